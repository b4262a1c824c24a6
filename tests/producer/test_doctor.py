"""The doctor: every rule by its facts, and real servers that break the promise one way each."""

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from forked_processes import run_forked

from rerankq import BrokerUnavailable
from rerankq.doctor import collect as collecting
from rerankq.doctor import round_trips
from rerankq.doctor.checks import LedgerCounts, RegisteredWorker, Server, Snapshot, checks, merged
from rerankq.doctor.collect import collect
from rerankq.doctor.round_trips import RoundTrip
from rerankq.ledger import calls, connect
from rerankq.ledger.runner import Ledger
from rerankq.local.embedded import EmbeddedRedis
from rerankq.settings import Settings

LEDGER = Server(
    roles=("broker", "ledger"), url="redis://h:6379/0", run_id="1", version="7.2.4", appendonly=True, fsync="everysec",
    maxmemory=2 << 30,
)  # fmt: skip
CACHE = Server(roles=("cache",), url="redis://c:6379/0", run_id="2", version="7.2.4", maxmemory=1 << 30)
CACHE = replace(CACHE, policy="allkeys-lfu")
WORKER = RegisteredWorker("gpu0:1:a", "m", "f", ("rerankq.interactive", "rerankq.bulk"), version="1.0", device="cuda:0")
ELSEWHERE = replace(WORKER, id="b", queues=("rerankq.interactive.x", "rerankq.bulk.x"))
WELL = Snapshot("1.0", [LEDGER, CACHE], [WORKER], LedgerCounts())


def wrong(snapshot: Snapshot) -> list[str]:
    return [f"{one.subject}: {one.said}" for one in checks(snapshot) if one.level == "wrong"]


def notes(snapshot: Snapshot) -> list[str]:
    return [f"{one.subject}: {one.said}" for one in checks(snapshot) if one.level == "note"]


def test_checks_pass_for_a_deployment_that_keeps_the_promise():
    assert (wrong(WELL), notes(WELL)) == ([], [])


def ledger(**fields) -> Snapshot:
    return replace(WELL, servers=[replace(LEDGER, **fields), CACHE])


def cache(**fields) -> Snapshot:
    return replace(WELL, servers=[LEDGER, replace(CACHE, **fields)])


# All that Redis has but noeviction.
EVICTING = [
    *(f"{keys}-{way}" for keys in ("allkeys", "volatile") for way in ("lru", "lfu", "random")),
    "volatile-ttl",
]


@pytest.mark.parametrize(
    ("snapshot", "said"),
    [
        (ledger(fault="Connection refused"), "does not answer: Connection refused"),
        (ledger(version="6.0.16"), "too old: 6.2 or newer"),
        (ledger(replica=True), "is a replica"),
        (ledger(appendonly=False), "appendonly is off"),
        (ledger(log_is_written=False), "append-only file failed"),
        (ledger(fsync="no"), "appendfsync no"),
        *((ledger(policy=policy), f"{policy}: a full server drops accepted jobs") for policy in EVICTING),
        (ledger(memory=int(0.95 * (2 << 30))), "95% full: jobs are refused"),
        (ledger(memory=9, maxmemory=10), "90% full: jobs are refused"),
        (ledger(refused=("ledger: run scripts",)), "lacks permissions: ledger: run scripts"),
        (cache(policy="noeviction"), "accepts no scores"),
        *((cache(policy=policy), "accepts no scores") for policy in EVICTING if policy.startswith("volatile")),
        (cache(run_id="1"), "give RERANKQ_CACHE_URL a server of its own"),
        (replace(WELL, workers=[]), "no worker is running; jobs are waiting"),
        (replace(WELL, workers=[], counts=LedgerCounts(sweeper=False)), "no worker is running; jobs are waiting"),
        (
            replace(
                WELL,
                workers=[WORKER, replace(WORKER, id="b", model="other", age_s=9.0)],
                promised_models=["m", "other"],
            ),
            "lists other, but no worker serves it",
        ),
        (replace(WELL, workers=[WORKER, replace(WORKER, id="b", fingerprint="g")]), "differ in weights"),
        (replace(WELL, promised_models=["m", "other"]), "lists other, but no worker serves it"),
        (replace(WELL, counts=LedgerCounts(pairs_waiting=10_000_000)), "10000000 pairs waiting of 10000000"),
        (replace(WELL, counts=LedgerCounts(expired=2)), "2 jobs lost their worker"),
        (replace(WELL, counts=LedgerCounts(sweeper=False)), "none sweeps"),
        (
            replace(WELL, round_trips=[RoundTrip("broker", "a Celery message", "refused")]),
            "broker: a Celery message failed: refused",
        ),
        (
            replace(WELL, round_trips=[RoundTrip("cache", "a ping"), RoundTrip("ledger", "a script", "x")]),
            "ledger: a script failed: x",
        ),
        (replace(WELL, workers=[replace(WORKER, age_s=19.9)]), "no worker is running; jobs are waiting"),
        (replace(WELL, workers=[replace(WORKER, trouble="HTTP 503")]), "gets no scores from cuda:0: HTTP 503"),
        (replace(WELL, workers=[replace(WORKER, channel="rerankq:6")], channel="rerankq:1"), "another deployment"),
        (
            replace(WELL, workers=[replace(WORKER, channel="rerankq:1")], channel="rerankq:1", answered=set()),
            "does not answer through this broker: it uses another",
        ),
    ],
)
def test_each_broken_promise_is_one_wrong_finding(snapshot, said):
    found = wrong(snapshot)
    assert len(found) == 1, found
    assert said in found[0]


@pytest.mark.parametrize(
    ("snapshot", "said"),
    [
        (ledger(fsync=None), "may not read appendfsync"),
        (ledger(maxmemory=0), "maxmemory is not set"),
        (ledger(latency_ms=30.0), "slow: 30.0 ms"),
        (ledger(ahead_s=-7.0), "7 s behind ours"),
        (ledger(ahead_s=7.0), "7 s ahead of ours"),
        (ledger(accepts_alone=True), "min-replicas-to-write is 0"),
        (ledger(memory=int(0.8 * (2 << 30))), "80% full"),
        (replace(WELL, version="1.1"), "1.0, 1.1 run side by side"),
        (replace(WELL, counts=LedgerCounts(pairs_waiting=8_000_000)), "8000000 pairs waiting"),
        (replace(WELL, counts=LedgerCounts(dead=3)), "3: see `rerankq dead list`"),
        (ledger(appendonly=False, embedded=True), "started by `rerankq up`"),
        (
            replace(WELL, workers=[WORKER, replace(WORKER, id="b", age_s=9.0)]),
            "worker b: m on cuda:0, 9.0 s ago: if it does not return, it was killed",
        ),
        (
            replace(WELL, workers=[WORKER, replace(WORKER, id="b", fingerprint="g", age_s=9.0)]),
            "9.0 s ago: if it does not return, it was killed",
        ),
        (
            replace(WELL, default_model="n", default_is_set=True),
            "RERANKQ_MODEL: n is set here but has no effect: jobs that name no model go to m",
        ),
        (
            replace(WELL, default_model="n", default_is_set=True, workers=[WORKER, replace(ELSEWHERE, model="n")]),
            "RERANKQ_MODEL: n is set here but has no effect: jobs that name no model go to m",
        ),
    ],
)
def test_each_minor_risk_is_one_note(snapshot, said):
    assert wrong(snapshot) == []
    assert len(notes(snapshot)) == 1
    assert said in notes(snapshot)[0]


@pytest.mark.parametrize(
    "snapshot",
    [
        cache(memory=int(0.95 * (1 << 30))),  # a full cache evicts
        ledger(version="6.2.0"),
        replace(WELL, servers=[replace(LEDGER, roles=("broker",), run_id="0", appendonly=False, fsync="no"), LEDGER]),
        replace(WELL, default_model="n", default_is_set=True, workers=[replace(WORKER, model="n"), ELSEWHERE]),
        replace(WELL, default_model="n", default_is_set=False),  # nobody set it here
        replace(WELL, default_model="m", default_is_set=True),
        replace(
            WELL, workers=[replace(WORKER, channel="rerankq:1")], channel="rerankq:1", answered=None
        ),  # no permission to ask
        replace(WELL, workers=[replace(WORKER, channel="rerankq:1")], channel="rerankq:1", answered={"gpu0:1:a"}),
        replace(WELL, channel="rerankq:1", answered=set()),  # a worker of a version that does not publish its channel
        replace(
            WELL, round_trips=[RoundTrip("cache", "a ping", "NOPERM", refused=True), RoundTrip("ledger", "a script")]
        ),
    ],
)
def test_correct_or_unknown_facts_give_no_finding(snapshot):
    assert (wrong(snapshot), notes(snapshot)) == ([], [])


def test_memory_limit_is_reported_in_mebibytes_with_its_share():
    found = checks(ledger(memory=1 << 30))
    assert "maxmemory 2048 MiB, noeviction, 50% in use" in [one.said for one in found]


def test_role_is_ok_if_all_its_round_trips_worked():
    trips = [RoundTrip("ledger", "a script"), RoundTrip("ledger", "a write", "x"), RoundTrip("cache", "a ping")]
    found = [(one.level, one.subject) for one in checks(replace(WELL, round_trips=trips)) if "round trips" in one.said]
    assert found == [("ok", "cache")]


def test_round_trip_without_an_answer_is_a_fault_of_its_own(monkeypatch):
    done = threading.Event()

    def refuse():
        raise TimeoutError

    def fail():
        raise RuntimeError("NOPERM: no Permission")

    paths = {"hangs": done.wait, "answers": bool, "fails without a word": refuse, "is refused": fail}
    monkeypatch.setattr(round_trips, "WITHIN_S", 0.1)
    monkeypatch.setattr(round_trips, "_paths", lambda settings: [("ledger", *one) for one in paths.items()])
    trips = round_trips.try_all(Settings(_env_file=None), ["ledger"])
    done.set()
    assert [(trip.fault, trip.refused) for trip in trips] == [
        ("no answer within 0.1 s", False),
        ("", False),
        ("TimeoutError", False),
        ("NOPERM: no Permission", True),
    ]
    assert round_trips.try_all(Settings(_env_file=None), ["cache"]) == []


@pytest.mark.parametrize("message", [None, {"type": "subscribe"}])
def test_message_of_another_type_is_not_accepted(message):
    round_trips._expect("message", {"type": "message"})
    with pytest.raises(BrokerUnavailable, match="no message within"):
        round_trips._expect("message", message)


def test_workers_are_unknown_if_the_broker_forbids_asking(monkeypatch):
    def refuse(**_):
        raise redis.exceptions.NoPermissionError("this user has no permissions")

    app = SimpleNamespace(control=SimpleNamespace(inspect=refuse), close=lambda: None)
    monkeypatch.setattr(round_trips, "make_app", lambda settings: app)
    assert round_trips.workers_that_answer(Settings(_env_file=None), 1) is None


def test_server_clock_is_compared_with_the_middle_of_the_round_trip(monkeypatch):
    # A quarter of a second there and back, by a server that is seven seconds ahead.
    now = itertools.count(100, 0.25)
    monkeypatch.setattr(collecting.time, "time", lambda: next(now))

    class Ahead:
        answers = itertools.count()

        def time(self):
            there = 100.125 + 7 + 0.5 * next(self.answers)
            return int(there), round(there % 1 * 1_000_000)

    assert collecting._clock(Ahead()) == (250.0, 7.0)


def test_sweeper_is_assumed_without_the_permission_to_see_it():
    class Forbidding:
        def exists(self, name):
            raise redis.exceptions.NoPermissionError("this user has no permissions")

    assert Ledger(Forbidding())._somebody_sweeps()


@pytest.mark.parametrize(
    ("told", "field", "found"),
    [
        ({"role": "slave"}, "replica", True),
        ({"role": "replica"}, "replica", True),
        ({"role": "master"}, "replica", False),
        ({"aof_last_write_status": "err"}, "log_is_written", False),
        ({"aof_last_write_status": "ok"}, "log_is_written", True),
        ({"aof_enabled": 1}, "appendonly", True),
        ({"used_memory": 7, "used_memory_peak": 9}, "memory", 7),
        ({"maxmemory": 8, "maxmemory_policy": "volatile-ttl"}, "policy", "volatile-ttl"),
        ({"config_file": "/tmp/rerankq-redis-x/redis.conf"}, "embedded", True),
        ({"config_file": "/etc/redis.conf"}, "embedded", False),
    ],
)
def test_server_facts_are_read_from_its_info(redis_url: str, monkeypatch, told, field, found):
    real = redis.Redis.info
    monkeypatch.setattr(redis.Redis, "info", lambda self: real(self) | told)
    server = collecting._server(Settings(_env_file=None, broker_url=redis_url), {"cache": redis_url})
    assert server.fault == ""
    assert getattr(server, field) == found


def test_ledger_counts_are_collected_without_workers_silent_for_too_long(redis_url: str, monkeypatch):
    settings = Settings(
        _env_file=None, broker_url=redis_url, model="m", default_model="n", models=["x"], max_queued_pairs=70, lease_s=8
    )
    info = json.dumps({"model": "m", "fingerprint": "f", "queues": []})
    with connect(settings.ledger) as connection:
        now = connection.time()[0]
        queues = {"*": 5, "rerankq.bulk": 3, "rerankq.bulk|tenant": 3, "rerankq.interactive": 2}
        connection.hset("rerankq:backlog", mapping=queues)
        connection.hset("rerankq:workers", mapping={"silent": f"{now - 20} {info}", "gone": f"{now - 30} {info}"})
    monkeypatch.setattr(collecting, "try_all", lambda settings, roles: [])
    snapshot = collect(settings)
    assert snapshot.counts is not None
    assert (snapshot.counts.pairs_waiting, snapshot.counts.max_pairs) == (5, 70)
    assert snapshot.counts.by_queue == {"rerankq.bulk": 3, "rerankq.interactive": 2}
    assert [worker.id for worker in snapshot.workers] == ["silent"]
    assert (snapshot.default_model, snapshot.default_is_set, snapshot.promised_models) == ("n", True, ["x"])
    by_default = Settings(_env_file=None, broker_url=redis_url, default_model="n")
    assert collect(by_default).default_is_set
    # Set neither here: what others call the default is right.
    assert not collect(Settings(_env_file=None, broker_url=redis_url)).default_is_set


def test_refusals_of_one_server_under_several_users_are_merged():
    users = [replace(LEDGER, refused=("ledger: publish",)), replace(LEDGER, roles=("cache",), refused=("cache: read",))]
    (one,) = merged(users)
    assert (one.roles, one.refused) == (("broker", "ledger", "cache"), ("ledger: publish", "cache: read"))
    assert len(merged([replace(one, run_id="", url=f"redis://{name}") for name in "ab"])) == 2


def test_workers_of_different_models_may_have_different_weights():
    other = RegisteredWorker("gpu1:2:b", "n", "g", ("rerankq.interactive.n", "rerankq.bulk.n"), version="1.0")
    assert wrong(replace(WELL, workers=[WORKER, other], promised_models=["m", "n"])) == []


@pytest.fixture
def doctor(monkeypatch, tmp_path) -> Callable[..., tuple[int, list[dict]]]:
    def run(**environment: str) -> tuple[int, list[dict]]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RERANKQ_")}
        done = run_forked(["doctor", "--json"], clean | environment, tmp_path, given=None, timeout=120)
        assert done.stderr == ""
        assert "secret" not in done.stdout
        return done.returncode, json.loads(done.stdout)

    return run


@contextmanager
def a_live_worker(settings: Settings, **info: object) -> Iterator[None]:
    """Somebody who gives signs of life, and does nothing else."""
    shown = {"model": "m", "fingerprint": "f", "queues": ["rerankq.interactive", "rerankq.bulk"], "device": "cpu"}
    ended = threading.Event()

    def beat(ledger: Ledger) -> None:
        ledger.ask(calls.beat("host:1:x", json.dumps(shown | info), forget_after_s=60))
        ledger.redis.set("rerankq:sweeper", "host:1:x", px=60_000)

    def live(ledger: Ledger) -> None:
        while not ended.wait(0.5):
            beat(ledger)

    with connect(settings.ledger) as connection:
        beat(ledger := Ledger(connection))
        (living := threading.Thread(target=live, args=(ledger,))).start()
        try:
            yield
        finally:
            ended.set()
            living.join()


def test_durable_server_with_a_worker_passes(redis_binary_each_version: Path, doctor: Callable):
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


def test_foreign_entries_in_the_registry_are_skipped(redis_url: str, doctor: Callable):
    settings = Settings(_env_file=None, broker_url=redis_url)
    with a_live_worker(settings):
        with connect(settings.ledger) as connection:
            connection.hset("rerankq:workers", mapping={"odd": "words", "odder": "1 [1, 2]", b"\xff": "1 {}"})
        _, found = doctor(RERANKQ_BROKER_URL=redis_url)
    assert [one["subject"] for one in found if one["subject"].startswith("worker ")] == ["worker host:1:x"]


def test_servers_that_break_the_promise_are_found(doctor: Callable):
    with EmbeddedRedis(maxmemory="64mb", maxmemory_policy="allkeys-lru") as server:
        status, found = doctor(RERANKQ_BROKER_URL=server.url)
    said = " ".join(one["said"] for one in found if one["level"] == "wrong")
    assert status == 1
    assert "drops accepted jobs" in said
    assert any("started by `rerankq up`" in one["said"] for one in found if one["level"] == "note")
    assert "no worker is running; jobs are waiting" in said


def test_unreachable_server_is_wrong_in_one_line(doctor: Callable):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    status, found = doctor(RERANKQ_BROKER_URL=f"redis://:secret@127.0.0.1:{port}/0")
    assert status == 1
    assert [one["level"] for one in found] == ["wrong"]
    assert f"redis://:***@127.0.0.1:{port}/0 does not answer" in found[0]["said"]
    # RabbitMQ carries doorbells only: what cannot be reached is told beside the ledger.
    with EmbeddedRedis(appendonly=True) as server:
        urls = {"RERANKQ_BROKER_URL": f"amqp://me:secret@127.0.0.1:{port}//", "RERANKQ_LEDGER_URL": server.url}
        status, found = doctor(**urls)
    assert any(one["subject"] == "broker" and "amqp://me:***@" in one["said"] for one in found)


def test_user_without_permissions_is_told_which_it_lacks(redis_binary_each_version: Path):
    with EmbeddedRedis(binary=redis_binary_each_version, appendonly=True) as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.execute_command("ACL", "SETUSER", "weak", "on", ">weak", "~*", "resetchannels", "-@all",
                                  "+@read", "+@connection", "+select", "+time", "+info", "+hello")  # fmt: skip
        url = server.url.replace(":" + server.url.split(":")[2].split("@")[0], "weak:weak")
        snapshot = collect(Settings(_env_file=None, broker_url=url, ledger_url=url.replace("/0", "/1")))
    assert snapshot.counts is not None, "what it may see is told"
    (found,) = snapshot.servers
    assert found.refused == ("ledger: run scripts", "ledger: write", "ledger: subscribe", "ledger: publish")
    assert found.fsync is None


def test_ledger_that_answers_but_refuses_writes_is_found(redis_binary_each_version: Path, doctor: Callable):
    with EmbeddedRedis(binary=redis_binary_each_version, appendonly=True) as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.config_set("min-replicas-to-write", 1)
        status, found = doctor(RERANKQ_BROKER_URL=server.url)
        said = [one["said"] for one in found if one["subject"] == "ledger" and one["level"] == "wrong"]
        assert said == ["a write failed: NOREPLICAS Not enough good replicas to write."]
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


def test_lease_that_expired_just_now_is_not_counted_as_lost(lost_job: Settings):
    # The next sweep hands it on, or the one after an outage.
    with connect(lost_job.ledger) as connection:
        now = connection.time()[0]
        connection.zadd("rerankq:running", {"lapsed": now - 1, "running": now + 60})
    # Sweeps judge it within 23 s: a busy machine may take seconds to look.
    work = collect(lost_job.model_copy(update={"lease_s": 10})).counts
    assert work is not None
    assert (work.expired, work.running) == (1, 3)


def test_lost_leases_and_dead_jobs_are_counted(lost_job: Settings):
    snapshot = collect(lost_job)
    assert snapshot.counts is not None
    assert (snapshot.counts.expired, snapshot.counts.dead, snapshot.counts.sweeper) == (1, 1, False)
