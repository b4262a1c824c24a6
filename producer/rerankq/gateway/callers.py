"""Who calls: found by the key that a request presents, before its body is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from starlette.requests import Request

from ..contract import Priority
from ..errors import NotAllowed
from .keys import ApiKey
from .rerank_call import CallOptions

# Where clients put a key: most know the first only.
KEY_HEADERS = ("authorization", "x-api-key", "api-key")
SCHEMES = frozenset({"bearer", "token", "apikey", "api-key"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. ``tenant`` is that of all its jobs; None: each names its own, and all can be seen.

    ``ceiling``: the most urgent priority of its jobs. ``key``: None where the gateway asks for none.
    """

    name: str = ""
    tenant: str | None = None
    ceiling: Priority = "interactive"
    operator: bool = False
    key: ApiKey | None = None

    def allowed(self, options: CallOptions) -> CallOptions:
        """Keep what a call asks within what its caller may.

        Raises:
            NotAllowed: if it names another tenant than its caller's.
        """
        if self.ceiling == "bulk":
            options = replace(options, priority="bulk")
        return replace(options, tenant=self.tenant_of(options.tenant))

    def tenant_of(self, named: str) -> str:
        """Answer the tenant of a job that names one, or none.

        Raises:
            NotAllowed: if it is another one than its caller's.
        """
        if self.tenant is None:
            return named
        if named not in {"", self.tenant}:
            raise NotAllowed(f"this key is for the tenant {self.tenant!r}, not for {named[:200]!r}")
        return self.tenant

    def may_see(self, tenant: str) -> bool:
        """Whether what belongs to a tenant is this caller's to read, follow and cancel."""
        return self.tenant is None or self.tenant == tenant


def caller_with(key: ApiKey) -> Caller:
    """Say who calls with a key."""
    return Caller(key.name, key.own_tenant, key.priority, key.operator, key)


def presented_key(headers: Mapping[str, str]) -> str:
    """Read the key that a request presents; empty if there is none. The scheme may be left out.

    Another scheme is for somebody else: a proxy's own users, for example.

    >>> presented_key({"authorization": "bearer  k"}), presented_key({"authorization": "k"})
    ('k', 'k')
    >>> presented_key({"authorization": "Bearer ", "x-api-key": "k"}), presented_key({"authorization": "Bearer"})
    ('k', '')
    >>> presented_key({"authorization": "Basic dTpw", "x-api-key": "k"}), presented_key({"authorization": "Basic dTpw"})
    ('k', '')
    """
    for name in KEY_HEADERS:
        value = (headers.get(name) or "").strip()
        if name == "authorization":
            scheme, _, rest = value.partition(" ")
            if scheme.lower() in SCHEMES:
                value = rest.strip()
            elif rest:  # a key has no blank in it
                value = ""
        if value:
            return value
    return ""


async def caller_of(request: Request) -> Caller:
    """Say who sends a request: whom its admission found."""
    caller: Caller = request.state.caller
    return caller
