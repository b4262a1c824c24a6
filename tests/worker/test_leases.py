"""Leases: renewed while the device lives, let lapse when it hangs, and work on what is no longer ours is stopped."""

import re
import threading
from collections.abc import Callable, Iterator

import pytest

from rerankq import RerankJob
from rerankq.client.routing import Route
from rerankq.client.submission import prepare
from rerankq.ledger import Claim, LedgerLimits, calls, connect
from rerankq.ledger.lease_policy import BATCH_TIME_FACTOR, BREAK_S, PATIENCE_S, LeasePolicy
from rerankq.ledger.runner import Ledger
from rerankq.local.embedded import EmbeddedRedis
from rerankq.settings import Settings
from rerankq_worker import leases as leases_module
from rerankq_worker.leases import Leases
from rerankq_worker.work import NotRecorded

WAIT_S = 20  # a test that hangs ends here; none that works waits so long


class Work:
    """A job being scored, as leases see it."""

    def __init__(self, pairs_done: int = 0) -> None:
        self.pairs_done = pairs_done
        self.cancelled = threading.Event()
        self.activity = NotRecorded()

    def cancel(self) -> None:
        self.cancelled.set()


class World:
    """A ledger with leases on it, and what the device is said to do."""

    def __init__(self, url: str, lease_s: float = 30) -> None:
        self.settings = Settings(broker_url=url, model="stub", lease_s=lease_s)
        self.limits: LedgerLimits = LedgerLimits.of(self.settings)
        self.ledger = Ledger(connect(self.settings.ledger))
        self.device_hangs = False
        self.gave_up = threading.Event()
        self.leases = Leases(self.ledger, self.limits, device_hangs=lambda: self.device_hangs, give_up=self.gave_up.set)

    def claimed(self, name: str, owner: str = "w1") -> Claim:
        new_job = prepare(RerankJob(id=name, query="q", chunks=["x"] * 5), Route("stub", (), ""), self.settings)
        self.ledger.ask(calls.submit(new_job, self.limits))
        claim = self.ledger.ask(calls.claim(name, owner, self.limits))
        assert isinstance(claim, Claim)
        return claim

    def held(self, name: str) -> tuple[Claim, Work]:
        claim, work = self.claimed(name), Work()
        self.leases.hold(name, claim.fence, work)
        return claim, work

    def lease_of(self, name: str) -> float | None:
        """Seconds that are left of it."""
        clock = self.ledger.redis.time()
        ends = self.ledger.redis.zscore("rerankq:running", name)
        return None if ends is None else ends - clock[0] - clock[1] / 1e6

    def shorten(self, name: str, seconds: float) -> None:
        clock = self.ledger.redis.time()
        self.ledger.redis.zadd("rerankq:running", {name: clock[0] + clock[1] / 1e6 + seconds})


@pytest.fixture
def world(redis_url_each_version: str) -> Iterator[World]:
    world = World(redis_url_each_version)
    yield world
    world.leases.stop()
    world.ledger.redis.close()


def test_a_renewed_lease_is_full_again_and_records_the_progress(world: World):
    _, work = world.held("a")
    world.shorten("a", 1)
    work.pairs_done = 3
    world.leases.renew()
    assert world.lease_of("a") > 25
    assert world.ledger.ask(calls.snapshot("a", world.limits)).status.pairs_done == 3
    assert not work.cancelled.is_set()


def test_a_released_lease_is_not_renewed(world: World):
    claim, work = world.held("a")
    world.leases.release("a", claim.fence)
    world.shorten("a", 1)
    world.leases.renew()
    assert world.lease_of("a") <= 1
    assert world.leases.stop() == []
    assert not work.cancelled.is_set()


def test_work_on_a_job_whose_lease_was_lost_is_stopped_and_its_neighbour_goes_on(world: World):
    claim, lost = world.held("lost")
    _, kept = world.held("kept")
    world.ledger.ask(calls.hand_back([("lost", claim.fence)]))
    world.ledger.ask(calls.claim("lost", "w2", world.limits))
    world.leases.renew()
    assert lost.cancelled.is_set()
    assert not kept.cancelled.is_set()


def test_a_cancelled_job_missed_on_the_channel_is_noticed_at_the_next_renewal(world: World):
    _, work = world.held("a")
    world.ledger.ask(calls.cancel("a", world.limits))
    world.leases.renew()
    assert work.cancelled.is_set()


def test_an_old_fence_releases_nothing(world: World):
    claim, old = world.held("a")
    world.ledger.ask(calls.hand_back([("a", claim.fence)]))
    again = world.ledger.ask(calls.claim("a", "w1", world.limits))
    new = Work()
    world.leases.hold("a", again.fence, new)
    world.leases.release("a", claim.fence)
    assert world.leases.stop() == [("a", again.fence)]
    world.leases.renew()
    assert not new.cancelled.is_set()
    assert old.cancelled.is_set(), "its claim ended, or there would be no later one"


def test_a_job_that_ended_while_its_lease_was_being_renewed_stops_no_later_claim(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    claim, old = world.held("a")
    new, ask = Work(), world.ledger.ask

    def ask_and_meanwhile(call: object) -> object:
        world.leases.release("a", claim.fence)
        world.leases.hold("a", claim.fence + 1, new)
        ask(calls.hand_back([("a", claim.fence)]))
        return ask(call)

    monkeypatch.setattr(world.ledger, "ask", ask_and_meanwhile)
    world.leases.renew()
    assert not new.cancelled.is_set()
    assert not old.cancelled.is_set()


def test_a_job_cancelled_and_at_once_submitted_again_is_worked_on_once(world: World):
    _, old = world.held("a")
    world.ledger.ask(calls.cancel("a", world.limits))
    claim, new = world.held("a")
    assert old.cancelled.is_set(), "whether or not the cancellation was received"
    assert not new.cancelled.is_set()
    assert world.leases.stop() == [("a", claim.fence)]


def test_cancelling_stops_held_work_and_no_other(world: World):
    claim, one = world.held("one")
    _, other = world.held("other")
    world.leases.cancel([("one", claim.fence), ("never held", 1)])
    assert one.cancelled.is_set()
    assert not other.cancelled.is_set()


def test_a_late_cancellation_leaves_a_newer_claim_of_the_same_id_alone(world: World):
    claim, _ = world.held("a")
    world.ledger.ask(calls.cancel("a", world.limits))
    world.leases.release("a", claim.fence)
    again, new = world.held("a")
    assert again.fence > claim.fence
    world.leases.cancel([("a", claim.fence)])
    assert not new.cancelled.is_set()


def test_stopping_answers_the_claims_that_are_still_held(world: World):
    first, _ = world.held("a")
    second, _ = world.held("b")
    world.leases.start()
    assert sorted(world.leases.stop()) == [("a", first.fence), ("b", second.fence)]
    assert world.ledger.ask(calls.hand_back(world.leases.stop())) == 2


@pytest.fixture
def lively(redis_url: str) -> Iterator[World]:
    """Leases so short that the timer turns many times in a test."""
    world = World(redis_url, lease_s=0.3)
    yield world
    world.leases.stop()
    world.ledger.redis.close()


def renewed(world: World, name: str) -> threading.Event:
    """Set when this job's lease is renewed next."""
    seen, renew = threading.Event(), world.leases.renew

    def renew_and_tell() -> None:
        renew()
        if name in world.leases._held:
            seen.set()

    world.leases.renew = renew_and_tell
    return seen


def test_the_timer_renews_leases(lively: World):
    lively.held("a")
    seen = renewed(lively, "a")
    lively.leases.start()
    assert seen.wait(WAIT_S)
    assert lively.lease_of("a") is not None


@pytest.mark.parametrize("lease_s", [0.3, 8, 60])
def test_the_timer_renews_so_often_that_one_renewal_may_fail(redis_url: str, monkeypatch, lease_s: float):
    world, waits = World(redis_url, lease_s), []
    stopped = world.leases._stopped
    monkeypatch.setattr(stopped, "wait", lambda seconds: waits.append(seconds) or len(waits) == 3)
    world.leases._run()
    assert waits == [pytest.approx(min(lease_s / 3, 1.0))] * 3
    assert 2 * LeasePolicy(lease_s).renew_every_s < lease_s
    world.ledger.redis.close()


def test_leases_of_a_hanging_device_lapse_and_then_it_is_given_up(lively: World):
    lively.held("a")
    lively.device_hangs = True
    lively.leases.start()
    assert lively.gave_up.wait(WAIT_S)
    assert lively.lease_of("a") < 0, "not before the leases have lapsed"


def test_jobs_of_a_hanging_device_that_only_wait_are_handed_back_at_once_unsuspected(
    lively: World, wait_until: Callable
):
    _, on_device = lively.held("on-device")
    _, waits = lively.held("waits")
    waits.activity.at_work = False
    lively.device_hangs = True
    lively.leases.start()
    wait_until(lambda: lively.lease_of("waits") is None)
    assert waits.cancelled.is_set()
    assert lively.ledger.redis.hmget("rerankq:job:waits", "state", "suspect") == [b"queued", b"0"]
    assert lively.gave_up.wait(WAIT_S)
    assert not on_device.cancelled.is_set()
    assert lively.lease_of("on-device") < 0


def test_a_device_that_goes_on_after_a_while_has_its_leases_renewed(lively: World, monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(leases_module.time, "monotonic", lambda: clock[0])
    lively.device_hangs = True
    assert lively.leases._hangs()
    lively.device_hangs = False
    assert not lively.leases._hangs()
    clock[0] += 10
    lively.device_hangs = True
    assert lively.leases._hangs()
    assert not lively.gave_up.is_set(), "it hangs since just now, not since the first time"


def test_a_device_has_a_minute_more_after_a_pause_of_its_process(lively: World, monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(leases_module.time, "monotonic", lambda: clock[0])
    lively.device_hangs = True
    for seconds in (lively.limits.lease_s / 3 + 1, lively.limits.lease_s + BREAK_S):
        lively.leases._note_pause(slept_for=seconds)
        assert lively.leases._hangs(), "a busy machine is no pause"
    lively.leases._note_pause(slept_for=3_600)
    assert not lively.leases._hangs()
    assert not lively.leases.hung
    clock[0] += PATIENCE_S - 1
    assert not lively.leases._hangs()
    clock[0] += 1
    assert lively.leases._hangs()
    assert lively.leases.hung


def test_the_timer_survives_an_outage_of_the_ledger_and_any_bug(
    lively: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    lively.held("a")
    errors: list[Exception] = [*(ConnectionError("gone") for _ in range(3)), ZeroDivisionError()]
    evalsha = lively.ledger.redis.evalsha

    def sometimes(*args: object) -> object:
        if errors:
            raise errors.pop(0)
        return evalsha(*args)

    monkeypatch.setattr(lively.ledger.redis, "evalsha", sometimes)
    seen = renewed(lively, "a")
    lively.leases.start()
    assert seen.wait(WAIT_S)
    assert errors == []
    lively.leases.stop()
    said = [re.split("[:,]", one.getMessage())[0] for one in caplog.records if one.levelname == "WARNING"]
    assert said == ["cannot renew leases", "leases are renewed again"], "an outage is logged once"


def test_leases_survive_a_server_that_was_started_again_empty():
    with EmbeddedRedis() as server:
        world = World(server.url)
        _, work = world.held("a")
        world.ledger.redis.flushall()
        world.ledger.redis.script_flush()
        world.leases.renew()
        assert work.cancelled.is_set(), "the ledger knows nothing of it: it is no longer ours"
        world.ledger.redis.close()


@pytest.mark.parametrize(
    ("running_s", "predicted_s", "hung"),
    [
        (None, 0, False),
        (None, 1e9, False),
        (PATIENCE_S, 0, False),
        (PATIENCE_S + 0.1, 0, True),
        (PATIENCE_S + 0.1, PATIENCE_S, False),
        (BATCH_TIME_FACTOR * PATIENCE_S + 0.1, PATIENCE_S, True),
    ],
)
def test_a_batch_hangs_when_it_takes_ten_times_its_time_and_never_before_a_minute(running_s, predicted_s, hung):
    assert LeasePolicy(8).hangs(running_s, predicted_s) == hung


@pytest.mark.parametrize(("lease_s", "seconds"), [(0.5, 60), (6, 60), (8, 80), (60, 600)])
def test_the_registry_forgets_a_worker_after_ten_leases_and_never_before_a_minute(lease_s, seconds):
    assert LeasePolicy(lease_s).forget_after_s == seconds
