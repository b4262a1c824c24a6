"""Serving the gateway's application: one process, one event loop."""

from __future__ import annotations

import uvicorn

from ..settings import Settings
from .app import create_app

# Seconds for which a gateway that is told to stop lets callers wait; their jobs are cancelled then.
STOP_WITHIN_S = 8
# Connections that wait to be accepted.
BACKLOG = 4096


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    uvicorn.run(
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
