"""When a worker dies, the jobs that were at work are suspects; only the one that kills again while alone is blamed."""

from collections.abc import Callable
from itertools import pairwise

import redis

from rerankq import Client, JobDead, Ranking, RerankJob
from rerankq.settings import Settings
from rerankq_worker.crash_record import CrashRecords


def test_two_poison_jobs_are_both_found_and_no_neighbour_is_blamed(
    client: Client, start_worker: Callable, settings: Settings, wait_until: Callable
):
    worker = start_worker("poisonable", RERANKQ_MAX_ATTEMPTS="1", RERANKQ_LEASE_S="1", RERANKQ_MODEL="stub:1e-4")
    good = [RerankJob(id=f"good-{at}", query=f"q {at}", chunks=["a", "b"], fusion="model") for at in range(12)]
    poison = [RerankJob(id=f"poison-{at}", query=f"p {at}", chunks=["poison"], fusion="model") for at in range(2)]
    ids = client.submit_many([*good[:4], poison[0], *good[4:8], poison[1], *good[8:]])

    def ended() -> bool:
        if worker.process.poll() is not None:
            worker.start()  # a supervisor
        return all(client.status(one).state in {"done", "dead"} for one in ids)

    wait_until(ended, 90)
    got = dict(client.as_completed(ids, timeout=10))
    assert {one for one, answer in got.items() if isinstance(answer, JobDead)} == {"poison-0", "poison-1"}
    assert sum(isinstance(answer, Ranking) for answer in got.values()) == len(good)
    with redis.Redis.from_url(settings.ledger) as ledger:
        for one in good:
            assert ledger.hget(f"rerankq:job:{one.id}", "deaths") == b"0"
        for one in poison:
            history = ledger.hget(f"rerankq:job:{one.id}", "history").decode()
            assert history.index("alone") < history.rindex("worker-ended")


def test_a_job_that_kills_runs_once_more_than_the_deaths_that_count(
    client: Client, start_worker: Callable, wait_until: Callable
):
    worker = start_worker("poisonable", RERANKQ_MAX_ATTEMPTS="1", RERANKQ_LEASE_S="1")
    poison = client.submit(RerankJob(query="p", chunks=["poison"]))

    def dead() -> bool:
        if worker.process.poll() is not None:
            worker.start()  # a supervisor
        return client.status(poison).state == "dead"

    wait_until(dead, 60)
    assert client.status(poison).attempts == 2


def test_suspects_of_an_innocent_death_run_one_at_a_time_and_are_cleared(
    client: Client, start_worker: Callable, settings: Settings, wait_until: Callable
):
    env = {"RERANKQ_LEASE_S": "1", "RERANKQ_MODEL": "stub:1e-3", "RERANKQ_CONCURRENCY": "6"}
    # All of them are at work for as long as it takes to see that: they hang.
    killed = start_worker("hanging", HANGS="tokenise", **env)
    ids = client.submit_many(
        [RerankJob(id=f"job-{at}", query="hang", chunks=["words of a chunk"] + [f"x {at}"] * 30) for at in range(6)]
    )
    wait_until(lambda: all(client.status(one).state == "running" for one in ids))
    killed.kill()
    start_worker(**env)
    assert all(isinstance(answer, Ranking) for _, answer in client.as_completed(ids, timeout=60))
    with redis.Redis.from_url(settings.ledger) as ledger:
        assert ledger.hlen("rerankq:alone") == 0
        assert {ledger.hget(f"rerankq:job:{one}", "deaths") for one in ids} == {b"0"}
        alone = []
        for one in ids:
            lines = (ledger.hget(f"rerankq:job:{one}", "history") or b"").decode().splitlines()
            began = [float(line.split()[0]) for line in lines if " alone " in line]
            alone.append((began[-1], client.status(one).ended_at))
        alone.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(alone)), "one after the other"


def test_jobs_that_only_waited_when_their_worker_was_killed_run_again_unsuspected_without_waiting_for_their_leases(
    client: Client, start_worker: Callable, settings: Settings, wait_until: Callable
):
    env = {"RERANKQ_LEASE_S": "120", "RERANKQ_MODEL": "stub:1e-6"}
    killed = start_worker("hanging", HANGS="device", **env)
    on_device = client.submit(RerankJob(id="on-device", query="q", chunks=["word " * 400], fusion="model"))
    records = CrashRecords(settings.ledger)
    with redis.Redis.from_url(settings.ledger) as ledger:
        wait_until(lambda: client.status(on_device).state == "running")
        owner = ledger.hget(f"rerankq:job:{on_device}", "owner").decode()
        # Its batch hangs: what comes now waits behind it.
        wait_until(
            lambda: not records.waiting(owner) and records._path(records._folder(), owner).read_bytes().count(b"D")
        )
        waiting = client.submit_many(
            [RerankJob(id=f"waits-{at}", query=f"q {at}", chunks=["a", "b"], fusion="model") for at in range(20)]
        )
        wait_until(lambda: {name for name, _ in records.waiting(owner)} == set(waiting))
        killed.kill()
        start_worker(**env)
        got = dict(client.as_completed([on_device, *waiting], timeout=60))
        assert all(isinstance(answer, Ranking) for answer in got.values())
        histories = {one: ledger.hget(f"rerankq:job:{one}", "history").decode() for one in got}
        suspected = {one: int(ledger.hget(f"rerankq:job:{one}", "suspect")) for one in got}
    assert suspected == {on_device: 1} | dict.fromkeys(waiting, 0)
    assert {one for one, history in histories.items() if " spared " in history} == set(waiting)
    assert {one for one, history in histories.items() if " alone " in history} == {on_device}
    assert records.ended() == []
