"""What holds for every request, whoever sends it: which host and origin it is for, and how fast its body comes.

And for every answer: JSON that says what is wrong, and the headers that keep browsers from doing more than they should.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import failures

logger = logging.getLogger("rerankq.gateway")

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
# The documentation's page loads its script from where its makers publish it.
_DOCS_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' "
    "https://cdn.jsdelivr.net https://fonts.googleapis.com; font-src https://fonts.gstatic.com; img-src 'self' data: "
    "https://fastapi.tiangolo.com https://cdn.redoc.ly; connect-src 'self'; worker-src blob:; frame-ancestors 'none'"
)
DOCS = ("/docs", "/redoc")
# A body may begin so many seconds late, and must then come as fast as this many bytes a second on average.
BODY_GRACE_S = 15.0
BODY_BYTES_PER_S = 10_000
# Seconds for which what comes of a body that was refused is read.
DISCARD_S = 5.0
# Headers by which a page of another origin may read an answer.
CORS = ("Access-Control-Allow-Origin", "Access-Control-Expose-Headers", "Vary")
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class BodyTooSlow(HTTPException):
    """Raised where a body is read that does not come."""

    def __init__(self) -> None:
        super().__init__(408, f"the body came slower than {BODY_BYTES_PER_S} bytes a second", {"Connection": "close"})


def hostname(header: str) -> str:
    """Read the name in a Host header.

    >>> hostname("Localhost:8080"), hostname("[::1]:8080"), hostname("example.com."), hostname("a b")
    ('localhost', '::1', 'example.com', '')
    """
    try:
        return (urlsplit(f"//{header}").hostname or "").rstrip(".") if header and " " not in header else ""
    except ValueError:
        return ""


def is_local_name(name: str) -> bool:
    """Whether no page from elsewhere can have this name: an address, ``localhost``, or a name without a dot.

    Or one below ``internal``, which nobody can register: ``host.docker.internal`` is what containers call this machine.
    A page can point a name of its own at the loopback (DNS rebinding), and call what listens there as its own host.

    >>> [is_local_name(name) for name in ("127.0.0.1", "::1", "app.localhost", "gateway", "example.com", "")]
    [True, True, True, True, False, False]
    >>> is_local_name("host.docker.internal"), is_local_name("host.docker.internal.example.com")
    (True, False)
    """
    if not name:
        return False
    if "." not in name.removesuffix(".localhost") or name.endswith(".internal"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_allowed_host(name: str, allowed: Collection[str]) -> bool:
    """Whether requests for a host are answered.

    >>> allowed = {"example.com", "*.example.org"}
    >>> [is_allowed_host(name, allowed) for name in ("localhost", "example.com", "a.example.org", "example.org")]
    [True, True, True, False]
    """
    patterns = {one.lower() for one in allowed}
    return (
        is_local_name(name)
        or name in patterns
        or any(one.startswith("*.") and name.endswith(one[1:]) for one in patterns)
    )


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server that listens on an address.

    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "10.0.0.1", "example.com")]
    [True, True, True, False, False, False, False]
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_unread(error: Exception) -> bool:
    """Whether an error says no more than that a caller went away while events were sent to it, as FastAPI raises it.

    >>> gone = ExceptionGroup("", [anyio.BrokenResourceError()])
    >>> is_unread(gone), is_unread(ExceptionGroup("", [gone, ValueError()])), is_unread(ValueError())
    (True, False, False)
    """
    return isinstance(error, ExceptionGroup) and error.split(anyio.BrokenResourceError)[1] is None


class Edge:
    """Wraps the whole application.

    Args:
        app: what it wraps.
        allowed_hosts: names under which it is reached; None: every one.
        same_origin: refuse what pages of other origins send: nothing else would, where no key is asked for.
        cors_origins: whose pages may nevertheless.
    """

    def __init__(
        self, app: ASGIApp, *, allowed_hosts: Collection[str] | None, same_origin: bool, cors_origins: Collection[str]
    ) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts
        self._same_origin = same_origin
        self._cors_origins = frozenset(cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive)
        answer = _Answer(scope, send, body)
        refused = self._refusal(scope)
        if refused is not None:
            await refused(scope, receive, answer.send)
            return
        try:
            await self._app(scope, body.receive, answer.send)
        except Exception as error:
            if not answer.begun:
                logger.exception("unexpected error")
                await failures.failure(500, "internal error", kind="InternalError")(scope, receive, answer.send)
            elif not answer.ended and not is_unread(error):
                raise

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # Programs that speak HTTP/1.0 may send none, as load balancers' checks do; browsers always do.
        foreign = "host" in headers and not is_allowed_host(hostname(host), self._allowed_hosts or ())
        if self._allowed_hosts is not None and foreign:
            said = f"not a host of this gateway: {host[:200]!r}; RERANKQ_ALLOWED_HOSTS names those that are"
            return failures.failure(421, said, kind="HostRefused", field="Host")
        origin = headers.get("origin")
        if (
            self._same_origin
            and origin is not None
            and scope["method"] not in SAFE
            and origin not in self._cors_origins
            and urlsplit_netloc(origin) != host.lower()
        ):
            said = f"pages of {origin[:200]!r} may not call this gateway; RERANKQ_CORS_ORIGINS names those that may"
            return failures.failure(403, said, kind="OriginRefused", field="Origin")
        encoding = headers.get("content-encoding", "identity").lower().strip()
        if encoding not in {"identity", ""}:
            # Unpacked, a small body may be of any size.
            said = f"send the body as it is, not compressed ({encoding[:50]!r})"
            return failures.failure(415, said, kind="EncodingRefused", field="Content-Encoding")
        return None


def urlsplit_netloc(origin: str) -> str:
    """Read host and port of an origin.

    >>> urlsplit_netloc("http://Localhost:8080"), urlsplit_netloc("null")
    ('localhost:8080', '')
    """
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


class _Body:
    """A request's body, which must come within a time that grows with what has come."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._began = time.monotonic()
        self._size = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            # The end of the connection: as long as it takes.
            return await self._receive()
        left_s = self._began + BODY_GRACE_S + self._size / BODY_BYTES_PER_S - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow from None
        self._size += len(message.get("body", b""))
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read what is still to come, for some seconds: a client that is sending would not see the answer, else."""
        with suppress(TimeoutError, BodyTooSlow):
            async with asyncio.timeout(DISCARD_S):
                while not self._complete:
                    await self.receive()


class _Answer:
    """An answer on its way out: gets the headers that it lacks."""

    def __init__(self, scope: Scope, send: Send, body: _Body) -> None:
        self._body = body
        self._path = scope["path"]
        self._scope = scope
        self._send = send
        self._replaced = False
        self.begun = False
        self.ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            if message["status"] == 413 and headers.get("content-type", "").startswith("text/plain"):
                # The framework's own refusal of a body that is too large.
                allowed = {name: headers[name] for name in CORS if name in headers}
                told = failures.failure(
                    413, "the body is too large", kind="BodyTooLarge", field="body", headers=allowed
                )
                await self._replace(told)
                return
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            if self._path.startswith(DOCS):
                headers["Content-Security-Policy"] = _DOCS_POLICY
            if message["status"] in {408, 413}:
                if message["status"] == 413:
                    await self._body.discard()
                headers["Connection"] = "close"
        if self._replaced:
            return
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def _replace(self, response: Response) -> None:
        async def nothing() -> Message:
            return {"type": "http.disconnect"}

        await response(self._scope, nothing, self.send)
        self._replaced = self.ended = True
