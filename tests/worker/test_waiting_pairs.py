"""The queues of jobs: every pair once, and a small job waits longer only for the number of other jobs."""

import math
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankq_worker.engine.scheduling.batching import cost, plan
from rerankq_worker.engine.scheduling.waiting_pairs import BULK, INTERACTIVE, NOT_WAITING, JobQueue, WaitingPairs


class Pair:
    def __init__(self, length, job=None):
        self.length, self.job = length, job
        self.index, self.queues = NOT_WAITING, []


class Device:
    """A device without a clock: one batch after the other from what waits."""

    def __init__(self, budget=1000, *, padded=False, window=4096):
        self.waiting = WaitingPairs()
        self.budget, self.fill, self.padded, self.window = budget, budget // 4, padded, window
        self.batches = []

    def add(self, lengths, *, tenant="", priority=INTERACTIVE, now=0.0):
        queue = JobQueue(priority, tenant)
        pairs = [Pair(length, queue) for length in lengths]
        self.waiting.add(queue, pairs, now)
        return queue, pairs

    def step(self):
        window = self.waiting.window(self.window)
        ages = np.zeros(window.indices.size)
        options = {"starts": window.starts, "padded": self.padded, "fill_tokens": self.fill}
        chosen = plan(window.lengths, window.priorities, ages, self.budget, **options)
        batch = self.waiting.take(window, chosen, led_by=int(window.priorities.max()), least=self.fill)
        self.batches.append(batch)
        return batch

    def run_until(self, pairs):
        """Go on until all of these are computed; answers how many batches it took."""
        steps = 0
        while any(pair.index != NOT_WAITING for pair in pairs):
            self.step()
            steps += 1
        return steps

    def tokens(self, queue):
        return sum(pair.length for batch in self.batches for pair in batch if pair.job is queue)


lengths_of_jobs = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=40), min_size=1, max_size=6)


@given(lengths_of_jobs, st.integers(1, 1500), st.booleans(), st.integers(1, 60), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_every_pair_is_taken_once_and_no_batch_exceeds_the_budget(jobs, budget, padded, window, random):
    device = Device(budget, padded=padded, window=window)
    joined, taken = [], []
    for number, lengths in enumerate(jobs):
        _, pairs = device.add(lengths, tenant=f"tenant {number % 2}", priority=random.choice([BULK, INTERACTIVE]))
        joined += pairs
        for _ in range(random.randrange(3)):
            taken += device.step() if len(device.waiting) else []
    while len(device.waiting):
        taken += device.step()
    assert len(taken) == len(set(taken)) == len(joined)
    for batch in device.batches:
        assert len(batch) == 1 or cost([pair.length for pair in batch], padded=padded) <= budget
    assert all(pair.index == NOT_WAITING and pair.queues == [] for pair in joined)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(0, 40),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_small_jobs_batches_are_bounded_by_the_number_of_jobs_beside_it_whatever_their_size(
    small, others, before, padded, one_tenant
):
    device = Device(1000, padded=padded)
    for number, lengths in enumerate(others):
        device.add(lengths * 200, tenant="" if one_tenant else str(number))
    for _ in range(before):
        if len(device.waiting):
            device.step()
    _, pairs = device.add(small, tenant="" if one_tenant else "small")
    # Each of its pairs leads a batch at worst. Whoever leads pays for a quarter of the budget at least, so that each
    # job beside it leads no more often than it takes to pay as much as the small one, a budget, and once more.
    each = len(small) + math.ceil((sum(small) + device.budget) / device.fill) + 1
    assert device.run_until(pairs) <= len(small) + len(others) * each


@pytest.mark.parametrize("first", [BULK, INTERACTIVE])
def test_a_pair_of_an_interactive_and_a_bulk_job_waits_once_and_as_interactive(first):
    waiting, before, shared = WaitingPairs(), Pair(300), Pair(10)
    # Its turn in the bulk job is the earlier one.
    jobs = {BULK: [shared], INTERACTIVE: [before, shared]}
    for priority in (first, 1 - first):
        waiting.add(JobQueue(priority, ""), jobs[priority], 0.0)
    window = waiting.window(100)
    assert sorted(window.indices.tolist()) == sorted([before.index, shared.index])
    assert window.priorities.tolist() == [INTERACTIVE, INTERACTIVE]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("size", [600, 6_000, 60_000])
def test_a_job_of_two_pairs_beside_a_large_job_waits_for_two_batches_at_most(padded, size):
    device = Device(2048, padded=padded)
    device.add(np.random.default_rng(0).integers(20, 400, size).tolist())
    for _ in range(7):
        device.step()
    _, small = device.add([60, 300])
    assert device.run_until(small) <= 2


@pytest.mark.parametrize("padded", [True, False])
def test_a_tenant_with_many_jobs_gets_no_more_than_one_with_a_single_job(padded):
    device = Device(1000, padded=padded)
    many = [device.add([50] * 100, tenant="many")[0] for _ in range(10)]
    one, pairs = device.add([50] * 200, tenant="one")
    device.run_until(pairs)
    assert sum(map(device.tokens, many)) == pytest.approx(device.tokens(one), abs=2 * device.budget)
    assert max(map(device.tokens, many)) - min(map(device.tokens, many)) <= 2 * device.budget


@pytest.mark.parametrize("count", [2, 8, 18])
def test_a_tenant_whose_jobs_come_one_after_the_other_gets_no_more_than_one_whose_job_is_large(count):
    device = Device(1000)
    steady, _ = device.add([50] * 4000, tenant="steady")
    small, served = [], 0
    for _ in range(100):
        if not any(pair.index != NOT_WAITING for pair in small):
            _, small = device.add([50] * count, tenant="hops")
        served += sum(pair.length for pair in device.step() if pair.job is not steady)
    # A batch goes to both where it has room for both.
    assert served <= device.tokens(steady) + 2 * device.budget


@pytest.mark.parametrize("padded", [True, False])
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5), others=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_equal_jobs_are_served_equally(padded, lengths, others):
    device = Device(1000, padded=padded)
    jobs = [device.add(lengths * 60) for _ in range(1 + others)]
    device.run_until(jobs[0][1])
    served = [device.tokens(queue) for queue, _ in jobs]
    assert max(served) - min(served) <= 2 * device.budget


@pytest.mark.parametrize("padded", [True, False])
def test_a_large_job_is_not_starved_by_a_stream_of_small_ones(padded):
    device = Device(1000, padded=padded)
    large, _ = device.add([50] * 4000)
    for turn in range(100):
        if turn % 2:
            device.add([900])
        device.step()
    assert device.tokens(large) >= 0.3 * sum(pair.length for batch in device.batches for pair in batch)


@pytest.mark.parametrize("size", [1, 4, 10])
def test_the_window_has_as_many_bulk_pairs_however_many_interactive_pairs_wait(size):
    device = Device()
    device.add([5] * 10)
    device.add([5] * 12, priority=BULK)
    window = device.waiting.window(size)
    assert [int((window.priorities == kind).sum()) for kind in (INTERACTIVE, BULK)] == [size, size]


@pytest.mark.parametrize("one_tenant", [True, False])
def test_the_leader_of_a_batch_is_charged_for_a_quarter_of_it_at_least(one_tenant):
    device = Device(1000)
    small, pairs = device.add([10] * 3, tenant="small")
    large, _ = device.add([990] * 3, tenant="small" if one_tenant else "large")
    assert device.step()[0] is pairs[0]
    assert [device.tokens(queue) for queue in (small, large)] == [10, 990]
    tenants = device.waiting._tenants[INTERACTIVE]
    if one_tenant:
        assert {queue: start for start, queue in tenants._jobs["small"]} == {small: 250, large: 990}
    else:
        assert {tenant: start for start, tenant in tenants._tenants} == {"small": 250, "large": 990}


def test_a_pair_of_two_jobs_is_computed_once_in_the_earlier_turn():
    device = Device(100)
    _, pairs = device.add([50] * 100)
    device.step()
    queue = JobQueue(INTERACTIVE, "")
    device.waiting.add(queue, [pairs[90], pairs[91]], 1.0)
    assert device.run_until([pairs[90], pairs[91]]) <= 2
    device.run_until(pairs)
    assert sum(map(len, device.batches)) == 100
    assert len(device.waiting) == 0


def test_a_pair_shared_by_a_bulk_and_an_interactive_job_is_interactive():
    device = Device(100)
    _, pairs = device.add([50] * 100, priority=BULK)
    device.add([50] * 4)
    device.waiting.add(JobQueue(INTERACTIVE, ""), pairs[70:71], 1.0)
    assert device.run_until(pairs[70:71]) <= 2


def test_closing_a_job_queue_keeps_the_pairs_that_other_jobs_share():
    device = Device(100)
    first, pairs = device.add([50] * 10)
    other = JobQueue(BULK, "other")
    device.waiting.add(other, pairs[:3], 1.0)
    device.waiting.close(first)
    assert len(device.waiting) == 3
    assert [pair.index != NOT_WAITING for pair in pairs] == [True] * 3 + [False] * 7
    device.waiting.close(first)
    device.run_until(pairs)
    assert list(chain(*device.batches)) == pairs[:3]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), min_size=1, max_size=30), st.booleans())
@settings(max_examples=40, deadline=None)
def test_job_queues_keep_their_order_and_every_pair_when_the_arrays_are_compacted(steps, shared):
    device = Device(3_000, window=150)
    wanted, queues = [], []
    for kind, count in steps:
        if kind == 0 and queues:
            queue, pairs = queues.pop()
            device.waiting.close(queue)
            closed = set(pairs)
            wanted = [pair for pair in wanted if pair.index != NOT_WAITING or pair not in closed]
        elif kind == 1 and len(device.waiting):
            device.step()
        elif kind == 2 and shared and queues:
            still = [pair for pair in queues[-1][1] if pair.index != NOT_WAITING][:count]
            queue = JobQueue(INTERACTIVE, "twin")
            device.waiting.add(queue, still, 0.0)
        else:
            queues.append(device.add([7] * count * 20))
            wanted += queues[-1][1]
    while len(device.waiting):
        device.step()
    taken = list(chain(*device.batches))
    assert len(taken) == len(set(taken))
    assert set(wanted) <= set(taken)
    position = {pair: at for at, pair in enumerate(taken)}
    if not shared:
        for _, pairs in queues:
            order = [position[pair] for pair in pairs]
            assert order == sorted(order)
