"""Real workers on a real Redis, for tests of the whole way of a job."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import redis
from worker_processes import RunningWorker, wait_for_workers

from rerankq import Client, RerankJob
from rerankq.settings import Settings

# Programs, not tests: the search for doctests would import them, and importing one is starting a worker.
collect_ignore = ["hanging.py", "killable.py", "poisonable.py", "renewed.py"]


@pytest.fixture
def start_worker(redis_url: str) -> Iterator[Callable[..., RunningWorker]]:
    """Start workers; those that still run when the test is over are stopped."""
    running: list[RunningWorker] = []

    def start(app: str = "rerankq_worker.tasks", url: str = redis_url, *, ready=True, debug=False, **env: str):
        worker = RunningWorker(url, app, debug=debug, **env)
        running.append(worker)
        if ready:
            wait_for_workers(url, worker)
        return worker

    yield start
    for worker in running:
        worker.stop()


@pytest.fixture(scope="session")
def worker_process() -> Callable[..., RunningWorker]:
    """Start a worker for longer than a test; who asks for it stops it."""

    def start(url: str, app: str = "rerankq_worker.tasks", **env: str) -> RunningWorker:
        worker = RunningWorker(url, app, **env)
        wait_for_workers(url, worker)
        return worker

    return start


@pytest.fixture(scope="session")
def bundled_url(deployment: Settings) -> str:
    """Give the URL of a Redis with a worker behind it that ranks with the bundled model."""
    return deployment.broker_url


@pytest.fixture
def settings(redis_url: str) -> Settings:
    return Settings(broker_url=redis_url, lease_s=2)


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with ExitStack() as stack:
        yield stack.enter_context(Client(settings))


@pytest.fixture
def ask(client: Client, settings: Settings) -> Callable[[RerankJob], tuple[str, float]]:
    """Submit a job; answers its id and, by the ledger's clock, when its doorbell had been sent."""

    def submit_and_send(job: RerankJob) -> tuple[str, float]:
        job_id = client.submit(job)
        assert client._inner._doorbells.flush(30)
        with redis.Redis.from_url(settings.ledger) as ledger:
            seconds, microseconds = ledger.time()
        return job_id, seconds + microseconds / 1e6

    return submit_and_send
