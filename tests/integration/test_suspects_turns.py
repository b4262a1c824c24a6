"""Suspects take their turns between others: with real workers, whatever the slots."""

import signal
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import redis

from rerankq import Client, Ranking, RerankJob
from rerankq.settings import Settings

pytestmark = pytest.mark.slow


def jobs(prefix: str, count: int, *, chunks: int = 1, **fields: Any) -> list[RerankJob]:
    return [
        RerankJob(id=f"{prefix}-{at}", query=f"{prefix} {at}", chunks=[f"{one}" for one in range(chunks)], **fields)
        for at in range(count)
    ]


def accuse(settings: Settings, *ids: str) -> None:
    """As if the worker of all of them had died."""
    with redis.Redis.from_url(settings.ledger) as ledger:
        for one in ids:
            ledger.hset(f"rerankq:job:{one}", "suspect", 1)


def alone_times(settings: Settings, client: Client, *ids: str) -> list[tuple[float, float, str]]:
    """When each suspect went in alone, and when it ended, in that order."""
    with redis.Redis.from_url(settings.ledger) as ledger:
        found = []
        for one in ids:
            lines = (ledger.hget(f"rerankq:job:{one}", "history") or b"").decode().splitlines()
            began = [float(line.split()[0]) for line in lines if " alone " in line]
            found.append((began[-1], client.status(one).ended_at, one))
    return sorted(found)


@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_an_interactive_job_waits_for_one_of_many_suspects_at_most(
    client: Client, settings: Settings, start_worker: Callable, wait_until: Callable, ask: Callable, concurrency: int
):
    bulk = client.submit_many(jobs("bulk", 10, chunks=10, priority="bulk", fusion="model"))
    urgent = client.submit_many(jobs("urgent", 10, chunks=10, fusion="model"))
    accuse(settings, *bulk, *urgent)
    # A quarter of a second for each suspect.
    start_worker(RERANKQ_MODEL="stub:5e-3", RERANKQ_CONCURRENCY=str(concurrency))
    asked = {}
    ended = client.as_completed([*bulk, *urgent], timeout=120)
    for one, answer in ended:
        assert isinstance(answer, Ranking), (one, answer)
        if not asked:
            # The worker knows of all suspects: no job waits behind their first doorbells.
            with redis.Redis.from_url(settings.broker_url) as broker:
                wait_until(lambda: not broker.llen("rerankq:rerankq.interactive"))
        if len(asked) < 8:
            job_id, sent_at = ask(jobs(f"asked after {one}".replace(" ", "-"), 1, fusion="model")[0])
            asked[job_id] = sent_at
            assert isinstance(client.result(job_id, timeout=60), Ranking)
    times = alone_times(settings, client, *bulk, *urgent)
    for (_, end, _), (start, _, _) in pairwise(times):
        assert end <= start, "one at a time"
    for one, sent_at in asked.items():
        before = [name for start, _, name in times if sent_at < start < client.status(one).ended_at]
        assert len(before) <= 1, f"{one} waited for {before}"


def test_suspects_go_on_while_others_come_without_a_break_and_interactive_ones_go_first(
    client: Client, settings: Settings, start_worker: Callable, wait_until: Callable
):
    bulk = client.submit_many(jobs("bulk", 4, chunks=4, priority="bulk", fusion="model"))
    urgent = client.submit_many(jobs("urgent", 3, chunks=4, fusion="model"))
    flood = client.submit_many(jobs("flood", 400, chunks=4, priority="bulk", fusion="model"))
    accuse(settings, *bulk, *urgent)
    start_worker(RERANKQ_MODEL="stub:2e-3", RERANKQ_CONCURRENCY="6")
    got = dict(client.as_completed([*bulk, *urgent], timeout=120))
    assert all(isinstance(answer, Ranking) for answer in got.values())
    done = sum(client.status(one).state == "done" for one in flood)
    assert 0 < done < len(flood), "others went on, and suspects did not wait for them all"
    order = [name for _, _, name in alone_times(settings, client, *bulk, *urgent)]
    assert sum(name.startswith("urgent") for name in order[:4]) >= 2


def test_a_worker_that_is_told_to_stop_leaves_the_suspects_that_waited_for_their_turn_to_others(
    client: Client, settings: Settings, start_worker: Callable, wait_until: Callable
):
    ids = client.submit_many(jobs("job", 12, chunks=10, priority="bulk", fusion="model"))
    accuse(settings, *ids)
    env = {"RERANKQ_MODEL": "stub:1e-2", "RERANKQ_LEASE_S": "30"}
    worker = start_worker(**env)
    wait_until(lambda: any(client.status(one).state == "running" for one in ids))
    start_worker(**env)
    worker.process.send_signal(signal.SIGQUIT)
    worker.process.wait(30)
    assert all(isinstance(answer, Ranking) for _, answer in client.as_completed(ids, timeout=90))
