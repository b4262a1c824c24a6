"""A worker's slots: interactive jobs find one whatever bulk does, bulk never starves, and tenants take turns."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
import redis

from rerankq import Client, RerankJob
from rerankq.settings import Settings

pytestmark = pytest.mark.slow


def job(name: str, *, chunks: int = 10, **fields: Any) -> RerankJob:
    return RerankJob(
        id=name, query=f"q {name}", chunks=[f"{name} {at}" for at in range(chunks)], fusion="model", **fields
    )


def drain(client: Client, ids: list[str], seconds: float = 60) -> dict[str, Any]:
    ended = dict(client.as_completed(ids, timeout=seconds))
    assert not [error for error in ended.values() if isinstance(error, Exception)]
    return ended


def test_an_interactive_job_is_claimed_at_once_while_bulk_saturates_the_worker(
    client: Client, start_worker: Callable, settings: Settings, wait_until: Callable, ask: Callable
):
    # Each job is 0.2 s of the device or more: bulk keeps its share of slots for as long as the test lasts.
    start_worker(RERANKQ_MODEL="stub:2e-3", RERANKQ_CONCURRENCY="4")
    bulk = client.submit_many([job(f"bulk-{number}", chunks=20, priority="bulk") for number in range(16)])
    with redis.Redis.from_url(settings.ledger) as ledger:
        wait_until(lambda: ledger.zcard("rerankq:running") == 2)
        asked = dict(ask(job(f"asked-{number}", chunks=2)) for number in range(2))
        seen: list[set[bytes]] = []

        def answered() -> bool:
            seen.append(set(ledger.zrange("rerankq:running", 0, -1)))
            return all(client.status(one).state == "done" for one in asked)

        wait_until(answered)
    assert max(sum(name.startswith(b"bulk") for name in running) for running in seen) == 2, "bulk keeps to its share"
    drain(client, bulk)
    ends = sorted(client.status(one).ended_at for one in bulk)
    for one, sent_at in asked.items():
        status = client.status(one)
        before_it = [end for end in ends if sent_at < end < status.started_at]
        assert len(before_it) <= 1, "it waited for no bulk job to end"
        assert len([end for end in ends if end < status.ended_at]) < len(bulk) / 2, "and was not done last"


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_an_interactive_job_is_the_next_to_be_taken_with_few_slots(
    client: Client, start_worker: Callable, ask: Callable, slots: int
):
    # A tenth of a second for each bulk job.
    start_worker(RERANKQ_MODEL="stub:2e-3", RERANKQ_CONCURRENCY=str(slots))
    bulk = client.submit_many([job(f"bulk-{number}", chunks=10, priority="bulk") for number in range(60)])
    asked = {}
    for number in range(5):
        drain(client, [bulk[4 * number]])
        one, sent_at = ask(job(f"asked-{number}", chunks=1))
        asked[one] = sent_at
        drain(client, list(asked))
    starts = [client.status(one).started_at for one in bulk]
    for one, sent_at in asked.items():
        between = [start for start in starts if start and sent_at < start < client.status(one).started_at]
        # One, or as many as end with the same batch.
        assert len(between) <= max(1, slots - 1)
    assert any(start is None for start in starts), "bulk jobs waited all the time"
    drain(client, bulk)


def test_bulk_that_fills_its_share_goes_on_without_pauses(client: Client, start_worker: Callable):
    start_worker(RERANKQ_CONCURRENCY="3")
    count = 40
    spent = {}
    for priority in ("interactive", "bulk"):
        ids = client.submit_many([job(f"{priority}-{number}", priority=priority) for number in range(count)])
        drain(client, ids, seconds=120)
        statuses = [client.status(one) for one in ids]
        spent[priority] = max(one.ended_at for one in statuses) - min(one.started_at for one in statuses)
    # One slot, taken and given back 40 times: were it noticed only when a blocking pop of a second ends, it would be
    # most of 40 s longer.
    assert spent["bulk"] < spent["interactive"] + count / 4


def test_a_small_tenant_waits_for_a_window_of_a_large_one_and_not_for_its_backlog(
    client: Client, start_worker: Callable, settings: Settings
):
    count = 5_000
    flood = client.submit_many([job(f"a-{number}", chunks=2, tenant="a", priority="bulk") for number in range(count)])
    small = client.submit(job("b", chunks=2, tenant="b", priority="bulk"))
    start_worker()
    drain(client, [small], seconds=120)
    ended = client.status(small).ended_at
    # Besides the doorbells that were out already: those that were sent in turn while they were received.
    before = [one.ended_at for one in map(client.status, flood[:1_000]) if one.ended_at and one.ended_at < ended]
    assert len(before) < settings.doorbell_window + 100


def test_a_job_that_was_handed_back_overtakes_the_doorbells_that_are_out(
    client: Client, start_worker: Callable, wait_until: Callable
):
    # One slot for bulk; the first job takes some seconds of the device, each other a tenth or more.
    env = {"RERANKQ_MODEL": "stub:2e-3", "RERANKQ_CONCURRENCY": "3", "RERANKQ_LEASE_S": "30"}
    env["RERANKQ_MAX_BATCH_TOKENS"] = "100"
    worker = start_worker(**env)
    back = client.submit(job("back", chunks=300, priority="bulk"))
    ids = client.submit_many([job(f"bulk-{number}", chunks=10, priority="bulk") for number in range(80)])
    wait_until(lambda: client.status(back).state == "running")
    worker.process.send_signal(signal.SIGQUIT)
    worker.process.wait(20)
    assert client.status(back).state == "queued"
    start_worker(**env)
    drain(client, [back])
    # Those that the new worker took before it swept for the first time.
    assert sum(client.status(one).state == "done" for one in ids) < 30


def test_doorbells_lost_while_the_ledger_was_away_are_sent_again(
    start_worker: Callable, restartable_redis: Any, redis_url: str, wait_until: Callable
):
    urls = {"ledger_url": restartable_redis.url, "cache_url": redis_url, "lease_s": 2}
    env = {f"RERANKQ_{name.upper()}": str(value) for name, value in urls.items()}
    worker = start_worker(ready=False, **env)
    with Client(Settings(broker_url=redis_url, **urls)) as client, redis.Redis.from_url(redis_url) as broker:
        drain(client, client.submit_many([job("first")]))
        worker.send(19)  # SIGSTOP: so that the doorbells wait in the broker
        ids = client.submit_many([job(f"late-{number}", priority="bulk") for number in range(20)])
        # All but one, perhaps, that went to the pop it was blocked in.
        wait_until(lambda: broker.llen("rerankq:rerankq.bulk") >= 19)
        restartable_redis.kill()
        worker.send(18)  # SIGCONT: every doorbell is received, and no claim is possible
        wait_until(lambda: broker.llen("rerankq:rerankq.bulk") == 0)
        restartable_redis.start()
        drain(client, ids)
    assert worker.process.poll() is None
