"""The worker in this process, on a real ledger: how each job ends, and that every slot and lease comes back."""

import importlib
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from celery import signals
from celery.exceptions import Ignore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rerankq import JobCancelled, JobDead, JobExpired, RerankJob
from rerankq.broker.celery_app import make_app
from rerankq.client.routing import Route, queue_name, suffix_of
from rerankq.client.submission import prepare
from rerankq.errors import BrokerUnavailable, JobRejected, JobTooLarge, SettingsInvalid
from rerankq.ledger import Deferred, Doorbell, calls
from rerankq.settings import Settings
from rerankq_worker.engine import EngineDied, PairFailed

WAIT_S = 20  # a test that hangs ends here; none that works waits so long
QUEUES = ("rerankq.interactive", "rerankq.bulk")


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    """The worker's program, imported as Celery does it; no broker is asked yet."""
    with pytest.MonkeyPatch.context() as patched:
        for name in [name for name in os.environ if name.startswith("RERANKQ_")]:
            patched.delenv(name)
        patched.setenv("RERANKQ_BROKER_URL", "redis://127.0.0.1:1/0")
        patched.setenv("RERANKQ_MODEL", "stub")
        yield importlib.import_module("rerankq_worker.tasks")


@pytest.fixture
def worker(program: Any, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A worker that is not started: nothing happens in it but what a test does."""
    settings = Settings(broker_url=redis_url, model="stub:0", default_model="stub:0", concurrency=4, lease_s=30)
    made = program.Worker(settings, make_app(settings))
    monkeypatch.setattr(program, "worker", made)
    monkeypatch.setattr(program, "TELL_AGAIN_S", 0.01)
    yield made
    assert made.leases.stop() == [], "every lease was let go of"
    made.stop()
    made.ledger.redis.close()


def submit(worker: Any, name: str = "a", chunks: tuple[str, ...] = ("one", "two"), **fields: Any) -> str:
    job = RerankJob(id=name, query="q", chunks=list(chunks), fusion="model", **fields)
    place = Route(job.model or worker.model, (), "")
    worker.ledger.ask(calls.submit(prepare(job, place, worker.settings), worker.limits))
    return name


def snapshot(worker: Any, name: str = "a") -> Any:
    return worker.ledger.ask(calls.snapshot(name, worker.limits, with_ranking=True))


def fence(worker: Any, name: str = "a") -> int:
    return int(worker.ledger.redis.hget(f"rerankq:job:{name}", "fence"))


def state(worker: Any, name: str = "a") -> str:
    return snapshot(worker, name).status.state


def test_a_job_is_ranked_and_told_in_a_few_words(worker: Any):
    told = worker.rerank(submit(worker, chunks=("a secret", "another")))
    assert re.fullmatch(r"ranked 2 pairs, 0 cached, \d+ ms", told)
    found = snapshot(worker)
    assert found.status.state == "done"
    assert sorted(chunk.index for chunk in found.ranking.chunks) == [0, 1]
    assert found.ranking.model.fingerprint == worker.engine.fingerprint


def test_a_second_bell_does_nothing(worker: Any):
    submit(worker)
    worker.ledger.ask(calls.claim("a", "somebody else", worker.limits))
    with pytest.raises(Ignore, match="running"):
        worker.rerank("a")
    assert state(worker) == "running"
    worker.rerank(submit(worker, "b"))
    assert worker.rerank("b") == "nothing to do: done"
    assert worker.rerank("never submitted") == "nothing to do: unknown"


@pytest.mark.parametrize("why", ["it was told to hand back", "its device hangs"])
def test_a_worker_that_cannot_work_claims_nothing(worker: Any, why: str):
    submit(worker)
    if why == "its device hangs":
        worker.leases._hung_since = 0.0
    else:
        worker.drop()
    with pytest.raises(Ignore, match="a sweeper"):
        worker.rerank("a")
    assert (state(worker), snapshot(worker).status.attempts) == ("queued", 0)


def test_a_job_whose_engine_is_closed_meanwhile_is_handed_back_and_not_failed(worker: Any):
    worker.batcher.close()
    with pytest.raises(Ignore, match="handed back"):
        worker.rerank(submit(worker))
    assert state(worker) == "queued"


def queue_of(worker: Any, name: str = "a") -> str:
    return worker.ledger.redis.hget(f"rerankq:job:{name}", "queue").decode()


def beat_as(worker: Any, model: str, *queues: str) -> None:
    """Let another worker live."""
    shown = {"model": model, "fingerprint": "f", "queues": queues}
    worker.ledger.ask(calls.beat(f"another of {model}", json.dumps(shown), gone_after_s=60))


@pytest.mark.parametrize("lives", [True, False])
def test_a_job_of_another_model_is_sent_on_to_its_queue_and_not_failed(worker: Any, lives: bool):
    suffix = suffix_of("another/model", worker.model)
    where = f"rerankq.interactive{'.its-own' if lives else suffix}"
    if lives:
        beat_as(worker, "another/model", where, "rerankq.bulk.its-own")
    with pytest.raises(Ignore, match="sent on to"):
        worker.rerank(submit(worker, model="another/model", deadline_s=60))
    assert (state(worker), queue_of(worker)) == ("queued", where)
    told = snapshot(worker).status
    assert (told.attempts, told.started_at) == (0, None)
    record = worker.ledger.redis.hgetall("rerankq:job:a")
    assert float(record[b"deadline"]) == pytest.approx(float(record[b"created"]) + 60, abs=1), "its deadline holds"
    (doorbell,) = worker.ledger.ask(calls.refill_window([where], worker.limits))
    assert (doorbell.id, doorbell.queue, doorbell.ahead) == ("a", where, False)
    assert worker.ledger.redis.hget("rerankq:backlog", where) == b"2"
    assert not worker.ledger.redis.hexists("rerankq:backlog", QUEUES[0])


def test_a_job_of_another_model_that_shares_its_queue_does_not_go_round_and_round(worker: Any):
    # Two programs, each with a model of its own and both told that theirs is the default.
    beat_as(worker, "another/model", *QUEUES)
    with pytest.raises(Ignore, match="sent on to"):
        worker.rerank(submit(worker, model="another/model"))
    assert (state(worker), queue_of(worker)) == ("queued", QUEUES[0])
    assert worker.ledger.ask(calls.refill_window(QUEUES, worker.limits)) == [], "not rung for at once"
    assert worker.ledger.redis.zscore(f"rerankq:sent:{QUEUES[0]}", "a"), "but when its doorbell counts as lost"


def test_a_job_of_another_model_that_was_taken_away_meanwhile_is_left_alone(worker: Any, monkeypatch):
    workers = worker.ledger.workers
    monkeypatch.setattr(worker.ledger, "workers", lambda: (take_away(worker), workers())[1])
    with pytest.raises(Ignore):
        worker.rerank(submit(worker, model="another/model"))
    assert (state(worker), queue_of(worker)) == ("queued", QUEUES[0])


def test_jobs_left_in_a_models_former_queues_are_adopted_unless_somebody_listens_there(worker: Any):
    left = [queue_name(priority, suffix_of(worker.model, "another")) for priority in ("interactive", "bulk")]
    for name, queue, tenant in [("a", left[0], ""), ("b", left[1], ""), ("c", left[1], "t"), ("d", left[1], "t")]:
        new_job = prepare(
            RerankJob(id=name, query="q", chunks=["x", "y"], tenant=tenant), Route("m", (), ""), worker.settings
        )
        worker.ledger.ask(calls.submit(new_job._replace(queue=queue), worker.limits))
    worker.ledger.ask(calls.cancel("d", worker.limits))
    beat_as(worker, worker.model, *left)
    assert worker.adopt() == 0
    worker.ledger.redis.delete("rerankq:workers")
    assert worker.adopt() == 3
    assert [queue_of(worker, name) for name in "abcd"] == [QUEUES[0], QUEUES[1], QUEUES[1], left[1]]
    backlog = {
        f"rerankq:backlog {name}": int(count) for name, count in worker.ledger.redis.hgetall("rerankq:backlog").items()
    }
    assert sum(backlog.values()) == 3 * 6, "all, by queue, and by tenant"
    assert {doorbell.id for doorbell in worker.ledger.ask(calls.refill_window(QUEUES, worker.limits))} == {
        "a",
        "b",
        "c",
    }
    assert worker.adopt() == 0
    for name in "abc":
        worker.rerank(name)
        assert state(worker, name) == "done"


def test_expired_cancelled_and_dead_jobs_raise_as_such(worker: Any):
    submit(worker)
    worker.ledger.redis.hset("rerankq:job:a", "deadline", "1.000000")
    with pytest.raises(JobExpired):
        worker.rerank("a")
    worker.ledger.ask(calls.cancel(submit(worker, "b"), worker.limits))
    with pytest.raises(JobCancelled):
        worker.rerank("b")
    worker.ledger.redis.hset("rerankq:job:dead", mapping={"state": "dead"})
    with pytest.raises(JobDead):
        worker.rerank("dead")


def test_a_pair_that_cannot_be_scored_fails_its_job_and_says_why(worker: Any, monkeypatch: pytest.MonkeyPatch):
    def break_down(_: object) -> None:
        raise ValueError("no such token")

    monkeypatch.setattr(worker.engine, "forward", break_down)
    with pytest.raises(PairFailed):
        worker.rerank(submit(worker))
    found = snapshot(worker)
    assert (found.status.state, found.error_type) == ("failed", "JobFailed")
    assert "no such token" in found.status.error


def test_the_error_of_a_failed_job_is_cut(worker: Any, monkeypatch: pytest.MonkeyPatch):
    def stumble(*_: object, **__: object) -> None:
        raise ValueError("all of the text that could not be read " * 10_000)

    monkeypatch.setattr(worker.reranker, "rank", stumble)
    with pytest.raises(ValueError, match="could not be read"):
        worker.rerank(submit(worker))
    assert 1_000 < len(snapshot(worker).status.error) <= 2_000


def test_a_bug_fails_its_job_by_name(worker: Any, monkeypatch: pytest.MonkeyPatch):
    def stumble(*_: object, **__: object) -> None:
        raise ZeroDivisionError("one over none")

    monkeypatch.setattr(worker.reranker, "rank", stumble)
    with pytest.raises(ZeroDivisionError):
        worker.rerank(submit(worker))
    assert snapshot(worker).status.error == "ZeroDivisionError: one over none"


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b'{"query": "q"}', b'{"query": "q", "chunks": ["x"], "new": 1}'])
def test_a_payload_that_no_job_can_be_read_from_fails_its_job(worker: Any, payload: bytes):
    submit(worker)
    worker.ledger.redis.hset("rerankq:job:a", "payload", payload)
    with pytest.raises(Exception, match=r"."):
        worker.rerank("a")
    assert state(worker) == "failed"


def test_a_payload_over_the_limit_is_refused_before_it_is_parsed(worker: Any, monkeypatch: pytest.MonkeyPatch, program):
    submit(worker, chunks=("long " * 30,))
    worker.settings = worker.settings.model_copy(update={"max_job_bytes": 100})
    monkeypatch.setattr(program, "job_of", lambda payload: pytest.fail("it was parsed"))
    with pytest.raises(JobTooLarge, match="at most 100"):
        worker.rerank("a")
    assert snapshot(worker).error_type == "JobTooLarge"


def test_a_payload_of_just_the_limit_is_taken(worker: Any):
    size = worker.ledger.redis.hstrlen(f"rerankq:job:{submit(worker)}", "payload")
    worker.settings = worker.settings.model_copy(update={"max_job_bytes": size})
    worker.rerank("a")
    assert state(worker) == "done"


def test_what_a_payload_holds_is_not_quoted_when_it_cannot_be_read(worker: Any, caplog: pytest.LogCaptureFixture):
    for payload in (b"Sphinx of black quartz", b'{"query": "Sphinx", "chunks": {"Sphinx": 1}}', b'["Sphinx"'):
        submit(worker)
        worker.ledger.redis.hset("rerankq:job:a", "payload", payload)
        with pytest.raises(JobRejected):
            worker.rerank("a")
        assert "Sphinx" not in snapshot(worker).status.error
        worker.ledger.ask(calls.forget("a", worker.limits))
    assert "failed" in caplog.text
    assert "Sphinx" not in caplog.text


job_like = st.fixed_dictionaries(
    {},
    optional={
        "query": st.text(max_size=5) | st.integers(),
        "chunks": st.lists(
            st.fixed_dictionaries({"text": st.text(max_size=9)}, optional={"tokens": st.lists(st.text(max_size=3))})
            | st.integers(),
            max_size=3,
        ),
        "fusion": st.sampled_from(["default", "rrf", "nobody's", 3, None, {"weights": {}}, {"weights": {"token": 1}}]),
        "top_k": st.integers(-1, 3),
        "min_score": st.floats(),
        "query_tokens": st.lists(st.tuples(st.text(max_size=3), st.floats()), max_size=2),
        "query_tags": st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
        "max_length": st.sampled_from([-1, 8, 10**12]),
        "long_chunks": st.sampled_from(["truncate", "window", ""]),
        "cache": st.sampled_from(["use", "refresh", "bypass", 0]),
        "skip_at_or_below": st.integers(-1, 4),
        "model": st.sampled_from([None, "stub:0", "another"]),
        "unknown": st.none(),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(payload=st.binary(max_size=60) | job_like.map(lambda job: json.dumps(job).encode()), suspect=st.booleans())
def test_whatever_a_payload_holds_its_job_is_ranked_or_fails_and_says_why(worker: Any, payload: bytes, suspect: bool):
    worker.ledger.redis.flushall()
    submit(worker)
    worker.ledger.redis.hset("rerankq:job:a", mapping={"payload": payload, "suspect": int(suspect)})
    with suppress(Exception):
        worker.rerank("a")
    found = snapshot(worker)
    assert found.status.state in {"done", "failed"}
    assert (found.status.state == "done") == (found.status.error is None)
    assert found.status.state == "done" or found.status.error
    assert worker.slots.taken == 0
    # And the next one finds the device free.
    worker.rerank(submit(worker, "b"))
    assert state(worker, "b") == "done"


def test_a_suspect_has_the_device_alone_and_the_ledger_knows_it(worker: Any, monkeypatch: pytest.MonkeyPatch):
    submit(worker)
    worker.ledger.redis.hset("rerankq:job:a", "suspect", 1)
    rank, seen = worker.reranker.rank, []

    def rank_and_look(*args: Any, **kwargs: Any) -> Any:
        seen.append((worker.device._holders.exclusive, worker.ledger.redis.hget("rerankq:alone", worker.id)))
        return rank(*args, **kwargs)

    monkeypatch.setattr(worker.reranker, "rank", rank_and_look)
    worker.rerank("a")
    assert seen == [(True, b"a")]
    assert worker.ledger.redis.hget("rerankq:alone", worker.id) is None
    worker.rerank(submit(worker, "b"))
    assert seen[1] == (False, None)


def test_the_next_suspects_doorbell_is_sent_when_the_one_before_it_has_ended(worker: Any, monkeypatch):
    sent: list[str] = []
    monkeypatch.setattr(worker.doorbells, "send", lambda doorbells: sent.extend(doorbell.id for doorbell in doorbells))
    for name in "abc":
        submit_suspect(worker, name)

    def others_come() -> None:
        for name in "bc":
            with pytest.raises(Ignore, match="turn"):
                worker.rerank(name)

    with monkeypatch.context() as patched:
        in_the_middle(worker, patched, others_come)
        worker.rerank("a")
    assert sent == ["b"]
    worker.rerank("b")
    assert sent == ["b", "c"]
    worker.rerank("c")
    assert sent == ["b", "c"]


def submit_suspect(worker: Any, name: str) -> str:
    worker.ledger.redis.hset(f"rerankq:job:{submit(worker, name)}", "suspect", 1)
    return name


def test_a_worker_that_hands_back_tells_others_of_the_suspects_that_waited_here(worker: Any, monkeypatch):
    sent: list[str] = []
    monkeypatch.setattr(worker.doorbells, "send", lambda doorbells: sent.extend(doorbell.id for doorbell in doorbells))
    worker.suspects.take(Deferred(Doorbell("elsewhere", "q", "", ahead=True), "interactive"))
    worker.suspects.take(Deferred(Doorbell("waits", "q", "", ahead=True), "interactive"))
    worker.drop()
    assert sent == ["waits"]


def test_a_suspect_that_was_taken_away_while_it_waited_is_not_run(worker: Any, monkeypatch: pytest.MonkeyPatch):
    submit(worker)
    worker.ledger.redis.hset("rerankq:job:a", "suspect", 1)
    monkeypatch.setattr(worker.reranker, "rank", lambda *_, **__: pytest.fail("not ours"))
    alone = worker.device.exclusive

    def taken_away(**how: Any) -> Any:
        take_away(worker)
        return alone(**how)

    monkeypatch.setattr(worker.device, "exclusive", taken_away)
    with pytest.raises(JobCancelled):
        worker.rerank("a")
    assert state(worker) == "queued"


def take_away(worker: Any, name: str = "a") -> None:
    fence = int(worker.ledger.redis.hget(f"rerankq:job:{name}", "fence"))
    assert worker.ledger.ask(calls.hand_back([(name, fence)])) == 1


def in_the_middle(worker: Any, monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> None:
    """Let something happen while the device computes."""
    forward = worker.engine.forward

    def forward_and_meanwhile(batch: Any) -> Any:
        what()
        return forward(batch)

    monkeypatch.setattr(worker.engine, "forward", forward_and_meanwhile)


def test_a_job_cancelled_while_it_runs_stays_cancelled(worker: Any, monkeypatch: pytest.MonkeyPatch):
    in_the_middle(worker, monkeypatch, lambda: worker.leases.cancel([("a", fence(worker))]))
    in_the_middle(worker, monkeypatch, lambda: worker.cancel(["a"]))
    with pytest.raises(JobCancelled):
        worker.rerank(submit(worker))
    assert state(worker) == "cancelled"


def test_an_answer_that_comes_too_late_is_not_taken(worker: Any, monkeypatch: pytest.MonkeyPatch):
    in_the_middle(worker, monkeypatch, lambda: take_away(worker))
    with pytest.raises(Ignore, match="queued"):
        worker.rerank(submit(worker))
    assert state(worker) == "queued"


def test_jobs_of_a_dead_engine_are_left_to_their_leases_and_the_worker_ends(worker: Any, program: Any, monkeypatch):
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(program.os, "kill", lambda *args: killed.append(args))

    def die(*_: object, **__: object) -> None:
        raise EngineDied("no device")

    monkeypatch.setattr(worker.reranker, "rank", die)
    for name in ("a", "b"):
        with pytest.raises(Ignore, match="left to its lease"):
            worker.rerank(submit(worker, name))
        assert state(worker, name) == "running", "its lease lapses, and it comes back as a suspect"
    assert killed == [(os.getpid(), program.signal.SIGTERM)], "told once"


def test_a_batch_that_never_comes_back_ends_the_worker_with_a_status_of_its_own(
    worker: Any, program: Any, monkeypatch: pytest.MonkeyPatch
):
    stuck, ended = threading.Event(), []
    monkeypatch.setattr(program.os, "_exit", ended.append)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + (3_600 if stuck.is_set() else 0))
    monkeypatch.setattr(program, "time", clock)

    def look_an_hour_later() -> None:
        assert not worker._device_hangs()
        stuck.set()
        assert worker._device_hangs()
        worker._give_up()
        stuck.clear()

    in_the_middle(worker, monkeypatch, look_an_hour_later)
    worker.rerank(submit(worker))
    assert ended == [70]
    assert not worker._device_hangs()


def away(worker: Any, monkeypatch: pytest.MonkeyPatch, script: str, times: int) -> list[str]:
    """Let the ledger be away for so many tries of one script; answers what was tried."""
    ask, tried = worker.ledger.ask, []

    def sometimes(call: Any) -> Any:
        if call.script == script:
            tried.append(script)
            if len(tried) <= times:
                raise BrokerUnavailable("away")
        return ask(call)

    monkeypatch.setattr(worker.ledger, "ask", sometimes)
    return tried


def test_a_ranking_is_told_again_and_again_until_the_ledger_is_back(worker: Any, monkeypatch: pytest.MonkeyPatch):
    tried = away(worker, monkeypatch, "complete", 5)
    worker.rerank(submit(worker))
    assert len(tried) == 6
    assert state(worker) == "done"


def test_a_worker_that_is_told_to_stop_does_not_wait_for_the_ledger(worker: Any, monkeypatch: pytest.MonkeyPatch):
    signals.worker_shutting_down.send(sender="test", sig="TERM", how="Warm", exitcode=0)
    tried = away(worker, monkeypatch, "complete", 10**9) + away(worker, monkeypatch, "fail", 10**9)
    with pytest.raises(Ignore, match="handed back"):
        worker.rerank(submit(worker))
    assert len(tried) <= 2
    assert state(worker) == "queued", "its scores are in the cache; a ledger that was away fails no job"


def test_a_ledger_that_is_away_at_the_claim_leaves_the_job_to_the_next_bell(worker: Any, monkeypatch):
    submit(worker)
    with monkeypatch.context() as patched:
        away(worker, patched, "claim", 1)
        with pytest.raises(BrokerUnavailable):
            worker.rerank("a")
    assert state(worker) == "queued"
    worker.rerank("a")
    assert state(worker) == "done"


def test_who_is_in_a_hurry_hands_back_and_withdraws_what_it_holds(worker: Any, program: Any, monkeypatch: Any):
    submit(worker, chunks=tuple(f"chunk {number}" for number in range(4)))
    dropped = threading.Event()
    drop = worker.drop

    def drop_and_tell() -> None:
        drop()
        dropped.set()

    monkeypatch.setattr(worker, "drop", drop_and_tell)

    def quit_now() -> None:
        with pytest.raises(SystemExit):
            program.SafeConsumer.cancel_active_requests(None)
        assert dropped.wait(WAIT_S)

    in_the_middle(worker, monkeypatch, quit_now)
    with pytest.raises(JobCancelled):
        worker.rerank("a")
    assert state(worker) == "queued"
    # Its doorbell is rung again at once, and may be heard here too: it is for others.
    with pytest.raises(Ignore, match="in a hurry"):
        worker.rerank("a")
    assert state(worker) == "queued"


def test_what_is_not_finished_in_time_by_who_is_told_to_stop_is_handed_back_unsuspected(worker: Any, monkeypatch: Any):
    worker.settings = worker.settings.model_copy(update={"drain_s": 0})

    def told_to_stop() -> None:
        worker.stopping.set()
        worker.drain()

    in_the_middle(worker, monkeypatch, told_to_stop)
    with pytest.raises(JobCancelled):
        worker.rerank(submit(worker))
    assert state(worker) == "queued"
    assert worker.ledger.redis.hget("rerankq:job:a", "suspect") == b"0"


def test_room_in_the_window_is_rung_on_at_once(worker: Any, monkeypatch: pytest.MonkeyPatch):
    rang: list[bool] = []
    monkeypatch.setattr(worker.sweeper, "refill_window", lambda: rang.append(True))
    worker.rerank(submit(worker))
    assert rang == []
    for name in ("b", "c"):
        submit(worker, name)
    worker.ledger.redis.zrem("rerankq:sent:rerankq.interactive", "c")
    worker.ledger.redis.zadd("rerankq:waiting:rerankq.interactive", {"c": 1})
    worker.rerank("b")
    assert rang == [True]


# -- what Celery says -------------------------------------------------------------------------------------------------


def request(name: str, queue: str = QUEUES[0]) -> SimpleNamespace:
    return SimpleNamespace(id=name, delivery_info={"routing_key": queue})


def came_in(*requests: SimpleNamespace) -> None:
    for one in requests:
        signals.task_received.send(sender=None, request=one)


class Pool:
    """A pool of threads that end when a test says so."""

    def __init__(self, program: Any) -> None:
        self.futures: dict[str, Future] = {}
        program._follow(self)

    def on_apply(self, target: Any, args: tuple[str, str], **_: Any) -> SimpleNamespace:
        self.futures[args[1]] = Future()
        return SimpleNamespace(f=self.futures[args[1]])

    def start(self, *names: str) -> None:
        for name in names:
            self.on_apply(None, ("rerankq.rerank", name), callback=None)


def test_slots_follow_what_celery_says(worker: Any, program: Any):
    pool = Pool(program)
    came_in(request("a"), request("b", QUEUES[1]), request("c", QUEUES[1]))
    pool.start("a", "b", "c")
    assert worker.slots.taken == 3
    assert not worker.slots.has_room(bulk=True)
    assert worker.slots.has_room(bulk=False)
    pool.futures["b"].set_result(None)
    assert worker.slots.has_room(bulk=True)
    pool.futures["c"].set_exception(ValueError("a body that is no JSON"))
    pool.futures["a"].cancel()
    assert worker.slots.taken == 0


def test_events_wait_for_each_other_and_a_timer_that_was_lost_is_made_again(program: Any, monkeypatch):
    asked: list[Any] = []
    hub = SimpleNamespace(call_soon=lambda ask: ask(), call_later=lambda delay, _: asked.append(delay))
    consumer = object.__new__(program.SafeConsumer)
    consumer.hub = hub
    now = 100.0
    with monkeypatch.context() as patched:
        patched.setattr(program.time, "monotonic", lambda: now)
        for _ in range(10):
            consumer.on_send_event_buffered()
        assert asked == [program.EVENTS_EVERY_S]
        now += program.EVENTS_EVERY_S  # the timer never rang: its connection was lost
        consumer.on_send_event_buffered()
    assert len(asked) == 2


@pytest.mark.parametrize(("broker", "no_ack"), [("redis://x/0", True), ("unix:///x", True), ("amqp://x", False)])
def test_bells_are_acknowledged_where_a_broker_would_else_send_them_all(program: Any, monkeypatch, broker, no_ack):
    monkeypatch.setattr(program, "settings", Settings(broker_url=broker, ledger_url="redis://x/1"))
    assert program.worker_queue("rerankq.bulk").no_ack is no_ack


def test_whoever_makes_room_wakes_the_consumer(worker: Any, program: Any, monkeypatch: pytest.MonkeyPatch):
    woken: list[Any] = []
    consumer = SimpleNamespace(call_soon=woken.append, pool=Pool(program), task_consumer=None)
    monkeypatch.setattr(program, "listening", program.Listening(consumer))
    came_in(request("a", QUEUES[1]), request("b", QUEUES[1]), request("c"))
    program._went_out("c")
    assert woken == [], "there was room before"
    program._went_out("a")
    assert len(woken) == 1
    woken[0]()


class PushingConsumer:
    """A consumer of RabbitMQ: while the broker confirms that it is withdrawn, or is not, messages come in."""

    channel = object()  # without the quality of service of Redis's

    def __init__(self) -> None:
        self.consumes, self.busy, self.comes = True, False, []

    def consuming_from(self, _: str) -> bool:
        return self.consumes

    def change(self, consumes: bool) -> None:
        assert not self.busy, "kombu's own tables would change under it"
        self.busy = True
        while self.comes:
            self.comes.pop()()
        self.consumes, self.busy = consumes, False

    def consume(self) -> None:
        self.change(True)

    def cancel(self) -> None:
        self.change(False)


def test_messages_that_come_while_the_bulk_consumer_is_withdrawn_do_not_disturb_that(worker: Any, program, monkeypatch):
    consumer = SimpleNamespace(call_soon=lambda call: call(), pool=Pool(program), task_consumer=None)
    listening = program.Listening(consumer)
    listening.bulk = PushingConsumer()
    monkeypatch.setattr(program, "listening", listening)
    listening.bulk.comes = [lambda: came_in(request("c", QUEUES[1])), lambda: came_in(request("d"))]
    came_in(request("a", QUEUES[1]), request("b", QUEUES[1]))
    assert not listening.bulk.consumes
    # And one that goes out while it is let in again, one that comes in.
    listening.bulk.comes = [lambda: program._went_out("a"), lambda: came_in(request("e", QUEUES[1]))]
    program._went_out("b")
    program._went_out("c")
    assert listening.bulk.consumes == worker.slots.has_room(bulk=True)
    for name in "de":
        program._went_out(name)
    assert listening.bulk.consumes


def test_a_lost_connection_to_rabbitmq_takes_that_of_events_along_which_may_never_answer_a_goodbye(program: Any):
    ended: list[str] = []
    events = SimpleNamespace(
        transport=SimpleNamespace(driver_type="amqp"),
        collect=lambda: ended.append("collected"),
        connection_errors=(OSError,),
        channel_errors=(),
    )
    # Of late acknowledgements, of which there are none; Celery warns where it is not set.
    conf = {"worker_cancel_long_running_tasks_on_connection_loss": True}
    consumer = object.__new__(program.SafeConsumer)
    consumer.connection, consumer.event_dispatcher = None, SimpleNamespace(connection=events)
    consumer.app = SimpleNamespace(conf=SimpleNamespace(**conf, worker_enable_prefetch_count_reduction=False))
    consumer.on_connection_error_after_connected(OSError("too many heartbeats missed"))
    assert ended == ["collected"]


def test_a_job_revoked_before_it_was_received_gives_no_slot_back(worker: Any, program: Any):
    submit(worker)
    came_in(request("b"))
    signals.task_revoked.send(sender=None, request=request("a"), terminated=False, signum=None, expired=False)
    assert worker.slots.taken == 1
    assert state(worker) == "cancelled"
    signals.task_revoked.send(sender=None, request=request("b"), terminated=False, signum=None, expired=False)
    assert worker.slots.taken == 0
    program._went_out("b")
    assert worker.slots.taken == 0


def test_revoking_cancels_in_the_ledger_and_the_same_content_can_be_submitted_again(worker: Any, program: Any):
    sent: list[tuple[str, str]] = []
    dispatcher = SimpleNamespace(send=lambda kind, **fields: sent.append((kind, fields["uuid"])))
    told = SimpleNamespace(consumer=SimpleNamespace(event_dispatcher=dispatcher))
    for name in ("a", "b"):
        submit(worker, name)
    for names in (["a", "never submitted"], "b"):
        program.revoke(told, task_id=names, terminate=True, signal="SIGTERM")
    for thread in [one for one in threading.enumerate() if one.name == "rerankq-revoked"]:
        thread.join(WAIT_S)
    assert [state(worker, name) for name in ("a", "b")] == ["cancelled", "cancelled"]
    assert sent == [("task-revoked", "a"), ("task-revoked", "never submitted"), ("task-revoked", "b")]
    worker.rerank(submit(worker, "a"))
    assert state(worker) == "done"


def test_what_the_registry_shows_is_enough_to_place_a_job(worker: Any):
    worker.sweeper.beat()
    (shown,) = worker.ledger.workers()
    assert (shown.model, shown.fingerprint, shown.queues) == ("stub:0", worker.engine.fingerprint, QUEUES)


@pytest.mark.parametrize(
    ("model", "default", "queues"),
    [
        ("stub", "", QUEUES),
        ("stub", "stub", QUEUES),
        ("stub:1e-6", "stub", tuple(name + suffix_of("stub:1e-6", "stub") for name in QUEUES)),
        ("/srv/mine/", "stub", tuple(name + suffix_of("/srv/mine", "stub") for name in QUEUES)),
        ("/srv/mine", "/srv/mine/", QUEUES),
    ],
)
def test_a_second_model_has_queues_of_its_own(program: Any, model: str, default: str, queues: tuple[str, str]):
    settings = Settings(broker_url="redis://nowhere", model=model, default_model=default)
    assert program.queues_of(settings) == queues


def test_the_concurrency_of_celerys_command_line_counts_and_another_pool_is_refused(program: Any):
    settings = Settings(broker_url="redis://nowhere", concurrency=32)
    asked = SimpleNamespace(pool_cls="threads", concurrency=3)
    assert program.chosen(settings, asked).concurrency == 3
    asked.concurrency = "auto"  # Celery counts processors later
    assert program.chosen(settings, asked).concurrency == 32
    for pool in ("solo", "prefork"):
        asked.pool_cls = pool
        with pytest.raises(SettingsInvalid, match=f"expected threads, and not {pool}"):
            program.chosen(settings, asked)


def test_a_task_before_the_worker_started_is_an_error(program: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program, "worker", None)
    with pytest.raises(RuntimeError):
        program.rerank("a")
    came_in(request("a"))
    program._went_out("a")
    signals.task_revoked.send(sender=None, request=request("a"))
    signals.worker_shutting_down.send(sender="test", sig="TERM", how="Warm", exitcode=0)
    signals.worker_shutdown.send(sender=None)


def test_a_broker_that_is_away_is_tried_every_few_seconds_however_long(program: Any, monkeypatch: pytest.MonkeyPatch):
    slept, tried_after = [0.0], []
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda seconds: slept.append(slept[-1] + seconds))
    connection = program.app.connection_for_read()

    def away() -> None:
        tried_after.append(slept[-1])
        if len(tried_after) < 30:
            raise ConnectionRefusedError

    monkeypatch.setattr(connection, "_connection_factory", away)
    consumer = program.SafeConsumer.__new__(program.SafeConsumer)
    consumer.app, consumer.first_connection_attempt, consumer.broker_connection_retry_attempt = program.app, False, 0
    assert consumer.ensure_connected(connection) is connection
    pauses = [after - before for before, after in itertools.pairwise(tried_after)]
    assert len(pauses) == 29
    assert 0 < min(pauses) <= max(pauses) <= 3
