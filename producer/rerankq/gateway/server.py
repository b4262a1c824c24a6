"""Serving the gateway's application: one process, one event loop."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from ..settings import Settings
from .app import create_app

# Seconds for which a gateway that is told to stop lets callers wait, and after which connections are cut.
ANSWER_WITHIN_S = 5
STOP_WITHIN_S = 8
# Connections that wait to be accepted.
BACKLOG = 4096


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        backlog=BACKLOG,
        timeout_graceful_shutdown=STOP_WITHIN_S,
        # Requests are counted, not logged: their bodies and paths are their callers' own.
        access_log=False,
        server_header=False,
    )
    Server(config).run()


class Server(uvicorn.Server):
    """A server that, told to stop, answers who still waits after some seconds instead of cutting them off."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: no new connections, and those that wait have ``ANSWER_WITHIN_S``."""
        closing: asyncio.Event = self.config.app.state.ranker.closing  # type: ignore[union-attr]
        asyncio.get_running_loop().call_later(ANSWER_WITHIN_S, closing.set)
        await super().shutdown(sockets)
