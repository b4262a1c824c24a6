"""A worker killed at any stage of a job: another answers it, computes no stored score again, blames no neighbour."""

import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import redis

from rerankq import Client, Ranking, RerankJob
from rerankq.local.embedded import EmbeddedRedis
from rerankq.settings import Settings
from rerankq_worker.engine import load

CHUNKS = 20
NEIGHBOURS = 8


class Outcome(NamedTuple):
    """What a job costs that kills its worker at some stage: how often it is claimed, and which pairs were kept."""

    attempts: int
    cached_pairs: int


STAGES = {
    "received": Outcome(attempts=1, cached_pairs=0),
    "waiting": Outcome(attempts=2, cached_pairs=0),
    "tokenising": Outcome(attempts=2, cached_pairs=0),
    "batched": Outcome(attempts=2, cached_pairs=0),
    "scoring": Outcome(attempts=2, cached_pairs=0),
    "unstored": Outcome(attempts=2, cached_pairs=0),
    "stored": Outcome(attempts=2, cached_pairs=CHUNKS),
    "completed": Outcome(attempts=1, cached_pairs=0),
}


class Deployment:
    """Two workers, of which one is killed at a time, and a supervisor that starts it again."""

    def __init__(self, start: Callable, url: str, marks: str) -> None:
        env = {"RERANKQ_LEASE_S": "1", "RERANKQ_MODEL": "stub:1e-5", "KILLED_MARKS": marks}
        self.workers = [start(url, "killable", **env) for _ in range(2)]
        settings = Settings(broker_url=url, lease_s=1)
        self.client = Client(settings)
        self.ledger = redis.Redis.from_url(settings.ledger)

    def restart(self) -> list[int]:
        """Start the workers again that ended, and say with which statuses they did."""
        ended = [worker for worker in self.workers if worker.process.poll() is not None]
        statuses = [worker.process.returncode for worker in ended]
        for worker in ended:
            worker.start()
        return statuses


@pytest.fixture(scope="module")
def deployment(worker_process: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with EmbeddedRedis() as server:
        deployed = Deployment(worker_process, server.url, str(tmp_path_factory.mktemp("marks")))
        with deployed.client, deployed.ledger:
            yield deployed
        for worker in deployed.workers:
            worker.kill()
            worker.stop()


def job(name: str) -> RerankJob:
    chunks = [f"{name} says {at} " + "word " * (at % 7) for at in range(CHUNKS)]
    return RerankJob(id=name, query=name, chunks=chunks, fusion="model")


def alone(wanted: RerankJob) -> list[tuple[int, float | None]]:
    """A job's ranking when nothing else runs: the stub engine, called directly."""
    logits = load("stub").score([(wanted.query, chunk.model_text) for chunk in wanted.chunks])
    return [(at, float(logits[at])) for at in sorted(range(len(logits)), key=lambda at: -logits[at])]


def order_of(ranking: Ranking) -> list[tuple[int, float | None]]:
    return [(chunk.index, chunk.model_logit) for chunk in ranking.chunks]


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_whose_worker_is_killed_is_answered_by_another(deployment: Deployment, stage: str, wait_until: Callable):
    client, killing = deployment.client, f"killed-{stage}"
    beside = [job(f"beside-{stage}-{at}") for at in range(NEIGHBOURS)]
    wanted = [*beside[: NEIGHBOURS // 2], job(killing), *beside[NEIGHBOURS // 2 :]]
    got = dict(client.as_completed(client.submit_many(wanted), timeout=60))
    # Not at once: one that was killed after its job was done may outlive the answer for a moment.
    wait_until(lambda: any(worker.process.poll() is not None for worker in deployment.workers))
    assert {name: order_of(answer) for name, answer in got.items()} == {one.id: alone(one) for one in wanted}
    assert deployment.restart() == [-signal.SIGKILL], "one worker died, once"
    assert Outcome(client.status(killing).attempts, got[killing].usage.cached_pairs) == STAGES[stage]
    assert all(client.status(one.id).attempts <= 2 for one in beside)
    assert {deployment.ledger.hget(f"rerankq:job:{one.id}", "deaths") for one in wanted} == {b"0"}, "none is blamed"
