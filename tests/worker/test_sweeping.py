"""Sweeping: who may judge and when, doorbells that were lost, the registry, and a loop that nothing ends but stop."""

import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq import RerankJob
from rerankq.client.routing import Route
from rerankq.client.submission import prepare
from rerankq.errors import BrokerUnavailable
from rerankq.ledger import Claim, Counted, Doorbell, LedgerLimits, Swept, calls, connect
from rerankq.ledger.lease_policy import BREAK_S, LeasePolicy, Server, Watch
from rerankq.ledger.runner import Ledger
from rerankq.settings import Settings
from rerankq_worker.crash_record import CrashRecords
from rerankq_worker.processes import mark_of
from rerankq_worker.sweeping import SEND_AT_ONCE, CancelListener, Sweeper

WAIT_S = 20  # a test that hangs ends here; none that works waits so long
QUEUES = ("rerankq.interactive", "rerankq.bulk")


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A ledger, a sweeper on it, and all doorbells that it rang."""

    def __init__(self, url: str, folder: Path, **limits: float) -> None:
        self.records = CrashRecords(url, folder / "records")
        self.settings = Settings(broker_url=url, model="stub", lease_s=5)
        self.limits: LedgerLimits = LedgerLimits.of(self.settings)._replace(**limits)
        self.ledger = Ledger(connect(self.settings.ledger))
        self.server = Server("a run", 1e6)
        self.ledger.server = lambda: self.server
        self.clock = Clock()
        self.sent: list[Doorbell] = []
        self.in_broker: dict[str, int] | None = {}
        self.asked: list[str] = []
        self.living = True
        self.ended: set[str] = set()
        self.sweeper = self.another("w1")

    def another(self, worker: str, **options: object) -> Sweeper:
        return Sweeper(
            self.ledger,
            self.limits,
            self,
            self,
            self.records,
            worker=worker,
            queues=QUEUES,
            describe=lambda: {"model": "stub", "fingerprint": "f"},
            can_work=lambda: self.living,
            ended=lambda mark: mark in self.ended,
            **{"clock": self.clock, **options},
        )

    def ask(self, queues: Sequence[str], at: float) -> None:
        self.asked += queues
        self.counted = Counted(at, {name: self.in_broker.get(name, 0) for name in queues})

    def take(self) -> Counted:
        counted, self.counted = self.counted, Counted()
        return counted

    counted = Counted()

    def send(self, doorbells: Sequence[Doorbell]) -> None:
        self.sent += doorbells

    def submit(self, *names: str, tenant: str = "", priority: str = "interactive") -> None:
        for name in names:
            job = RerankJob(id=name, query="q", chunks=["x"], tenant=tenant, priority=priority)
            self.ledger.ask(calls.submit(prepare(job, Route("stub", (), ""), self.settings), self.limits))

    def claim(self, name: str, owner: str = "w2") -> Claim:
        claim = self.ledger.ask(calls.claim(name, owner, self.limits))
        assert isinstance(claim, Claim)
        return claim

    def state(self, name: str) -> str:
        return self.ledger.ask(calls.snapshot(name, self.limits)).status.state

    def now(self) -> float:
        clock = self.ledger.redis.time()
        return clock[0] + clock[1] / 1e6

    def lapse(self, name: str) -> None:
        self.ledger.redis.zadd("rerankq:running", {name: self.now() - 1})

    def age_doorbell(self, name: str, seconds: float, queue: str = QUEUES[0]) -> None:
        self.ledger.redis.zadd(f"rerankq:sent:{queue}", {name: self.now() - seconds})

    def names_sent(self) -> list[str]:
        return [doorbell.id for doorbell in self.sent]


@pytest.fixture
def world(redis_url_each_version: str, tmp_path: Path) -> Iterator[World]:
    world = World(redis_url_each_version, tmp_path)
    yield world
    world.ledger.redis.close()


def test_a_job_whose_lease_lapsed_is_queued_again_and_its_doorbell_sent(world: World):
    world.submit("a")
    world.claim("a")
    world.lapse("a")
    assert world.sweeper.sweep().lapsed == 1
    assert world.state("a") == "queued"
    assert world.names_sent() == ["a"]
    assert world.claim("a", "w3").suspect


def breaks(how: str, world: World) -> None:
    """What keeps living workers from renewing in time."""
    if how == "a pause of its own":
        world.clock.now += world.limits.lease_s + 1
    elif how == "another server":
        world.server = Server("a replica that was promoted", 1e6)
    elif how == "a clock set forward":
        # As this one would see it: less time passed than the ledger tells.
        world.clock.now -= 3_600


@pytest.mark.parametrize("how", ["a pause of its own", "another server", "a clock set forward"])
def test_leases_are_not_judged_for_one_lease_after_a_break(world: World, how: str):
    world.submit("a")
    world.claim("a")
    world.sweeper.sweep()
    breaks(how, world)
    for _ in range(5):
        world.lapse("a")
        assert world.sweeper.sweep().lapsed == 0, "its worker may have been cut off as we were"
        world.clock.now += world.limits.lease_s / 5
    world.lapse("a")
    world.clock.now += 0.1
    assert world.sweeper.sweep().lapsed == 1


def test_leases_are_not_judged_until_the_server_has_run_for_one_lease(world: World):
    world.submit("a")
    world.claim("a")
    world.lapse("a")
    world.server = Server("young", world.limits.lease_s - 1)
    assert world.sweeper.sweep().lapsed == 0
    world.lapse("a")
    world.clock.now += 1.1
    assert world.sweeper.sweep().lapsed == 1


def test_a_server_whose_clock_was_set_back_counts_as_new_for_one_lease_only(world: World):
    world.submit("a")
    world.claim("a")
    world.lapse("a")
    world.server = Server("up for less than nothing", -3_590)
    assert world.sweeper.sweep().lapsed == 1


@given(
    lease_s=st.sampled_from([1, 8, 60]),
    seen=st.lists(
        st.tuples(st.floats(0.1, 20), st.floats(0, 3), st.floats(-5_000, 5_000), st.sampled_from(["a", "a", "a", "b"])),
        max_size=20,
    ),
)
def test_a_watch_is_as_long_as_its_unbroken_end(lease_s: float, seen: list):
    watch, now, ledger, seen = Watch(LeasePolicy(lease_s)), 0.0, 1e9, []
    for passed, answers_in, step, run in seen:
        asked, now, ledger = now + passed, now + passed + answers_in, ledger + passed + answers_in + step
        watch = watch.saw(asked, now, ledger_now=ledger, server=Server(run, 100.0))
        seen.append((asked, now, ledger, run))
    since = seen[0][1] - 100 if seen else -math.inf
    for (before, _, ledger_before, run_before), (_, after, ledger_after, run) in itertools.pairwise(seen):
        stepped = ledger_after - ledger_before > after - before + BREAK_S
        if run != run_before or after - before > max(BREAK_S, 2 / 3 * lease_s) or stepped:
            since = after
    assert watch.watched_s(now) == pytest.approx(now - since)
    assert watch.lost(now).watched_s(now + 2) == pytest.approx(2)


@pytest.mark.parametrize(
    ("passed", "step", "broke"),
    [
        (5.3, 0.0, False),
        (5.4, 0.0, True),
        (1.0, BREAK_S - 0.1, False),
        (1.0, BREAK_S + 0.1, True),
        (1.0, -900.0, False),
    ],
)
def test_a_watch_is_broken_by_what_keeps_a_living_worker_from_renewing(passed: float, step: float, broke: bool):
    watch = Watch(LeasePolicy(8)).saw(0.0, 0.0, ledger_now=1e9, server=Server("a", 100.0))
    watch = watch.saw(passed, passed, ledger_now=1e9 + passed + step, server=Server("a", 100.0 + passed))
    assert watch.watched_s(passed) == pytest.approx(0.0 if broke else 100.0 + passed)


def test_a_worker_that_cannot_work_sends_no_heartbeat_and_judges_no_lease(world: World):
    world.submit("a")
    world.claim("a")
    world.lapse("a")
    world.living = False
    assert world.sweeper.sweep() == Swept()
    assert world.ledger.workers() == []
    world.living = True
    assert world.sweeper.sweep().lapsed == 1


def register(world: World, name: str, silent_s: float, mark: str = "its mark") -> None:
    said = json.dumps({"model": "stub", "fingerprint": "f", "queues": list(QUEUES), "process": mark})
    world.ledger.redis.hset("rerankq:workers", name, f"{world.now() - silent_s:.6f} {said}")


def test_a_silent_worker_whose_process_has_ended_is_signed_off_by_its_neighbour(world: World):
    world.ended = {"its mark"}
    register(world, "silent", 2.5)
    register(world, "just now", 1)
    register(world, "elsewhere", 2.5, mark="no mark")
    world.sweeper.sweep()
    assert {worker.id for worker in world.ledger.workers()} == {"w1", "just now", "elsewhere"}


def suspects(world: World) -> dict[str, int]:
    return {
        key.decode().removeprefix("rerankq:job:"): int(world.ledger.redis.hget(key, "suspect"))
        for key in world.ledger.redis.keys("rerankq:job:*")
    }


def crash(world: World, *names: str, waiting: Sequence[str], owner: str = "w2") -> Path:
    """Let a worker claim jobs and end; answers the file with its record."""
    world.submit(*names)
    record = world.records.create(owner, 8)
    for name in names:
        slot = record.begin(name, world.claim(name, owner).fence)
        slot.set_working(name not in waiting)
    record.close()  # jobs are left in it
    return record._path


def test_jobs_of_an_ended_worker_run_again_at_once_and_those_that_only_waited_are_no_suspects(world: World):
    path = crash(world, "works", "waits", "too", waiting=["waits", "too"])
    register(world, "w2", 0)
    world.submit("elsewhere")
    world.claim("elsewhere", "w3")
    world.sweeper.sweep()
    assert {name: world.state(name) for name in ("works", "waits", "too")} == dict.fromkeys(
        ("works", "waits", "too"), "queued"
    )
    assert suspects(world) == {"works": 1, "waits": 0, "too": 0, "elsewhere": 0}
    assert world.state("elsewhere") == "running"
    assert sorted(world.names_sent()) == ["too", "waits", "works"]
    assert {worker.id for worker in world.ledger.workers()} == {"w1"}
    assert not path.exists()


@pytest.mark.parametrize("how", ["damaged", "gone", "of another claim"])
def test_all_jobs_of_an_ended_worker_are_suspects_at_once_where_its_record_does_not_name_them(world: World, how: str):
    path = crash(world, "a", "b", waiting=["a", "b"])
    if how == "damaged":
        path.write_bytes(b"\0" + path.read_bytes()[1:])
    elif how == "gone":
        path.unlink()
        world.ended = {"its mark"}
        register(world, "w2", 3)
    else:
        for name in "ab":
            world.ledger.redis.hincrby(f"rerankq:job:{name}", "fence", 1)
    world.sweeper.sweep()
    assert suspects(world) == {"a": 1, "b": 1}
    assert world.state("a") == world.state("b") == "queued"
    assert not path.exists()


def test_a_record_is_kept_until_the_ledger_has_been_told(world: World, monkeypatch: pytest.MonkeyPatch):
    path = crash(world, "a", waiting=["a"])
    ask = world.ledger.ask

    def away(call: calls.Call) -> object:
        if call.script == "recover":
            raise BrokerUnavailable("away")
        return ask(call)

    with monkeypatch.context() as patched:
        patched.setattr(world.ledger, "ask", away)
        with pytest.raises(BrokerUnavailable):
            world.sweeper.sweep()
    assert path.exists()
    world.sweeper.sweep()
    assert suspects(world) == {"a": 0}


def test_two_neighbours_that_find_the_same_record_suspect_nobody_else(world: World):
    crash(world, "works", "waits", waiting=["waits"])
    for sweeper in (world.sweeper, world.another("w3")):
        sweeper.sweep()
        world.records.ended = lambda: ["w2"]  # as if it had looked before the first removed it
    assert suspects(world) == {"works": 1, "waits": 0}


def test_a_heartbeat_forgets_workers_after_the_time_of_the_lease_policy(world: World):
    forget_after_s = world.limits.lease_policy.forget_after_s
    register(world, "remembered", forget_after_s - 5, mark="")
    register(world, "forgotten", forget_after_s + 5, mark="")
    world.sweeper.beat()
    assert {worker.id for worker in world.ledger.workers()} == {"w1", "remembered"}
    said = json.loads(world.ledger.redis.hget("rerankq:workers", "w1").partition(b" ")[2])
    assert said["forget_after_s"] == forget_after_s


def test_a_watch_begins_when_the_heartbeat_was_answered_and_not_when_it_was_sent(world: World, monkeypatch):
    world.submit("a")
    world.claim("a")
    world.sweeper.sweep()
    beat, slow = world.sweeper.beat, [2.0]

    def beat_slowly() -> float:
        world.clock.now += slow.pop() if slow else 0
        return beat()

    monkeypatch.setattr(world.sweeper, "beat", beat_slowly)
    world.server = Server("a replica that was promoted", 1e6)
    world.sweeper.sweep()
    for _ in range(4):
        world.clock.now += 1
        world.lapse("a")
        assert world.sweeper.sweep().lapsed == 0, "a lease of 5 s has its whole length once more"
    world.clock.now += 1.1
    world.lapse("a")
    assert world.sweeper.sweep().lapsed == 1


def test_a_sweeper_that_was_woken_waits_again_once_it_has_sent_doorbells(world: World, monkeypatch):
    woken: list[bool] = []

    def wait(seconds: float) -> None:
        assert seconds > 0
        woken.append(world.sweeper._wake.is_set())
        world.sweeper._stopped = len(woken) == 3

    monkeypatch.setattr(world.sweeper._wake, "wait", wait)
    world.sweeper.refill_window()
    world.sweeper._run()
    assert woken == [True, False, False]


def test_two_sweepers_judge_a_lease_once(world: World):
    world.submit("a")
    world.claim("a")
    world.sweeper.sweep()
    world.lapse("a")
    assert world.another("w3").sweep().lapsed == 0
    assert world.sweeper.sweep().lapsed == 1


def test_a_doorbell_that_the_broker_lost_is_sent_again_however_busy_the_workers_are(world: World):
    world.submit("a")
    assert world.sweeper.sweep().doorbells == 0
    assert world.asked == [], "its doorbell was sent just now"
    world.age_doorbell("a", 4)
    assert world.sweeper.sweep().doorbells == 0, "first the broker is asked"
    assert world.asked == [QUEUES[0]]
    assert world.sweeper.sweep().doorbells == 1
    assert world.names_sent() == ["a"]
    assert world.sweeper.sweep().doorbells == 0, "its doorbell was sent just now"


def test_a_doorbell_that_the_broker_holds_is_not_sent_again_however_long_it_waits(world: World):
    world.submit("a")
    world.age_doorbell("a", 1_000)
    world.in_broker = {QUEUES[0]: 1}
    for _ in range(3):
        assert world.sweeper.sweep().doorbells == 0


def test_a_backlog_longer_than_a_round_is_sent_round_by_round(redis_url: str, tmp_path: Path):
    world = World(redis_url, tmp_path, doorbell_window=1)
    names = [f"j{number}" for number in range(2 * SEND_AT_ONCE + 50)]
    world.submit(*names)
    world.limits = world.limits._replace(doorbell_window=2 * SEND_AT_ONCE + 10)
    world.another("w1").sweep()
    assert world.names_sent() == names[1 : 2 * SEND_AT_ONCE + 10]
    world.ledger.redis.close()


def test_doorbells_of_tenants_are_sent_in_turn(redis_url: str, tmp_path: Path):
    world = World(redis_url, tmp_path, doorbell_window=4)
    world.submit(*[f"flood-{number}" for number in range(40)], tenant="flood")
    world.submit(*[f"small-{number}" for number in range(3)], tenant="small")
    world.sweeper.sweep()
    assert {f"small-{number}" for number in range(3)} <= {
        name.decode() for name in world.ledger.redis.zrange(f"rerankq:sent:{QUEUES[0]}:small", 0, -1)
    }
    assert world.ledger.redis.zcard(f"rerankq:sent:{QUEUES[0]}:flood") == 4
    world.ledger.redis.close()


def test_a_heartbeat_carries_the_description_and_the_process_of_its_worker(world: World):
    world.sweeper.beat()
    (worker,) = world.ledger.workers()
    assert (worker.id, worker.model, worker.fingerprint, worker.queues) == ("w1", "stub", "f", QUEUES)
    assert worker.age_s < 5
    assert worker.process == mark_of(os.getpid())


def running(sweeper: Sweeper) -> Sweeper:
    sweeper.start()
    return sweeper


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sweeper, int], threading.Event]:
    """Say when a sweeper has swept so many times without an error."""

    def count(sweeper: Sweeper, wanted: int) -> threading.Event:
        done, sweep, left = threading.Event(), sweeper.sweep, [wanted]

        def sweep_and_count() -> object:
            swept = sweep()
            left[0] -= 1
            if not left[0]:
                done.set()
            return swept

        sweeper.sweep = sweep_and_count
        return done

    monkeypatch.setattr("rerankq_worker.sweeping.SWEEP_EVERY_S", 0.01)
    return count


def test_the_sweeping_loop_survives_an_outage_of_the_ledger_and_any_bug(
    world: World, turns: Callable, monkeypatch, caplog
):
    errors: list[Exception] = [*[ConnectionError("gone")] * 5, ZeroDivisionError()]
    evalsha = world.ledger.redis.evalsha

    def sometimes(*args: object) -> object:
        if errors:
            raise errors.pop(0)
        return evalsha(*args)

    monkeypatch.setattr(world.ledger.redis, "evalsha", sometimes)
    sweeper = world.another("w1", clock=time.monotonic)
    done = turns(sweeper, 3)
    running(sweeper)
    assert done.wait(WAIT_S)
    sweeper.stop()
    said = [record.message for record in caplog.records if "sweep" in record.message]
    assert len([one for one in said if one.startswith("cannot sweep the ledger")]) == 1, "an outage is logged once"
    assert any("reached again" in one for one in said)


def test_an_outage_postpones_judging(world: World, turns: Callable, monkeypatch: pytest.MonkeyPatch):
    world.submit("a")
    world.claim("a")
    world.lapse("a")
    sweeper = world.another("w1", clock=time.monotonic)
    away, beat = [True], sweeper.beat

    def beat_sometimes() -> float:
        if away:
            away.pop()
            raise BrokerUnavailable("away")
        return beat()

    monkeypatch.setattr(sweeper, "beat", beat_sometimes)
    done = turns(sweeper, 3)
    running(sweeper)
    assert done.wait(WAIT_S)
    sweeper.stop()
    assert world.state("a") == "running", "leases lapsed in an outage though their workers live"


def test_doorbells_are_sent_as_soon_as_a_claim_says_that_the_window_has_a_gap(world: World):
    sweeper = world.another("w1", clock=time.monotonic)
    rang = threading.Event()
    swept = threading.Event()
    sweep = sweeper.sweep

    def sweep_once() -> object:
        done = sweep()
        swept.set()
        return done

    def send(doorbells: Sequence[Doorbell]) -> None:
        world.sent += doorbells
        rang.set()

    world.send = send
    sweeper.sweep = sweep_once
    running(sweeper)
    assert swept.wait(WAIT_S)
    sweeper.sweep = lambda: None  # doorbells of now on are not sent by a sweep
    world.submit("a")
    world.ledger.redis.zrem(f"rerankq:sent:{QUEUES[0]}", "a")
    world.ledger.redis.zadd(f"rerankq:waiting:{QUEUES[0]}", {"a": 1})
    sweeper.refill_window()
    assert rang.wait(WAIT_S)
    sweeper.stop()
    assert world.names_sent() == ["a"]


def test_a_stopping_sweeper_signs_off_and_does_not_wait_for_a_lost_ledger(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    running(world.sweeper)
    world.sweeper.stop()
    assert world.ledger.workers() == []
    other = running(world.another("w2"))

    def gone(*_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(world.ledger.redis, "evalsha", gone)
    other.stop()
    assert not other._thread.is_alive()


# -- cancellations ----------------------------------------------------------------------------------------------------


class Received:
    def __init__(self) -> None:
        self.claims: list[tuple[str, int]] = []
        self.changed = threading.Condition()
        self.errors: list[Exception] = []

    def __call__(self, claims: list[tuple[str, int]]) -> None:
        with self.changed:
            self.claims += claims
            self.changed.notify_all()
        if self.errors:
            raise self.errors.pop()

    def wait_for(self, world: World, name: str) -> None:
        """Publish it until it is received: pub/sub forgets what had no subscriber."""
        channel = f"{world.limits.channel}:cancel"
        for _ in range(WAIT_S * 20):
            world.ledger.redis.publish(channel, f"{name} 7")
            with self.changed:
                if self.changed.wait_for(lambda: (name, 7) in self.claims, 0.05):
                    return
        pytest.fail("never received")


@pytest.fixture
def received(world: World) -> Iterator[Received]:
    received = Received()
    listener = CancelListener(world.ledger, world.limits, received)
    listener.start()
    yield received
    listener.stop()
    assert not listener._thread.is_alive()


def test_the_cancellation_of_a_running_job_is_received(world: World, received: Received):
    received.wait_for(world, "ready")
    world.submit("a")
    claim = world.claim("a")
    world.ledger.ask(calls.cancel("a", world.limits))
    with received.changed:
        assert received.changed.wait_for(lambda: ("a", claim.fence) in received.claims, WAIT_S)


def test_malformed_cancellations_are_skipped(world: World, received: Received, caplog: pytest.LogCaptureFixture):
    received.wait_for(world, "before")
    for said in (b"", b"a", b"a b", b"a 1 2", b"\xff\xfe 1", b"x" * 100_000):
        world.ledger.redis.publish(f"{world.limits.channel}:cancel", said)
    received.wait_for(world, "after")
    assert {name for name, _ in received.claims} == {"before", "after"}
    assert max(map(len, caplog.messages)) < 1_000


def test_the_listener_goes_on_after_its_connection_was_cut(world: World, received: Received):
    received.wait_for(world, "before")
    for client in world.ledger.redis.client_list(_type="pubsub"):
        world.ledger.redis.client_kill_filter(_id=client["id"])
    received.wait_for(world, "after")


def test_the_listener_goes_on_after_a_bug_in_its_callback(world: World, received: Received):
    received.errors = [ZeroDivisionError()]
    received.wait_for(world, "stumbled")
    received.wait_for(world, "after")
