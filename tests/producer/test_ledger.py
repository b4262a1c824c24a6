"""What the ledger promises, told as stories; the twin in test_ledger_twin.py covers what no story tells."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from rerankq.contract import ModelName, Ranking
from rerankq.errors import BrokerUnavailable, JobFailed, QueueFull
from rerankq.ledger import LedgerLimits, NewJob, calls, connect
from rerankq.ledger.runner import Ledger, prelude, source, translated
from rerankq.local.embedded import EmbeddedRedis

TERMS = LedgerLimits("tests", max_attempts=2)
BULK = "rerankq.bulk"


@pytest.fixture
def ledger(redis_url_each_version: str) -> Iterator[Ledger]:
    yield from opened(redis_url_each_version)


@pytest.fixture
def newest_ledger(redis_url: str) -> Iterator[Ledger]:
    yield from opened(redis_url)


def opened(url: str) -> Iterator[Ledger]:
    connection = connect(url)
    yield Ledger(connection)
    connection.close()


def new_job(
    name: str, *, content: str = "c", tenant: str = "", pairs: int = 1, payload: bytes = b"{}", **fields
) -> NewJob:
    priority = fields.pop("priority", "bulk")
    queue = fields.pop("queue", f"rerankq.{priority}")
    deadline_s = fields.pop("deadline_s", None)
    return NewJob(name, content, queue, tenant, priority, pairs, deadline_s, f"label of {name}", "m", payload)


def submit(ledger: Ledger, *names: str, limits: LedgerLimits = TERMS, **fields) -> None:
    answers = ledger.ask_all([calls.submit(new_job(name, **fields), limits) for name in names])
    assert [answer.state for answer in answers] == ["queued"] * len(names)


def claim(ledger: Ledger, name: str, owner: str = "w", limits: LedgerLimits = TERMS) -> calls.Claim:
    answer = ledger.ask(calls.claim(name, owner, limits))
    assert isinstance(answer, calls.Claim), answer
    return answer


def ranking(name: str, **fields) -> Ranking:
    return Ranking(job_id=name, model=ModelName(name="m", fingerprint="f"), chunks=[], **fields)


def state(ledger: Ledger, name: str) -> str:
    return ledger.ask(calls.snapshot(name, TERMS)).status.state


def leases_end(ledger: Ledger) -> None:
    script = """
    redis.call('DEL', 'a full server allows what begins by freeing')
    for _, id in ipairs(redis.call('ZRANGE', 'rerankq:running', 0, -1)) do
      redis.call('ZADD', 'rerankq:running', 1, id)
    end
    """
    ledger.redis.eval(script, 0)


def sweep(ledger: Ledger, held_by_broker: dict[str, int] | None = None, **options) -> calls.Swept:
    ledger.redis.delete("rerankq:sweeper")
    counted = calls.Counted(now(ledger), held_by_broker or {})
    return ledger.ask(calls.sweep("s", TERMS, counted=counted, **options))


def now(ledger: Ledger) -> float:
    seconds, micros = ledger.redis.time()
    return seconds + micros / 1e6


# Poison


def test_of_five_jobs_that_die_together_the_poison_ends_dead_and_its_neighbours_are_ranked(ledger: Ledger):
    names = ["a", "b", "poison", "c", "d"]
    submit(ledger, *names)
    for name in names:
        claim(ledger, name, "first")
    leases_end(ledger)
    assert sweep(ledger).lapsed == 5

    waiting, deaths, worker = list(names), 0, 0
    while waiting:
        name = waiting.pop(0)
        owner = f"worker {worker}"
        taken = claim(ledger, name, owner)
        assert taken.suspect, "all five are under suspicion, each is taken alone"
        assert ledger.ask(calls.isolate(name, taken.fence, owner))
        if name != "poison":
            assert ledger.ask(calls.complete(name, taken.fence, ranking(name), TERMS)) == "done"
            continue
        # This worker dies, with the next job parked beside the suspect.
        beside = waiting[0] if waiting else None
        if beside:
            claim(ledger, beside, owner)
        leases_end(ledger)
        deaths += 1
        worker += 1
        assert sweep(ledger).dead == (deaths == TERMS.max_attempts)
        if deaths < TERMS.max_attempts:
            waiting.insert(0, "poison")
    assert deaths == TERMS.max_attempts
    assert [state(ledger, name) for name in names] == ["done", "done", "dead", "done", "done"]
    assert ledger.redis.hget("rerankq:job:c", "deaths") == b"0"


def test_a_job_parked_beside_a_lone_suspect_stays_innocent(ledger: Ledger):
    submit(ledger, "suspect", "parked")
    claim(ledger, "suspect", "first")
    leases_end(ledger)
    sweep(ledger)
    alone = claim(ledger, "suspect", "second")
    ledger.ask(calls.isolate("suspect", alone.fence, "second"))
    claim(ledger, "parked", "second")
    leases_end(ledger)
    assert sweep(ledger) == calls.Swept(lapsed=2, doorbells=0)
    assert not claim(ledger, "parked", "third").suspect
    assert claim(ledger, "suspect", "third").suspect


def test_a_parked_job_whose_lease_ends_a_sweep_later_stays_innocent_too(ledger: Ledger):
    submit(ledger, "suspect", "parked")
    alone = claim(ledger, "suspect")
    ledger.ask(calls.isolate("suspect", alone.fence, "w"))
    ledger.ask(calls.beat("w", "{}", forget_after_s=60))
    leases_end(ledger)
    claim(ledger, "parked", "x")  # anyone's claim but the dead worker's: it says nothing of it
    ledger.redis.hset("rerankq:job:parked", "owner", "w")
    assert sweep(ledger).lapsed == 1
    leases_end(ledger)
    assert sweep(ledger).lapsed == 1
    assert not claim(ledger, "parked", "y").suspect


@pytest.mark.parametrize("registered", [True, False])
def test_a_worker_that_was_only_paused_answers_for_what_it_takes_afterwards(ledger: Ledger, registered: bool):
    submit(ledger, "suspect", "killer")
    if registered:
        ledger.ask(calls.beat("paused", "{}", forget_after_s=60))
    alone = claim(ledger, "suspect", "paused")
    ledger.ask(calls.isolate("suspect", alone.fence, "paused"))
    leases_end(ledger)
    sweep(ledger)
    claim(ledger, "killer", "paused")  # it lives again, and takes another job, which kills it
    leases_end(ledger)
    sweep(ledger)
    assert claim(ledger, "killer", "other").suspect


def paused(ledger: Ledger, name: str, owner: str, limits: LedgerLimits = TERMS) -> calls.Claim:
    """A living worker takes a job, has the device alone with it, and is not heard of for longer than its lease."""
    ledger.ask(calls.beat(owner, "{}", forget_after_s=60))
    taken = claim(ledger, name, owner, limits)
    ledger.ask(calls.isolate(name, taken.fence, owner))
    leases_end(ledger)
    return taken


def silent(ledger: Ledger, owner: str, seconds: float) -> None:
    ledger.redis.hset("rerankq:workers", owner, f"{now(ledger) - seconds:.6f} {{}}")


def test_an_innocent_whose_workers_are_only_paused_one_after_the_other_never_ends_dead(ledger: Ledger):
    submit(ledger, "innocent")
    for turn in range(4 * TERMS.max_attempts):
        worker = f"w{turn % 2}"
        paused(ledger, "innocent", worker)
        sweep(ledger)
        assert state(ledger, "innocent") in {"queued", "running"}
        ledger.ask(calls.beat(worker, "{}", forget_after_s=60))
        if state(ledger, "innocent") == "running":
            # The last death waits: woken up, the worker completes what it has.
            fence = int(ledger.redis.hget("rerankq:job:innocent", "fence"))
            assert ledger.ask(calls.renew([("innocent", fence, 1)], TERMS)) == []
            ledger.ask(calls.hand_back([("innocent", fence)]))
        assert ledger.redis.hget("rerankq:job:innocent", "deaths") == b"0"


def test_the_last_death_waits_until_the_worker_is_gone_by_a_second_sign(ledger: Ledger):
    limits = TERMS._replace(max_attempts=1, lease_s=8)

    def judged() -> int:
        leases_end(ledger)
        ledger.redis.delete("rerankq:sweeper")
        return ledger.ask(calls.sweep("s", limits)).dead

    submit(ledger, "silent", "signed off", "buried", "never registered")
    for name in ("silent", "signed off", "buried"):
        paused(ledger, name, f"w of {name}")
    assert judged() == 0
    silent(ledger, "w of silent", 23)
    assert judged() == 0, "it may only be paused"
    silent(ledger, "w of silent", 24.1)
    assert judged() == 1
    assert ledger.ask(calls.sign_off(["w of signed off", "w of buried", "nobody"])) == 2
    assert judged() == 2
    taken = claim(ledger, "never registered", "w")
    ledger.ask(calls.isolate("never registered", taken.fence, "w"))
    assert judged() == 1


def test_the_last_death_of_a_short_lease_does_not_count_after_a_silence_of_seconds(ledger: Ledger):
    """As after a hiccup of the server: whoever has a longer lease sweeps first, before the worker's next sign."""
    submit(ledger, "innocent")
    paused(ledger, "innocent", "w", limits=TERMS._replace(lease_s=0.5))
    limits = TERMS._replace(max_attempts=1, lease_s=60)
    for seconds, dead in ((5, 0), (9.5, 0), (10.1, 1)):
        silent(ledger, "w", seconds)
        leases_end(ledger)
        ledger.redis.delete("rerankq:sweeper")
        assert ledger.ask(calls.sweep("s", limits)).dead == dead


def test_a_worker_that_comes_back_takes_its_death_back_even_from_a_job_set_aside(ledger: Ledger):
    submit(ledger, "innocent", payload=b"the payload")
    for number in range(TERMS.max_attempts):
        paused(ledger, "innocent", f"w{number}")
        silent(ledger, f"w{number}", 1_000)
        sweep(ledger)
    assert state(ledger, "innocent") == "dead"
    ledger.ask(calls.beat("w0", "{}", forget_after_s=60))
    assert state(ledger, "innocent") == "queued"
    assert ledger.ask(calls.dead()) == []
    taken = claim(ledger, "innocent", "other")
    assert (taken.payload, taken.suspect) == (b"the payload", True), "one of two deaths stands"
    assert ledger.redis.hget("rerankq:job:innocent", "deaths") == b"1"
    ledger.ask(calls.complete("innocent", taken.fence, ranking("innocent"), TERMS))
    ledger.ask(calls.beat("w1", "{}", forget_after_s=60))
    assert state(ledger, "innocent") == "done", "what ended is none the worse for it"


@pytest.mark.parametrize("sign", ["a heartbeat", "a claim"])
def test_suspects_are_cleared_when_the_worker_that_left_them_lives(ledger: Ledger, sign: str):
    submit(ledger, "a", "b", "next")
    for name in "ab":
        claim(ledger, name, "paused")
    leases_end(ledger)
    sweep(ledger)
    claim(ledger, "a", "other")
    leases_end(ledger)
    sweep(ledger)
    if sign == "a claim":
        claim(ledger, "next", "paused")
    else:
        ledger.ask(calls.beat("paused", "{}", forget_after_s=60))
    assert not claim(ledger, "b").suspect
    assert claim(ledger, "a").suspect, "another worker's silence accuses it still"


def test_a_silence_that_counted_no_death_clears_none_when_it_ends(ledger: Ledger):
    submit(ledger, "a")
    alone = claim(ledger, "a", "one that dies")
    ledger.ask(calls.isolate("a", alone.fence, "one that dies"))
    leases_end(ledger)
    sweep(ledger)
    claim(ledger, "a", "paused")
    leases_end(ledger)
    sweep(ledger)
    assert 0 < ledger.redis.ttl("rerankq:accused:paused") <= 86_400, "whoever never comes back is forgotten"
    ledger.ask(calls.beat("paused", "{}", forget_after_s=60))
    assert ledger.redis.hmget("rerankq:job:a", "deaths", "suspect") == [b"1", b"1"]


def test_a_lapsed_lease_is_judged_only_after_the_sweeper_has_watched_for_its_length(ledger: Ledger):
    submit(ledger, "long", "short")
    claim(ledger, "long", limits=TERMS._replace(lease_s=60))
    claim(ledger, "short", limits=TERMS._replace(lease_s=2))
    leases_end(ledger)
    # The sweeper's own leases are of 8 s.
    assert sweep(ledger, watched_s=10).lapsed == 1
    assert (state(ledger, "long"), state(ledger, "short")) == ("running", "queued")
    assert ledger.redis.zscore("rerankq:running", "long") - now(ledger) == pytest.approx(50, abs=5)
    leases_end(ledger)
    assert sweep(ledger, watched_s=61).lapsed == 1


def test_the_registry_keeps_each_worker_for_as_long_as_it_asked(ledger: Ledger):
    said = '{"model": "m", "fingerprint": "f", "forget_after_s": 600.0}'
    for name, age in (("long leases", 500), ("gone", 601)):
        ledger.redis.hset("rerankq:workers", name, f"{now(ledger) - age:.6f} {said}")
    ledger.ask(calls.beat("short leases", "{}", forget_after_s=60))
    assert set(ledger.redis.hkeys("rerankq:workers")) == {b"long leases", b"short leases"}


# Clocks. What is written down is what a clock left that was set back or forward since.


def test_a_clock_set_back_lengthens_no_lease_beyond_its_own_length(ledger: Ledger):
    submit(ledger, "a", "b")
    claim(ledger, "a")
    claim(ledger, "b", limits=TERMS._replace(lease_s=60))
    sweep(ledger)
    ledger.redis.zadd("rerankq:running", {"a": now(ledger) + 3_608, "b": now(ledger) + 3_660})
    ledger.redis.set("rerankq:clock", now(ledger) + 3_600)
    sweep(ledger)
    left = {name: ends - now(ledger) for name, ends in ledger.redis.zrange("rerankq:running", 0, -1, withscores=True)}
    assert left == {b"a": pytest.approx(8, abs=5), b"b": pytest.approx(60, abs=5)}


def test_a_clock_set_back_keeps_no_worker_in_the_registry_longer(ledger: Ledger):
    ledger.ask(calls.beat("w", "{}", forget_after_s=60))
    silent(ledger, "dead", -3_600)
    ledger.ask(calls.beat("w", "{}", forget_after_s=60))
    beaten = float(ledger.redis.hget("rerankq:workers", "dead").split()[0])
    assert beaten <= now(ledger)


def test_a_worker_seen_before_a_clock_was_set_back_has_an_age_of_zero(newest_ledger: Ledger):
    newest_ledger.redis.hset(
        "rerankq:workers", "w", f'{now(newest_ledger) + 3_600:.6f} {{"model": "m", "fingerprint": "f"}}'
    )
    assert [worker.age_s for worker in newest_ledger.workers()] == [0]


def test_a_clock_set_back_keeps_no_sweeper_out(ledger: Ledger):
    ledger.redis.set("rerankq:sweeper", "dead", px=3_600_000)
    ledger.ask(calls.sweep("s", TERMS))
    assert ledger.redis.pttl("rerankq:sweeper") <= 3_000


def test_doorbells_sent_before_a_clock_was_set_back_are_sent_again_only_if_they_are_lost(ledger: Ledger):
    submit(ledger, "a", "b")
    sent_ago(ledger, {"a": -3_600, "b": -3_601})
    assert sweep(ledger).overdue == (BULK,)
    assert sweep(ledger, {BULK: 2}).doorbells == 0
    assert sweep(ledger, {BULK: 1}).doorbells == 1
    ledger.ask(calls.refill_window([BULK], TERMS))
    assert sweep(ledger, {BULK: 2}).doorbells == 0
    # Asked before the clock was set back: of no use.
    ledger.redis.delete("rerankq:sweeper")
    counted = calls.Counted(now(ledger) + 3_600, {BULK: 0})
    assert ledger.ask(calls.sweep("s", TERMS, counted=counted)).doorbells == 0


def test_jobs_submitted_after_a_clock_was_set_back_queue_behind_those_that_wait(ledger: Ledger):
    full = TERMS._replace(doorbell_window=0)
    submit(ledger, "before", limits=full)
    ledger.redis.zadd(f"rerankq:waiting:{BULK}", {"before": now(ledger) + 3_600})
    after = [f"after-{number}" for number in range(9, -1, -1)]
    submit(ledger, *after, limits=full)
    assert [name.decode() for name in ledger.redis.zrange(f"rerankq:waiting:{BULK}", 0, -1)] == ["before", *after]


def test_deaths_count_however_long_the_next_worker_takes_to_come(ledger: Ledger):
    submit(ledger, "poison")
    ledger.ask(calls.beat("w", "{}", forget_after_s=60))
    taken = claim(ledger, "poison")
    ledger.ask(calls.isolate("poison", taken.fence, "w"))
    leases_end(ledger)
    # Minutes later: the next worker's first sign of life takes the dead one out of the registry, before any sweep.
    ledger.redis.hset("rerankq:workers", "w", "1.0 {}")
    ledger.ask(calls.beat("next", "{}", forget_after_s=60))
    assert ledger.redis.hkeys("rerankq:workers") == [b"next"]
    sweep(ledger)
    assert ledger.redis.hget("rerankq:job:poison", "deaths") == b"1"
    assert ledger.redis.hlen("rerankq:alone") == 0, "and nothing is kept of workers that are gone"


def test_a_dead_job_keeps_its_payload_and_its_history(ledger: Ledger):
    submit(ledger, "poison", payload=b"the payload")
    for number in range(TERMS.max_attempts):
        taken = claim(ledger, "poison", f"w{number}")
        ledger.ask(calls.isolate("poison", taken.fence, f"w{number}"))
        leases_end(ledger)
        sweep(ledger)
    job = ledger.redis.hgetall("rerankq:job:poison")
    assert (job[b"state"], job[b"payload"]) == (b"dead", b"the payload")
    events = [line.split(b" ", 1)[1] for line in job[b"history"].splitlines()]
    assert events == [b"alone w0", b"lease-over w0", b"claimed w1", b"alone w1", b"lease-over w1"]
    assert ledger.redis.zrange("rerankq:dead", 0, -1) == [b"poison"]
    assert ledger.ask(calls.forget("poison", TERMS)) == "dead"
    assert ledger.redis.exists("rerankq:job:poison")


def killed(ledger: Ledger, name: str) -> None:
    """Claimed, alone, dead: until the job is."""
    for number in range(TERMS.max_attempts):
        taken = claim(ledger, name, f"w{number} of {name}")
        ledger.ask(calls.isolate(name, taken.fence, f"w{number} of {name}"))
        leases_end(ledger)
        sweep(ledger)
    assert state(ledger, name) == "dead"


def test_a_dead_job_that_is_tried_again_has_all_its_attempts_and_stays_a_suspect(ledger: Ledger):
    submit(ledger, "poison", pairs=5, payload=b"the payload")
    ledger.redis.hset("rerankq:job:poison", "lost", 1)
    killed(ledger, "poison")
    answer = ledger.ask(calls.retry("poison", TERMS))
    assert answer == calls.Retrial("queued", calls.Doorbell("poison", BULK, "label of poison"))
    snapshot = ledger.ask(calls.snapshot("poison", TERMS))
    status = snapshot.status
    assert (status.state, status.attempts, status.error, status.started_at, status.ended_at) == (
        *("queued", 0, None, None, None),
    )
    assert ledger.ask(calls.retry("poison", TERMS)) == calls.Retrial("queued", None), "one doorbell is sent"
    assert not ledger.redis.hexists("rerankq:job:poison", "lost"), "it stands in line by its age"
    assert ledger.redis.hget("rerankq:backlog", "*") == b"5"
    killed(ledger, "poison")
    found = ledger.ask(calls.record("poison"))
    assert found.submitted_at < found.died_at
    assert [event.event for event in found.history].count("lease-over") == 2 * TERMS.max_attempts
    assert ("retried", "") in {(event.event, event.worker) for event in found.history}


def test_a_dead_job_is_listed_until_it_is_dropped_and_then_its_id_is_free(ledger: Ledger):
    submit(ledger, "first", "second", payload=b"the payload")
    for name in ("first", "second"):
        killed(ledger, name)
    assert ledger.ask(calls.dead()) == ["first", "second"]
    assert ledger.ask(calls.dead(1, 1)) == ["second"]
    assert ledger.ask(calls.forget("first", TERMS)) == "dead"
    assert ledger.ask(calls.record("first")).payload is None, "texts are shown only where they are asked for"
    assert ledger.ask(calls.record("first", with_payload=True)).payload == "the payload"
    assert ledger.ask(calls.forget("first", TERMS, dead=True)) == "dead"
    assert ledger.ask(calls.dead()) == ["second"]
    assert ledger.ask(calls.record("first")) == "unknown"
    submit(ledger, "first", content="other")
    # One whose record was removed from outside leaves the list when it is dropped.
    ledger.redis.delete("rerankq:job:second")
    assert ledger.ask(calls.forget("second", TERMS, dead=True)) == "unknown"
    assert ledger.ask(calls.dead()) == []


def test_only_a_dead_job_is_tried_again(ledger: Ledger):
    submit(ledger, "queued", "running", "cancelled", "late", deadline_s=100)
    claim(ledger, "running")
    ledger.ask(calls.cancel("cancelled", TERMS))
    ledger.redis.hset("rerankq:job:late", "deadline", "1.0")
    for name, found in {
        "queued": "queued",
        "running": "running",
        "cancelled": "cancelled",
        "late": "expired",
        "none": "unknown",
    }.items():
        assert ledger.ask(calls.retry(name, TERMS)) == calls.Retrial(found, None)
        assert state(ledger, name) == found


def test_a_history_is_bounded(ledger: Ledger):
    submit(ledger, "a")
    for _ in range(200):
        taken = claim(ledger, "a")
        ledger.ask(calls.hand_back([("a", taken.fence)]))
    assert ledger.redis.hstrlen("rerankq:job:a", "history") < 5_000


# Fences


def test_a_late_twin_fits_no_fence_of_a_job_that_was_forgotten_and_came_again(ledger: Ledger):
    submit(ledger, "a")
    late = claim(ledger, "a", "late")
    leases_end(ledger)
    sweep(ledger)
    taken = claim(ledger, "a", "other")
    ledger.ask(calls.complete("a", taken.fence, ranking("a"), TERMS))
    ledger.ask(calls.forget("a", TERMS))
    submit(ledger, "a", content="another question under the same id")
    claim(ledger, "a", "other")
    assert ledger.ask(calls.complete("a", late.fence, ranking("a"), TERMS)) == "running"
    assert ledger.ask(calls.renew([("a", late.fence, 1)], TERMS)) == ["a"]
    assert ledger.ask(calls.fail("a", late.fence, "JobFailed", "late", TERMS)) == "running"
    assert ledger.ask(calls.hand_back([("a", late.fence)])) == 0
    assert ledger.ask(calls.isolate("a", late.fence, "late")) is False


def test_a_claim_whose_answer_was_lost_is_answered_again_but_a_second_doorbell_is_not(ledger: Ledger):
    submit(ledger, "a")
    lost = calls.claim("a", "w", TERMS)
    first = ledger.ask(lost)
    assert isinstance(first, calls.Claim)
    again = ledger.ask(lost)
    assert isinstance(again, calls.Claim)
    assert again.fence == first.fence
    assert ledger.ask(calls.claim("a", "w", TERMS)) == "running"
    assert ledger.ask(calls.snapshot("a", TERMS)).status.attempts == 1


# Doorbells


def sent_ago(ledger: Ledger, ages: dict[str, float], queue: str = BULK) -> None:
    ledger.redis.zadd(f"rerankq:sent:{queue}", {name: now(ledger) - age for name, age in ages.items()})


def test_as_many_doorbells_are_lost_as_the_broker_lacks_the_oldest_first(ledger: Ledger):
    submit(ledger, "a", "b", "c", "young")
    sent_ago(ledger, {"a": 20, "b": 30, "c": 10, "young": 1})
    assert sweep(ledger, {BULK: 4}).doorbells == 0, "they are all in the broker, however long they wait"
    assert sweep(ledger, {BULK: 7}).doorbells == 0, "doubled ones and those of ended jobs are in it too"
    assert sweep(ledger, {BULK: 3}).doorbells == 1
    assert [doorbell.id for doorbell in ledger.ask(calls.refill_window([BULK], TERMS))] == ["b"]
    assert sweep(ledger, {BULK: 4}).doorbells == 0
    assert sweep(ledger, {BULK: 0}).doorbells == 2, "a doorbell that was sent lately may be on its way"
    assert ledger.redis.zrange(f"rerankq:sent:{BULK}", 0, -1) == [b"young", b"b"]


def test_the_broker_is_asked_only_if_doorbells_are_out_for_long(ledger: Ledger):
    submit(ledger, "bulk")
    submit(ledger, "interactive", priority="interactive")
    assert sweep(ledger).overdue == ()
    sent_ago(ledger, {"bulk": 4})
    assert sweep(ledger).overdue == (BULK,)


def test_doorbells_of_all_tenants_share_the_brokers_messages(ledger: Ledger):
    for tenant in ("one", "other"):
        submit(ledger, f"{tenant}-0", f"{tenant}-1", tenant=tenant)
        sent_ago(ledger, {f"{tenant}-0": 20 + len(tenant), f"{tenant}-1": 10 + len(tenant)}, f"{BULK}:{tenant}")
    assert sweep(ledger, {BULK: 2}).doorbells == 2
    assert {doorbell.id for doorbell in ledger.ask(calls.refill_window([BULK], TERMS))} == {"one-0", "other-0"}


def test_doorbells_sent_or_claimed_after_the_broker_was_asked_are_not_counted(ledger: Ledger):
    submit(ledger, "a", "b")
    sent_ago(ledger, {"a": 20, "b": 20})
    asked_at = now(ledger)
    submit(ledger, "later")
    claim(ledger, "a")
    ledger.redis.delete("rerankq:sweeper")
    counted = calls.Counted(asked_at, {BULK: 1})
    assert ledger.ask(calls.sweep("s", TERMS, counted=counted)).doorbells == 0


def test_sending_again_never_makes_the_broker_hold_more_than_is_out(ledger: Ledger):
    names = [f"j{number}" for number in range(20)]
    submit(ledger, *names)
    in_broker = 15
    for _ in range(10):
        sent_ago(ledger, dict.fromkeys(names, 20))
        sweep(ledger, {BULK: in_broker})
        in_broker += len(ledger.ask(calls.refill_window([BULK], TERMS)))
    assert in_broker == len(names)


def test_lost_doorbells_overtake_a_full_window(ledger: Ledger):
    limits = TERMS._replace(doorbell_window=4)
    submit(ledger, "lost-0", "lost-1", "out-0", "out-1", "behind-0", "behind-1", limits=limits)
    sent_ago(ledger, {"lost-0": 40, "lost-1": 39, "out-0": 24, "out-1": 23})
    assert sweep(ledger, {BULK: 2}).doorbells == 2
    doorbells = ledger.ask(calls.refill_window([BULK], limits))
    assert [(doorbell.id, doorbell.ahead) for doorbell in doorbells] == [("lost-0", True), ("lost-1", True)]
    # The window is full: lost a second time, its doorbell is sent all the same.
    sent_ago(ledger, {"lost-1": 60} | {f"filler-{at}": 0 for at in range(6)})
    assert sweep(ledger, {BULK: 9}).doorbells == 1
    assert [(doorbell.id, doorbell.ahead) for doorbell in ledger.ask(calls.refill_window([BULK], limits))] == [
        ("lost-1", True)
    ]


def test_a_flood_of_one_tenant_does_not_keep_another_waiting(ledger: Ledger):
    limits = TERMS._replace(doorbell_window=20)
    submit(ledger, *(f"flood {number}" for number in range(300)), tenant="flood", limits=limits)
    submit(ledger, "late comer", tenant="quiet", limits=limits)
    assert ledger.redis.zcard(f"rerankq:sent:{BULK}:flood") == 20
    assert ledger.redis.zrange(f"rerankq:sent:{BULK}:quiet", 0, -1) == [b"late comer"]


def test_refilling_the_window_takes_tenants_in_turn(ledger: Ledger):
    limits = TERMS._replace(doorbell_window=64)
    wide = limits._replace(doorbell_window=1)
    for tenant in "abc":
        submit(ledger, *(f"{tenant}{number}" for number in range(100)), tenant=tenant, limits=wide)
    doorbells = ledger.ask(calls.refill_window([BULK], limits, most=48))
    shares = {tenant: sum(doorbell.id.startswith(tenant) for doorbell in doorbells) for tenant in "abc"}
    assert shares == {"a": 16, "b": 16, "c": 16}


def test_doorbells_taken_one_at_a_time_go_to_tenants_in_turn(ledger: Ledger):
    for tenant in "ab":
        submit(
            ledger,
            *(f"{tenant}{number}" for number in range(2)),
            tenant=tenant,
            limits=TERMS._replace(doorbell_window=0),
        )
    taken = [ledger.ask(calls.refill_window([BULK], TERMS, most=1))[0].id for _ in range(4)]
    assert {one[0] for one in taken[:2]} == {one[0] for one in taken[2:]} == {"a", "b"}


def test_a_tenant_without_jobs_is_removed_from_its_queue(ledger: Ledger):
    submit(ledger, "a", tenant="gone")
    taken = claim(ledger, "a")
    ledger.ask(calls.complete("a", taken.fence, ranking("a"), TERMS))
    ledger.ask(calls.refill_window([BULK], TERMS))
    assert ledger.redis.exists(f"rerankq:tenants:{BULK}") == 0


def test_a_doorbell_whose_record_was_removed_is_dropped(ledger: Ledger):
    submit(ledger, "a")
    ledger.redis.delete("rerankq:job:a")
    assert sweep(ledger, {BULK: 0}).doorbells == 0
    sent_ago(ledger, {"a": 20})
    assert sweep(ledger, {BULK: 0}).doorbells == 0
    assert ledger.redis.zcard(f"rerankq:sent:{BULK}") == 0
    assert ledger.ask(calls.claim("a", "w", TERMS)) == "unknown"


def test_a_claim_asks_for_more_doorbells_when_less_than_half_of_the_window_is_out(ledger: Ledger):
    limits = TERMS._replace(doorbell_window=4)
    submit(ledger, *"abcdef", limits=limits)
    assert [claim(ledger, name, limits=limits).refill_window for name in "abc"] == [False, False, True]
    submit(ledger, "alone", tenant="without a backlog", limits=limits)
    assert not claim(ledger, "alone", limits=limits).refill_window


def test_a_job_that_was_running_before_goes_ahead_of_those_that_wait(ledger: Ledger):
    submit(ledger, "older", "handed-back", "younger", limits=TERMS._replace(doorbell_window=0))
    ledger.ask(calls.hand_back([("handed-back", claim(ledger, "handed-back").fence)]))
    doorbells = ledger.ask(calls.refill_window([BULK], TERMS))
    assert [(doorbell.id, doorbell.ahead) for doorbell in doorbells] == [
        ("handed-back", True),
        ("older", False),
        ("younger", False),
    ]


def test_the_message_of_a_deferred_suspect_counts_as_lost_from_that_moment_on(ledger: Ledger):
    submit(ledger, "suspect")
    claim(ledger, "suspect", "one that dies")
    leases_end(ledger)
    sweep(ledger)
    ledger.ask(calls.refill_window([BULK], TERMS))
    sent_ago(ledger, {"suspect": 20})
    deferred = ledger.ask(calls.claim_unless_suspect("suspect", "w", TERMS))
    assert deferred == calls.Deferred(calls.Doorbell("suspect", BULK, "label of suspect", ahead=True), "bulk")
    assert sweep(ledger, {BULK: 0}).doorbells == 0
    assert state(ledger, "suspect") == "queued"


def test_jobs_of_a_former_queue_move_a_few_at_a_time_with_their_deadlines_and_their_pairs(ledger: Ledger):
    submit(ledger, "a", "b", tenant="one", pairs=5, deadline_s=100, queue="former")
    submit(ledger, "c", tenant="other", pairs=5, deadline_s=100, queue="former")
    assert [ledger.ask(calls.adopt({"former": BULK}, limit=2)) for _ in range(3)] == [2, 1, 0]
    assert ledger.redis.zcard("rerankq:deadlines") == 3
    backlog = {field: int(pairs) for field, pairs in ledger.redis.hgetall("rerankq:backlog").items()}
    assert backlog == {b"*": 15, BULK.encode(): 15, f"{BULK}|one".encode(): 10, f"{BULK}|other".encode(): 5}
    assert {doorbell.id for doorbell in ledger.ask(calls.refill_window(["former", BULK], TERMS))} == {"a", "b", "c"}
    for name in "abc":
        claim(ledger, name)
    assert ledger.redis.hlen("rerankq:backlog") == 0


@pytest.mark.parametrize(
    "lost", [f"rerankq:{key}" for key in (f"waiting:{BULK}", f"sent:{BULK}", "queues", f"tenants:{BULK}", "backlog")]
)
def test_a_queued_job_evicted_from_its_index_is_restored_when_it_is_read(ledger: Ledger, lost: str):
    submit(ledger, "a", "b", limits=TERMS._replace(doorbell_window=1))
    ledger.redis.delete(lost)
    for name in "ab":
        assert state(ledger, name) == "queued"
    if sent := ledger.redis.zrange(f"rerankq:sent:{BULK}", 0, -1):
        sent_ago(ledger, dict.fromkeys(sent, 20))
    sweep(ledger, {BULK: 0})
    assert {doorbell.id for doorbell in ledger.ask(calls.refill_window([BULK], TERMS))} == {"a", "b"}
    for name in "ab":
        ledger.ask(calls.complete(name, claim(ledger, name).fence, ranking(name), TERMS))


def test_a_running_or_dead_job_evicted_from_its_index_is_restored_too(ledger: Ledger):
    submit(ledger, "running", "dead")
    killed(ledger, "dead")
    claim(ledger, "running")
    ledger.redis.delete("rerankq:running", "rerankq:dead")
    assert (state(ledger, "running"), state(ledger, "dead")) == ("running", "dead")
    assert ledger.ask(calls.dead()) == ["dead"]
    assert ledger.redis.zscore("rerankq:running", "running") > now(ledger), "its worker may be at it"
    leases_end(ledger)
    assert sweep(ledger).lapsed == 1


# Submitting


def test_a_longer_deadline_holds_for_all_who_submitted_and_a_shorter_one_changes_nothing(ledger: Ledger):
    def deadline() -> float:
        return float(ledger.redis.hget("rerankq:job:a", "deadline") or "inf") - now(ledger)

    submit(ledger, "a", deadline_s=100)
    submit(ledger, "a", deadline_s=50)
    assert 90 < deadline() <= 100
    submit(ledger, "a", deadline_s=1_000)
    assert 900 < deadline() <= 1_000
    submit(ledger, "a", deadline_s=None)
    assert deadline() == float("inf")
    assert ledger.redis.zcard("rerankq:deadlines") == 0


def test_an_ended_job_is_kept_for_the_longest_time_that_was_asked(ledger: Ledger):
    def kept_s(name: str) -> int:
        return ledger.redis.ttl(f"rerankq:job:{name}")

    short, middle, long = (TERMS._replace(result_ttl_s=seconds) for seconds in (10, 1_000, 10_000))
    submit(ledger, "patient", "hasty", "lifted", "cancelled", limits=middle)
    ledger.ask(calls.submit(new_job("patient"), long))
    ledger.ask(calls.submit(new_job("hasty"), short))
    for name, expected in (("patient", 10_000), ("hasty", 1_000)):
        ledger.ask(calls.complete(name, claim(ledger, name).fence, ranking(name), short))
        assert kept_s(name) == pytest.approx(expected, abs=30)
    ledger.ask(calls.submit(new_job("hasty"), short))
    assert kept_s("hasty") > 900, "who asks for less takes nothing from others"
    ledger.ask(calls.submit(new_job("hasty"), long))
    assert kept_s("hasty") > 9_000
    ledger.ask(calls.cancel("cancelled", short))
    assert kept_s("cancelled") > 900
    ledger.ask(calls.complete("lifted", claim(ledger, "lifted").fence, ranking("lifted"), long))
    assert kept_s("lifted") > 9_000
    submit(ledger, "for ever", limits=TERMS._replace(result_ttl_s=10**18))
    assert ledger.ask(calls.cancel("for ever", TERMS)) == "cancelled", "more than Redis can count"


def test_a_job_that_was_started_in_time_expires_no_more_however_often_it_is_queued_again(ledger: Ledger):
    submit(ledger, "handed-back", "lapsed", deadline_s=100)
    ledger.ask(calls.hand_back([("handed-back", claim(ledger, "handed-back").fence)]))
    claim(ledger, "lapsed")
    leases_end(ledger)
    assert sweep(ledger).lapsed == 1
    assert ledger.redis.zcard("rerankq:deadlines") == 0
    # Its 100 s are over, as the ledger would know of them.
    for name in ("handed-back", "lapsed"):
        assert ledger.redis.hget(f"rerankq:job:{name}", "deadline") == b""
        # Whoever submits it again with less patience does not bring the deadline back.
        assert ledger.ask(calls.submit(new_job(name, deadline_s=1e-6), TERMS)).state == "queued"
        assert state(ledger, name) == "queued"
        assert claim(ledger, name)


def test_an_interactive_submission_lifts_a_queued_bulk_job_and_asks_for_a_doorbell(ledger: Ledger):
    submit(ledger, "a")
    lifted = ledger.ask(calls.submit(new_job("a", priority="interactive"), TERMS))
    assert lifted == calls.Acceptance("queued", send=True)
    taken = claim(ledger, "a")
    assert taken.priority == "interactive"
    assert ledger.ask(calls.submit(new_job("a"), TERMS)) == calls.Acceptance("running", send=False)


def test_a_job_that_ended_badly_is_queued_anew_by_the_same_content(ledger: Ledger):
    submit(ledger, "a", "b", "c", payload=b"fresh")
    taken = claim(ledger, "a")
    ledger.ask(calls.fail("a", taken.fence, "JobFailed", "why", TERMS))
    ledger.ask(calls.cancel("b", TERMS))
    ledger.redis.hset("rerankq:job:c", "deadline", "1.0")
    for name, before in (("a", "failed"), ("b", "cancelled"), ("c", "expired")):
        assert state(ledger, name) == before
        submit(ledger, name, payload=b"fresh")
        snapshot = ledger.ask(calls.snapshot(name, TERMS))
        assert (snapshot.status.state, snapshot.status.error, snapshot.status.attempts) == ("queued", None, 0)
        assert ledger.redis.ttl(f"rerankq:job:{name}") == -1
        assert claim(ledger, name).payload == b"fresh"


def test_the_backlog_limit_refuses_and_says_how_much_waits_but_takes_a_large_job_into_an_empty_queue(ledger: Ledger):
    limits = TERMS._replace(max_queued_pairs=10)
    submit(ledger, "large", pairs=50, limits=limits)
    refused = ledger.ask(calls.submit(new_job("small"), limits))
    assert refused == calls.Acceptance("full", send=False, pairs_waiting=50)
    assert state(ledger, "small") == "unknown"
    claim(ledger, "large")
    submit(ledger, "small", limits=limits)
    submit(ledger, "the rest", pairs=9, limits=limits)
    assert ledger.ask(calls.submit(new_job("one more"), limits)).state == "full"


def test_the_load_counts_jobs_by_queue_with_and_without_a_doorbell_and_the_age_of_the_oldest(ledger: Ledger):
    limits = TERMS._replace(doorbell_window=1)
    submit(ledger, "sent", "waits", tenant="a", pairs=2, limits=limits)
    submit(ledger, "other", tenant="b", limits=limits)
    submit(ledger, "urgent", priority="interactive", limits=limits)
    claim(ledger, "urgent")
    created = float(ledger.redis.hget("rerankq:job:waits", "created"))
    ledger.redis.hset("rerankq:job:waits", "created", created - 50)
    ledger.redis.hset("rerankq:job:other", "created", "damaged")
    found = ledger.ask(calls.load())
    assert (found.running, found.dead) == (1, 0)
    [bulk] = found.queues
    assert (bulk.name, bulk.jobs, bulk.pairs, bulk.tenants) == (BULK, 3, 5, 2)
    assert bulk.oldest_s is not None
    assert 50 <= bulk.oldest_s < 200


def test_the_texts_of_a_job_are_dropped_however_it_ends(ledger: Ledger):
    submit(ledger, "done", "failed", "cancelled", "stopped", "expired", payload=b"the texts")
    ledger.ask(calls.complete("done", claim(ledger, "done").fence, ranking("done"), TERMS))
    ledger.ask(calls.fail("failed", claim(ledger, "failed").fence, "JobFailed", "why", TERMS))
    claim(ledger, "stopped")
    for name in ("cancelled", "stopped"):
        ledger.ask(calls.cancel(name, TERMS))
    ledger.redis.hset("rerankq:job:expired", "deadline", "1.0")
    for name, ended in {"done": "done", "failed": "failed", "cancelled": "cancelled", "stopped": "cancelled"}.items():
        assert state(ledger, name) == ended
        assert not ledger.redis.hexists(f"rerankq:job:{name}", "payload")
    assert state(ledger, "expired") == "expired"
    assert not ledger.redis.hexists("rerankq:job:expired", "payload")


def test_forgetting_drops_what_ended_and_leaves_what_has_not(ledger: Ledger):
    submit(ledger, "done", "failed", "cancelled", "expired", "running", "queued")
    ledger.ask(calls.complete("done", claim(ledger, "done").fence, ranking("done"), TERMS))
    ledger.ask(calls.fail("failed", claim(ledger, "failed").fence, "JobFailed", "why", TERMS))
    ledger.ask(calls.cancel("cancelled", TERMS))
    ledger.redis.hset("rerankq:job:expired", "deadline", "1.0")
    claim(ledger, "running")
    for name in ("done", "failed", "cancelled", "expired", "running", "queued"):
        assert ledger.ask(calls.forget(name, TERMS)) == name
        assert state(ledger, name) == (name if name in {"running", "queued"} else "unknown")


# Who hears of it


def test_each_end_is_published_and_a_cancellation_reaches_the_workers(ledger: Ledger):
    completions = ledger.redis.pubsub()
    completions.psubscribe("tests:*")
    completions.get_message(timeout=5)
    submit(ledger, "done", "failed", "cancelled", "expired", "stopped")
    taken = {name: claim(ledger, name) for name in ("done", "failed", "stopped")}
    ledger.ask(calls.complete("done", taken["done"].fence, ranking("done"), TERMS))
    ledger.ask(calls.fail("failed", taken["failed"].fence, "JobFailed", "why", TERMS))
    ledger.ask(calls.cancel("cancelled", TERMS))
    ledger.ask(calls.cancel("stopped", TERMS))
    ledger.redis.hset("rerankq:job:expired", "deadline", "1.0")
    state(ledger, "expired")
    heard = [completions.get_message(timeout=5) for _ in range(6)]
    assert [(message["channel"], message["data"]) for message in heard] == [
        (b"tests:job:done", b"done"),
        (b"tests:job:failed", b"failed"),
        (b"tests:job:cancelled", b"cancelled"),
        (b"tests:cancel", b"stopped %d" % taken["stopped"].fence),
        (b"tests:job:stopped", b"cancelled"),
        (b"tests:job:expired", b"expired"),
    ]
    completions.close()


def test_a_job_set_aside_is_published_and_has_no_time_to_live(ledger: Ledger):
    completions = ledger.redis.pubsub()
    completions.psubscribe("tests:job:*")
    completions.get_message(timeout=5)
    submit(ledger, "poison")
    ledger.redis.expire("rerankq:job:poison", 1_000)
    killed(ledger, "poison")
    heard = completions.get_message(timeout=5)
    assert (heard["channel"], heard["data"]) == (b"tests:job:poison", b"dead")
    assert ledger.redis.ttl("rerankq:job:poison") == -1
    completions.close()


def test_a_sweep_expires_late_jobs_and_forgets_deadlines_without_a_job(ledger: Ledger):
    submit(ledger, "late", "in time", deadline_s=1_000)
    ledger.redis.hset("rerankq:job:late", "deadline", "1.0")
    ledger.redis.zadd("rerankq:deadlines", {"late": 1, "removed from outside": 1})
    assert sweep(ledger).expired == 1
    assert ledger.redis.zrange("rerankq:deadlines", 0, -1) == [b"in time"]
    assert state(ledger, "late") == "expired"


def test_the_pairs_done_and_the_seconds_waited_are_those_of_the_job(ledger: Ledger):
    submit(ledger, "a", pairs=7)
    ledger.redis.hset("rerankq:job:a", "created", f"{now(ledger) - 1_000:.6f}")
    taken = claim(ledger, "a")
    assert taken.waited_s == pytest.approx(1_000, abs=60)
    ledger.ask(calls.renew([("a", taken.fence, 3)], TERMS))
    status = ledger.ask(calls.snapshot("a", TERMS)).status
    assert (status.pairs_done, status.pairs_total) == (3, 7)
    assert status.started_at - status.submitted_at == pytest.approx(1_000, abs=60)
    ledger.ask(calls.complete("a", taken.fence, ranking("a"), TERMS))
    assert ledger.ask(calls.snapshot("a", TERMS)).status.pairs_done == 7


def test_one_sweeper_sweeps_at_a_time_and_its_lock_runs_out(ledger: Ledger):
    submit(ledger, "a")
    claim(ledger, "a")
    leases_end(ledger)
    assert ledger.ask(calls.sweep("one", TERMS, watched_s=0)) == calls.Swept()
    assert ledger.ask(calls.sweep("other", TERMS)) == calls.Swept()
    assert 0 < ledger.redis.pttl("rerankq:sweeper") <= 3_000
    leases_end(ledger)
    assert ledger.ask(calls.sweep("one", TERMS)).lapsed == 1


def test_a_sweep_judges_so_many_and_the_next_one_goes_on(ledger: Ledger):
    names = [f"j{number}" for number in range(25)]
    submit(ledger, *names)
    for name in names:
        claim(ledger, name)
    leases_end(ledger)
    swept = [ledger.ask(calls.sweep("s", TERMS, limit=10)).lapsed for _ in range(4)]
    assert swept == [10, 10, 5, 0]


def test_the_registry_shows_living_workers_and_forgets_those_long_gone(ledger: Ledger):
    said = '{"model": "m", "fingerprint": "f", "queues": ["rerankq.interactive.x", "rerankq.bulk.x"]}'
    ledger.ask(calls.beat("w", said, forget_after_s=60))
    (worker,) = ledger.workers()
    assert (worker.id, worker.model, worker.suffix) == ("w", "m", ".x")
    assert 0 <= worker.age_s < 5
    ledger.redis.hset("rerankq:workers", "gone", f"{now(ledger) - 61:.6f} {said}")
    assert len(ledger.workers()) == 2
    ledger.ask(calls.beat("w", said, forget_after_s=60))
    assert [worker.id for worker in ledger.workers()] == ["w"]


# Redis itself


def test_scripts_come_back_after_the_server_forgot_them(ledger: Ledger):
    submit(ledger, "a")
    ledger.redis.script_flush()
    assert state(ledger, "a") == "queued"
    ledger.redis.script_flush()
    submit(ledger, "b", "c")
    assert [state(ledger, name) for name in "bc"] == ["queued", "queued"]


def test_a_server_that_is_not_there_is_a_broker_unavailable():
    ledger = Ledger(connect("redis://127.0.0.1:1/0"))
    with pytest.raises(BrokerUnavailable, match="does not answer"):
        ledger.ask(calls.snapshot("a", TERMS))
    with pytest.raises(BrokerUnavailable, match="does not answer"):
        ledger.ask_all([calls.snapshot("a", TERMS)])


def test_a_server_that_refuses_is_a_broker_unavailable(newest_ledger: Ledger):
    newest_ledger.redis.set("rerankq:backlog", "no hash of counters at all")
    with pytest.raises(BrokerUnavailable, match="refused"):
        newest_ledger.ask(calls.cancel("a", TERMS))
    wrong, right = newest_ledger.ask_all([calls.cancel("a", TERMS), calls.snapshot("b", TERMS)])
    assert isinstance(wrong, BrokerUnavailable)
    assert right.status.state == "unknown"


def test_a_ranking_of_another_version_fails_its_own_job_only(newest_ledger: Ledger):
    submit(newest_ledger, "a", "b")
    for name in "ab":
        newest_ledger.ask(calls.complete(name, claim(newest_ledger, name).fence, ranking(name), TERMS))
    newest_ledger.redis.hset("rerankq:job:a", "ranking", '{"words": "of the future"}')
    looks = newest_ledger.ask_all([calls.snapshot(name, TERMS, with_ranking=True) for name in "ab"])
    assert isinstance(looks[0], JobFailed)
    assert looks[1].ranking == ranking("b")


def test_an_error_message_that_utf8_cannot_encode_is_stored(newest_ledger: Ledger):
    submit(newest_ledger, "a")
    failure = calls.fail("a", claim(newest_ledger, "a").fence, "JobFailed", "broken \ud800 text " * 1_000, TERMS)
    assert newest_ledger.ask(failure) == "failed"
    error = newest_ledger.ask(calls.snapshot("a", TERMS)).status.error
    assert error.startswith("broken ? text")
    assert len(error) == 2_000, "a ledger is no place for a log"


# A full Redis


@pytest.fixture
def small_server(redis_binary_each_version) -> Iterator[Callable[[str], Ledger]]:
    """Start a server of so much memory that evicts nothing."""
    with ExitStack() as stack:

        def start(maxmemory: str) -> Ledger:
            server = stack.enter_context(EmbeddedRedis(binary=redis_binary_each_version, maxmemory=maxmemory))
            connection = connect(server.url)
            stack.callback(connection.close)
            return Ledger(connection)

        yield start


def used(ledger: Ledger) -> float:
    memory = ledger.redis.info("memory")
    return memory["used_memory"] / memory["maxmemory"]


def let_go_of_buffers(ledger: Ledger, wait_until: Callable) -> None:
    """Leave in the server's memory what it stores alone.

    Beside that it keeps a buffer as large as the largest argument for each connection, until that has been idle for
    some seconds.
    """
    ledger.redis.connection_pool.disconnect()
    wait_until(lambda: len(ledger.redis.client_list()) == 1)


def fill_up(ledger: Ledger, wait_until: Callable) -> None:
    """Leave no byte for anybody, nor once the server has freed what it keeps for itself: buffers, a former table."""
    let_go_of_buffers(ledger, wait_until)
    memory = ledger.redis.info("memory")
    assert memory["used_memory"] < memory["maxmemory"], "it was to be filled by what it holds"
    ledger.redis.config_set("maxmemory", int(memory["used_memory"] * 0.9))


def test_submissions_are_refused_well_before_the_memory_is_full_however_many_come_at_once(
    small_server: Callable, wait_until: Callable
):
    ledger = small_server("60mb")

    def produce(producer: int) -> None:
        for turn in range(20):
            batch = [new_job(f"{producer}-{turn}-{number}", payload=b"x" * 500_000) for number in range(8)]
            answers = ledger.ask_all([calls.submit(one, TERMS) for one in batch])
            states.update(answer.state for answer in answers)

    states: set[str] = set()
    producers = [threading.Thread(target=produce, args=(number,)) for number in range(4)]
    for producer in producers:
        producer.start()
    for producer in producers:
        producer.join()
    assert states == {"queued", "memory_full"}
    # What a producer is just sending counts as memory in use, too: it is there beside what was accepted.
    let_go_of_buffers(ledger, wait_until)
    assert 0.7 < used(ledger) <= 0.9
    refused = ledger.ask(calls.submit(new_job("more", payload=b"x" * 3_000_000), TERMS))
    assert refused.state == "memory_full"
    assert refused.memory_percent > 90
    assert ledger.redis.set("a stranger's key", "has room")


def test_a_job_is_refused_that_would_fill_the_memory_by_itself(small_server: Callable):
    ledger = small_server("20mb")
    # While it is submitted the server holds it twice: as it came, and as it is stored.
    assert ledger.ask(calls.submit(new_job("large", payload=b"x" * 7_000_000), TERMS)).state == "memory_full"
    assert ledger.ask(calls.submit(new_job("small", payload=b"x" * 1_000_000), TERMS)).state == "queued"


def test_a_really_full_ledger_still_does_all_that_makes_room(small_server: Callable, wait_until: Callable):
    ledger = small_server("20mb")
    names = [f"j{number}" for number in range(400)]
    submit(ledger, *names, payload=b"x" * 10_000)
    claimed = {name: claim(ledger, name) for name in names[:5]}
    ledger.redis.script_flush()
    fill_up(ledger, wait_until)

    assert ledger.ask(calls.submit(new_job("one more"), TERMS)).state == "memory_full"
    assert ledger.ask(calls.beat("w", "{}", forget_after_s=60)) > 0
    assert ledger.ask(calls.renew([(name, one.fence, 1) for name, one in claimed.items()], TERMS)) == []
    assert ledger.ask(calls.isolate("j0", claimed["j0"].fence, "w"))
    assert ledger.ask(calls.complete("j0", claimed["j0"].fence, ranking("j0"), TERMS)) == "done"
    assert ledger.ask(calls.fail("j1", claimed["j1"].fence, "JobFailed", "why", TERMS)) == "failed"
    assert ledger.ask(calls.hand_back([("j2", claimed["j2"].fence)])) == 1
    assert ledger.ask(calls.cancel("j3", TERMS)) == "cancelled"
    assert ledger.ask(calls.cancel("j6", TERMS)) == "cancelled"
    leases_end(ledger)
    assert sweep(ledger).lapsed == 1
    assert ledger.ask(calls.snapshot("j0", TERMS, with_ranking=True)).ranking == ranking("j0")
    assert ledger.ask(calls.forget("j0", TERMS)) == "done"


def test_a_really_full_ledger_drains_to_the_last_job(small_server: Callable, wait_until: Callable):
    ledger = small_server("20mb")
    limits = TERMS._replace(doorbell_window=8)
    names = [f"j{number}" for number in range(300)]
    submit(ledger, *names, payload=b"x" * 10_000, limits=limits)
    fill_up(ledger, wait_until)
    sent = [name.decode() for name in ledger.redis.zrange(f"rerankq:sent:{BULK}", 0, -1)]
    done = []
    while sent:
        for name in sent:
            taken = claim(ledger, name)
            assert ledger.ask(calls.complete(name, taken.fence, ranking(name), TERMS)) == "done"
            done.append(name)
        sent = [doorbell.id for doorbell in ledger.ask(calls.refill_window([BULK], limits))]
    assert sorted(done) == sorted(names)
    assert ledger.redis.hlen("rerankq:backlog") == 0
    assert used(ledger) < 1


def test_a_refusal_for_lack_of_memory_is_a_queue_full(small_server: Callable, wait_until: Callable):
    ledger = small_server("20mb")
    fill_up(ledger, wait_until)
    for refused in (
        lambda: ledger.redis.set("one more", "byte"),
        lambda: ledger.redis.eval("return redis.call('SET', 'one more', 'byte')", 0),
    ):
        with pytest.raises(QueueFull) as caught, translated():
            refused()
        assert caught.value.retry_after_s > 0


# What it costs


def fill(ledger: Ledger, count: int, *, first: int = 0) -> None:
    """Put many small jobs into the backlog at once, as submit would."""
    functions = prelude()
    loop = """
    for number = tonumber(ARGV[1]), tonumber(ARGV[2]) do
      local id, created = 'fill-' .. number, stamp(now() - 1000 + number / 1000000)
      redis.call('HSET', job_key(id), 'state', 'queued', 'content', 'c', 'queue', ARGV[3], 'tenant', '', 'priority',
        'bulk', 'pairs', 1, 'deadline', '', 'label', 'l', 'model', 'm', 'payload', '{}', 'created', created,
        'fence', 0, 'claims', 0, 'deaths', 0, 'suspect', 0, 'done_pairs', 0)
      enqueue(id, ARGV[3], '', 1, '')
    end"""
    for start in range(first, first + count, 5_000):
        ledger.redis.eval(functions + loop, 0, start, min(start + 5_000, first + count) - 1, BULK)


# Each of these takes time that does not grow with the backlog, or with its logarithm, as the ledger uses it:
# SMEMBERS lists tenants and queues, HGETALL workers, the ranges are cut by LIMIT or COUNT.
FLAT = {
    *("hget", "hmget", "hset", "hdel", "hincrby", "hgetall", "hexists", "exists", "get", "set", "incr", "del"),
    *("zadd", "zrem", "zcard", "zcount", "zrank", "zpopmin", "zrangebyscore", "zrevrange", "sadd", "srem", "smembers"),
    *("expire", "publish", "time", "type", "info", "evalsha"),
}


def commands_of(ledger: Ledger, work: Callable[[], None]) -> dict[str, int]:
    """Count the commands that Redis ran for some work, those inside of scripts too."""
    ledger.redis.config_resetstat()
    work()
    stats = ledger.redis.info("commandstats")
    ours = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}
    return {name: count for name, count in ours.items() if not name.startswith(("config", "client", "hello", "ping"))}


def test_the_cost_of_a_job_does_not_grow_with_the_jobs_that_wait(ledger: Ledger):
    def a_few_jobs(prefix: str) -> None:
        for number in range(10):
            submit(ledger, f"{prefix}-{number}")
        doorbells = ledger.ask(calls.refill_window([BULK], TERMS, most=10))
        assert len(doorbells) == 10
        for doorbell in doorbells:
            taken = claim(ledger, doorbell.id)
            ledger.ask(calls.renew([(doorbell.id, taken.fence, 0)], TERMS))
            ledger.ask(calls.complete(doorbell.id, taken.fence, ranking(doorbell.id), TERMS))
        ledger.ask(calls.sweep("s", TERMS, counted=calls.Counted(now(ledger), {BULK: 0})))

    fill(ledger, 1_000)
    a_few_jobs("warm")
    few = commands_of(ledger, lambda: a_few_jobs("few"))
    fill(ledger, 19_000, first=1_000)
    many = commands_of(ledger, lambda: a_few_jobs("many"))
    assert few == many
    assert set(many) <= FLAT


def test_the_scripts_ship_with_the_package_and_are_named_by_their_hash():
    text, sha = source("claim")
    assert text.startswith("local KEY = {job = ")
    assert len(sha) == 40


def test_scripts_that_are_flushed_all_the_time_are_given_again(ledger: Ledger):
    """As by an operator's SCRIPT FLUSH, again and again, while hundreds of calls come in one round trip."""
    stop = threading.Event()

    def flush() -> None:
        while not stop.wait(0.001):
            ledger.redis.script_flush()

    flushing = threading.Thread(target=flush)
    flushing.start()
    try:
        for _ in range(30):
            looks = ledger.ask_all([calls.snapshot(f"{number}", TERMS) for number in range(300)])
            assert {snapshot.status.state for snapshot in looks} == {"unknown"}
    finally:
        stop.set()
        flushing.join()
