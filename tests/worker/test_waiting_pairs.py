"""The lines of jobs before the device: everybody once, and a small job's time grows with the jobs beside it alone."""

import math
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankq_worker.engine.scheduling.batching import cost, plan
from rerankq_worker.engine.scheduling.waiting_pairs import BULK, INTERACTIVE, NOWHERE, Line, WaitingPairs


class Waiting:
    def __init__(self, length, job=None):
        self.length, self.job = length, job
        self.place, self.lines = NOWHERE, []


class Device:
    """A device without a clock: one batch after the other from what waits."""

    def __init__(self, budget=1000, *, padded=False, window=4096):
        self.waiting = WaitingPairs()
        self.budget, self.fill, self.padded, self.window = budget, budget // 4, padded, window
        self.batches = []

    def join(self, lengths, *, tenant="", priority=INTERACTIVE, now=0.0):
        line = Line(priority, tenant)
        pairs = [Waiting(length, line) for length in lengths]
        self.waiting.join(line, pairs, now)
        return line, pairs

    def step(self):
        window = self.waiting.window(self.window)
        ages = np.zeros(window.places.size)
        options = {"starts": window.starts, "padded": self.padded, "fill_tokens": self.fill}
        chosen = plan(window.lengths, window.priorities, ages, self.budget, **options)
        batch = self.waiting.take(window, chosen, led_by=int(window.priorities.max()), least=self.fill)
        self.batches.append(batch)
        return batch

    def run_until(self, pairs):
        """Go on until all of these are computed; answers how many batches it took."""
        steps = 0
        while any(pair.place != NOWHERE for pair in pairs):
            self.step()
            steps += 1
        return steps

    def tokens(self, line):
        return sum(pair.length for batch in self.batches for pair in batch if pair.job is line)


lengths_of_jobs = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=40), min_size=1, max_size=6)


@given(lengths_of_jobs, st.integers(1, 1500), st.booleans(), st.integers(1, 60), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_every_pair_is_taken_once_and_no_batch_exceeds_the_budget(jobs, budget, padded, window, random):
    device = Device(budget, padded=padded, window=window)
    joined, taken = [], []
    for number, lengths in enumerate(jobs):
        _, pairs = device.join(lengths, tenant=f"tenant {number % 2}", priority=random.choice([BULK, INTERACTIVE]))
        joined += pairs
        for _ in range(random.randrange(3)):
            taken += device.step() if len(device.waiting) else []
    while len(device.waiting):
        taken += device.step()
    assert len(taken) == len(set(taken)) == len(joined)
    for batch in device.batches:
        assert len(batch) == 1 or cost([pair.length for pair in batch], padded=padded) <= budget
    assert all(pair.place == NOWHERE and pair.lines == [] for pair in joined)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(0, 40),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_small_jobs_batches_are_bounded_by_the_number_of_jobs_beside_it_whatever_their_size(
    small, others, before, padded, one_tenant
):
    device = Device(1000, padded=padded)
    for number, lengths in enumerate(others):
        device.join(lengths * 200, tenant="" if one_tenant else str(number))
    for _ in range(before):
        if len(device.waiting):
            device.step()
    _, pairs = device.join(small, tenant="" if one_tenant else "small")
    # Each of its pairs leads a batch at worst. Whoever leads pays for a quarter of the budget at least, so that each
    # job beside it leads no more often than it takes to pay as much as the small one, a budget, and once more.
    each = len(small) + math.ceil((sum(small) + device.budget) / device.fill) + 1
    assert device.run_until(pairs) <= len(small) + len(others) * each


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("size", [600, 6_000, 60_000])
def test_two_pairs_beside_a_large_job_wait_for_a_batch_or_two(padded, size):
    device = Device(2048, padded=padded)
    device.join(np.random.default_rng(0).integers(20, 400, size).tolist())
    for _ in range(7):
        device.step()
    _, small = device.join([60, 300])
    assert device.run_until(small) <= 2


@pytest.mark.parametrize("padded", [True, False])
def test_a_tenant_with_many_jobs_gets_no_more_than_one_with_a_single_job(padded):
    device = Device(1000, padded=padded)
    many = [device.join([50] * 100, tenant="many")[0] for _ in range(10)]
    one, pairs = device.join([50] * 200, tenant="one")
    device.run_until(pairs)
    assert sum(map(device.tokens, many)) == pytest.approx(device.tokens(one), abs=2 * device.budget)
    assert max(map(device.tokens, many)) - min(map(device.tokens, many)) <= 2 * device.budget


@pytest.mark.parametrize("count", [2, 8, 18])
def test_a_tenant_whose_jobs_come_one_after_the_other_gets_no_more_than_one_whose_job_is_large(count):
    device = Device(1000)
    steady, _ = device.join([50] * 4000, tenant="steady")
    small, served = [], 0
    for _ in range(100):
        if not any(pair.place != NOWHERE for pair in small):
            _, small = device.join([50] * count, tenant="hops")
        served += sum(pair.length for pair in device.step() if pair.job is not steady)
    # A batch goes to both where it has room for both.
    assert served <= device.tokens(steady) + 2 * device.budget


@pytest.mark.parametrize("padded", [True, False])
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5), others=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_jobs_alike_are_served_alike(padded, lengths, others):
    device = Device(1000, padded=padded)
    jobs = [device.join(lengths * 60) for _ in range(1 + others)]
    device.run_until(jobs[0][1])
    served = [device.tokens(line) for line, _ in jobs]
    assert max(served) - min(served) <= 2 * device.budget


@pytest.mark.parametrize("padded", [True, False])
def test_a_stream_of_small_jobs_holds_up_no_large_one(padded):
    device = Device(1000, padded=padded)
    large, _ = device.join([50] * 4000)
    for turn in range(100):
        if turn % 2:
            device.join([900])
        device.step()
    assert device.tokens(large) >= 0.3 * sum(pair.length for batch in device.batches for pair in batch)


@pytest.mark.parametrize("size", [1, 4, 10])
def test_a_window_shows_as_many_of_bulk_however_many_interactive_pairs_wait(size):
    device = Device()
    device.join([5] * 10)
    device.join([5] * 12, priority=BULK)
    window = device.waiting.window(size)
    assert [int((window.priorities == kind).sum()) for kind in (INTERACTIVE, BULK)] == [size, size]


@pytest.mark.parametrize("one_tenant", [True, False])
def test_whoever_leads_a_batch_with_little_of_its_own_pays_for_a_quarter_of_it(one_tenant):
    device = Device(1000)
    small, pairs = device.join([10] * 3, tenant="small")
    large, _ = device.join([990] * 3, tenant="small" if one_tenant else "large")
    assert device.step()[0] is pairs[0]
    assert [device.tokens(line) for line in (small, large)] == [10, 990]
    shares = device.waiting._shares[INTERACTIVE]
    if one_tenant:
        assert {line: start for start, line in shares._jobs["small"]} == {small: 250, large: 990}
    else:
        assert {tenant: start for start, tenant in shares._tenants} == {"small": 250, "large": 990}


def test_a_pair_of_two_jobs_is_computed_once_in_the_turn_that_comes_first():
    device = Device(100)
    _, pairs = device.join([50] * 100)
    device.step()
    line = Line(INTERACTIVE, "")
    device.waiting.join(line, [pairs[90], pairs[91]], 1.0)
    assert device.run_until([pairs[90], pairs[91]]) <= 2
    device.run_until(pairs)
    assert sum(map(len, device.batches)) == 100
    assert len(device.waiting) == 0


def test_a_pair_of_a_bulk_job_that_an_interactive_one_wants_is_interactive():
    device = Device(100)
    _, pairs = device.join([50] * 100, priority=BULK)
    device.join([50] * 4)
    device.waiting.join(Line(INTERACTIVE, ""), pairs[70:71], 1.0)
    assert device.run_until(pairs[70:71]) <= 2


def test_whoever_closes_a_line_takes_along_only_what_nobody_else_waits_for():
    device = Device(100)
    first, pairs = device.join([50] * 10)
    other = Line(BULK, "other")
    device.waiting.join(other, pairs[:3], 1.0)
    device.waiting.close(first)
    assert len(device.waiting) == 3
    assert [pair.place != NOWHERE for pair in pairs] == [True] * 3 + [False] * 7
    device.waiting.close(first)
    device.run_until(pairs)
    assert list(chain(*device.batches)) == pairs[:3]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), min_size=1, max_size=30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_lines_keep_their_order_and_nobody_is_lost_however_often_the_arrays_are_packed(steps, shared):
    device = Device(3_000, window=50)
    wanted, lines = [], []
    for kind, count in steps:
        if kind == 0 and lines:
            line, pairs = lines.pop()
            device.waiting.close(line)
            wanted = [pair for pair in wanted if pair.place != NOWHERE or pair not in pairs]
        elif kind == 1 and len(device.waiting):
            device.step()
        elif kind == 2 and shared and lines:
            still = [pair for pair in lines[-1][1] if pair.place != NOWHERE][:count]
            line = Line(INTERACTIVE, "twin")
            device.waiting.join(line, still, 0.0)
        else:
            lines.append(device.join([7] * count * 20))
            wanted += lines[-1][1]
    while len(device.waiting):
        device.step()
    taken = list(chain(*device.batches))
    assert len(taken) == len(set(taken))
    assert set(wanted) <= set(taken)
    places = {pair: place for place, pair in enumerate(taken)}
    if not shared:
        for _, pairs in lines:
            order = [places[pair] for pair in pairs]
            assert order == sorted(order)
