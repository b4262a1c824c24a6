"""Cancelling, by the client or through Celery: a running job stops before its next micro-batch, and no other does."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from rerankq import Client, JobCancelled, Ranking, RerankJob
from rerankq.broker.celery_app import make_app
from rerankq.settings import Settings
from rerankq_worker.engine import load

# Micro-batches of a few pairs, each a tenth of a second or so: a job of 150 pairs is seen amid its work.
SLOW = {"RERANKQ_MODEL": "stub:1e-3", "RERANKQ_MAX_BATCH_TOKENS": "100", "RERANKQ_CONCURRENCY": "4"}


def job(name: str, *, chunks: int = 150, **fields: Any) -> RerankJob:
    return RerankJob(
        id=name, query="q", chunks=[f"chunk number {at} of some" for at in range(chunks)], fusion="model", **fields
    )


def logits(ranking: Ranking) -> list[float | None]:
    return [chunk.model_logit for chunk in sorted(ranking.chunks, key=lambda chunk: chunk.index)]


def alone(one: RerankJob) -> list[float]:
    return load("stub").score([(one.query, chunk.model_text) for chunk in one.chunks]).tolist()


@pytest.fixture
def celery(settings: Settings) -> Iterator[Any]:
    app = make_app(settings)
    yield app
    app.close()


def engine_of(celery: Any) -> dict[str, Any]:
    """What the one worker's engine has done."""
    for _ in range(60):  # a worker receives no control command before it is connected to the broker
        answers = celery.control.inspect(timeout=1, limit=1).stats()
        if answers:
            return next(iter(answers.values()))["engine"]
    pytest.fail("the worker did not answer")


def test_a_cancelled_job_stops_before_its_next_micro_batch(
    client: Client, start_worker: Callable, wait_until: Callable, celery: Any
):
    start_worker(**SLOW)
    one = client.submit(job("a"))
    wait_until(lambda: client.status(one).state == "running")
    assert client.cancel(one) == "cancelled"
    with pytest.raises(JobCancelled):
        client.result(one, timeout=10)
    wait_until(lambda: engine_of(celery)["waiting_pairs"] == 0)
    computed = engine_of(celery)["pairs"]
    assert computed < 150
    client.rerank("another", ["x"], timeout=20)
    assert engine_of(celery)["pairs"] <= computed + 20, "nothing of the cancelled job ran on"


def test_pairs_shared_with_another_job_still_come(client: Client, start_worker: Callable, wait_until: Callable):
    start_worker(**SLOW)
    owner, other = client.submit(job("owner")), client.submit(job("other"))
    wait_until(lambda: client.status(owner).state == client.status(other).state == "running")
    client.cancel(owner)
    assert logits(client.result(other, timeout=60)) == alone(job("other"))
    assert client.status(owner).state == "cancelled"


def test_a_cancelled_job_can_be_submitted_again(client: Client, start_worker: Callable, wait_until: Callable):
    start_worker(**SLOW)
    one = client.submit(job("a", chunks=60))
    wait_until(lambda: client.status(one).state == "running")
    client.cancel(one)
    assert client.submit(job("a", chunks=60)) == one
    assert logits(client.result(one, timeout=60)) == alone(job("a", chunks=60))


def test_revoking_through_celery_is_cancelling_and_costs_no_slot(
    client: Client, start_worker: Callable, wait_until: Callable, celery: Any
):
    # Two slots for bulk: one lost for each revoked job would be the end of it.
    start_worker(**SLOW)
    ids = client.submit_many([job(f"bulk-{number}", priority="bulk") for number in range(8)])
    wait_until(lambda: sum(client.status(one).state == "running" for one in ids) == 2)
    running = [one for one in ids if client.status(one).state == "running"]
    for one in ids:
        celery.control.revoke(one, terminate=one in running)
    ended = dict(client.as_completed(ids, timeout=30))
    assert {type(error) for error in ended.values()} == {JobCancelled}
    again = [client.submit(job(f"bulk-{number}", chunks=3, priority="bulk", tenant="t")) for number in range(8, 16)]
    assert all(isinstance(one, Ranking) for _, one in client.as_completed(again, timeout=30))
    # One that was revoked, by its id: no worker may remember it as such.
    client.submit(job("bulk-0", priority="bulk"))
    assert logits(client.result("bulk-0", timeout=60)) == alone(job("bulk-0"))


def test_a_worker_in_a_hurry_hands_its_jobs_back(client: Client, start_worker: Callable, wait_until: Callable):
    # With leases of 30 s, whatever was not handed back would not come in time.
    env = SLOW | {"RERANKQ_LEASE_S": "30"}
    worker = start_worker(**env)
    ids = client.submit_many([job(f"job-{number}", chunks=400) for number in range(3)])
    wait_until(lambda: any(client.status(one).state == "running" for one in ids))
    worker.process.send_signal(signal.SIGQUIT)
    worker.process.wait(20)
    with redis.Redis.from_url(client.settings.ledger) as ledger:
        assert ledger.zcard("rerankq:running") == 0
        assert {ledger.hget(f"rerankq:job:{one}", "suspect") for one in ids} == {b"0"}
    start_worker(RERANKQ_LEASE_S="30")
    for one in ids:
        client.result(one, timeout=25)
