"""Who calls: checked before a body is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from starlette.requests import Request

from ..contract import Priority
from .rerank_call import CallOptions


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. ``tenant`` replaces the call's own, unless None; ``ceiling``: the most urgent priority it may have."""

    name: str = ""
    tenant: str | None = None
    ceiling: Priority = "interactive"

    def allowed(self, options: CallOptions) -> CallOptions:
        """Keep what a call asks within what its caller may."""
        if self.ceiling == "bulk":
            options = replace(options, priority="bulk")
        return options if self.tenant is None else replace(options, tenant=self.tenant)


async def caller_of(_: Request) -> Caller:
    """Say who sends a request."""
    return Caller()
