"""The application put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from .. import __version__
from ..client.asynchronous import AsyncClient
from ..errors import RerankqError, SettingsInvalid
from ..settings import Settings
from . import (
    batch_routes,
    deployment_routes,
    dialect_routes,
    discovery,
    failures,
    health,
    job_routes,
    metrics,
    openapi,
    pages,
)
from .admission import Admission
from .batch_runner import BatchRunner
from .batch_store import BatchStore
from .edge import Edge, is_loopback
from .file_store import FileStore
from .health import Health
from .keys import KnownKeys
from .metrics import CountRequests, Metrics
from .paths import PastedPaths
from .ranker import Ranker
from .rates import Rates
from .webhooks.delivering import Webhooks

# Headers of answers that a page of another origin may read, where it may call at all.
EXPOSED = [
    *(f"X-Rerankq-{name}" for name in ("Job", "Status", "Cached-Pairs", "Truncated", "Warning")),
    "Server-Timing",
    "Retry-After",
    "Location",
]


class Gateway(FastAPI):
    """The application inside its edge, which even the framework's own answers pass."""

    def build_middleware_stack(self) -> ASGIApp:
        """Put all layers together, the outermost first."""
        settings: Settings = self.state.settings
        open_to_all = not self.state.keys
        guarded = settings.allowed_hosts or (open_to_all and is_loopback(settings.host))
        served = super().build_middleware_stack()
        if settings.cors_origins:
            # Around everything: a page may read what is wrong with its request, whoever says so.
            served = CORSMiddleware(
                served,
                allow_origins=settings.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=EXPOSED,
            )
        return Edge(
            served,
            allowed_hosts=settings.allowed_hosts if guarded else None,
            same_origin=open_to_all,
            cors_origins=settings.cors_origins,
        )


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the gateway's application for the deployment that the settings name.

    Raises:
        SettingsInvalid: if they name none, or would open it to others than this machine without keys.
    """
    given = settings or Settings()
    keys = KnownKeys(given.api_keys)
    if not (keys or given.open_access or is_loopback(given.host)):
        raise SettingsInvalid(
            f"RERANKQ_HOST: {given.host} can be reached from elsewhere, and there are no API keys: set "
            "RERANKQ_API_KEYS (`rerankq key NAME` makes one), or RERANKQ_OPEN_ACCESS=true to let everybody in"
        )

    files, batches = FileStore(given.files), BatchStore(given.files)

    @asynccontextmanager
    async def working(rates: Rates) -> AsyncIterator[Webhooks]:
        """Deliver webhooks and run batches beside the calls."""
        webhooks = Webhooks(given)
        running = [
            asyncio.create_task(webhooks.run()),
            asyncio.create_task(BatchRunner(given, batches, files, rates=rates, keys=keys).run()),
        ]
        try:
            yield webhooks
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await webhooks.aclose()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with (
            AsyncClient(given) as client,
            aclosing(Rates(given.ledger)) as app.state.rates,
            working(app.state.rates) as app.state.webhooks,
        ):
            app.state.ranker = Ranker(client, timeout_s=given.request_timeout_s)
            app.state.health = Health(client)
            try:
                yield
            finally:
                await app.state.ranker.aclose()
                await app.state.health.aclose()

    app = Gateway(
        title="rerankq",
        version=__version__,
        summary="Rerank jobs over HTTP, in its own API and in the dialects of other servers.",
        lifespan=lifespan,
        # Not included as the others are, which would build each of them once more, for half of the time of a start.
        routes=dialect_routes.router().routes,
        redirect_slashes=False,
        max_body_size=3 * given.max_job_bytes,
        exception_handlers={
            RerankqError: failures.on_error,
            HTTPException: failures.on_http_exception,
            RequestValidationError: failures.on_invalid_request,
            ClientDisconnect: failures.on_hang_up,
            Exception: failures.on_unexpected,
        },
    )
    app.state.settings = given
    app.state.files, app.state.batches = files, batches
    app.state.keys = keys
    app.state.metrics = Metrics(
        known_tenants=lambda: keys.tenants,
        waiting=lambda: len(app.state.ranker.waiters),
    )
    # The last that is added comes first: who is let in depends on the path that is served, whatever was pasted.
    app.add_middleware(Admission, keys=keys, open_metrics=given.open_metrics, timeout_s=given.request_timeout_s)
    app.add_middleware(CountRequests, metrics=app.state.metrics, dialect_of=dialect_routes.dialect_of)
    app.add_middleware(PastedPaths)
    for routes in (
        discovery.routes,
        job_routes.routes,
        batch_routes.router(given.max_file_bytes),
        deployment_routes.routes,
        health.routes,
        metrics.routes,
        pages.routes,
    ):
        app.include_router(routes)
    app.openapi = openapi.described(app)  # type: ignore[method-assign]
    return app
