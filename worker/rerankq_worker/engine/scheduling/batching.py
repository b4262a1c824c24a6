"""Which pairs share the next batch: a pure decision over arrays.

A padded batch costs *longest × count* tokens, an unpadded one the sum of its lengths. A batch is planned whenever the
device becomes free, from the pairs that wait at that moment; there is no gather timer.

Among pairs of one priority the device is shared by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), in
two levels: tenants share it, and a tenant's jobs share what is the tenant's, by tokens. ``virtual_starts`` says whose
turn it is, and ``plan`` follows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Positions = NDArray[np.intp]
Floats = NDArray[np.float64]

#: A pair may be padded by this share of its own length... These three in a simulation of four interactive and four bulk
#: producers with sentences of 40 tokens, on a device whose batches below 512 tokens take equally long: 4 % more real
#: tokens per second than with 0.125, 8 and 1, and padding of 1.06 instead of 1.12.
SLACK = 0.04
#: ...and by this many tokens more, so that very short pairs can share a batch at all.
GRACE_TOKENS = 2
#: Both are multiplied by this in a batch too small to use the device well.
STRETCH = 4
#: Pairs considered at a time: enough neighbours in length, and about a millisecond of planning at most.
WINDOW = 8192
#: Where the next pair in turn does not fit, so many after it are tried for the rest of the budget.
LOOK_AHEAD = 32


def cost(lengths: ArrayLike, *, padded: bool = True) -> int:
    """Count the tokens that a batch costs: *longest × count* where it is padded, else the sum.

    >>> cost([3, 5]), cost([3, 5], padded=False), cost([])
    (10, 8, 0)
    """
    lengths = np.asarray(lengths)
    if not lengths.size:
        return 0
    return int(lengths.max()) * lengths.size if padded else int(lengths.sum())


def fill_of(budget: int) -> int:
    """Estimate the tokens below which a smaller batch takes as long: a quarter of the budget.

    On a CPU with a budget of 2048, tokens per second are constant from 512 up (measured, 22 M parameters).
    """
    return budget // 4


def virtual_starts(
    lengths: ArrayLike, jobs: ArrayLike, job_starts: ArrayLike, tenants: ArrayLike, tenant_starts: ArrayLike
) -> Floats:
    """Compute the virtual time at which each pair's turn begins, by the tokens before it; earlier starts go first.

    ``lengths`` and ``jobs`` have one entry per pair, a job's pairs in its own order; ``job_starts`` and ``tenants`` one
    per job, ``tenant_starts`` one per tenant. A job's pairs follow one another from the job's start, each after the
    tokens of those before it; that is their order within the tenant. In this order a tenant's pairs follow one another
    in the same way from the tenant's start.

    >>> virtual_starts([9, 9, 9, 4], [0, 0, 0, 1], job_starts=[0, 0], tenants=[0, 0], tenant_starts=[0])
    array([ 0., 13., 22.,  9.])
    >>> virtual_starts([9, 9, 9, 4], [0, 0, 0, 1], job_starts=[0, 0], tenants=[0, 1], tenant_starts=[0, 0])
    array([ 0.,  9., 18.,  0.])
    """
    lengths, jobs, tenants = np.asarray(lengths), np.asarray(jobs, np.intp), np.asarray(tenants, np.intp)
    within = _starts_within_flows(lengths, jobs, np.asarray(job_starts))
    order = np.argsort(within, kind="stable")
    starts = np.empty(lengths.size)
    starts[order] = _starts_within_flows(lengths[order], tenants[jobs[order]], np.asarray(tenant_starts))
    return starts


def even_share(counts: ArrayLike, size: int) -> int:
    """Find the largest equal limit with which all together take no more than ``size``; at least 1.

    >>> even_share([100, 3, 100], 43), even_share([1, 2], 43), even_share([5, 5, 5], 2)
    (20, 2, 1)
    """
    ascending = np.sort(np.asarray(counts))
    if ascending.sum() <= size:
        return max(1, int(ascending.max(initial=1)))
    rest = size - np.concatenate(([0], np.cumsum(ascending)[:-1]))
    share = rest // np.arange(ascending.size, 0, -1)
    # The first count above the equal share of the rest: those before it are taken whole.
    return max(1, int(share[np.argmax(ascending > share)]))


def leading_priority(priorities: ArrayLike, ages: ArrayLike, age_limit: float) -> int:
    """Return the priority whose turn it is: the highest, unless a pair of a lower one is as old as ``age_limit``.

    >>> leading_priority([1, 0, 0], [1.0, 7.0, 9.0], age_limit=8.0), leading_priority([1, 0], [1.0, 7.0], age_limit=8.0)
    (0, 1)
    """
    priorities, ages = np.asarray(priorities), np.asarray(ages)
    overdue = (priorities < priorities.max()) & (ages >= age_limit)
    return int(priorities[np.argmax(np.where(overdue, ages, -np.inf))] if overdue.any() else priorities.max())


def plan(
    lengths: ArrayLike,
    priorities: ArrayLike,
    ages: ArrayLike,
    budget: int,
    *,
    starts: ArrayLike | None = None,
    padded: bool = True,
    fill_tokens: int = 0,
    age_limit: float = math.inf,
    slack: float = SLACK,
    grace: float = GRACE_TOKENS,
) -> Positions:
    """Choose the one batch to run now, as positions into the given arrays, shortest pair first.

    ``lengths`` are tokens, ``priorities`` higher first, ``ages`` and ``age_limit`` seconds, ``starts`` virtual times,
    each array one entry per waiting pair. The rule, in order:

    1. One pair leads: of the priority whose turn it is (``leading_priority``) the one that starts earliest, of several
       the first. Without ``starts`` it is the oldest. The leader is always in the batch, so nothing starves.
    2. Its peers, the pairs of its priority, come first: those that start earliest where batches are not padded; else a
       run of its neighbours in length, the one that holds the most tokens within their limits of padding.
    3. Pairs of a higher priority fill the rest of ``budget``. Pairs of a lower one fill a batch up to ``fill_tokens``
       only: a smaller batch takes the device as long, a larger one would delay the priority whose turn it is.
    4. The batch's ``cost`` stays within ``budget``. Only a leader longer than the budget exceeds it, alone.
    5. No pair of ``n`` tokens is padded beyond ``n * (1 + slack) + grace``; in a batch that costs no more than
       ``fill_tokens`` both may be ``STRETCH`` times as much, if that brings more real tokens together.

    >>> plan([9, 40, 10, 400, 9], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1], budget=64)
    array([0, 4, 2])
    >>> plan([9, 40, 10, 400, 9], [0, 1, 0, 1, 0], [5, 4, 3, 2, 1], budget=64)
    array([1])
    >>> plan([9, 40, 10, 400, 9], [0, 1, 0, 1, 0], [5, 4, 3, 2, 1], budget=64, padded=False, fill_tokens=64)
    array([0, 2, 1])
    >>> plan([9, 40, 10, 400, 9], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1], budget=64, starts=[9, 7, 8, 8, 8])
    array([1])
    >>> plan([], [], [], budget=64)
    array([], dtype=int64)

    Raises ValueError when the arrays differ in length, a length is below one, or the budget is.
    """
    lengths, priorities, ages = np.asarray(lengths), np.asarray(priorities), np.asarray(ages, dtype=np.float64)
    starts = -ages if starts is None else np.asarray(starts, dtype=np.float64)
    if not lengths.shape == priorities.shape == ages.shape == starts.shape or lengths.ndim != 1:
        shapes = ", ".join(str(row.shape) for row in (lengths, priorities, ages, starts))
        raise ValueError(f"one entry per pair: got {shapes}")
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, not {budget}")
    if not lengths.size:
        return np.empty(0, dtype=np.intp)
    if lengths.min() < 1:
        raise ValueError("every length must be at least 1 token")
    lengths = lengths.astype(np.int64)
    turn = leading_priority(priorities, ages, age_limit)
    # The order of turns also decides between equals.
    order = np.argsort(starts, kind="stable")
    ranks = priorities[order]
    peers = order[ranks == turn]
    others = ((order[ranks > turn], budget), (order[ranks < turn], fill_tokens))
    if padded:
        batch = np.empty(0, dtype=np.intp)
        leader, peers = peers[0], peers[_by_length(lengths[peers])]
        for stretch, most in ((1, budget), (STRETCH, min(budget, fill_tokens))):
            limits = lengths * (1 + slack * stretch) + grace * stretch
            run = _best_run(peers, int(leader), lengths, limits, most)
            for more, limit in others:
                run = _with_neighbours(run, more, lengths, limits, min(limit, most))
            if lengths[run].sum() > lengths[batch].sum():
                batch = run
    else:
        batch = peers[:1]
        for more, limit in ((peers[1:], budget), *others):
            batch = _with_first(batch, more[np.argsort(-priorities[more], kind="stable")], lengths, min(limit, budget))
    return batch[_by_length(lengths[batch])]


def plan_all(lengths: ArrayLike, budget: int, *, padded: bool = True, window: int = WINDOW) -> Iterator[Positions]:
    """Plan batches until every pair is in one, oldest first, all of one priority.

    >>> [batch.tolist() for batch in plan_all([10, 50, 11, 52], budget=110)]
    [[0, 2], [1, 3]]
    """
    lengths = np.asarray(lengths)
    rest = np.arange(lengths.size)
    while rest.size:
        near = rest[:window]
        same = np.zeros(near.size, dtype=np.int8)
        batch = near[plan(lengths[near], same, -near, budget, padded=padded, fill_tokens=fill_of(budget))]
        yield batch
        rest = rest[~np.isin(rest, batch)]


def _starts_within_flows(lengths: NDArray[Any], flows: NDArray[Any], flow_starts: NDArray[Any]) -> Floats:
    """Compute each entry's start: its flow's start plus the tokens of the flow's entries before it."""
    by_flow = np.argsort(flows, kind="stable")
    flow, tokens = flows[by_flow], lengths[by_flow]
    before = np.cumsum(tokens, dtype=np.float64) - tokens
    first = np.searchsorted(flow, flow, side="left")
    starts = np.empty(lengths.size)
    starts[by_flow] = flow_starts[flow] + before - before[first]
    return starts


def _with_first(batch: Positions, order: Positions, lengths: NDArray[np.int64], limit: int) -> Positions:
    """Add pairs in order while they fit; then, of the next few, those that still fit."""
    left = limit - int(lengths[batch].sum())
    whole = int(np.searchsorted(np.cumsum(lengths[order]), left, side="right"))
    chosen = order[:whole].tolist()
    left -= int(lengths[chosen].sum())
    for position in order[whole : whole + LOOK_AHEAD].tolist():
        if lengths[position] <= left:
            chosen.append(position)
            left -= int(lengths[position])
    return np.concatenate((batch, np.array(chosen, dtype=np.intp)))


def _with_neighbours(
    batch: Positions, more: Positions, lengths: NDArray[np.int64], padded_limits: Floats, limit: int
) -> Positions:
    """Add the pairs nearest to the batch's longest, and not longer, as many as fit."""
    longest = int(lengths[batch].max())
    near = more[(lengths[more] <= longest) & (padded_limits[more] >= longest)]
    order = np.argsort(-lengths[near], kind="stable")
    return np.concatenate((batch, near[order[: max(0, limit // longest - batch.size)]]))


def _by_length(lengths: NDArray[np.int64]) -> Positions:
    # numpy sorts 16-bit integers by radix sort, without comparisons.
    short = lengths.max(initial=0) < 1 << 16
    return np.argsort(lengths.astype(np.uint16) if short else lengths, kind="stable")


def _best_run(
    ranked: Positions, leader: int, lengths: NDArray[np.int64], padded_limits: Floats, budget: int
) -> Positions:
    """Find the best run of neighbours in length with the leader in it; ``ranked`` is in ascending order of length."""
    sizes, limits = lengths[ranked], padded_limits[ranked]
    at = int(np.flatnonzero(ranked == leader)[0])
    if sizes[at] > budget:
        return ranked[at : at + 1]
    # A run is given by its ends, lo..hi in order of length. For each position of the longest pair (hi) only the lowest
    # lo that is allowed has to be considered: every pair within its limit adds more than it costs.
    hi = np.arange(at, np.searchsorted(sizes, min(limits[at], budget), side="right"))
    longest = sizes[hi]
    lo = np.maximum(np.searchsorted(limits, longest, side="left"), hi - budget // longest + 1)
    lo, hi, longest = (ends[lo <= at] for ends in (lo, hi, longest))
    total = np.concatenate(([0.0], np.cumsum(limits)))
    worth = total[hi + 1] - total[lo] - longest * (hi - lo + 1)
    best = int(np.argmax(worth))
    return ranked[lo[best] : hi[best] + 1]
