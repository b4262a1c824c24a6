"""Serving the gateway's application: one process, one event loop."""

from __future__ import annotations

import asyncio
import gc
import re
import resource
import socket
import sys
from contextlib import suppress

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ..settings import Settings
from . import failures
from .app import create_app
from .edge import SECURITY_HEADERS

# Seconds for which a gateway that is told to stop lets callers wait, and after which connections are cut.
ANSWER_WITHIN_S = 5
STOP_WITHIN_S = 8
# Connections that wait to be accepted.
BACKLOG = 4096


# Seconds in which the headers of a request have to come, the first and each further one of a connection; and their
# bytes at most. uvicorn has no limit for either.
HEADERS_WITHIN_S = 20.0
# Seconds for which a connection is kept for a next request: longer than clients and proxies keep theirs (httpx 5,
# nginx 60), as one that is closed at the moment at which it is used again costs a call.
KEEP_ALIVE_S = 75
MOST_HEADER_BYTES = 65_536


_UPGRADE = re.compile(rb"^upgrade(?=[ \t]*:)", re.IGNORECASE | re.MULTILINE)


def without_upgrade(data: bytes) -> bytes:
    r"""Hide an offer to change the protocol in headers from the parser, which would take the body for what follows it.

    Java's client offers HTTP/2 with every request. Nothing here speaks another protocol, so the offer is ignored.

    >>> without_upgrade(b"POST / HTTP/1.1\r\nUpgrade: h2c\r\n\r\nUpgrade: no header")
    b'POST / HTTP/1.1\r\nX-Upgrade: h2c\r\n\r\nUpgrade: no header'
    """
    headers, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"X-Upgrade", headers) + end + rest


class BoundedHeaders(HttpToolsProtocol):
    """Closes connections whose headers do not come, or do not end."""

    headers_within_s = HEADERS_WITHIN_S
    keep_alive_s = KEEP_ALIVE_S
    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._expect_headers(self.headers_within_s)

    def data_received(self, data: bytes) -> None:
        """Read what came."""
        reading_headers = self._deadline is not None
        super().data_received(without_upgrade(data) if reading_headers else data)
        if reading_headers and self._deadline is not None:
            if not self._header_bytes:
                # The first of a further request: its time begins.
                self._expect_headers(self.headers_within_s)
            self._header_bytes += len(data)
            if self._header_bytes > MOST_HEADER_BYTES and not self.transport.is_closing():
                self._refuse(431, f"more than {MOST_HEADER_BYTES} bytes of headers")

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the form of all errors."""
        self._refuse(400, msg)

    def _refuse(self, status: int, said: str) -> None:
        told = failures.failure(status, said, kind="RequestInvalid")
        headers = {**told.headers, **SECURITY_HEADERS, "Connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[status] + lines.encode() + b"\r\n" + bytes(told.body))
        self.transport.close()

    def on_headers_complete(self) -> None:
        """Begin to serve a request."""
        self._stop_waiting()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, if there is none yet."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._expect_headers(self.keep_alive_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_headers(self, seconds: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(seconds, self._give_up)

    def _stop_waiting(self) -> None:
        self._header_bytes = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def config_of(settings: Settings) -> uvicorn.Config:
    """Write uvicorn's options.

    Raises:
        SettingsInvalid: as ``create_app`` does.
    """
    return uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        http=BoundedHeaders,
        # No route speaks it.
        ws="none",
        log_level="warning",
        backlog=BACKLOG,
        timeout_graceful_shutdown=STOP_WITHIN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
        # Requests are counted, not logged: their bodies and paths are their callers' own.
        access_log=False,
        server_header=False,
    )


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    config = config_of(settings)
    # A file for every caller that waits: as many as the system allows.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    server = Server(config)
    # Modules and routes live as long as this process: no garbage collection looks through them while calls wait.
    gc.collect()
    gc.freeze()
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(1)  # uvicorn has said why


class Server(uvicorn.Server):
    """A server that, told to stop, answers who still waits after some seconds instead of cutting them off."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: no new connections, and those that wait have ``ANSWER_WITHIN_S``."""
        closing: asyncio.Event = self.config.app.state.ranker.closing  # type: ignore[union-attr]
        asyncio.get_running_loop().call_later(ANSWER_WITHIN_S, closing.set)
        await super().shutdown(sockets)
