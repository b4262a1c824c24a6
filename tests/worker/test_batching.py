"""The planner against a slow twin that tries every run of neighbours."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankq_worker.batching import GRACE_TOKENS, SLACK, plan, plan_all

lengths_of_pairs = st.lists(st.integers(1, 600), min_size=1, max_size=60)


@st.composite
def waiting_pairs(draw):
    lengths = draw(lengths_of_pairs)
    count = len(lengths)
    priorities = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    ages = draw(st.lists(st.integers(0, 20).map(float), min_size=count, max_size=count))
    return lengths, priorities, ages


def leader_slowly(priorities, ages, age_limit):
    top = max(priorities)
    overdue = [i for i in range(len(ages)) if priorities[i] < top and ages[i] >= age_limit]
    group = overdue or [i for i in range(len(ages)) if priorities[i] == top]
    return max(group, key=lambda i: (ages[i], -i))


def worth(lengths):
    return sum(n * (1 + SLACK) + GRACE_TOKENS for n in lengths) - max(lengths) * len(lengths)


def within_reach(lengths):
    return max(lengths) <= min(lengths) * (1 + SLACK) + GRACE_TOKENS


def best_worth_slowly(lengths, priorities, ages, budget, age_limit):
    """The most that any run of neighbours with the leader in it is worth, or None if the leader goes alone."""
    leader = leader_slowly(priorities, ages, age_limit)
    if lengths[leader] > budget:
        return leader, None
    mates = sorted((i for i in range(len(lengths)) if priorities[i] >= priorities[leader]), key=lambda i: lengths[i])
    worths = []
    for lo in range(len(mates)):
        for hi in range(lo, len(mates)):
            run = mates[lo : hi + 1]
            sizes = [lengths[i] for i in run]
            if leader in run and max(sizes) * len(run) <= budget and within_reach(sizes):
                worths.append(worth(sizes))
    return leader, max(worths)


@given(waiting_pairs(), st.integers(1, 3000), st.sampled_from([0.0, 5.0, 10.0, math.inf]))
@settings(max_examples=150, deadline=None)
def test_the_plan_is_the_best_run_that_the_slow_twin_finds(waiting, budget, age_limit):
    lengths, priorities, ages = waiting
    chosen = plan(lengths, priorities, ages, budget, age_limit=age_limit).tolist()
    leader, best = best_worth_slowly(lengths, priorities, ages, budget, age_limit)
    assert leader in chosen
    assert len(set(chosen)) == len(chosen)
    if best is None:
        assert chosen == [leader]
        return
    sizes = [lengths[i] for i in chosen]
    assert worth(sizes) == pytest.approx(best)
    assert max(sizes) * len(sizes) <= budget
    assert within_reach(sizes)
    assert all(priorities[i] >= priorities[leader] for i in chosen)


@given(lengths_of_pairs, st.integers(1, 2000), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_planning_until_nothing_waits_plans_every_pair_exactly_once(lengths, budget, window):
    batches = list(plan_all(lengths, budget, window=window))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert longest * len(batch) <= budget or len(batch) == 1


@given(waiting_pairs(), st.integers(1, 2000))
@settings(max_examples=100, deadline=None)
def test_interactive_pairs_go_first_until_bulk_is_overdue(waiting, budget):
    lengths, priorities, ages = waiting
    chosen = plan(lengths, priorities, ages, budget)
    if 1 in priorities:
        assert {priorities[i] for i in chosen} == {1}


def test_the_oldest_overdue_bulk_pair_leads_and_interactive_pairs_may_ride_along():
    chosen = plan([100, 100, 101, 300], [1, 0, 1, 0], [1.0, 9.0, 2.0, 30.0], 1000, age_limit=8.0)
    assert chosen.tolist() == [3]
    chosen = plan([100, 100, 101], [1, 0, 1], [1.0, 9.0, 2.0], 1000, age_limit=8.0)
    assert sorted(chosen.tolist()) == [0, 1, 2]


def test_no_pair_waits_for_more_batches_than_pairs_that_came_before_it():
    rng = np.random.default_rng(5)
    lengths = rng.integers(5, 512, 300)
    waits = np.zeros(300, dtype=int)
    for number, batch in enumerate(plan_all(lengths, 2048)):
        waits[batch] = number
    assert (waits <= np.arange(300)).all()


def test_a_pair_over_the_budget_goes_alone_and_never_with_others():
    assert [batch.tolist() for batch in plan_all([50, 5000, 51, 5000], budget=1000)] == [[0, 2], [1], [3]]


@pytest.mark.parametrize(
    ("name", "bound"), [("chunks of one splitter", 1.02), ("a wide spread", 1.04), ("a heavy tail", 1.06)]
)
def test_padding_stays_small_on_realistic_lengths(name, bound):
    # The bounds are just over what was measured for these seeds, with 1024 pairs waiting and 4096 tokens a batch.
    rng = np.random.default_rng(0)
    lengths = {
        "chunks of one splitter": rng.normal(230, 60, 4000),
        "a wide spread": rng.lognormal(np.log(160) - 0.32, 0.8, 4000),
        "a heavy tail": rng.pareto(1.5, 4000) * 60 + 15,
    }[name]
    lengths = np.clip(lengths, 10, 512).astype(int)
    padded = sum(len(batch) * lengths[batch].max() for batch in plan_all(lengths, 4096, window=1024))
    assert padded / lengths.sum() <= bound


def test_the_same_waiting_pairs_give_the_same_plan_whatever_type_their_arrays_have():
    lengths, priorities, ages = [30, 10, 31, 500], [0, 0, 0, 0], [4, 3, 2, 1]
    expected = plan(lengths, priorities, ages, 200).tolist()
    assert plan(
        np.array(lengths, np.uint16), np.array(priorities, np.int8), np.array(ages, np.float32), 200
    ).tolist() == (expected)


@pytest.mark.parametrize(
    ("lengths", "priorities", "ages", "budget", "complaint"),
    [
        ([1, 2], [0], [0, 0], 10, "one entry per pair"),
        ([[1]], [[0]], [[0]], 10, "one entry per pair"),
        ([0], [0], [0], 10, "at least one token"),
        ([1], [0], [0], 0, "holds no pair"),
    ],
)
def test_arrays_that_do_not_describe_pairs_are_refused(lengths, priorities, ages, budget, complaint):
    with pytest.raises(ValueError, match=complaint):
        plan(lengths, priorities, ages, budget)


def test_a_large_window_is_planned_whole():
    rng = np.random.default_rng(1)
    lengths = rng.integers(10, 512, 10_000)
    batch = plan(lengths, np.zeros(10_000, np.int8), np.arange(10_000, 0, -1), 32_768)
    assert 0 in batch
    assert len(batch) * lengths[batch].max() <= 32_768
