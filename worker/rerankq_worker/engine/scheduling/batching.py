"""Which pairs share the next batch: a pure decision over arrays.

A padded batch costs *longest × count* tokens, a flattened one the sum of its lengths. Whoever owns the device asks for
one batch whenever it becomes free, from whatever waits at that moment; nothing here waits for company.

Among pairs of one priority the device is shared by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), in
two levels: tenants share it, and a tenant's jobs share what is the tenant's, by tokens. ``virtual_starts`` says whose
turn it is, ``plan`` keeps to it.
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
#: producers with sentences of 40 tokens, on a device that is level below 512: 4 % more real tokens per second than
#: with 0.125, 8 and 1, and padding of 1.06 instead of 1.12.
SLACK = 0.04
#: ...and by this many tokens more, so that very short pairs find company at all.
GRACE_TOKENS = 2
#: So much further may both go in a batch too small to use the device well.
STRETCH = 4
#: Planning looks at this many pairs at a time: enough neighbours in length, about a millisecond at most.
WINDOW = 8192
#: Where the next in turn does not fit any more, so many behind it may take the room that is left.
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
    """Guess the tokens below which a device takes as long for less, where nobody measured them: a quarter.

    On a CPU whose budget is 2048, tokens per second are level from 512 up (measured, 22 M parameters).
    """
    return budget // 4


def virtual_starts(
    lengths: ArrayLike, jobs: ArrayLike, job_starts: ArrayLike, tenants: ArrayLike, tenant_starts: ArrayLike
) -> Floats:
    """Tell at which virtual time each pair's turn comes, by the tokens before it; whoever starts earlier goes first.

    ``lengths`` and ``jobs`` have one entry per pair, a job's pairs in its own order; ``job_starts`` and ``tenants`` one
    per job, ``tenant_starts`` one per tenant. A job's pairs follow each other from the job's start on, each after the
    tokens of those before it; that is their order within the tenant. In this order a tenant's pairs follow each other
    in the same way from the tenant's start on.

    >>> virtual_starts([9, 9, 9, 4], [0, 0, 0, 1], job_starts=[0, 0], tenants=[0, 0], tenant_starts=[0])
    array([ 0., 13., 22.,  9.])
    >>> virtual_starts([9, 9, 9, 4], [0, 0, 0, 1], job_starts=[0, 0], tenants=[0, 1], tenant_starts=[0, 0])
    array([ 0.,  9., 18.,  0.])
    """
    lengths, jobs, tenants = np.asarray(lengths), np.asarray(jobs, np.intp), np.asarray(tenants, np.intp)
    within = _one_after_the_other(lengths, jobs, np.asarray(job_starts))
    order = np.argsort(within, kind="stable")
    starts = np.empty(lengths.size)
    starts[order] = _one_after_the_other(lengths[order], tenants[jobs[order]], np.asarray(tenant_starts))
    return starts


def even_share(counts: ArrayLike, size: int) -> int:
    """Find how many each may take at most, so that all together take no more than ``size``; at least 1.

    >>> even_share([100, 3, 100], 43), even_share([1, 2], 43), even_share([5, 5, 5], 2)
    (20, 2, 1)
    """
    ascending = np.sort(np.asarray(counts))
    if ascending.sum() <= size:
        return max(1, int(ascending.max(initial=1)))
    rest = size - np.concatenate(([0], np.cumsum(ascending)[:-1]))
    share = rest // np.arange(ascending.size, 0, -1)
    # The first whose count is above what is left for each: those before it take all they have.
    return max(1, int(share[np.argmax(ascending > share)]))


def leading_priority(priorities: ArrayLike, ages: ArrayLike, age_limit: float) -> int:
    """Tell whose turn it is: the highest priority present, unless a pair of a lower one is as old as ``age_limit``.

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
    2. Its peers come first, the pairs of its priority: those that start earliest where batches are not padded; else its
       neighbours in order of length, of those runs the one with the most room used up, counting padding against it.
    3. Pairs of a higher priority fill what is left of ``budget``. Pairs of a lower one fill a batch up to
       ``fill_tokens`` alone: below so many tokens a device takes as long for less, above they would make those wait
       whose turn it is.
    4. The batch's ``cost`` stays within ``budget``. Only a leader that is longer than the budget exceeds it, alone.
    5. No pair of ``n`` tokens is padded beyond ``n * (1 + slack) + grace``; in a batch that costs no more than
       ``fill_tokens`` both may be ``STRETCH`` times as much, where more real tokens come together so.

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
        raise ValueError(f"a budget of {budget} tokens holds no pair")
    if not lengths.size:
        return np.empty(0, dtype=np.intp)
    if lengths.min() < 1:
        raise ValueError("a pair has at least one token")
    lengths = lengths.astype(np.int64)
    turn = leading_priority(priorities, ages, age_limit)
    # Whoever is earlier in it comes first wherever one must choose among equals.
    line = np.argsort(starts, kind="stable")
    ranks = priorities[line]
    peers = line[ranks == turn]
    others = ((line[ranks > turn], budget), (line[ranks < turn], fill_tokens))
    if padded:
        batch = np.empty(0, dtype=np.intp)
        leader, peers = peers[0], peers[_by_length(lengths[peers])]
        for stretch, most in ((1, budget), (STRETCH, min(budget, fill_tokens))):
            reach = lengths * (1 + slack * stretch) + grace * stretch
            run = _best_run(peers, int(leader), lengths, reach, most)
            for more, limit in others:
                run = _with_neighbours(run, more, lengths, reach, min(limit, most))
            if lengths[run].sum() > lengths[batch].sum():
                batch = run
    else:
        batch = peers[:1]
        for more, limit in ((peers[1:], budget), *others):
            batch = _with_first(batch, more[np.argsort(-priorities[more], kind="stable")], lengths, min(limit, budget))
    return batch[_by_length(lengths[batch])]


def plan_all(lengths: ArrayLike, budget: int, *, padded: bool = True, window: int = WINDOW) -> Iterator[Positions]:
    """Plan batch after batch until every pair had its turn, oldest first, all of one priority.

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


def _one_after_the_other(lengths: NDArray[Any], flows: NDArray[Any], flow_starts: NDArray[Any]) -> Floats:
    """Let the entries of each flow follow each other from its start on, in their order."""
    by_flow = np.argsort(flows, kind="stable")
    flow, tokens = flows[by_flow], lengths[by_flow]
    before = np.cumsum(tokens, dtype=np.float64) - tokens
    first = np.searchsorted(flow, flow, side="left")
    starts = np.empty(lengths.size)
    starts[by_flow] = flow_starts[flow] + before - before[first]
    return starts


def _with_first(batch: Positions, line: Positions, lengths: NDArray[np.int64], limit: int) -> Positions:
    """Add the first in line while they fit; then, of the next few, those that fit still."""
    room = limit - int(lengths[batch].sum())
    whole = int(np.searchsorted(np.cumsum(lengths[line]), room, side="right"))
    chosen = line[:whole].tolist()
    room -= int(lengths[chosen].sum())
    for position in line[whole : whole + LOOK_AHEAD].tolist():
        if lengths[position] <= room:
            chosen.append(position)
            room -= int(lengths[position])
    return np.concatenate((batch, np.array(chosen, dtype=np.intp)))


def _with_neighbours(
    batch: Positions, more: Positions, lengths: NDArray[np.int64], reach: NDArray[np.float64], limit: int
) -> Positions:
    """Add those that are nearest to the batch's longest, and not longer, as many as fit."""
    longest = int(lengths[batch].max())
    near = more[(lengths[more] <= longest) & (reach[more] >= longest)]
    order = np.argsort(-lengths[near], kind="stable")
    return np.concatenate((batch, near[order[: max(0, limit // longest - batch.size)]]))


def _by_length(lengths: NDArray[np.int64]) -> Positions:
    # Numbers of 16 bits are sorted without comparing them.
    short = lengths.max(initial=0) < 1 << 16
    return np.argsort(lengths.astype(np.uint16) if short else lengths, kind="stable")


def _best_run(ranked: Positions, leader: int, lengths: NDArray[np.int64], reaches: Floats, budget: int) -> Positions:
    """Find the best run with the leader in it among neighbours in length, ``ranked`` from the shortest on."""
    sizes, reach = lengths[ranked], reaches[ranked]
    place = int(np.flatnonzero(ranked == leader)[0])
    if sizes[place] > budget:
        return ranked[place : place + 1]
    # A run is named by its ends, lo..hi in order of length. For each place of the longest pair (hi) exactly one lo is
    # worth a look, the lowest allowed: every pair within reach adds more than it costs.
    hi = np.arange(place, np.searchsorted(sizes, min(reach[place], budget), side="right"))
    longest = sizes[hi]
    lo = np.maximum(np.searchsorted(reach, longest, side="left"), hi - budget // longest + 1)
    lo, hi, longest = (ends[lo <= place] for ends in (lo, hi, longest))
    total = np.concatenate(([0.0], np.cumsum(reach)))
    worth = total[hi + 1] - total[lo] - longest * (hi - lo + 1)
    best = int(np.argmax(worth))
    return ranked[lo[best] : hi[best] + 1]
