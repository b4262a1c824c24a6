"""A worker in this process, on a real ledger: how each job ends, and that every slot and lease comes back."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_worker import QUEUES, WAIT_S, fence, snapshot, state, submit

from rerankq import JobCancelled, JobDead, JobExpired, RerankJob
from rerankq.client.routing import Route, queue_name, suffix_of
from rerankq.client.submission import prepare
from rerankq.errors import BrokerUnavailable, JobRejected, JobTooLarge
from rerankq.ledger import Deferred, Doorbell, calls
from rerankq.settings import Settings
from rerankq_worker import backend
from rerankq_worker import worker as worker_module
from rerankq_worker.crash_record import CrashRecords, waiting_jobs
from rerankq_worker.engine import EngineDied, PairFailed
from rerankq_worker.locks import Waiter
from rerankq_worker.processes import boot_id
from rerankq_worker.sweeping import recover_ended
from rerankq_worker.worker import DoorbellIgnored, Lifecycle, Phase, queues_of


def test_a_ranked_job_is_done_and_summed_up_without_its_text(worker: Any):
    said = worker.rerank(submit(worker, chunks=("a secret", "another")))
    assert re.fullmatch(r"ranked 2 pairs, 0 cached, \d+ ms", said)
    found = snapshot(worker)
    assert found.status.state == "done"
    assert sorted(chunk.index for chunk in found.ranking.chunks) == [0, 1]
    assert found.ranking.model.fingerprint == worker.backend.engine.fingerprint


def test_a_second_doorbell_of_a_job_does_nothing(worker: Any):
    submit(worker)
    worker.ledger.ask(calls.claim("a", "another worker", worker.limits))
    with pytest.raises(DoorbellIgnored, match="running"):
        worker.rerank("a")
    assert state(worker) == "running"
    worker.rerank(submit(worker, "b"))
    assert worker.rerank("b") == "nothing to do: done"
    assert worker.rerank("never submitted") == "nothing to do: unknown"


@pytest.mark.parametrize("why", ["it hands its jobs back", "its device hangs"])
def test_a_worker_that_cannot_work_claims_no_job(worker: Any, why: str):
    submit(worker)
    if why == "its device hangs":
        worker.leases._hung_since = 0.0
    else:
        worker.hand_back()
    with pytest.raises(DoorbellIgnored, match="a sweeper"):
        worker.rerank("a")
    assert (state(worker), snapshot(worker).status.attempts) == ("queued", 0)


def test_a_job_whose_engine_is_closed_meanwhile_is_handed_back_and_not_failed(worker: Any):
    worker.backend.batcher.close()
    with pytest.raises(DoorbellIgnored, match="handed back"):
        worker.rerank(submit(worker))
    assert state(worker) == "queued"


def queue_of(worker: Any, name: str = "a") -> str:
    return worker.ledger.redis.hget(f"rerankq:job:{name}", "queue").decode()


def beat_as(worker: Any, model: str, *queues: str) -> None:
    """Let another worker live."""
    shown = {"model": model, "fingerprint": "f", "queues": queues}
    worker.ledger.ask(calls.beat(f"another of {model}", json.dumps(shown), forget_after_s=60))


@pytest.mark.parametrize("lives", [True, False])
def test_a_job_of_another_model_is_rerouted_to_its_queue_and_not_failed(worker: Any, lives: bool):
    suffix = suffix_of("another/model", worker.model)
    where = f"rerankq.interactive{'.its-own' if lives else suffix}"
    if lives:
        beat_as(worker, "another/model", where, "rerankq.bulk.its-own")
    with pytest.raises(DoorbellIgnored, match="rerouted to"):
        worker.rerank(submit(worker, model="another/model", deadline_s=60))
    assert (state(worker), queue_of(worker)) == ("queued", where)
    status = snapshot(worker).status
    assert (status.attempts, status.started_at) == (0, None)
    record = worker.ledger.redis.hgetall("rerankq:job:a")
    assert float(record[b"deadline"]) == pytest.approx(float(record[b"created"]) + 60, abs=1), "its deadline holds"
    (doorbell,) = worker.ledger.ask(calls.refill_window([where], worker.limits))
    assert (doorbell.id, doorbell.queue, doorbell.ahead) == ("a", where, False)
    assert worker.ledger.redis.hget("rerankq:backlog", where) == b"2"
    assert not worker.ledger.redis.hexists("rerankq:backlog", QUEUES[0])


def test_a_job_of_another_model_that_shares_its_queue_does_not_go_round_and_round(worker: Any):
    # Two programs, each with a model of its own and both configured with their own as the default.
    beat_as(worker, "another/model", *QUEUES)
    with pytest.raises(DoorbellIgnored, match="rerouted to"):
        worker.rerank(submit(worker, model="another/model"))
    assert (state(worker), queue_of(worker)) == ("queued", QUEUES[0])
    assert worker.ledger.ask(calls.refill_window(QUEUES, worker.limits)) == [], "no doorbell at once"
    assert worker.ledger.redis.zscore(f"rerankq:sent:{QUEUES[0]}", "a"), "but once its doorbell counts as lost"


def test_a_job_of_another_model_whose_lease_was_lost_meanwhile_is_not_rerouted(worker: Any, monkeypatch):
    workers = worker.ledger.workers
    monkeypatch.setattr(worker.ledger, "workers", lambda: (take_away(worker), workers())[1])
    with pytest.raises(DoorbellIgnored):
        worker.rerank(submit(worker, model="another/model"))
    assert (state(worker), queue_of(worker)) == ("queued", QUEUES[0])


def test_jobs_in_a_models_former_queues_are_adopted_unless_a_worker_consumes_them(worker: Any):
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


def test_doorbells_of_expired_cancelled_and_dead_jobs_raise_how_they_ended(worker: Any):
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

    monkeypatch.setattr(worker.backend.engine, "forward", break_down)
    with pytest.raises(PairFailed):
        worker.rerank(submit(worker))
    found = snapshot(worker)
    assert (found.status.state, found.error_type) == ("failed", "JobFailed")
    assert "no such token" in found.status.error


def test_the_error_of_a_failed_job_is_cut_to_2000_characters(worker: Any, monkeypatch: pytest.MonkeyPatch):
    def stumble(*_: object, **__: object) -> None:
        raise ValueError("all of the text that could not be read " * 10_000)

    monkeypatch.setattr(worker.reranker, "rank", stumble)
    with pytest.raises(ValueError, match="could not be read"):
        worker.rerank(submit(worker))
    assert 1_000 < len(snapshot(worker).status.error) <= 2_000


def test_an_unexpected_error_fails_its_job_and_is_named_by_its_type(worker: Any, monkeypatch: pytest.MonkeyPatch):
    def stumble(*_: object, **__: object) -> None:
        raise ZeroDivisionError("one over none")

    monkeypatch.setattr(worker.reranker, "rank", stumble)
    with pytest.raises(ZeroDivisionError):
        worker.rerank(submit(worker))
    assert snapshot(worker).status.error == "ZeroDivisionError: one over none"


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b'{"query": "q"}', b'{"query": "q", "chunks": ["x"], "new": 1}'])
def test_a_malformed_payload_fails_its_job(worker: Any, payload: bytes):
    submit(worker)
    worker.ledger.redis.hset("rerankq:job:a", "payload", payload)
    with pytest.raises(Exception, match=r"."):
        worker.rerank("a")
    assert state(worker) == "failed"


def test_a_payload_over_the_limit_is_refused_before_it_is_parsed(worker: Any, monkeypatch: pytest.MonkeyPatch):
    submit(worker, chunks=("long " * 30,))
    worker.settings = worker.settings.model_copy(update={"max_job_bytes": 100})
    monkeypatch.setattr(worker_module, "job_of", lambda payload: pytest.fail("it was parsed"))
    with pytest.raises(JobTooLarge, match="at most 100"):
        worker.rerank("a")
    assert snapshot(worker).error_type == "JobTooLarge"


def test_a_payload_of_just_the_limit_is_taken(worker: Any):
    size = worker.ledger.redis.hstrlen(f"rerankq:job:{submit(worker)}", "payload")
    worker.settings = worker.settings.model_copy(update={"max_job_bytes": size})
    worker.rerank("a")
    assert state(worker) == "done"


def test_the_error_of_a_malformed_payload_quotes_none_of_its_text(worker: Any, caplog: pytest.LogCaptureFixture):
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
        "fusion": st.sampled_from(["default", "rrf", "unknown", 3, None, {"weights": {}}, {"weights": {"token": 1}}]),
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


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(payload=st.binary(max_size=60) | job_like.map(lambda job: json.dumps(job).encode()), suspect=st.booleans())
def test_a_job_with_any_payload_is_ranked_or_fails_and_says_why(worker: Any, payload: bytes, suspect: bool):
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


def test_a_suspect_has_the_device_alone_and_the_ledger_records_that(worker: Any, monkeypatch: pytest.MonkeyPatch):
    submit(worker)
    worker.ledger.redis.hset("rerankq:job:a", "suspect", 1)
    rank, seen = worker.reranker.rank, []

    def rank_and_record(*args: Any, **kwargs: Any) -> Any:
        seen.append((worker.device._holders.exclusive, worker.ledger.redis.hget("rerankq:alone", worker.id)))
        return rank(*args, **kwargs)

    monkeypatch.setattr(worker.reranker, "rank", rank_and_record)
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
            with pytest.raises(DoorbellIgnored, match="turn"):
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


def test_a_worker_that_hands_back_sends_the_doorbells_of_suspects_that_waited_for_it(worker: Any, monkeypatch):
    sent: list[str] = []
    monkeypatch.setattr(worker.doorbells, "send", lambda doorbells: sent.extend(doorbell.id for doorbell in doorbells))
    worker.suspects.take(Deferred(Doorbell("elsewhere", "q", "", ahead=True), "interactive"))
    worker.suspects.take(Deferred(Doorbell("waits", "q", "", ahead=True), "interactive"))
    worker.hand_back()
    assert sent == ["waits"]


def test_a_suspect_whose_lease_was_lost_while_it_waited_is_not_run(worker: Any, monkeypatch: pytest.MonkeyPatch):
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
    forward = worker.backend.engine.forward

    def forward_and_meanwhile(batch: Any) -> Any:
        what()
        return forward(batch)

    monkeypatch.setattr(worker.backend.engine, "forward", forward_and_meanwhile)


def test_a_job_cancelled_while_it_runs_stays_cancelled(worker: Any, monkeypatch: pytest.MonkeyPatch):
    in_the_middle(worker, monkeypatch, lambda: worker.leases.cancel([("a", fence(worker))]))
    in_the_middle(worker, monkeypatch, lambda: worker.cancel(["a"]))
    with pytest.raises(JobCancelled):
        worker.rerank(submit(worker))
    assert state(worker) == "cancelled"


def test_a_ranking_that_comes_after_its_lease_was_lost_is_ignored(worker: Any, monkeypatch: pytest.MonkeyPatch):
    in_the_middle(worker, monkeypatch, lambda: take_away(worker))
    with pytest.raises(DoorbellIgnored, match="queued"):
        worker.rerank(submit(worker))
    assert state(worker) == "queued"


def test_jobs_of_a_dead_engine_are_left_to_be_suspects_where_they_were_on_it_and_handed_back_otherwise(
    worker: Any, monkeypatch: pytest.MonkeyPatch
):
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(worker_module.os, "kill", lambda *args: killed.append(args))

    def die(job_id: str, job: RerankJob, work: Any, **_: object) -> None:
        work.activity.set_on_device(job_id == "on-it")
        raise EngineDied("no device")

    monkeypatch.setattr(worker.reranker, "rank", die)
    for name, said in (("on-it", "left to its lease"), ("waited", "handed back")):
        worker.life._exit_status = 0  # claimed before
        with pytest.raises(DoorbellIgnored, match=said):
            worker.rerank(submit(worker, name))
    assert killed == [(os.getpid(), signal.SIGTERM)], "signalled once"
    assert (state(worker, "on-it"), state(worker, "waited")) == ("running", "queued")
    worker.life._exit_status = 70
    with pytest.raises(DoorbellIgnored, match="device failed"):
        worker.rerank("waited")
    worker.stop()
    # Its neighbour finds that it has ended.
    recover_ended(worker.ledger, worker.limits, CrashRecords(worker.settings.ledger))
    assert suspected(worker, "on-it", "waited") == {"on-it": ("queued", 1), "waited": ("queued", 0)}


def suspected(worker: Any, *names: str) -> dict[str, tuple[str, int]]:
    found = {name: worker.ledger.redis.hmget(f"rerankq:job:{name}", "state", "suspect") for name in names}
    return {name: (state.decode(), int(suspect)) for name, (state, suspect) in found.items()}


def test_a_job_is_at_work_in_each_of_its_steps_and_none_is_left_in_the_record(worker: Any, monkeypatch):
    seen: dict[str, bool] = {}

    def spy(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def record_and_go_on(*args: Any, **options: Any) -> Any:
            ((_, work),) = worker.leases._held.values()
            seen[name] = work.activity.at_work
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, record_and_go_on)

    for owner, name in (
        (worker, "_rank"),
        (worker.backend.engine, "tokenise"),
        (worker.backend.engine, "launch"),
        (worker.reranker, "_signals"),
        (worker, "_report"),
    ):
        spy(owner, name)
    worker.rerank(submit(worker))
    assert seen == dict.fromkeys(["_rank", "tokenise", "launch", "_signals", "_report"], True)
    assert waiting_jobs(bytes(worker.record._buffer), boot_id()) == []
    assert worker.record._path.exists()
    worker.stop()
    assert not worker.record._path.exists()


def test_a_job_that_waits_in_the_queue_is_not_at_work(worker: Any, monkeypatch: pytest.MonkeyPatch):
    launched, goes_on = threading.Event(), threading.Event()
    forward = worker.backend.engine.forward

    def forward_later(batch: Any) -> Any:
        launched.set()
        assert goes_on.wait(WAIT_S)
        return forward(batch)

    monkeypatch.setattr(worker.backend.engine, "forward", forward_later)
    threads = [threading.Thread(target=worker.rerank, args=(submit(worker, "a"),), daemon=True)]
    threads[0].start()
    assert launched.wait(WAIT_S)
    threads.append(threading.Thread(target=worker.rerank, args=(submit(worker, "b", chunks=("other",)),), daemon=True))
    threads[1].start()
    for _ in range(WAIT_S * 100):
        if found := waiting_jobs(bytes(worker.record._buffer), boot_id()):
            break
        threading.Event().wait(0.01)
    assert found == [("b", fence(worker, "b"))]
    goes_on.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert (state(worker, "a"), state(worker, "b")) == ("done", "done")


@pytest.mark.parametrize("suspect", [False, True])
@pytest.mark.parametrize("priority", ["interactive", "bulk"])
def test_a_job_asks_for_the_device_in_its_own_class_and_waits_meanwhile(
    worker: Any, monkeypatch: pytest.MonkeyPatch, priority: str, suspect: bool
):
    asked: list[tuple[Waiter, bool]] = []
    held = worker.device._held

    def held_and_recorded(waiter: Waiter, check: Callable[[], None]) -> Any:
        ((_, work),) = worker.leases._held.values()
        asked.append((waiter, work.activity.at_work))
        return held(waiter, check)

    monkeypatch.setattr(worker.device, "_held", held_and_recorded)
    submit(worker, priority=priority)
    worker.ledger.redis.hset("rerankq:job:a", "suspect", int(suspect))
    worker.rerank("a")
    assert asked == [(Waiter(exclusive=suspect, interactive=priority == "interactive"), False)]


def test_a_worker_whose_device_hangs_exits_with_a_status_of_its_own(worker: Any, monkeypatch: pytest.MonkeyPatch):
    stuck, ended = threading.Event(), []
    monkeypatch.setattr(worker_module.os, "_exit", ended.append)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + (3_600 if stuck.is_set() else 0))
    monkeypatch.setattr(backend, "time", clock)

    def check_an_hour_later() -> None:
        assert not worker._hangs()
        stuck.set()
        assert worker._hangs()
        worker._give_up()
        stuck.clear()

    in_the_middle(worker, monkeypatch, check_an_hour_later)
    worker.rerank(submit(worker))
    assert ended == [70]
    assert not worker._hangs()


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


def test_completing_a_job_is_retried_until_the_ledger_is_back(worker: Any, monkeypatch: pytest.MonkeyPatch):
    tried = away(worker, monkeypatch, "complete", 5)
    worker.rerank(submit(worker))
    assert len(tried) == 6
    assert state(worker) == "done"


def test_a_stopping_worker_does_not_wait_for_the_ledger(worker: Any, monkeypatch: pytest.MonkeyPatch):
    worker.begin_to_stop(hurry=False)
    tried = away(worker, monkeypatch, "complete", 10**9) + away(worker, monkeypatch, "fail", 10**9)
    with pytest.raises(DoorbellIgnored, match="handed back"):
        worker.rerank(submit(worker))
    assert len(tried) <= 2
    assert state(worker) == "queued", "its scores are in the cache; a ledger that was away fails no job"


def test_a_job_that_cannot_be_claimed_in_an_outage_is_left_to_its_next_doorbell(worker: Any, monkeypatch):
    submit(worker)
    with monkeypatch.context() as patched:
        away(worker, patched, "claim", 1)
        with pytest.raises(BrokerUnavailable):
            worker.rerank("a")
    assert state(worker) == "queued"
    worker.rerank("a")
    assert state(worker) == "done"


def test_a_worker_that_stops_in_a_hurry_stops_its_jobs_and_hands_them_back(worker: Any, monkeypatch: Any):
    submit(worker, chunks=tuple(f"chunk {number}" for number in range(4)))
    handed_back = threading.Event()
    hand_back = worker.hand_back

    def hand_back_and_tell() -> None:
        hand_back()
        handed_back.set()

    monkeypatch.setattr(worker, "hand_back", hand_back_and_tell)

    def quit_now() -> None:
        worker.begin_to_stop(hurry=True)
        assert handed_back.wait(WAIT_S)

    in_the_middle(worker, monkeypatch, quit_now)
    with pytest.raises(JobCancelled):
        worker.rerank("a")
    # The job's thread ends first: it does not wait for the ledger.
    assert handed_back.wait(WAIT_S)
    assert state(worker) == "queued"
    # Another doorbell is sent at once, and may be received here too: it is for others.
    with pytest.raises(DoorbellIgnored, match="is stopping"):
        worker.rerank("a")
    assert state(worker) == "queued"


def test_jobs_unfinished_after_drain_are_requeued_unsuspected(worker: Any, monkeypatch: Any):
    worker.settings = worker.settings.model_copy(update={"drain_s": 0})
    drained = threading.Event()

    def begin_to_stop_and_drain() -> None:
        worker.begin_to_stop(hurry=False)
        worker.drain()
        drained.set()

    in_the_middle(worker, monkeypatch, begin_to_stop_and_drain)
    with pytest.raises(JobCancelled):
        worker.rerank(submit(worker))
    # The job's thread ends first: it does not wait for the ledger.
    assert drained.wait(WAIT_S)
    assert state(worker) == "queued"
    assert worker.ledger.redis.hget("rerankq:job:a", "suspect") == b"0"


def test_the_doorbell_window_is_refilled_at_once_when_a_claim_says_so(worker: Any, monkeypatch: pytest.MonkeyPatch):
    refilled: list[bool] = []
    monkeypatch.setattr(worker.sweeper, "refill_window", lambda: refilled.append(True))
    worker.rerank(submit(worker))
    assert refilled == []
    for name in ("b", "c"):
        submit(worker, name)
    worker.ledger.redis.zrem("rerankq:sent:rerankq.interactive", "c")
    worker.ledger.redis.zadd("rerankq:waiting:rerankq.interactive", {"c": 1})
    worker.rerank("b")
    assert refilled == [True]


def test_the_registry_shows_model_fingerprint_and_queues_of_a_worker(worker: Any):
    worker.sweeper.beat()
    (shown,) = worker.ledger.workers()
    assert (shown.model, shown.fingerprint, shown.queues) == ("stub:0", worker.backend.engine.fingerprint, QUEUES)


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
def test_a_second_model_has_queues_of_its_own(model: str, default: str, queues: tuple[str, str]):
    settings = Settings(broker_url="redis://nowhere", model=model, default_model=default)
    assert queues_of(settings) == queues


@settings(deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(Phase), st.integers(0, 2)), max_size=6))
def test_a_life_only_goes_forward_and_keeps_the_status_of_its_end(steps: list[tuple[Phase, int]]):
    life, far, status = Lifecycle(), Phase.RUNNING, 0
    for phase, exit_status in steps:
        assert life.advance(phase, exit_status=exit_status) == (phase > far)
        if phase > far:
            far, status = phase, exit_status or status
        assert [life.reached(one) for one in Phase] == [one <= far for one in Phase]
        assert life.exit_status == status


def test_a_wait_for_a_phase_ends_with_any_later_one():
    life, woken = Lifecycle(), []
    thread = threading.Thread(target=lambda: woken.append(life.wait(Phase.DRAINING, WAIT_S)), daemon=True)
    thread.start()
    life.advance(Phase.HANDING_BACK)
    thread.join(WAIT_S)
    assert woken == [True]


def test_a_worker_that_stops_by_a_fault_of_its_device_keeps_that_status_to_its_end(worker: Any, monkeypatch):
    monkeypatch.setattr(worker_module.os, "kill", lambda *_: None)
    worker._shut_down(EngineDied("no device"))
    worker.stop()
    assert worker.life.exit_status == 70


def test_figures_count_what_the_engine_did(worker: Any):
    worker.rerank(submit(worker))
    figures = worker.figures()
    assert (figures["worker"], figures["model"], figures["pairs"]) == (worker.id, "stub:0", 2)
    assert (figures["joined_pairs"], figures["failed_pairs"], figures["out_of_memory"]) == (0, 0, 0)
    assert 0 <= figures["last_progress_s"] < WAIT_S
