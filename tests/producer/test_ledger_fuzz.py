"""Damaged records: no script, sweep or client stumbles over one, and their neighbours are untouched."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rerankq import Client, RerankJob
from rerankq.contract import ENDED, ModelName, Ranking
from rerankq.errors import RerankqError
from rerankq.ledger import Claim, LedgerLimits, NewJob, calls, connect
from rerankq.ledger.runner import Ledger

TERMS = LedgerLimits("fuzz", max_attempts=2, lease_s=1_000)
QUEUE = "rerankq.bulk"
FIELDS = (
    *("state", "content", "queue", "tenant", "priority", "pairs", "deadline", "label", "model", "payload", "created"),
    *(
        "fence",
        "claims",
        "deaths",
        "suspect",
        "spared",
        "done_pairs",
        "owner",
        "claim",
        "started",
        "ended",
        "history",
        "ranking",
    ),
)
GONE = None
values = st.one_of(
    st.just(GONE),
    st.binary(max_size=40),
    st.text(max_size=20).map(str.encode),
    st.sampled_from(
        [b"", b"-1", b"0", b"nan", b"inf", b"1e300", b"9" * 30, b"0x10", b"queued", b"running", b"dead", b"[]"]
    ),
)
damages = st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=4)
states = st.sampled_from(["queued", "running", "suspect", "done", "failed", "dead"])


@pytest.fixture
def ledger(redis_url_each_version: str) -> Iterator[Ledger]:
    connection = connect(redis_url_each_version)
    yield Ledger(connection)
    connection.close()


def new_job(name: str) -> NewJob:
    return NewJob(
        name, "c", QUEUE, "t", "bulk", 2, 100, "label", "m", b'{"query":"q","chunks":[{"text":"x"},{"text":"y"}]}'
    )


def take(ledger: Ledger, name: str, owner: str) -> Claim:
    claim = ledger.ask(calls.claim(name, owner, TERMS))
    assert isinstance(claim, Claim)
    return claim


def lapse(ledger: Ledger) -> None:
    for name in ledger.redis.zrange("rerankq:running", 0, -1):
        ledger.redis.zadd("rerankq:running", {name: 1})


def sweep(ledger: Ledger) -> None:
    ledger.redis.delete("rerankq:sweeper")
    seconds, micros = ledger.redis.time()
    counted = calls.Counted(seconds + micros / 1e6, {QUEUE: 0})
    ledger.ask(calls.sweep("s", TERMS, counted=counted, grace_s=0))


def bring_to(ledger: Ledger, name: str, state: str, owner: str = "w0") -> int:
    """Bring a job into a state by the ledger's own means; answers the fence of its last claim."""
    assert ledger.ask(calls.submit(new_job(name), TERMS)).state == "queued"
    if state == "queued":
        return 0
    claim = take(ledger, name, owner)
    if state == "done":
        ranking = Ranking(job_id=name, model=ModelName(name="m", fingerprint="f"), chunks=[])
        ledger.ask(calls.complete(name, claim.fence, ranking, TERMS))
    elif state == "failed":
        ledger.ask(calls.fail(name, claim.fence, "JobFailed", "why", TERMS))
    elif state in {"suspect", "dead"}:
        for number in range(TERMS.max_attempts if state == "dead" else 1):
            ledger.ask(calls.isolate(name, claim.fence, f"w{number}"))
            lapse(ledger)
            sweep(ledger)
            if state == "suspect" or ledger.ask(calls.snapshot(name, TERMS)).status.state == "dead":
                break
            claim = take(ledger, name, f"w{number + 1}")
    return claim.fence


def damage(ledger: Ledger, name: str, how: dict[str, bytes | None] | bytes) -> None:
    key = f"rerankq:job:{name}"
    if isinstance(how, bytes):
        ledger.redis.set(key, how)
        return
    for field, value in how.items():
        ledger.redis.hdel(key, field) if value is GONE else ledger.redis.hset(key, field, value)


def every_call(name: str, fence: int) -> list[calls.Call[Any]]:
    return [
        calls.snapshot(name, TERMS, with_ranking=True),
        calls.record(name, with_payload=True),
        calls.load(),
        calls.renew([("neighbour", 0, 0), (name, fence, 1)], TERMS),
        calls.isolate(name, fence, "w"),
        calls.hand_back([(name, fence)]),
        calls.recover("w0", [(name, fence)], TERMS),
        calls.refill_window([QUEUE], TERMS),
        calls.claim(name, "w", TERMS),
        calls.submit(new_job(name), TERMS),
        calls.fail(name, fence, "JobFailed", "why", TERMS),
        calls.cancel(name, TERMS),
        calls.retry(name, TERMS),
        calls.forget(name, TERMS),
        calls.forget(name, TERMS, dead=True),
    ]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states, how=damages | st.binary(max_size=10), order=st.randoms(use_true_random=False))
def test_every_call_on_a_damaged_record_answers_or_raises_one_of_our_errors(
    ledger: Ledger, state: str, how: dict[str, bytes | None] | bytes, order: Any
):
    ledger.redis.flushall()
    fence = bring_to(ledger, "damaged", state)
    bring_to(ledger, "waiting", "queued")
    held = bring_to(ledger, "held", "running", owner="another")
    damage(ledger, "damaged", how)
    wanted = every_call("damaged", fence)
    order.shuffle(wanted)
    for call in wanted:
        with suppress(RerankqError):
            ledger.ask(call)
        sweep(ledger)
        assert ledger.ask(calls.renew([("held", held, 1)], TERMS)) == [], "its neighbour's lease is renewed"
    # Judging goes on: the neighbours' leases and doorbells are looked after.
    lapse(ledger)
    sweep(ledger)
    ledger.ask(calls.refill_window([QUEUE], TERMS))
    assert isinstance(ledger.ask(calls.claim("waiting", "w2", TERMS)), Claim)
    assert ledger.ask(calls.claim("held", "w2", TERMS)).suspect


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    state=st.sampled_from(["queued", "running", "suspect"]),
    field=st.sampled_from(["queue", "tenant", "priority", "pairs", "created", "fence", "claims", "deaths", "suspect"]),
    value=st.just(GONE) | st.sampled_from([b"x", b"-1", b"nan", b"1.5", b"9" * 30]),
)
def test_a_job_that_cannot_go_on_fails_and_says_why(ledger: Ledger, state: str, field: str, value: bytes | None):
    if value is not GONE and field in {"queue", "tenant", "priority"}:
        value = GONE  # any words are a name
    if field == "created" and value == b"1.5":
        value = b"nan"  # that one is a time
    ledger.redis.flushall()
    bring_to(ledger, "damaged", state)
    damage(ledger, "damaged", {field: value})
    lapse(ledger)
    sweep(ledger)
    snapshot = ledger.ask(calls.snapshot("damaged", TERMS))
    assert (snapshot.status.state, snapshot.error_type) == ("failed", "JobFailed")
    assert "damaged" in snapshot.status.error
    assert ledger.redis.zcard("rerankq:running") == 0
    # The same content submitted again is a new job, that does not vanish with the old one's time to live.
    assert ledger.ask(calls.submit(new_job("damaged"), TERMS)).state in {"queued", "conflict"}
    assert ledger.redis.ttl("rerankq:job:damaged") == -1
    assert isinstance(ledger.ask(calls.claim("damaged", "w", TERMS)), Claim)


@pytest.mark.parametrize("how", [{"created": b"x"}, dict.fromkeys(FIELDS, GONE)])
def test_removed_or_damaged_records_do_not_fill_the_backlog_for_ever(ledger: Ledger, how: dict):
    ledger.redis.flushall()
    ledger.ask(calls.submit(new_job("damaged"), TERMS))
    damage(ledger, "damaged", how)
    sweep(ledger)
    ledger.ask(calls.refill_window([QUEUE], TERMS))
    assert ledger.redis.hgetall("rerankq:backlog") == {}


@pytest.mark.parametrize("field", ["pairs", "tenant", "created"])
def test_a_dead_job_that_cannot_be_retried_stays_dead_and_keeps_its_payload(ledger: Ledger, field: str):
    ledger.redis.flushall()
    bring_to(ledger, "damaged", "dead")
    damage(ledger, "damaged", {field: GONE})
    assert ledger.ask(calls.retry("damaged", TERMS)).state == "dead"
    assert ledger.ask(calls.dead()) == ["damaged"]
    assert ledger.redis.hexists("rerankq:job:damaged", "payload")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(found=st.dictionaries(st.binary(min_size=1, max_size=8), st.binary(max_size=60), max_size=3), more=st.data())
def test_registry_entries_that_no_worker_wrote_are_skipped(ledger: Ledger, found: dict[bytes, bytes], more: Any):
    ledger.redis.flushall()
    good = json.dumps({"model": "m", "fingerprint": "f", "queues": [QUEUE]})
    ledger.ask(calls.beat("good", good, forget_after_s=60))
    odd = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda parts: st.lists(parts, max_size=3))
    info = {name: more.draw(odd) for name in ("model", "queues", "process", "forget_after_s")} | {"fingerprint": "f"}
    ledger.redis.hset("rerankq:workers", "odd", f"{ledger.redis.time()[0]} {json.dumps(info)}")
    for name, new_job in found.items():
        ledger.redis.hset("rerankq:workers", name, new_job)
    ledger.ask(calls.beat("other", good, forget_after_s=60))
    living = {worker.id: worker for worker in ledger.workers()}
    assert {"good", "other"} <= living.keys()
    for worker in living.values():
        assert isinstance(worker.process, str)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states, how=damages | st.binary(max_size=10))
def test_a_client_that_meets_a_damaged_record_gets_one_of_our_errors(
    redis_url: str, make_client: Callable[[], Client], state: str, how: dict[str, bytes | None] | bytes
):
    client = make_client()
    ledger = Ledger(connect(client.settings.ledger))
    ledger.redis.flushall()
    bring_to(ledger, "damaged", state)
    damage(ledger, "damaged", how)
    asked = [client.status, client.dead_job, client.retry_dead, client.cancel, client.drop_dead]
    for ask in (lambda name: client.result(name, timeout=0.01), lambda _: client.dead(), *asked):
        with suppress(RerankqError):
            ask("damaged")
    with suppress(RerankqError):
        client.submit(RerankJob(id="damaged", query="q", chunks=["x"]))
    # Whoever waits for it beside others does not keep them from their answers.
    other = client.submit(RerankJob(query="other", chunks=["x"]))
    client.cancel(other)
    assert dict(client.as_completed([other], timeout=20)).keys() == {other}
    ledger.redis.close()


@pytest.fixture
def make_client(settings: Any) -> Iterator[Callable[[], Client]]:
    with Client(settings) as client:
        yield lambda: client


def test_the_states_that_are_damaged_here_are_reached(ledger: Ledger):
    for state in ("queued", "running", "suspect", "done", "failed", "dead"):
        bring_to(ledger, state, state)
        found = ledger.ask(calls.snapshot(state, TERMS)).status.state
        assert found == ("queued" if state == "suspect" else state)
        assert (found in ENDED) == (state in {"done", "failed", "dead"})
