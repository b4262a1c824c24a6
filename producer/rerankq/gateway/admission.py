"""Who is let in: by key, within its rates, before a body is read."""

from __future__ import annotations

import re
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import JobRejected, NotAllowed, RerankqError
from . import failures
from .call_options import options_of
from .callers import Caller, caller_with, presented_key
from .keys import KnownKeys
from .rates import Rates

# What anybody may read: pages without data, whether the gateway is well, and whether it wants a key.
HEALTH = re.compile(r"(/[a-z0-9]+)?/(health(/(live|ready))?|healthz|readyz|ping)")
PAGES = re.compile(
    r"/|/v1/cluster/auth|/deployment|/docs(/oauth2-redirect)?|/redoc|/openapi\.json|/favicon\.ico|/playground(/[\w./-]*)?"
)
METRICS = "/metrics"
# Seconds between looks whether the file of keys has changed.
REFRESH_EVERY_S = 1.0
OPEN = Caller()


def is_public(method: str, path: str) -> bool:
    """Whether a request needs no key: it reads a page or a health check.

    >>> is_public("GET", "/health"), is_public("GET", "/tei/health"), is_public("GET", "/v1/jobs/health")
    (True, True, False)
    >>> is_public("GET", "/"), is_public("POST", "/"), is_public("GET", "/playground/page.js")
    (True, False, True)
    """
    return method in {"GET", "HEAD"} and bool(HEALTH.fullmatch(path) or PAGES.fullmatch(path))


class Admission:
    """Lets in whom it knows, in turn.

    Reading a page needs no key. With keys, everything else needs one that is known; requests are counted, and calls
    (POST) hold one of the key's places until they are answered.
    """

    def __init__(self, app: ASGIApp, *, keys: KnownKeys, open_metrics: bool, timeout_s: float) -> None:
        self._app = app
        self._keys = keys
        self._open_metrics = open_metrics
        self._timeout_s = timeout_s
        self._refreshed_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            caller = self._caller_of(scope)
        except NotAllowed as error:
            await failures.of_error(error)(scope, receive, send)
            return
        if caller is None:
            await failures.no_key(presented=bool(presented_key(Headers(scope=scope))))(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        if caller.key is None:
            await self._app(scope, receive, send)
            return
        rates: Rates = scope["app"].state.rates
        try:
            await rates.spend_request(caller.key)
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            async with rates.place(caller.key, within_s=self._patience_s(scope)):
                await self._app(scope, receive, send)
        except RerankqError as error:
            # Of the rates: the application answers its own.
            await failures.of_error(error)(scope, receive, send)

    def _caller_of(self, scope: Scope) -> Caller | None:
        """Say who sends a request; None if it needs a key and has none that is known.

        Raises:
            NotAllowed: if its key is not enough.
        """
        path = scope["path"]
        if not self._keys or is_public(scope["method"], path) or (path == METRICS and self._open_metrics):
            return OPEN
        self._refresh()
        presented = presented_key(Headers(scope=scope))
        key = self._keys.find(presented) if presented else None
        if key is None:
            return None
        if path == METRICS and not key.operator:
            raise NotAllowed("metrics are of all tenants: they need the key of an operator")
        return caller_with(key)

    def _refresh(self) -> None:
        if time.monotonic() - self._refreshed_at > REFRESH_EVERY_S:
            self._refreshed_at = time.monotonic()
            self._keys.refresh()

    def _patience_s(self, scope: Scope) -> float:
        """How long a call may wait for its place; what is left of that it has for its ranking."""
        try:
            return options_of(Headers(scope=scope)).timeout_s or self._timeout_s
        except JobRejected:
            return self._timeout_s  # answered by the application, which names the header
