"""Metrics for Prometheus: what this gateway answered, and, read when they are asked for, the deployment's queues."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..client.asynchronous import AsyncClient
from ..errors import RerankqError
from ..ledger import WorkerInfo
from ..ledger.calls import Load
from .admission import HEALTH, METRICS
from .rerank_call import RerankReply

#: The format of the exposition.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("dialect", "model", "tenant", "outcome")
# What is not told apart any more. Labels come from callers in part, and every new one takes memory for ever.
OTHER = "other"
MOST_MODELS, MOST_TENANTS, MOST_SERIES = 50, 200, 2_000
# Seconds: from an answer out of the score cache to a long document on a CPU.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_OUTCOMES = {
    400: "invalid", 401: "unauthorized", 403: "forbidden", 404: "not-found", 408: "too-slow", 413: "too-large",
    422: "invalid", 429: "refused", 499: "caller-gone", 503: "unavailable", 504: "timed-out",
}  # fmt: skip


@dataclass(slots=True)
class CallRecord:
    """What metrics say of a request, noted on its way."""

    dialect: str = ""
    model: str = ""
    tenant: str = ""
    reply: RerankReply | None = None
    #: By the monotonic clock: the caller's time runs from here, whatever it waits for.
    began: float = field(default_factory=time.monotonic)


def record_of(request: Request) -> CallRecord:
    """Find a request's record."""
    record: CallRecord = request.scope.setdefault("state", {}).setdefault("record", CallRecord())
    return record


def outcome_of(status: int, *, degraded: bool = False) -> str:
    """Name how a request ended.

    >>> outcome_of(200), outcome_of(200, degraded=True), outcome_of(429), outcome_of(418), outcome_of(502)
    ('answered', 'degraded', 'refused', 'invalid', 'failed')
    """
    if status < 400:
        return "degraded" if degraded else "answered"
    return _OUTCOMES.get(status, "invalid" if status < 500 else "failed")


class Bounded:
    """Keeps a label within a number of values: the first so many, and those that are known beforehand.

    >>> tenants = Bounded(1, known=lambda: {"ours"})
    >>> [tenants(name) for name in ("a", "b", "a", "ours", "")]
    ['a', 'other', 'a', 'ours', '']
    """

    def __init__(self, most: int, *, known: Callable[[], Collection[str]] = tuple) -> None:
        self._most = most
        self._known = known
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        """Answer the value, or what stands for all that are not told apart."""
        if not value or value in self._seen or value in self._known():
            return value
        if len(self._seen) >= self._most:
            return OTHER
        self._seen.add(value)
        return value


class Metrics:
    """The metrics of one gateway.

    Args:
        known_tenants: tenants that are always told apart.
        waiting: counts the calls that wait for a ranking in this gateway.
    """

    def __init__(self, *, known_tenants: Callable[[], Collection[str]], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._tenant = Bounded(MOST_TENANTS, known=known_tenants)
        self._model = Bounded(MOST_MODELS)
        self._series: set[tuple[str, ...]] = set()
        self._deployment = _Deployment(waiting)
        self.registry.register(self._deployment)
        self._requests = Histogram(
            "rerankq_gateway_request_seconds",
            "Seconds from a request to its whole answer, by how it ended.",
            LABELS,
            buckets=BUCKETS,
            registry=self.registry,
        )
        told = ("dialect", "model", "tenant")
        self._totals = {
            name: Total(f"rerankq_gateway_{name}", said, told, registry=self.registry)
            for name, said in (
                ("pairs", "Pairs of a query and a document that were answered."),
                ("cached_pairs", "Pairs whose score was known."),
                ("truncated_pairs", "Pairs whose document was cut."),
                ("tokens", "Tokens computed for calls."),
                ("degraded", "Calls answered with their first stage because their time was over."),
            )
        }

    def observe(self, record: CallRecord, *, tenant: str, status: int, seconds: float) -> None:
        """Count a request."""
        reply = record.reply
        model = self._model(reply.model if reply is not None else record.model)
        who = self._bounded(record.dialect, model, self._tenant(tenant))
        outcome = outcome_of(status, degraded=reply is not None and reply.degraded)
        self._requests.labels(*who, outcome).observe(seconds)
        if reply is not None and status < 400:
            for name, count in (
                ("pairs", reply.pairs),
                ("cached_pairs", reply.cached_pairs),
                ("truncated_pairs", reply.truncated_pairs),
                ("tokens", reply.tokens),
                ("degraded", int(reply.degraded)),
            ):
                self._totals[name].labels(*who).inc(count)

    def _bounded(self, *labels: str) -> tuple[str, ...]:
        """Keep combinations within a number, too: what is beyond is not told apart by model and tenant."""
        if labels not in self._series:
            if len(self._series) >= MOST_SERIES:
                return (labels[0], OTHER, OTHER)
            self._series.add(labels)
        return labels

    def exposition(self, load: Load | None, workers: Iterable[WorkerInfo]) -> bytes:
        """Write all metrics; *load* None: the ledger did not answer, which is told, too."""
        self._deployment.load, self._deployment.workers = load, tuple(workers)
        return generate_latest(self.registry)


routes = APIRouter(tags=["health"])
# Seconds that the ledger may take; the gateway's own metrics are told without it.
ANSWER_WITHIN_S = 2.0


@routes.get(METRICS, response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus: what this gateway answered, and the deployment's queues."""
    client: AsyncClient = request.app.state.ranker.client
    load, workers = None, list[WorkerInfo]()
    with suppress(RerankqError, TimeoutError):
        async with asyncio.timeout(ANSWER_WITHIN_S):
            workers = await client.workers()
            load = await client.load()
    kept: Metrics = request.app.state.metrics
    return Response(kept.exposition(load, workers), headers={"Content-Type": CONTENT_TYPE})


class _Deployment(Collector):
    """What is read from the ledger."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.load: Load | None = None
        self.workers: tuple[WorkerInfo, ...] = ()
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        """Give the gauges."""
        yield _gauge("gateway_waiting_calls", "Calls that wait for a ranking in this gateway.", self._waiting())
        load = self.load
        yield _gauge("ledger_up", "Whether the ledger answered.", int(load is not None))
        if load is None:
            return
        for name, said, figure in (
            ("waiting_jobs", "Jobs that wait.", "jobs"),
            ("waiting_pairs", "Pairs of jobs that wait.", "pairs"),
            ("oldest_waiting_seconds", "For how long the oldest job has waited.", "oldest_s"),
        ):
            family = GaugeMetricFamily(f"rerankq_{name}", said, labels=["queue"])
            for queue in load.queues:
                family.add_metric([queue.name], getattr(queue, figure) or 0.0)
            yield family
        yield _gauge("running_jobs", "Jobs that workers hold.", load.running)
        yield _gauge("dead_jobs", "Jobs that crashed their workers and were set aside.", load.dead)
        count, pace = defaultdict[str, float](float), defaultdict[str, float](float)
        for worker in self.workers:
            count[worker.model] += 1
            pace[worker.model] += worker.pairs_per_s
        for name, said, of in (
            ("workers", "Workers that give signs of life.", count),
            ("workers_pairs_per_second", "Pairs that they compute in a second of work.", pace),
        ):
            family = GaugeMetricFamily(f"rerankq_{name}", said, labels=["model"])
            for model, value in of.items():
                family.add_metric([model], value)
            yield family


def _gauge(name: str, said: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"rerankq_{name}", said, value=value)


class CountRequests:
    """Counts every request but health checks and metrics."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, dialect_of: Callable[[str], str]) -> None:
        self._app = app
        self._metrics = metrics
        self._dialect_of = dialect_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or HEALTH.fullmatch(scope["path"]) or scope["path"] == METRICS:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        record = state["record"] = CallRecord(dialect=self._dialect_of(scope["path"]))
        status = 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            caller = state.get("caller")
            tenant = record.tenant or (caller.tenant if caller is not None else "") or ""
            self._metrics.observe(record, tenant=tenant, status=status, seconds=time.monotonic() - record.began)
