"""A worker that is not started, and jobs for it: what the tests of its three modules share."""

from types import SimpleNamespace
from typing import Any

from rerankq import RerankJob
from rerankq.client.routing import Route
from rerankq.client.submission import prepare
from rerankq.ledger import calls

WAIT_S = 20  # a test that hangs ends here; none that works waits so long
QUEUES = ("rerankq.interactive", "rerankq.bulk")


def submit(worker: Any, name: str = "a", chunks: tuple[str, ...] = ("one", "two"), **fields: Any) -> str:
    job = RerankJob(id=name, query="q", chunks=list(chunks), fusion="model", **fields)
    route = Route(job.model or worker.model, (), "")
    worker.ledger.ask(calls.submit(prepare(job, route, worker.settings), worker.limits))
    return name


def snapshot(worker: Any, name: str = "a") -> Any:
    return worker.ledger.ask(calls.snapshot(name, worker.limits, with_ranking=True))


def fence(worker: Any, name: str = "a") -> int:
    return int(worker.ledger.redis.hget(f"rerankq:job:{name}", "fence"))


def state(worker: Any, name: str = "a") -> str:
    return snapshot(worker, name).status.state


def request(name: str, queue: str = QUEUES[0]) -> SimpleNamespace:
    """What Celery's signals say of a message."""
    return SimpleNamespace(id=name, delivery_info={"routing_key": queue})
