"""Whether the gateway lives, and whether a call would be ranked now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse

from .. import urls
from ..broker import reach
from ..client.asynchronous import AsyncClient
from ..client.routing import queue_name
from ..connections import ledger_async
from ..errors import RerankqError
from ..ledger import WorkerInfo, translated
from ..ledger.calls import WaitingQueue
from ..ledger.lease_policy import ALIVE_LEAST_S, PATIENCE_S

# Seconds for each part to answer in, and for which an answer is given again.
ANSWER_WITHIN_S = 2.0
BELIEVED_S = 1.0
OK = "ok"
NO_ANSWER = "does not answer"
QUEUES = (queue_name("interactive", ""), queue_name("bulk", ""))


def worker_fault(workers: Sequence[WorkerInfo], queues: Sequence[WaitingQueue], *, alive_s: float) -> str:
    """Say why no worker would rank a job of the default model now; empty if one would.

    A worker has to have given a sign of life lately, which one whose device hangs does not. While jobs wait, one of
    them must have made progress, too: a worker may live and receive nothing.

    >>> worker = WorkerInfo("w", "m", (), "f", ("rerankq.interactive",), 1.0, 50.0, last_progress_s=90.0)
    >>> worker_fault([worker], (), alive_s=10)
    ''
    >>> worker_fault([worker], [WaitingQueue("rerankq.interactive", 1, 5, 1, oldest_s=80.0)], alive_s=10)
    'no worker has made progress for 91 s, and jobs wait'
    >>> worker_fault([worker._replace(age_s=11.0)], (), alive_s=10), worker_fault([], (), alive_s=10)
    ('no sign of life of a worker for 11 s', 'no worker serves the default model')
    """
    serving = [worker for worker in workers if worker.queues and not worker.suffix]
    if not serving:
        return "no worker serves the default model"
    live = [worker for worker in serving if worker.age_s <= alive_s]
    if not live:
        return f"no sign of life of a worker for {min(worker.age_s for worker in serving):.0f} s"
    if all(worker.trouble for worker in live):
        # What it is may name the other server.
        return "the workers get no scores at present"
    waited_s = max((queue.oldest_s or 0.0 for queue in queues if queue.name in QUEUES), default=0.0)
    idle_s = min(worker.age_s + (worker.last_progress_s or 0.0) for worker in live)
    if min(waited_s, idle_s) > PATIENCE_S:
        return f"no worker has made progress for {idle_s:.0f} s, and jobs wait"
    return ""


class Health:
    """Asks each part whether it answers; at most once a second, whoever asks."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        broker = client.settings.broker
        self._redis = None if urls.parts_of(broker).scheme in urls.AMQP else ledger_async(broker)
        self._probe: asyncio.Task[None] | None = None
        self._asking = asyncio.Lock()
        self._asked_at = float("-inf")
        self._parts: dict[str, str] = {}

    async def parts(self) -> dict[str, str]:
        """Say of each part that it is ``ok``, or what is wrong with it; nothing that strangers may not know."""
        async with self._asking:
            if time.monotonic() - self._asked_at > BELIEVED_S:
                (worker, ledger), (_, broker) = await asyncio.gather(
                    _answer_of(self._worker()), _answer_of(self._broker())
                )
                self._parts = {"broker": broker, "ledger": ledger, "worker": worker if ledger == OK else "not known"}
                self._asked_at = time.monotonic()
        return self._parts

    async def _worker(self) -> str:
        workers = await self._client.registered_workers()
        load = await self._client.load()
        # Shorter than for routing: whoever asks here can go elsewhere.
        alive_s = min(ALIVE_LEAST_S, self._client.limits.lease_policy.alive_for_s)
        return worker_fault(workers, load.queues, alive_s=alive_s) or OK

    async def _broker(self) -> str:
        if self._redis is not None:
            with translated():
                await self._redis.ping()
            return OK
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(asyncio.to_thread(reach, self._client.settings))
        await asyncio.shield(self._probe)
        return OK

    async def aclose(self) -> None:
        """Close the connection to the broker."""
        if self._redis is not None:
            with suppress(Exception):
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    await self._redis.aclose()


async def _answer_of(asked: Awaitable[str]) -> tuple[str, str]:
    """Answer what a part says, and whether it answered."""
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            return await asked, OK
    except (RerankqError, TimeoutError):
        return NO_ANSWER, NO_ANSWER
    except Exception:  # noqa: BLE001 - whatever the broker's library raises
        return NO_ANSWER, NO_ANSWER


class HealthReport(BaseModel):
    """What a health check answers."""

    status: str
    parts: dict[str, str] | None = None
    unix: float


routes = APIRouter(tags=["health"])
LIVE, READY = "/health/live", "/health/ready"


async def live() -> JSONResponse:
    """Whether the gateway's process answers: restart it if not."""
    return JSONResponse({"status": "live", "unix": time.time()})


async def ready(request: Request) -> JSONResponse:
    """Whether a call would be ranked now: broker and ledger answer, and a worker has proved progress. 503 if not."""
    health: Health = request.app.state.health
    parts = await health.parts()
    well = all(said == OK for said in parts.values())
    report = {"status": "ready" if well else "not ready", "parts": parts, "unix": time.time()}
    return JSONResponse(report, 200 if well else 503, None if well else {"Retry-After": "1"})


# As other servers name them: TEI, vLLM and infinity; LocalAI; SageMaker; NIM. One of them is enough in the document.
for path in ("/health/live", "/healthz", "/v1/health/live"):
    routes.add_api_route(path, live, methods=["GET"], response_model=HealthReport, include_in_schema=path == LIVE)
    routes.add_api_route(path, live, methods=["HEAD"], include_in_schema=False)
for path in ("/health/ready", "/health", "/ping", "/readyz", "/v1/health/ready"):
    routes.add_api_route(
        path,
        ready,
        methods=["GET"],
        response_model=HealthReport,
        responses={503: {"model": HealthReport}},
        include_in_schema=path == READY,
    )
    routes.add_api_route(path, ready, methods=["HEAD"], include_in_schema=False)
