"""One engine thread, many tickets: who is computed when, once, and what happens when something fails."""

import math
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rerankq_worker.engine import (
    AsynchronousStubEngine,
    Batcher,
    EngineClosed,
    EngineDied,
    PairFailed,
    StubEngine,
    TicketCancelled,
    TokenisedPair,
)

PATIENCE_S = 20  # a test that hangs ends here; none that works waits so long


class ScriptedEngine(StubEngine):
    """The stub, with a gate to hold the device at and a script of what goes wrong."""

    def __init__(self, *, fails=None, held=False, **options):
        super().__init__(seconds_per_token=0, **options)
        self.batches = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.fails = fails or (lambda batch: None)
        self.dead = False
        self.released = 0
        if not held:
            self.gate.set()

    def forward(self, batch):
        self.entered.release()
        assert self.gate.wait(PATIENCE_S)
        self.batches.append(list(batch))
        if error := self.fails(batch):
            raise error
        return super().forward(batch)

    def warm_up(self):
        if self.dead:
            raise RuntimeError("no answer")

    def release_memory(self):
        self.released += 1

    def wait_until_busy(self):
        assert self.entered.acquire(timeout=PATIENCE_S)


class AsynchronousEngine(ScriptedEngine):
    """The same on an asynchronous device: the script is followed on a thread of the device."""

    def __init__(self, **options):
        super().__init__(**options)
        self.device_thread = ThreadPoolExecutor(1)
        self.in_flight = self.most_in_flight = 0
        self.launched = threading.Semaphore(0)

    def launch(self, batch):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.launched.release()
        return CountedFuture(self, self.device_thread.submit(self.forward, batch))


class CountedFuture:
    def __init__(self, engine, future):
        self.engine, self.future = engine, future

    def done(self):
        return self.future.done()

    def result(self):
        try:
            return self.future.result(PATIENCE_S)
        finally:
            self.engine.in_flight -= 1


@pytest.fixture(params=[ScriptedEngine, AsynchronousEngine], ids=["blocking launch", "asynchronous"])
def make_engine(request):
    return request.param


@pytest.fixture
def started():
    """Make batchers that are closed whatever the test does."""
    made = []

    def start(engine, **options):
        made.append(Batcher(engine, **options))
        return made[-1]

    yield start
    for batcher in made:
        batcher._engine.gate.set()
        batcher.close(drain=False, timeout=PATIENCE_S)


def keys_of(chunks):
    return [chunk.encode() for chunk in chunks]


def computed(engine):
    return Counter(pair.ids.tobytes() for batch in engine.batches for pair in batch)


def has_word(engine, word):
    marker = engine.tokenise(word, [""])[0].ids[1]
    return lambda pair: marker in pair.ids.tolist()


CHUNKS = [f"chunk {'word ' * (number % 17)}number {number}" for number in range(60)]


def test_every_ticket_gets_the_scores_of_its_own_pairs_in_order(started, make_engine):
    engine = make_engine()
    batcher = started(engine, max_batch_tokens=64)
    tickets = {query: batcher.submit(engine.tokenise(query, CHUNKS)) for query in ("one", "two words", "three of them")}
    for query, ticket in tickets.items():
        alone = StubEngine(seconds_per_token=0).score([(query, chunk) for chunk in CHUNKS])
        np.testing.assert_array_equal(ticket.result(PATIENCE_S), alone)
        assert ticket.done
        assert ticket.done_pairs == ticket.pairs == len(CHUNKS)


def test_many_threads_at_once_get_their_own_scores(started, make_engine):
    engine = make_engine()
    batcher = started(engine, max_batch_tokens=256)
    wrong = []

    def job(number):
        query = f"query {number % 5}"
        pairs = engine.tokenise(query, CHUNKS)
        keys = [f"{query}/{chunk}".encode() for chunk in CHUNKS]
        ticket = batcher.submit(pairs, priority="bulk" if number % 2 else "interactive", keys=keys)
        if number % 7 == 3:
            ticket.cancel()
            return
        if not np.array_equal(ticket.result(PATIENCE_S), StubEngine.forward(engine, pairs)):
            wrong.append(number)

    threads = [threading.Thread(target=job, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert wrong == []
    assert batcher.stats().waiting_pairs == 0
    assert batcher.stats().tickets == 0
    assert batcher._by_key == {}


def test_pairs_of_many_tickets_share_batches(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine, max_batch_tokens=4096)
    batcher.submit(engine.tokenise("first", ["goes alone"]))
    engine.wait_until_busy()
    tickets = [batcher.submit(engine.tokenise(f"query {n}", ["same length"])) for n in range(20)]
    engine.gate.set()
    for ticket in tickets:
        ticket.result(PATIENCE_S)
    assert [len(batch) for batch in engine.batches] == [1, 20]


def test_no_batch_exceeds_the_budget_unless_one_pair_does(started, make_engine):
    engine = make_engine()
    batcher = started(engine, max_batch_tokens=40)
    batcher.submit(engine.tokenise("q", [*CHUNKS, "long " * 100])).result(PATIENCE_S)
    for batch in engine.batches:
        assert len(batch) * max(pair.length for pair in batch) <= 40 or len(batch) == 1


def test_a_submission_without_pairs_is_done_at_once(started, make_engine):
    ticket = started(make_engine()).submit([])
    assert ticket.done
    assert ticket.result(0).shape == (0,)


# -- coalescing ----------------------------------------------------------------------------------------------------


def test_pairs_with_equal_keys_in_flight_are_computed_once(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine)
    pairs = engine.tokenise("q", CHUNKS)
    tickets = [batcher.submit(pairs, keys=keys_of(CHUNKS)) for _ in range(3)]
    engine.gate.set()
    results = [ticket.result(PATIENCE_S) for ticket in tickets]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert set(computed(engine).values()) == {1}
    assert batcher.stats().joined_pairs == 2 * len(CHUNKS)


def test_a_pair_already_on_the_device_can_still_be_shared(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine)
    pairs = engine.tokenise("q", ["c"])
    first = batcher.submit(pairs, keys=[b"k"])
    engine.wait_until_busy()
    second = batcher.submit(pairs, keys=[b"k"])
    engine.gate.set()
    assert first.result(PATIENCE_S) == second.result(PATIENCE_S)
    assert len(engine.batches) == 1


def test_a_job_is_on_the_device_before_each_launch_with_its_pairs_and_not_after_the_last(started, make_engine):
    engine, noted, at_launches = make_engine(), [], []
    pairs = engine.tokenise("q", CHUNKS)
    own, launch = {pair.ids.tobytes() for pair in pairs}, engine.launch

    def launch_and_record(batch):
        if any(pair.ids.tobytes() in own for pair in batch):
            at_launches.append(noted[-1])
        return launch(batch)

    engine.launch = launch_and_record
    batcher = started(engine, max_batch_tokens=64)
    other = batcher.submit(engine.tokenise("other", CHUNKS))
    batcher.submit(pairs, note_on_device=noted.append).result(PATIENCE_S)
    other.result(PATIENCE_S)
    assert len(at_launches) > 5
    assert all(at_launches)
    assert noted == [True, False] * (len(noted) // 2), "told of changes alone"


def test_a_job_whose_pairs_are_all_queued_is_not_on_the_device(started):
    engine, noted = ScriptedEngine(held=True), []
    batcher = started(engine)
    blocker = batcher.submit(engine.tokenise("q", ["blocks the device"]))
    engine.wait_until_busy()
    ticket = batcher.submit(engine.tokenise("q", ["c"]), note_on_device=noted.append)
    assert noted == []
    engine.gate.set()
    blocker.result(PATIENCE_S)
    ticket.result(PATIENCE_S)
    assert noted == [True, False]


def test_a_job_that_joins_a_pair_on_the_device_is_on_the_device(started, make_engine):
    engine, noted = make_engine(held=True), []
    batcher = started(engine)
    pairs = engine.tokenise("q", ["c"])
    first = batcher.submit(pairs, keys=[b"c"])
    engine.wait_until_busy()
    second = batcher.submit(pairs, keys=[b"c"], note_on_device=noted.append)
    assert noted == [True]
    engine.gate.set()
    first.result(PATIENCE_S)
    second.result(PATIENCE_S)
    assert noted == [True, False]


def test_a_cancelled_job_is_told_nothing_more_though_its_pairs_stay_on_the_device(started, make_engine):
    engine, noted = make_engine(held=True), []
    batcher = started(engine)
    pairs = engine.tokenise("q", ["c"])
    ticket = batcher.submit(pairs, keys=[b"c"], note_on_device=noted.append)
    other = batcher.submit(pairs, keys=[b"c"])
    engine.wait_until_busy()
    ticket.cancel()
    engine.gate.set()
    other.result(PATIENCE_S)
    assert noted == [True], "its place in the record may be another job's by now"


@pytest.mark.parametrize("dies", [False, True])
def test_a_job_of_a_failed_batch_is_on_the_device_until_it_was_retried_and_for_ever_if_that_dies(
    started, make_engine, dies: bool
):
    engine = make_engine(held=True)
    broken = has_word(engine, "broken")
    engine.fails = lambda batch: ValueError("broken") if any(map(broken, batch)) else None
    engine.dead = dies
    noted = {"good": [], "broken": []}
    batcher = started(engine)
    batcher.submit(engine.tokenise("q", ["blocks the device"]))
    engine.wait_until_busy()
    tickets = {
        name: batcher.submit(engine.tokenise(name, ["c"]), note_on_device=told.append) for name, told in noted.items()
    }
    engine.gate.set()
    with pytest.raises(EngineDied if dies else PairFailed):
        tickets["broken"].result(PATIENCE_S)
    assert noted["broken"] == [True]
    if not dies:
        tickets["good"].result(PATIENCE_S)
        assert noted["good"] == [True, False]


def test_pairs_without_keys_are_never_shared(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine)
    pairs = engine.tokenise("q", ["c"])
    tickets = [batcher.submit(pairs, keys=keys) for keys in (None, [None], [b"k"], [b"k"])]
    engine.gate.set()
    for ticket in tickets:
        ticket.result(PATIENCE_S)
    assert sum(computed(engine).values()) == 3


def test_a_submission_may_contain_the_same_key_twice(started, make_engine):
    engine = make_engine()
    pairs = engine.tokenise("q", ["c", "d", "c"])
    logits = started(engine).submit(pairs, keys=[b"c", b"d", b"c"]).result(PATIENCE_S)
    np.testing.assert_array_equal(logits, StubEngine.forward(engine, pairs))
    assert set(computed(engine).values()) == {1}


def test_a_key_is_forgotten_once_computed(started, make_engine):
    engine = make_engine()
    batcher = started(engine)
    pairs = engine.tokenise("q", ["c"])
    for _ in range(2):
        batcher.submit(pairs, keys=[b"k"]).result(PATIENCE_S)
    assert sum(computed(engine).values()) == 2
    assert batcher._by_key == {}


def test_a_shared_pair_is_computed_although_its_first_ticket_is_cancelled(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine)
    blocker = batcher.submit(engine.tokenise("q", ["blocks the device"]))
    engine.wait_until_busy()
    pairs = engine.tokenise("q", CHUNKS)
    owner = batcher.submit(pairs, keys=keys_of(CHUNKS))
    other = batcher.submit(pairs[:10], keys=keys_of(CHUNKS[:10]))
    owner.cancel()
    engine.gate.set()
    np.testing.assert_array_equal(other.result(PATIENCE_S), StubEngine.forward(engine, pairs[:10]))
    blocker.result(PATIENCE_S)
    with pytest.raises(TicketCancelled):
        owner.result(PATIENCE_S)
    assert set(computed(engine)) == {pair.ids.tobytes() for batch in engine.batches for pair in batch}
    assert sum(computed(engine).values()) == 11


def test_a_bulk_pair_is_interactive_while_an_interactive_ticket_shares_it(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine, max_batch_tokens=8, clock=lambda: 0.0)
    batcher.submit(engine.tokenise("q", ["blocks"]))
    engine.wait_until_busy()
    chunks = ["aa aa", "bb bb", "cc cc"]
    pairs = engine.tokenise("q", chunks)
    bulk = batcher.submit(pairs, priority="bulk", keys=keys_of(chunks))
    batcher.submit(pairs[1:2], keys=[b"bb bb"]).cancel()
    lifted = batcher.submit(pairs[2:], keys=[b"cc cc"])
    engine.gate.set()
    bulk.result(PATIENCE_S)
    lifted.result(PATIENCE_S)
    order = [pair.ids.tobytes() for batch in engine.batches[1:] for pair in batch]
    assert order == [pairs[n].ids.tobytes() for n in (2, 0, 1)]


# -- cancelling ----------------------------------------------------------------------------------------------------


def test_a_cancelled_ticket_stops_before_its_next_micro_batch(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine, max_batch_tokens=8)
    ticket = batcher.submit(engine.tokenise("q", [f"chunk {n}" for n in range(50)]))
    engine.wait_until_busy()
    ticket.cancel()
    engine.gate.set()
    assert ticket.done
    with pytest.raises(TicketCancelled):
        ticket.result(0)
    after = batcher.submit(engine.tokenise("q", ["after"]))
    after.result(PATIENCE_S)
    # One may have been launched ahead already.
    assert 2 <= len(engine.batches) <= (2 if make_engine is ScriptedEngine else 3)
    assert batcher.stats().waiting_pairs == 0


def test_cancelling_twice_or_after_the_end_changes_nothing(started, make_engine):
    engine = make_engine()
    ticket = started(engine).submit(engine.tokenise("q", ["c"]))
    logits = ticket.result(PATIENCE_S)
    ticket.cancel()
    ticket.cancel()
    assert ticket.result(0) is logits


def test_a_result_that_timed_out_can_be_asked_for_again(started, make_engine):
    engine = make_engine(held=True)
    ticket = started(engine).submit(engine.tokenise("q", ["c"]))
    with pytest.raises(TimeoutError, match="0 of 1 pairs"):
        ticket.result(timeout=0.01)
    engine.gate.set()
    assert ticket.result(PATIENCE_S).shape == (1,)


# -- priorities ----------------------------------------------------------------------------------------------------


def test_interactive_pairs_go_before_bulk_that_came_earlier(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine, max_batch_tokens=16, clock=lambda: 0.0)
    batcher.submit(engine.tokenise("q", ["blocks"]))
    engine.wait_until_busy()
    bulk = batcher.submit(engine.tokenise("q", [f"bulk {n}" for n in range(40)]), priority="bulk")
    urgent = batcher.submit(engine.tokenise("q", [f"urgent {n}" for n in range(6)]))
    engine.gate.set()
    bulk.result(PATIENCE_S)
    urgent.result(PATIENCE_S)
    is_urgent = has_word(engine, "urgent")
    order = [is_urgent(pair) for batch in engine.batches[1:] for pair in batch]
    assert order == [True] * 6 + [False] * 40


def test_bulk_keeps_its_share_under_a_flood_of_interactive_pairs(started):
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()

    class TimedEngine(ScriptedEngine):
        def forward(self, batch):
            clock.now += len(batch) * max(pair.length for pair in batch) / 100
            return super().forward(batch)

    engine = TimedEngine(held=True)
    batcher = started(engine, max_batch_tokens=60, bulk_share=0.25, clock=clock)
    batcher.submit(engine.tokenise("q", ["blocks"]))
    engine.wait_until_busy()
    flood = batcher.submit(engine.tokenise("q", [f"flood {n}" for n in range(2000)]))
    bulk = batcher.submit(
        engine.tokenise("q", [f"this bulk chunk is longer than those {n}" for n in range(2000)]), priority="bulk"
    )
    engine.gate.set()
    flood.result(PATIENCE_S)
    bulk.result(PATIENCE_S)
    # A pair of the flood has 6 tokens, one of bulk 12: what the device computed until the flood ended.
    lengths = [pair.length for batch in engine.batches[1:] for pair in batch]
    until = len(lengths) - lengths[::-1].index(6)
    served = Counter(lengths[:until])
    assert served[12] * 12 / (served[12] * 12 + served[6] * 6) == pytest.approx(0.25, abs=0.08)


# -- batches in flight ---------------------------------------------------------------------------------------------


def test_one_batch_and_no_more_is_launched_ahead(started):
    engine = AsynchronousEngine(held=True)
    batcher = started(engine, max_batch_tokens=32)
    ticket = batcher.submit(engine.tokenise("q", CHUNKS))
    for _ in range(2):
        assert engine.launched.acquire(timeout=PATIENCE_S)
    assert engine.batches == []
    engine.gate.set()
    ticket.result(PATIENCE_S)
    assert engine.most_in_flight == 2
    assert len(engine.batches) > 4


def test_an_engine_whose_launch_blocks_delivers_each_batch_before_the_next(started):
    engine = ScriptedEngine()
    ticket, seen = None, []
    engine.fails = lambda _: seen.append(ticket.done_pairs if ticket else 0)
    engine.gate.clear()
    ticket = started(engine, max_batch_tokens=10).submit(engine.tokenise("q", ["same"] * 6))
    engine.gate.set()
    ticket.result(PATIENCE_S)
    assert seen == [0, 2, 4]


def test_a_batch_that_fails_in_flight_leaves_its_neighbours_scored(started):
    engine = AsynchronousEngine(held=True)
    bad = has_word(engine, "poison")
    engine.fails = lambda batch: ValueError("cannot read this") if any(map(bad, batch)) else None
    batcher = started(engine, max_batch_tokens=12)
    chunks = ["one", "two", "poison", "three", "four", "five", "six"]
    keys = keys_of(chunks)
    pairs = engine.tokenise("q", chunks)
    tickets = [batcher.submit([pair], keys=[key]) for pair, key in zip(pairs, keys, strict=True)]
    engine.gate.set()
    for chunk, pair, ticket in zip(chunks, pairs, tickets, strict=True):
        if chunk == "poison":
            with pytest.raises(PairFailed):
                ticket.result(PATIENCE_S)
        else:
            assert ticket.result(PATIENCE_S) == StubEngine.forward(engine, [pair])
    assert max(count for ids, count in computed(engine).items() if ids != pairs[2].ids.tobytes()) <= 2


def test_a_launch_that_fails_is_retried_after_the_batch_before_it(started):
    class Refusing(AsynchronousEngine):
        def launch(self, batch):
            if len(batch) > 2:
                raise MemoryError
            return super().launch(batch)

    engine = Refusing()
    batcher = started(engine, max_batch_tokens=32)
    logits = batcher.submit(engine.tokenise("q", CHUNKS)).result(PATIENCE_S)
    np.testing.assert_array_equal(logits, StubEngine.forward(engine, engine.tokenise("q", CHUNKS)))
    assert batcher.stats().out_of_memory
    assert batcher.stats().alive


def test_closing_finishes_the_batches_in_flight(started):
    engine = AsynchronousEngine(held=True)
    batcher = started(engine, max_batch_tokens=16)
    ticket = batcher.submit(engine.tokenise("q", CHUNKS))
    for _ in range(2):
        assert engine.launched.acquire(timeout=PATIENCE_S)
    engine.gate.set()
    batcher.close(timeout=PATIENCE_S)
    assert ticket.result(0).shape == (len(CHUNKS),)
    assert engine.in_flight == 0
    assert batcher.stats().batch_started is None


class Simulation:
    """A device, a batcher and a clock that moves when one of them waits; things happen at their times."""

    def __init__(self, started, *, seconds_per_token=0.001, max_batch_tokens=50, **options):
        self.now = 0.0
        self.due = []
        self.watch = lambda: None
        self.engine = AsynchronousStubEngine(
            seconds_per_token=seconds_per_token, clock=lambda: self.now, sleep=self.sleep, padded=False
        )
        self.engine.gate = threading.Event()
        self.batcher = started(self.engine, max_batch_tokens=max_batch_tokens, clock=lambda: self.now, **options)
        self.batcher._closed = self

    def sleep(self, seconds):
        self.watch()
        ends = self.now + seconds
        while self.due and self.due[0][0] <= ends:
            self.now, happen = self.due.pop(0)
            happen()
        self.now = ends

    def wait(self, seconds):
        self.batcher._lock.release()
        self.sleep(seconds)
        self.batcher._lock.acquire()

    def notify(self):
        pass

    def pairs(self, count):
        return self.engine.tokenise("q", ["five"] * count)


# A batch of ten pairs takes 0.05 s; an interactive pair alone 0.005 s. Bulk never ends.
@pytest.mark.parametrize(("lead_s", "longest", "shortest"), [(0.01, 0.05 + 0.01, 0.01), (math.inf, 2 * 0.05, 0.05)])
def test_an_interactive_pair_waits_for_the_batch_on_the_device_and_what_was_launched_ahead(
    started, lead_s, longest, shortest
):
    simulation = Simulation(started, lead_s=lead_s, fill_tokens=0)
    tickets = []

    def urgent():
        tickets.append(simulation.batcher.submit(simulation.pairs(1)))

    simulation.due = [(1.0 + 0.1537 * number, urgent) for number in range(100)]
    simulation.batcher.submit(simulation.pairs(5000), priority="bulk").result(PATIENCE_S)
    assert all(ticket.done for ticket in tickets)
    waits = [ticket.elapsed_s for ticket in tickets]
    assert len(waits) == 100
    # The device is polled every 2 ms.
    assert max(waits) <= longest + 0.005 + 0.002
    assert min(waits) >= shortest
    assert simulation.engine.idle_s == pytest.approx(0, abs=1e-9)


def test_bulk_keeps_its_share_of_an_asynchronous_device(started):
    simulation = Simulation(started, bulk_share=0.2)
    shares, over, tickets = [], threading.Event(), []

    def submit_both():
        tickets.append(simulation.batcher.submit(simulation.pairs(4000), priority="bulk"))
        tickets.append(simulation.batcher.submit(simulation.pairs(4000)))

    def watch():
        if tickets and tickets[1].done and not shares:
            shares.append(tickets[0].done_pairs / (tickets[0].done_pairs + 4000))
            over.set()

    simulation.watch = watch
    simulation.due = [(0.001, submit_both)]
    simulation.batcher.submit(simulation.pairs(1))
    assert over.wait(PATIENCE_S)
    assert shares[0] == pytest.approx(0.2, abs=0.01)


# A batch takes 0.05 s. Bulk with a fifth of the device has its turn once it has waited for four of them.
@pytest.mark.parametrize(("bulk_share", "batches"), [(0.2, 4), (0.5, 1), (0.1, 9)])
def test_a_bulk_pair_beside_many_interactive_ones_leads_once_it_has_waited_for_their_share(
    started, bulk_share, batches
):
    simulation = Simulation(started, bulk_share=bulk_share, fill_tokens=0)
    tickets = []

    def bulk():
        tickets.append(simulation.batcher.submit(simulation.pairs(1), priority="bulk"))

    simulation.due = [(0.25, bulk)]
    simulation.batcher.submit(simulation.pairs(1000)).result(PATIENCE_S)
    (ticket,) = tickets
    ticket.result(0)
    # It waits for its turn, for the batch then on the device, and for its own.
    assert batches * 0.05 <= ticket.elapsed_s <= (batches + 3) * 0.05


def test_busy_seconds_count_overlapping_batches_once(started):
    simulation = Simulation(started)
    simulation.batcher.submit(simulation.pairs(1000)).result(PATIENCE_S)
    simulation.batcher.close(timeout=PATIENCE_S)
    stats = simulation.batcher.stats()
    assert stats.busy_s == pytest.approx(simulation.now)
    assert stats.padded_tokens == stats.tokens == 5000
    assert simulation.now == pytest.approx(5.0)


# -- fairness among equals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["interactive", "bulk"])
@pytest.mark.parametrize("size", [600, 6000])
def test_a_small_job_beside_a_large_one_waits_for_what_is_launched_and_two_batches(started, size, beside):
    # A batch of ten pairs takes 0.05 s.
    simulation = Simulation(started)
    tickets = []

    def small():
        tickets.append(simulation.batcher.submit(simulation.pairs(2)))

    simulation.due = [(0.5137 + 0.3 * number, small) for number in range(5)]
    simulation.batcher.submit(simulation.pairs(size), priority=beside).result(PATIENCE_S)
    assert [ticket.done for ticket in tickets] == [True] * 5
    assert max(ticket.elapsed_s for ticket in tickets) <= 0.05 + 0.01 + 2 * 0.05


def test_a_tenant_is_not_delayed_by_the_huge_jobs_of_another(started):
    simulation = Simulation(started)
    many, one = [], []

    def submit_all():
        many.extend(simulation.batcher.submit(simulation.pairs(300), tenant="many") for _ in range(10))
        one.append(simulation.batcher.submit(simulation.pairs(300), tenant="one"))

    simulation.due = [(0.001, submit_all)]
    simulation.batcher.submit(simulation.pairs(1)).result(PATIENCE_S)
    simulation.batcher.close(timeout=PATIENCE_S)
    # Alone its 1500 tokens take 1.5 s; beside one other tenant, twice as long.
    assert 1.5 < one[0].elapsed_s <= 3.0 + 0.2
    assert min(ticket.elapsed_s for ticket in many) > 3.0


# -- times of a ticket --------------------------------------------------------------------------------------------


def test_a_ticket_counts_waiting_apart_from_the_time_of_its_batches(started):
    simulation = Simulation(started)
    tickets = []

    def come():
        tickets.extend(simulation.batcher.submit(simulation.pairs(10), tenant=tenant) for tenant in "ab")
        came.append(simulation.now)

    came = []
    simulation.due = [(0.02, come)]
    simulation.batcher.submit(simulation.pairs(10)).result(PATIENCE_S)
    simulation.batcher.close(timeout=PATIENCE_S)
    # The first batch ends at 0.05, and one of ten pairs of both jobs after it, and another.
    for ticket in tickets:
        assert ticket.device_s == pytest.approx(0.1)
        assert ticket.waited_s == pytest.approx(0.15 - 0.02 - 0.1)


def test_a_ticket_that_shares_a_pair_on_the_device_counts_the_rest_of_its_batch(started):
    simulation = Simulation(started)
    pairs, joined = simulation.pairs(10), []
    simulation.due = [(0.03, lambda: joined.append(simulation.batcher.submit(pairs[:1], keys=[b"k"])))]
    first = simulation.batcher.submit(pairs, keys=[b"k", *[None] * 9])
    first.result(PATIENCE_S)
    assert joined[0].result(PATIENCE_S).shape == (1,)
    assert (first.device_s, first.waited_s) == (pytest.approx(0.05), pytest.approx(0.0))
    assert (joined[0].device_s, joined[0].waited_s) == (pytest.approx(0.02), pytest.approx(0.0))
    assert (first.tokens, joined[0].tokens) == (50, 0)


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_bad_pair_fails_its_own_ticket_and_no_other(started, make_engine):
    engine = make_engine(held=True)
    bad = has_word(engine, "poison")
    engine.fails = lambda batch: ValueError("cannot read this") if any(map(bad, batch)) else None
    batcher = started(engine, max_batch_tokens=4096)
    batcher.submit(engine.tokenise("q", ["blocks"]))
    engine.wait_until_busy()
    good = [batcher.submit(engine.tokenise(f"query {n}", CHUNKS)) for n in range(3)]
    poisoned = batcher.submit(engine.tokenise("q", ["one", "two poison", "three"]))
    engine.gate.set()
    with pytest.raises(PairFailed, match="cannot read this"):
        poisoned.result(PATIENCE_S)
    for n, ticket in enumerate(good):
        np.testing.assert_array_equal(
            ticket.result(PATIENCE_S), StubEngine.forward(engine, engine.tokenise(f"query {n}", CHUNKS))
        )
    stats = batcher.stats()
    assert stats.alive
    assert stats.failed_pairs == 1
    assert stats.out_of_memory == 0


def test_a_ticket_cancelled_while_its_batch_fails_is_not_tried_again_in_halves(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine)
    batcher.submit(engine.tokenise("q", ["blocks"]))
    engine.wait_until_busy()
    withdrawn = batcher.submit(engine.tokenise("q", [f"withdrawn {n}" for n in range(8)]))
    other = batcher.submit(engine.tokenise("q", [f"other {n}" for n in range(8)]))

    def cancel_and_fail(batch):
        if len(batch) == 16:
            withdrawn.cancel()
            return ValueError("once")
        return None

    engine.fails = cancel_and_fail
    engine.gate.set()
    assert other.result(PATIENCE_S).shape == (8,)
    unwanted = {pair.ids.tobytes() for pair in engine.tokenise("q", [f"withdrawn {n}" for n in range(8)])}
    assert not unwanted & {pair.ids.tobytes() for batch in engine.batches[2:] for pair in batch}


def test_a_bad_pair_fails_every_ticket_that_shares_it(started, make_engine):
    engine = make_engine(held=True)
    bad = has_word(engine, "poison")
    engine.fails = lambda batch: ValueError("bad") if any(map(bad, batch)) else None
    batcher = started(engine)
    pairs = engine.tokenise("q", ["poison"])
    tickets = [batcher.submit(pairs, keys=[b"k"]) for _ in range(3)]
    engine.gate.set()
    for ticket in tickets:
        with pytest.raises(PairFailed):
            ticket.result(PATIENCE_S)
    assert batcher._by_key == {}


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("can't allocate memory")],
)
def test_out_of_memory_halves_the_batch_and_lowers_the_budget(started, make_engine, error):
    engine = make_engine(held=True)
    engine.fails = lambda batch: error if len(batch) * max(pair.length for pair in batch) > 100 else None
    batcher = started(engine, max_batch_tokens=800)
    chunks = [f"chunk number {n}" for n in range(300)]
    ticket = batcher.submit(engine.tokenise("q", chunks))
    engine.gate.set()
    np.testing.assert_array_equal(ticket.result(PATIENCE_S), StubEngine.forward(engine, engine.tokenise("q", chunks)))
    stats = batcher.stats()
    assert 50 <= stats.batch_tokens <= 100
    assert 3 <= stats.out_of_memory <= (3 if make_engine is ScriptedEngine else 5)
    assert engine.released == stats.out_of_memory
    assert stats.failed_pairs == 0


def test_out_of_memory_lowers_the_budget_below_the_batch_that_failed_however_large_it_was(started, make_engine):
    engine = make_engine()
    engine.fails = lambda batch: MemoryError() if len(batch) * max(pair.length for pair in batch) > 100 else None
    batcher = started(engine, max_batch_tokens=100_000)
    pairs = engine.tokenise("q", ["five"] * 40)
    batcher.submit(pairs).result(PATIENCE_S)
    assert batcher.stats().batch_tokens <= sum(pair.length for pair in pairs) // 2


def test_a_failed_batch_does_not_change_the_predictions(started):
    engine = ScriptedEngine()
    batcher = started(engine)
    batcher.submit(engine.tokenise("q", ["a"])).result(PATIENCE_S)
    learnt = batcher._in_flight.time_model
    engine.fails = lambda _: MemoryError()
    with pytest.raises(PairFailed):
        batcher.submit(engine.tokenise("q", ["a"])).result(PATIENCE_S)
    assert batcher._in_flight.time_model == learnt


def test_a_pair_that_does_not_fit_even_alone_fails_and_the_engine_lives(started, make_engine):
    engine = make_engine()
    engine.fails = lambda batch: MemoryError() if max(pair.length for pair in batch) > 100 else None
    batcher = started(engine)
    with pytest.raises(PairFailed):
        batcher.submit(engine.tokenise("q", ["long " * 200])).result(PATIENCE_S)
    assert batcher.submit(engine.tokenise("q", ["short"])).result(PATIENCE_S).shape == (1,)


def test_a_device_that_does_not_even_warm_up_fails_everyone_with_engine_died(started, make_engine):
    engine = make_engine(held=True)
    engine.fails = lambda batch: RuntimeError("illegal memory access")
    batcher = started(engine)
    tickets = [batcher.submit(engine.tokenise("q", CHUNKS), priority=p) for p in ("bulk", "interactive", "bulk")]
    engine.dead = True
    engine.gate.set()
    for ticket in tickets:
        with pytest.raises(EngineDied, match="illegal memory access"):
            ticket.result(PATIENCE_S)
    with pytest.raises(EngineDied):
        batcher.submit(engine.tokenise("q", ["late"]))
    assert not batcher.stats().alive


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_whatever_an_engine_raises_fails_the_pair_and_not_the_engine(started, make_engine, error):
    engine = make_engine(held=True)
    bad = has_word(engine, "poison")
    engine.fails = lambda batch: error if any(map(bad, batch)) else None
    batcher = started(engine)
    fine, poisoned = (batcher.submit(engine.tokenise("q", [*CHUNKS, last])) for last in ("fine", "poison"))
    engine.gate.set()
    with pytest.raises(PairFailed):
        poisoned.result(PATIENCE_S)
    assert fine.result(PATIENCE_S).shape == (len(CHUNKS) + 1,)
    assert batcher.stats().alive


def test_the_end_of_the_thread_itself_fails_everyone_at_once(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine)
    ticket = batcher.submit(engine.tokenise("q", CHUNKS))
    batcher._count = None
    engine.gate.set()
    with pytest.raises(EngineDied):
        ticket.result(PATIENCE_S)
    with pytest.raises(EngineDied):
        batcher.submit(engine.tokenise("q", CHUNKS))


def pair_of(ids):
    return TokenisedPair(np.array(ids, dtype=np.int32), 0, truncated=False)


def test_a_pair_too_long_for_the_model_fails_its_ticket_before_it_gets_to_the_device(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine)
    unfit = batcher.submit([*engine.tokenise("q", CHUNKS), pair_of([7] * 513)], keys=[*keys_of(CHUNKS), b"k"])
    with pytest.raises(PairFailed, match=r"513 tokens.*reads at most 512"):
        unfit.result(PATIENCE_S)
    assert (batcher.stats().waiting_pairs, batcher.stats().tickets, batcher._by_key) == (0, 0, {})
    fine = batcher.submit(engine.tokenise("q", CHUNKS), keys=keys_of(CHUNKS))
    engine.gate.set()
    assert fine.result(PATIENCE_S).shape == (len(CHUNKS),)


@pytest.mark.parametrize("ids", [[1, 100], [1, -1], [[1, 2], [3, 4]], [1.5, 2.0]], ids=repr)
@pytest.mark.parametrize("company", [[], [5, 6]], ids=["alone", "beside another"])
def test_a_pair_with_an_unknown_token_id_never_gets_to_the_device(started, make_engine, ids, company):
    engine = make_engine()
    engine.vocabulary = 100
    batcher = started(engine)
    unfit = TokenisedPair(np.array(ids), 0, truncated=False)
    others = [pair_of(company)] if company else []
    with pytest.raises(PairFailed, match="token ids"):
        batcher.submit([*others, unfit]).result(PATIENCE_S)
    assert batcher.submit([pair_of([99, 0])]).result(PATIENCE_S).shape == (1,)
    assert len(engine.batches) == 1


class NoLength:
    ids = np.zeros(3, dtype=np.int32)

    @property
    def length(self):
        raise OverflowError("how long?")


def test_a_submission_that_raises_leaves_nothing_behind(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine)
    pairs, keys = engine.tokenise("q", CHUNKS), keys_of(CHUNKS)
    with pytest.raises(OverflowError):
        batcher.submit([*pairs, NoLength()], keys=[*keys, b"k"])
    with pytest.raises(TypeError):
        batcher.submit([*pairs, pairs[0]], keys=[*keys, ["a list has no hash"]])
    fine = batcher.submit(pairs, keys=keys)
    engine.gate.set()
    assert fine.result(PATIENCE_S).shape == (len(CHUNKS),)
    assert sum(computed(engine).values()) == len(CHUNKS)


def test_an_engine_that_fails_to_release_memory_or_to_report_done_is_still_used(started):
    class Awkward(AsynchronousEngine):
        def release_memory(self):
            raise RuntimeError("nothing to release")

        def launch(self, batch):
            return Undecided(super().launch(batch))

    class Undecided:
        def __init__(self, future):
            self.result = future.result

        def done(self):
            raise RuntimeError("who knows")

    engine = Awkward()
    engine.fails = lambda batch: MemoryError() if len(batch) > 20 else None
    batcher = started(engine)
    pairs = engine.tokenise("q", CHUNKS)
    np.testing.assert_array_equal(batcher.submit(pairs).result(PATIENCE_S), StubEngine.forward(engine, pairs))


def test_a_wrong_number_of_logits_is_an_error(started):
    engine = ScriptedEngine()
    engine.forward = lambda batch: np.zeros(len(batch) + 1, dtype=np.float32)
    with pytest.raises(PairFailed, match="shape"):
        started(engine).submit(engine.tokenise("q", ["a", "b"])).result(PATIENCE_S)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_fails_its_own_pair_after_a_retry_alone(started, make_engine, value):
    engine = make_engine(held=True)
    bad = has_word(engine, "poison")
    forward = engine.forward
    engine.forward = lambda batch: np.where([bad(pair) for pair in batch], np.float32(value), forward(batch))
    batcher = started(engine)
    fine, poisoned = (batcher.submit(engine.tokenise("q", [*CHUNKS, last])) for last in ("fine", "poison"))
    engine.gate.set()
    with pytest.raises(PairFailed, match="finite"):
        poisoned.result(PATIENCE_S)
    np.testing.assert_array_equal(
        fine.result(PATIENCE_S), StubEngine.forward(engine, engine.tokenise("q", [*CHUNKS, "fine"]))
    )
    assert batcher.stats().failed_pairs == 1
    assert batcher.stats().batch_tokens == engine.max_batch_tokens


def test_a_logit_that_is_finite_when_retried_alone_is_delivered(started, make_engine):
    engine = make_engine()
    forward = engine.forward
    engine.forward = lambda batch: forward(batch) * (np.nan if len(batch) > 1 else 1)
    pairs = engine.tokenise("q", CHUNKS[:7])
    np.testing.assert_array_equal(started(engine).submit(pairs).result(PATIENCE_S), StubEngine.forward(engine, pairs))


class FaultyEngine(StubEngine):
    """The stub, failing by chance in every way that is known; what a pair of the word *poison* meets is no chance."""

    def __init__(self, seed):
        super().__init__(seconds_per_token=0, max_batch_tokens=200)
        self.chance = random.Random(seed)
        self.lock = threading.Lock()
        self.poison = super().tokenise("poison", [""])[0].ids[1]
        self.stirred = threading.Event()

    def launch(self, batch):
        with self.lock:
            kind = self.chance.choices(
                ["fine", "raises", "memory", "exit", "shape", "nan", "hangs", "late"], [60, 4, 6, 2, 2, 4, 4, 18]
            )[0]
        # Alone a pair of its own succeeds: what fails then is the pair's fault.
        if len(batch) == 1:
            kind = "fine"
        if any(self.poison in pair.ids for pair in batch):
            kind = "raises"
        if kind == "hangs":
            self.stirred.clear()
            self.stirred.wait(0.02)
        if kind == "raises":
            raise ValueError("cannot read this")
        if kind == "exit":
            raise SystemExit(1)
        return Mishap(kind, self.forward(batch))


class Mishap:
    def __init__(self, kind, logits):
        self.kind, self.right = kind, logits
        self.polls = 0

    def done(self):
        self.polls += 1
        return self.kind != "late" or self.polls > 3

    def result(self):
        if self.kind == "memory":
            raise RuntimeError("CUDA out of memory")
        if self.kind == "shape":
            return self.right[:-1]
        if self.kind == "nan":
            return np.where(np.arange(self.right.size) % 3, self.right, np.nan)
        return self.right


@pytest.mark.parametrize("seed", [1, 2])
def test_thirty_two_threads_at_a_faulty_engine_each_get_their_own_logits_or_their_own_error(started, seed):
    engine = FaultyEngine(seed)
    engine.gate = threading.Event()
    batcher = started(engine)
    wrong, ends, counted = [], Counter(), threading.Lock()

    def job(chance):
        query = f"query {chance.randrange(4)}"
        chunks = chance.choices(CHUNKS, k=chance.randrange(1, 25))
        poisoned = chance.random() < 0.1
        chunks += ["poison"] * poisoned
        pairs = engine.tokenise(query, chunks)
        unfit = chance.random() < 0.05
        pairs += [pair_of([7] * 513)] * unfit
        chunks += [""] * unfit
        keys = [f"{query}/{chunk}".encode() for chunk in chunks] if chance.random() < 0.7 else None
        kind, tenant = chance.choice(["bulk", "interactive"]), chance.choice("abc")
        ticket = batcher.submit(pairs, priority=kind, keys=keys, tenant=tenant)
        engine.stirred.set()
        if chance.random() < 0.15:
            ticket.cancel()
        try:
            logits = ticket.result(PATIENCE_S)
        except (PairFailed, TicketCancelled) as error:
            said = type(error).__name__
            if isinstance(error, PairFailed) and not (poisoned or unfit):
                wrong.append(said)
        else:
            said = "ranked"
            if poisoned or unfit or not np.array_equal(logits, StubEngine.forward(engine, pairs)):
                wrong.append(said)
        with counted:
            ends[said] += 1

    def work(number):
        chance = random.Random(seed * 1000 + number)
        for _ in range(6):
            try:
                job(chance)
            except BaseException as error:
                wrong.append(repr(error))
                raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5 * PATIENCE_S)
    assert wrong == []
    assert sum(ends.values()) == 32 * 6
    assert min(ends[kind] for kind in ("ranked", "PairFailed", "TicketCancelled")) > 0
    batcher.close(timeout=PATIENCE_S)
    stats = batcher.stats()
    assert (stats.waiting_pairs, stats.tickets, batcher._by_key) == (0, 0, {})
    assert batcher._waiting._queues == set()
    assert batcher._waiting._shared == 0
    assert stats.batches > 0
    assert stats.out_of_memory > 0


# -- statistics ----------------------------------------------------------------------------------------------------


def test_the_statistics_show_the_running_batch_and_its_predicted_time(started):
    engine = ScriptedEngine()
    batcher = started(engine)
    batcher.submit(engine.tokenise("q", CHUNKS)).result(PATIENCE_S)
    while engine.entered.acquire(blocking=False):
        pass
    engine.gate.clear()
    ticket = batcher.submit(engine.tokenise("q", CHUNKS[:1]))
    engine.wait_until_busy()
    stats = batcher.stats()
    assert stats.batch_started <= time.monotonic()
    assert stats.batch_predicted_s > 0
    assert stats.pairs == len(CHUNKS)
    assert stats.tickets == 1
    assert 1 <= stats.padding <= 2
    engine.gate.set()
    ticket.result(PATIENCE_S)
    batcher.close()
    assert batcher.stats().batch_started is None


def test_the_first_batch_is_predicted_by_the_given_seconds_per_token(started):
    engine = ScriptedEngine(held=True)
    batcher = started(engine, seconds_per_token=0.25)
    (pair,) = engine.tokenise("q", ["a chunk"])
    batcher.submit([pair])
    engine.wait_until_busy()
    assert batcher.stats().batch_predicted_s == pytest.approx(0.25 * pair.length)


def test_a_warm_up_after_a_failure_is_reported_as_a_running_batch(started):
    seen = []

    class Dying(ScriptedEngine):
        def warm_up(self):
            seen.append(batcher.stats().batch_started)

    batcher = started(Dying(fails=lambda _: ValueError("no")), clock=lambda: 7.0)
    with pytest.raises(PairFailed):
        batcher.submit(batcher._engine.tokenise("q", ["a"])).result(PATIENCE_S)
    assert seen == [7.0]
    assert batcher.stats().batch_started is None


def test_last_progress_is_when_a_batch_ended_or_a_pair_failed_alone(started):
    simulation = Simulation(started)
    simulation.batcher.submit(simulation.pairs(10)).result(PATIENCE_S)
    assert simulation.batcher.stats().last_progress == pytest.approx(0.05)

    def fail(batch):
        simulation.now = 3.0
        raise ValueError("no")

    simulation.engine.launch = fail
    with pytest.raises(PairFailed):
        simulation.batcher.submit(simulation.pairs(1)).result(PATIENCE_S)
    assert simulation.batcher.stats().last_progress == 3.0


def test_every_thread_that_waits_for_a_ticket_gets_its_logits(started):
    engine = ScriptedEngine(held=True)
    ticket = started(engine).submit(engine.tokenise("q", ["a"]))
    with ThreadPoolExecutor(3) as threads:
        results = [threads.submit(ticket.result, PATIENCE_S) for _ in range(3)]
        while len(ticket._changed._waiters) < 3:
            threading.Event().wait(0.001)
        engine.gate.set()
        assert len({float(result.result(PATIENCE_S)[0]) for result in results}) == 1


# -- closing -------------------------------------------------------------------------------------------------------


def test_closing_scores_waiting_pairs_and_rejects_new_ones(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine, max_batch_tokens=32)
    ticket = batcher.submit(engine.tokenise("q", CHUNKS))
    engine.gate.set()
    batcher.close(timeout=PATIENCE_S)
    assert ticket.result(0).shape == (len(CHUNKS),)
    with pytest.raises(EngineClosed):
        batcher.submit(engine.tokenise("q", ["late"]))


def test_closing_without_draining_fails_waiting_tickets(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine, max_batch_tokens=32)
    ticket = batcher.submit(engine.tokenise("q", CHUNKS))
    engine.wait_until_busy()
    batcher.close(drain=False, timeout=0.01)
    with pytest.raises(EngineClosed):
        ticket.result(0)
    engine.gate.set()
    batcher.close(timeout=PATIENCE_S)
    assert 1 <= len(engine.batches) <= (1 if make_engine is ScriptedEngine else 2)


@pytest.mark.parametrize(
    ("options", "complaint"), [({"priority": "urgent"}, "urgent"), ({"keys": [b"one", b"two"]}, "one key per pair")]
)
def test_a_malformed_submission_is_rejected(started, options, complaint):
    engine = ScriptedEngine()
    with pytest.raises(ValueError, match=complaint):
        started(engine).submit(engine.tokenise("q", ["c"]), **options)


@pytest.mark.parametrize("options", [{"max_batch_tokens": 0}, {"bulk_share": 0.0}, {"bulk_share": 1.0}])
def test_a_batcher_with_invalid_options_is_rejected(options):
    with pytest.raises(ValueError, match=r"token|share"):
        Batcher(StubEngine(), **options)


def test_tickets_are_added_to_and_cancelled_in_long_queues(started, make_engine):
    engine = make_engine(held=True)
    batcher = started(engine, max_batch_tokens=512)
    batcher.submit(engine.tokenise("q", ["blocks"]))
    engine.wait_until_busy()
    chunks = [f"chunk {n}" for n in range(700)]
    tickets = [
        batcher.submit(engine.tokenise(f"query{n}", chunks), priority=("bulk", "interactive")[n % 2]) for n in range(9)
    ]
    for ticket in tickets[::3]:
        ticket.cancel()
    tickets.append(batcher.submit(engine.tokenise("query9", chunks)))
    launched_ahead = 0 if make_engine is ScriptedEngine else 512 // 5
    assert 7 * 700 - launched_ahead <= batcher.stats().waiting_pairs <= 7 * 700
    engine.gate.set()
    for n, ticket in enumerate(tickets):
        if n in {0, 3, 6}:
            continue
        np.testing.assert_array_equal(
            ticket.result(PATIENCE_S), StubEngine.forward(engine, engine.tokenise(f"query{n}", chunks))
        )
