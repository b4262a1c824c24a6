"""The application put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from .. import __version__
from ..client.asynchronous import AsyncClient
from ..errors import RerankqError
from ..settings import Settings
from . import deployment_routes, dialect_routes, discovery, failures, job_routes, openapi, pages
from .paths import PastedPaths
from .ranker import Ranker
from .webhooks.delivering import Webhooks


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the gateway's application for the deployment that the settings name.

    Raises:
        SettingsInvalid: if they name none.
    """
    given = settings or Settings()

    @asynccontextmanager
    async def delivering() -> AsyncIterator[Webhooks]:
        webhooks = Webhooks(given)
        running = asyncio.create_task(webhooks.run())
        try:
            yield webhooks
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await webhooks.aclose()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncClient(given) as client, delivering() as app.state.webhooks:
            app.state.ranker = Ranker(client, timeout_s=given.request_timeout_s)
            try:
                yield
            finally:
                await app.state.ranker.aclose()

    app = FastAPI(
        title="rerankq",
        version=__version__,
        summary="Rerank jobs over HTTP, in its own API and in the dialects of other servers.",
        lifespan=lifespan,
        max_body_size=3 * given.max_job_bytes,
        exception_handlers={
            RerankqError: failures.on_error,
            HTTPException: failures.on_http_exception,
            RequestValidationError: failures.on_invalid_request,
            Exception: failures.on_unexpected,
        },
    )
    app.state.settings = given
    app.add_middleware(PastedPaths)
    app.include_router(dialect_routes.router())
    app.include_router(discovery.routes)
    app.include_router(job_routes.routes)
    app.include_router(deployment_routes.routes)
    app.include_router(pages.routes)
    app.openapi = openapi.described(app)  # type: ignore[method-assign]
    return app
