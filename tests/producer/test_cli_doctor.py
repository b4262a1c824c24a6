"""The doctor: every rule by its facts, and real servers that break the promise one way each."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from rerankq.cli.examine import examine
from rerankq.cli.findings import Facts, Server, Work, WorkerSeen, findings
from rerankq.cli.round_trips import Trip
from rerankq.embedded import EmbeddedRedis
from rerankq.ledger import Ledger, calls, connect
from rerankq.settings import Settings

LEDGER = Server(
    roles=("broker", "ledger"), url="redis://h:6379/0", run_id="1", version="7.2.4", appendonly=True, fsync="everysec",
    maxmemory=2 << 30,
)  # fmt: skip
CACHE = Server(roles=("cache",), url="redis://c:6379/0", run_id="2", version="7.2.4", maxmemory=1 << 30)
CACHE = replace(CACHE, policy="allkeys-lfu")
WORKER = WorkerSeen("gpu0:1:a", "m", "f", ("rerankq.interactive", "rerankq.bulk"), version="1.0", device="cuda:0")
WELL = Facts("1.0", [LEDGER, CACHE], [WORKER], Work())


def wrong(facts: Facts) -> list[str]:
    return [f"{one.subject}: {one.said}" for one in findings(facts) if one.level == "wrong"]


def notes(facts: Facts) -> list[str]:
    return [f"{one.subject}: {one.said}" for one in findings(facts) if one.level == "note"]


def test_nothing_is_said_against_a_deployment_that_keeps_the_promise():
    assert (wrong(WELL), notes(WELL)) == ([], [])


def ledger(**fields) -> Facts:
    return replace(WELL, servers=[replace(LEDGER, **fields), CACHE])


def cache(**fields) -> Facts:
    return replace(WELL, servers=[LEDGER, replace(CACHE, **fields)])


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (ledger(fault="Connection refused"), "does not answer: Connection refused"),
        (ledger(version="6.0.16"), "too old: 6.2 or newer"),
        (ledger(replica=True), "is a replica"),
        (ledger(appendonly=False), "appendonly is off"),
        (ledger(log_is_written=False), "could not be written"),
        (ledger(fsync="no"), "appendfsync no"),
        (ledger(policy="allkeys-lru"), "drops accepted jobs"),
        (ledger(memory=int(0.95 * (2 << 30))), "95% full: jobs are refused"),
        (ledger(refused=("ledger: run scripts",)), "may not: ledger: run scripts"),
        (cache(policy="noeviction"), "takes no score"),
        (cache(policy="volatile-lru"), "takes no score"),
        (cache(run_id="1"), "give RERANKQ_CACHE_URL a server of its own"),
        (replace(WELL, workers=[]), "none gives signs of life"),
        (replace(WELL, workers=[WORKER, replace(WORKER, id="b", fingerprint="g")]), "different weights"),
        (replace(WELL, listed=["m", "other"]), "lists other, and no worker serves it"),
        (replace(WELL, work=Work(pairs_waiting=10_000_000)), "10000000 pairs waiting of 10000000"),
        (replace(WELL, work=Work(long_over=2)), "2 jobs lost their worker"),
        (replace(WELL, work=Work(sweeper=False)), "none sweeps"),
        (
            replace(WELL, trips=[Trip("broker", "a message by way of Celery", "refused")]),
            "broker: a message by way of Celery does not come through: refused",
        ),
        (replace(WELL, trips=[Trip("cache", "a question"), Trip("ledger", "a script", "x")]), "ledger: a script does"),
        (replace(WELL, workers=[replace(WORKER, age_s=19.9)]), "none gives signs of life"),
        (replace(WELL, workers=[replace(WORKER, channel="rerankq:6")], channel="rerankq:1"), "another deployment"),
        (
            replace(WELL, workers=[replace(WORKER, channel="rerankq:1")], channel="rerankq:1", heard=set()),
            "does not answer through this broker: it listens to another",
        ),
    ],
)
def test_each_broken_promise_is_wrong_and_nothing_else_is(facts, said):
    found = wrong(facts)
    assert len(found) == 1, found
    assert said in found[0]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (ledger(fsync=None), "not told to this user"),
        (ledger(maxmemory=0), "no maxmemory"),
        (ledger(latency_ms=30.0), "slow: 30.0 ms"),
        (ledger(ahead_s=-7.0), "7 s behind ours"),
        (ledger(accepts_alone=True), "min-replicas-to-write is 0"),
        (ledger(memory=int(0.8 * (2 << 30))), "80% full"),
        (replace(WELL, version="1.1"), "1.0, 1.1 side by side"),
        (replace(WELL, work=Work(pairs_waiting=8_000_000)), "8000000 pairs waiting"),
        (replace(WELL, work=Work(dead=3)), "3: see `rerankq dead list`"),
        (ledger(appendonly=False, throwaway=True), "brought by `rerankq up`"),
        (
            replace(WELL, workers=[WORKER, replace(WORKER, id="b", age_s=9.0)]),
            "worker b: m on cuda:0, 9.0 s ago: killed",
        ),
        (
            replace(WELL, default="n", chosen=True),
            "RERANKQ_MODEL: n here, and not heeded: jobs that name no model go to m",
        ),
    ],
)
def test_what_is_worth_knowing_is_a_note_and_not_wrong(facts, said):
    assert wrong(facts) == []
    assert len(notes(facts)) == 1
    assert said in notes(facts)[0]


@pytest.mark.parametrize(
    "facts",
    [
        replace(WELL, default="n", chosen=False),  # nobody set it here
        replace(WELL, default="m", chosen=True),
        replace(
            WELL, workers=[replace(WORKER, channel="rerankq:1")], channel="rerankq:1", heard=None
        ),  # no right to ask
        replace(WELL, workers=[replace(WORKER, channel="rerankq:1")], channel="rerankq:1", heard={"gpu0:1:a"}),
        replace(WELL, channel="rerankq:1", heard=set()),  # a worker of a version that does not tell
        replace(WELL, trips=[Trip("cache", "a question", "NOPERM", refused=True), Trip("ledger", "a script")]),
    ],
)
def test_what_is_right_or_cannot_be_known_is_not_held_against_anybody(facts):
    assert (wrong(facts), notes(facts)) == ([], [])


def test_workers_of_different_models_may_have_different_weights():
    other = WorkerSeen("gpu1:2:b", "n", "g", ("rerankq.interactive.n", "rerankq.bulk.n"), version="1.0")
    assert wrong(replace(WELL, workers=[WORKER, other], listed=["m", "n"])) == []


@pytest.fixture
def doctor(monkeypatch, tmp_path) -> Callable[..., tuple[int, list[dict]]]:
    def run(**environment: str) -> tuple[int, list[dict]]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RERANKQ_")}
        command = [sys.executable, "-m", "rerankq.cli", "doctor", "--json"]
        done = subprocess.run(
            command, env=clean | environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        assert "secret" not in done.stdout
        return done.returncode, json.loads(done.stdout)

    return run


@contextmanager
def a_live_worker(settings: Settings, **info: object) -> Iterator[None]:
    """Somebody who gives signs of life, and does nothing else."""
    shown = {"model": "m", "fingerprint": "f", "queues": ["rerankq.interactive", "rerankq.bulk"], "device": "cpu"}
    ended = threading.Event()

    def live(ledger: Ledger) -> None:
        while not ended.wait(0.5):
            ledger.ask(calls.beat("host:1:x", json.dumps(shown | info), gone_after_s=60))
            ledger.redis.set("rerankq:sweeper", "host:1:x", px=60_000)

    with connect(settings.ledger) as connection:
        (living := threading.Thread(target=live, args=(Ledger(connection),))).start()
        try:
            yield
        finally:
            ended.set()
            living.join()


def test_a_durable_server_with_a_worker_is_well(redis_binary_each_version: Path, doctor: Callable):
    with (
        EmbeddedRedis(binary=redis_binary_each_version, appendonly=True, maxmemory="64mb") as server,
        EmbeddedRedis(binary=redis_binary_each_version, maxmemory="64mb", maxmemory_policy="allkeys-lfu") as scores,
        a_live_worker(Settings(broker_url=server.url)),
    ):
        status, found = doctor(RERANKQ_BROKER_URL=server.url, RERANKQ_CACHE_URL=scores.url)
        assert [one for one in found if one["level"] == "wrong"] == []
        assert status == 0
        assert {"broker+ledger", "cache", "worker host:1:x", "backlog"} <= {one["subject"] for one in found}
        # One server by two names is one server.
        named = server.url.replace("127.0.0.1", "localhost")
        status, found = doctor(RERANKQ_BROKER_URL=server.url, RERANKQ_CACHE_URL=named)
        assert status == 1
        assert any("a server of its own" in one["said"] for one in found if one["level"] == "wrong")


def test_what_other_hands_wrote_among_the_workers_is_passed_over(redis_url: str, doctor: Callable):
    settings = Settings(_env_file=None, broker_url=redis_url)
    with a_live_worker(settings):
        with connect(settings.ledger) as connection:
            connection.hset("rerankq:workers", mapping={"odd": "words", "odder": "1 [1, 2]", b"\xff": "1 {}"})
        _, found = doctor(RERANKQ_BROKER_URL=redis_url)
    assert [one["subject"] for one in found if one["subject"].startswith("worker ")] == ["worker host:1:x"]


def test_servers_that_break_the_promise_are_found_out(doctor: Callable):
    with EmbeddedRedis(maxmemory="64mb", maxmemory_policy="allkeys-lru") as server:
        status, found = doctor(RERANKQ_BROKER_URL=server.url)
    said = " ".join(one["said"] for one in found if one["level"] == "wrong")
    assert status == 1
    assert "drops accepted jobs" in said
    assert any("brought by `rerankq up`" in one["said"] for one in found if one["level"] == "note")
    assert "none gives signs of life" in said


def test_what_is_not_there_is_wrong_and_told_in_a_line(doctor: Callable):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    status, found = doctor(RERANKQ_BROKER_URL=f"redis://:secret@127.0.0.1:{port}/0")
    assert status == 1
    assert [one["level"] for one in found] == ["wrong"]
    assert f"redis://:***@127.0.0.1:{port}/0 does not answer" in found[0]["said"]
    # RabbitMQ carries bells only: what cannot be reached is told beside the ledger.
    with EmbeddedRedis(appendonly=True) as server:
        urls = {"RERANKQ_BROKER_URL": f"amqp://me:secret@127.0.0.1:{port}//", "RERANKQ_LEDGER_URL": server.url}
        status, found = doctor(**urls)
    assert any(one["subject"] == "broker" and "amqp://me:***@" in one["said"] for one in found)


def test_a_user_without_rights_is_told_which_it_lacks(redis_binary_each_version: Path):
    with EmbeddedRedis(binary=redis_binary_each_version, appendonly=True) as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.execute_command("ACL", "SETUSER", "weak", "on", ">weak", "~*", "resetchannels", "-@all",
                                  "+@read", "+@connection", "+select", "+time", "+info", "+hello")  # fmt: skip
        url = server.url.replace(":" + server.url.split(":")[2].split("@")[0], "weak:weak")
        facts = examine(Settings(_env_file=None, broker_url=url, ledger_url=url.replace("/0", "/1")))
    (found,) = facts.servers
    assert found.refused == ("ledger: run scripts", "ledger: write", "ledger: subscribe", "ledger: publish")
    assert found.fsync is None


def test_a_ledger_that_answers_and_takes_no_write_is_found(redis_binary_each_version: Path, doctor: Callable):
    with EmbeddedRedis(binary=redis_binary_each_version, appendonly=True) as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.config_set("min-replicas-to-write", 1)
        status, found = doctor(RERANKQ_BROKER_URL=server.url)
        said = [one["said"] for one in found if one["subject"] == "ledger" and one["level"] == "wrong"]
        assert said == ["a write does not come through: NOREPLICAS Not enough good replicas to write."]
        assert status == 1
        with redis.Redis.from_url(server.url) as admin:
            admin.config_set("min-replicas-to-write", 0)
        status, found = doctor(RERANKQ_BROKER_URL=server.url)
        assert any("a write," in one["said"] for one in found if (one["subject"], one["level"]) == ("ledger", "ok"))
        with connect(Settings(_env_file=None, broker_url=server.url).ledger) as connection:
            assert connection.keys("*") == [], "nothing is left behind"


@pytest.fixture
def lost_job(redis_url: str) -> Settings:
    """A deployment whose only job lost its worker long ago, and nobody swept."""
    settings = Settings(_env_file=None, broker_url=redis_url, lease_s=0.1)
    with connect(settings.ledger) as connection:
        connection.zadd("rerankq:running", {"lost": time.time() - 60})
        connection.zadd("rerankq:dead", {"poison": time.time()})
    return settings


def test_lost_leases_and_dead_jobs_are_counted(lost_job: Settings):
    facts = examine(lost_job)
    assert facts.work is not None
    assert (facts.work.long_over, facts.work.dead, facts.work.sweeper) == (1, 1, False)
