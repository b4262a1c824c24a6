"""Workers that are killed, paused, poisoned or stopped: every accepted job is answered, and rightly."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from rerankq import BrokerUnavailable, Client, JobDead, JobUnknown, Ranking, RerankJob
from rerankq.doctor.collect import collect
from rerankq.settings import Settings
from rerankq_worker.engine import load

pytestmark = pytest.mark.slow


def jobs(count: int, chunks: int = 12) -> list[RerankJob]:
    return [
        RerankJob(
            id=f"job-{number}",
            query=f"question {number}",
            chunks=[f"answer {number} {position} " + "word " * (position % 9) for position in range(chunks)],
            fusion="model",
            priority="bulk" if number % 3 else "interactive",
        )
        for number in range(count)
    ]


def order_of(ranking: Ranking) -> list[tuple[int, float | None]]:
    return [(chunk.index, chunk.model_logit) for chunk in ranking.chunks]


def alone(all_jobs: Iterable[RerankJob]) -> dict[str, list[tuple[int, float | None]]]:
    """What each job's ranking is when nothing else runs: the stub engine, called directly."""

    engine = load("stub")
    expected = {}
    for job in all_jobs:
        logits = engine.score([(job.query, chunk.model_text) for chunk in job.chunks])
        order = sorted(range(len(logits)), key=lambda at: -logits[at])
        expected[job.id] = [(at, float(logits[at])) for at in order]
    return expected


def answers(client: Client, ids: list[str], seconds: float = 90) -> dict[str, Ranking | Exception]:
    return dict(client.as_completed(ids, timeout=seconds))


def test_all_jobs_are_ranked_rightly_when_a_worker_is_killed_and_another_paused(
    client: Client, start_worker: Callable, settings: Settings, wait_until: Callable
):
    # A slow stub, so that the kill falls amid the work.
    env = {"RERANKQ_MODEL": "stub:4e-5", "RERANKQ_LEASE_S": "2"}
    killed, paused = start_worker(**env), start_worker(**env)
    wanted = jobs(200)
    ids = client.submit_many(wanted)
    ended = client.as_completed(ids, timeout=120)
    got = dict(next(ended) for _ in range(20))
    killed.kill()
    paused.send(signal.SIGSTOP)
    wait_until(lambda: _all_leases_over(settings))
    killed.start()
    got |= dict(next(ended) for _ in range(40))
    paused.send(signal.SIGCONT)
    got |= dict(ended)
    assert {one: order_of(ranking) for one, ranking in got.items()} == alone(wanted)
    assert len(got) == 200


def _all_leases_over(settings: Settings) -> bool:
    with redis.Redis.from_url(settings.ledger) as ledger:
        clock = ledger.time()
        return not ledger.zcount("rerankq:running", clock[0] + clock[1] / 1e6, "+inf")


def test_a_poison_job_ends_dead_and_its_neighbours_are_ranked(
    client: Client, start_worker: Callable, settings: Settings, wait_until: Callable
):
    env = {"RERANKQ_LEASE_S": "1", "RERANKQ_MAX_ATTEMPTS": "2", "RERANKQ_MODEL": "stub:2e-5"}
    worker = start_worker("poisonable", **env)
    wanted = jobs(30)
    poison = RerankJob(id="poison", query="what kills?", chunks=["poison", "harmless"], fusion="model")
    ids = client.submit_many([*wanted[:10], poison, *wanted[10:]])
    deaths = 0
    while client.status("poison").state != "dead":  # a supervisor: a worker that died is started again
        wait_until(lambda: worker.process.poll() is not None or client.status("poison").state == "dead", 60)
        if worker.process.poll() is not None:
            deaths += 1
            worker.start()
        assert deaths <= 1 + 2, "once beside others, and as often as counts alone"
    if worker.process.poll() is not None:
        worker.start()
    got = answers(client, ids)
    assert isinstance(got.pop("poison"), JobDead)
    assert {one: order_of(ranking) for one, ranking in got.items()} == alone(wanted)
    with redis.Redis.from_url(settings.ledger) as ledger:
        assert ledger.hget("rerankq:job:poison", "payload"), "a dead job keeps its payload for inspection"
        assert [ledger.hget(f"rerankq:job:{one}", "deaths") for one in got] == [b"0"] * 30, "no neighbour is blamed"


def test_a_job_that_fails_says_why_and_leaves_its_neighbours_ranked(client: Client, start_worker: Callable):
    start_worker("poisonable")
    wanted = jobs(10)
    broken = RerankJob(id="broken", query="what breaks?", chunks=["broken"])
    got = answers(client, client.submit_many([*wanted[:5], broken, *wanted[5:]]))
    failure = got.pop("broken")
    assert type(failure).__name__ == "JobFailed"
    assert "this pair cannot be scored" in str(failure)
    assert {one: order_of(ranking) for one, ranking in got.items()} == alone(wanted)


@pytest.mark.parametrize("drain_s", ["8", "0"])
def test_a_worker_that_is_told_to_stop_finishes_its_jobs_and_the_next_takes_the_rest(
    client: Client, start_worker: Callable, drain_s: str
):
    env = {"RERANKQ_MODEL": "stub:4e-5", "RERANKQ_LEASE_S": "30", "RERANKQ_DRAIN_S": drain_s}
    worker = start_worker(**env)
    wanted = jobs(120)
    ids = client.submit_many(wanted)
    ended = client.as_completed(ids, timeout=60)
    got = dict(next(ended) for _ in range(10))
    assert worker.stop() == 0
    # With leases of 30 s, whatever was not finished or handed back would not come in time.
    start_worker(**env)
    got |= dict(ended)
    assert {one: order_of(ranking) for one, ranking in got.items()} == alone(wanted)


def test_jobs_survive_a_redis_that_restarts_under_work(start_worker: Callable, restartable_redis: Any):
    env = {"RERANKQ_MODEL": "stub:4e-5", "RERANKQ_LEASE_S": "2"}
    worker = start_worker(url=restartable_redis.url, **env)
    wanted = jobs(150)
    with Client(Settings(broker_url=restartable_redis.url, lease_s=2)) as client:
        ids = client.submit_many(wanted)
        ended = client.as_completed(ids, timeout=100)
        got = dict(next(ended) for _ in range(10))
        restartable_redis.kill()
        time.sleep(1)
        restartable_redis.start()
        got |= dict(ended)
    assert {one: order_of(ranking) for one, ranking in got.items()} == alone(wanted)
    assert worker.process.poll() is None, worker.log.read_text()[-3000:]


def test_a_worker_that_starts_while_redis_is_full_ranks_what_was_accepted(
    redis_url_each_version: str, start_worker: Callable, wait_until: Callable
):
    wanted = jobs(20)
    with (
        Client(Settings(broker_url=redis_url_each_version)) as client,
        redis.Redis.from_url(redis_url_each_version) as server,
    ):
        ids = client.submit_many(wanted)
        queues = ("rerankq:rerankq.interactive", "rerankq:rerankq.bulk")
        # A doorbell takes memory, too: those that could be sent are received.
        wait_until(lambda: sum(map(server.llen, queues)) == len(ids))
        server.config_set("maxmemory", server.info("memory")["used_memory"] // 2)
        try:
            with pytest.raises(redis.OutOfMemoryError):
                server.set("one more", "byte")
            start_worker(url=redis_url_each_version)
            wait_until(lambda: all(client.status(one).state == "done" for one in ids), 60)
        finally:
            server.config_set("maxmemory", 0)
        got = answers(client, ids)
    assert {one: order_of(ranking) for one, ranking in got.items()} == alone(wanted)


@pytest.fixture
def pair(restartable_redis: Any, redis_binary_each_version: Path, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """A server, and a replica that follows it."""
    (folder := tmp_path / "replica").mkdir()
    replica = type(restartable_redis)(redis_binary_each_version, folder)
    follow(replica, restartable_redis)
    yield restartable_redis, replica
    replica.kill()


def follow(replica: Any, master: Any) -> None:
    with redis.Redis(port=replica.port) as connection:
        connection.replicaof("127.0.0.1", str(master.port))


def has_replica(server: Any) -> bool:
    with redis.Redis(port=server.port) as connection:
        replicas = connection.info("replication")
    return replicas["role"] == "master" and replicas.get("slave0", {}).get("state") == "online"


def hand_over(old: Any, new: Any, wait_until: Callable) -> None:
    """Make *new* the master and *old* its replica, without a write lost between the two."""
    wait_until(lambda: has_replica(old))
    with redis.Redis(port=old.port) as connection:
        connection.execute_command("FAILOVER")
    wait_until(lambda: has_replica(new))


def test_a_redis_that_is_read_only_for_a_while_refuses_jobs_and_loses_none(
    start_worker: Callable, pair: tuple[Any, Any], wait_until: Callable
):
    server, other = pair
    worker = start_worker(url=server.url, RERANKQ_MODEL="stub:4e-5", RERANKQ_LEASE_S="2")
    wanted = jobs(150)
    settings = Settings(broker_url=server.url, lease_s=2)
    with Client(settings) as client:
        ids = client.submit_many(wanted[:120])
        ended = client.as_completed(ids, timeout=100)
        got = dict(next(ended) for _ in range(10))
        hand_over(server, other, wait_until)
        with pytest.raises(BrokerUnavailable, match=r"(?i)readonly|read only") as refusal:
            client.submit_many(wanted[120:])
        assert refusal.value.accepted == []
        wait_until(lambda: _all_leases_over(settings))
        hand_over(other, server, wait_until)
        ids = client.submit_many(wanted[120:])
        got |= dict(ended) | dict(client.as_completed(ids, timeout=100))
    assert {one: order_of(ranking) for one, ranking in got.items()} == alone(wanted)
    assert worker.process.poll() is None, worker.log.read_text()[-3000:]


def test_workers_are_replaced_one_after_the_other_under_load_and_each_job_runs_once(
    client: Client, start_worker: Callable, settings: Settings
):
    # A job is some 10 ms of a device: each of the three workers holds several when it is told to stop.
    env = {"RERANKQ_MODEL": "stub:8e-5", "RERANKQ_LEASE_S": "30", "RERANKQ_CONCURRENCY": "6", "RERANKQ_DRAIN_S": "25"}
    workers = [start_worker(**env) for _ in range(3)]
    wanted = jobs(600)
    batches = [wanted[at : at + 100] for at in range(0, len(wanted), 100)]
    got: dict[str, Ranking | Exception] = {}
    ids = client.submit_many(batches.pop(0))
    for old in workers:
        ended = client.as_completed(ids, timeout=90)
        got |= dict(next(ended) for _ in range(60))
        ids = [one for one in ids if one not in got] + client.submit_many(batches.pop(0))
        start_worker(ready=False, **env)
        assert old.stop() == 0, "it finished what it held, or handed it back"
    got |= answers(client, ids + client.submit_many([job for batch in batches for job in batch]))
    assert {one: order_of(ranking) for one, ranking in got.items()} == alone(wanted)
    with redis.Redis.from_url(settings.ledger) as ledger:
        fields = "claims", "suspect", "deaths", "history"
        claims = {tuple(ledger.hmget(f"rerankq:job:{one.id}", fields)) for one in wanted}
    assert claims == {(b"1", b"0", b"0", None)}, "claimed once, no lease lapsed, nothing handed back"


class Sentinel:
    """Watches a master, which asks for a password from now on, and its replica."""

    def __init__(self, binary: Path, folder: Path, pair: tuple[Any, Any]) -> None:
        for server in pair:
            with redis.Redis(port=server.port) as connection:
                connection.config_set("masterauth", "se;cret")
                connection.config_set("requirepass", "se;cret")
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"sentinel monitor jobs 127.0.0.1 {pair[0].port} 1",
            "sentinel auth-pass jobs se;cret",
            "sentinel down-after-milliseconds jobs 1000",
            # An attempt that fails is made again after twice this: the default is three minutes.
            "sentinel failover-timeout jobs 4000",
        ]
        (folder / "sentinel.conf").write_text("\n".join(lines) + "\n")
        command = [binary, folder / "sentinel.conf", "--sentinel"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        # The first of the two is away.
        self.url = f"sentinel://:se%3Bcret@127.0.0.1:1,127.0.0.1:{self.port}/0?master=jobs"

    def says(self) -> dict[str, Any]:
        with redis.Redis(port=self.port) as sentinel:
            try:
                return sentinel.sentinel_master("jobs")
            except redis.ConnectionError:
                return {"num-slaves": 0}


@pytest.fixture
def sentinel(
    pair: tuple[Any, Any], redis_binary_each_version: Path, tmp_path: Path, wait_until: Callable
) -> Iterator[Sentinel]:
    wait_until(lambda: has_replica(pair[0]))
    sentinel = Sentinel(redis_binary_each_version, tmp_path, pair)
    wait_until(lambda: sentinel.says()["num-slaves"] == 1)
    yield sentinel
    sentinel.process.kill()
    sentinel.process.wait()


def test_jobs_survive_a_master_that_dies_under_work_and_is_replaced_by_sentinel(
    start_worker: Callable, sentinel: Sentinel, pair: tuple[Any, Any], wait_until: Callable
):
    worker = start_worker(url=sentinel.url, ready=False, RERANKQ_MODEL="stub:4e-5", RERANKQ_LEASE_S="2")
    wanted = jobs(150)
    settings = Settings(broker_url=sentinel.url, lease_s=2)
    with Client(settings) as client:
        wait_until(client.workers)
        assert [server.fault for server in collect(settings).servers] == [""], "the doctor finds it, too"
        ids = client.submit_many(wanted[:120])
        ended = client.as_completed(ids, timeout=100)
        got = dict(next(ended) for _ in range(10))
        pair[0].kill()
        for job in wanted[120:]:
            wait_until(lambda job=job: _is_accepted(client, job), 90)
        got |= dict(ended) | dict(client.as_completed([job.id for job in wanted[120:]], timeout=100))
        # A replica follows a moment behind: what was not there yet is unknown, and submitted again.
        lost = [job for job in wanted if isinstance(got[job.id], JobUnknown)]
        got |= dict(client.as_completed(client.submit_many(lost), timeout=100))
    assert {one: order_of(ranking) for one, ranking in got.items()} == alone(wanted)
    assert sentinel.says()["port"] == pair[1].port
    assert worker.process.poll() is None, worker.log.read_text()[-3000:]


def test_a_master_that_freezes_and_is_replaced_keeps_no_connection(
    start_worker: Callable, sentinel: Sentinel, pair: tuple[Any, Any], wait_until: Callable
):
    """It closes no connection: the broker's consumer and waiting clients would wait for ever."""
    worker = start_worker(url=sentinel.url, ready=False, RERANKQ_MODEL="stub:4e-5", RERANKQ_LEASE_S="2")
    settings = Settings(broker_url=sentinel.url, lease_s=2)
    with Client(settings) as client:
        wait_until(client.workers)
        ids = client.submit_many(jobs(60))
        ended = client.as_completed(ids, timeout=120)
        got = dict(next(ended) for _ in range(5))
        os.kill(pair[0].process.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: sentinel.says().get("port") == pair[1].port, 60)
            # A few checks later no connection to the old one is left, in the worker nor here.
            wait_until(lambda: not left_on(pair[0].port, worker.process.pid, os.getpid()), 15)
            got |= dict(ended)
            wanted = {job.id: job for job in jobs(60)}
            lost = [wanted[one] for one, ranking in got.items() if isinstance(ranking, JobUnknown)]
            got |= dict(client.as_completed(client.submit_many(lost), timeout=100))
            assert client.rerank("later", ["x", "y"], timeout=60).chunks
            assert not left_on(pair[0].port, worker.process.pid, os.getpid())
        finally:
            os.kill(pair[0].process.pid, signal.SIGCONT)
    assert all(isinstance(ranking, Ranking) for ranking in got.values())
    assert worker.process.poll() is None, worker.log.read_text()[-3000:]


def left_on(port: int, *processes: int) -> int:
    """How many connections to a port these processes hold."""
    held = [one for pid in processes for one in psutil.Process(pid).net_connections("tcp")]
    return sum(bool(one.raddr) and one.raddr.port == port and one.status == "ESTABLISHED" for one in held)


def _is_accepted(client: Client, job: RerankJob) -> bool:
    try:
        return client.submit(job) == job.id
    except BrokerUnavailable:
        return False
