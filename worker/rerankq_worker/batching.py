"""Which pairs share the next batch: a pure decision over arrays.

A padded batch costs *longest × count* tokens, a flattened one the sum of its lengths. Whoever owns the device asks for
one batch whenever it becomes free, from whatever waits at that moment; nothing here waits for company.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

Positions = NDArray[np.intp]

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


def plan(
    lengths: ArrayLike,
    priorities: ArrayLike,
    ages: ArrayLike,
    budget: int,
    *,
    padded: bool = True,
    fill_tokens: int = 0,
    age_limit: float = math.inf,
    slack: float = SLACK,
    grace: float = GRACE_TOKENS,
) -> Positions:
    """Choose the one batch to run now, as positions into the given arrays, shortest pair first.

    ``lengths`` are tokens, ``priorities`` higher first, ``ages`` and ``age_limit`` seconds, each array one entry per
    waiting pair in order of arrival. The rule, in order:

    1. One pair leads: the oldest of the highest priority present, unless a pair of a lower priority is as old as
       ``age_limit``; then the oldest of those. The leader is always in the batch, so nothing starves.
    2. Its peers come first, the pairs of its priority: the oldest where batches are not padded; else its neighbours
       in order of length, of those runs the one with the most room used up, counting padding against it.
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
    >>> plan([], [], [], budget=64)
    array([], dtype=int64)

    Raises ValueError when the arrays differ in length, a length is below one, or the budget is.
    """
    lengths, priorities, ages = np.asarray(lengths), np.asarray(priorities), np.asarray(ages, dtype=np.float64)
    if not lengths.shape == priorities.shape == ages.shape or lengths.ndim != 1:
        raise ValueError(f"one entry per pair: got {lengths.shape}, {priorities.shape} and {ages.shape}")
    if budget < 1:
        raise ValueError(f"a budget of {budget} tokens holds no pair")
    if not lengths.size:
        return np.empty(0, dtype=np.intp)
    if lengths.min() < 1:
        raise ValueError("a pair has at least one token")
    lengths = lengths.astype(np.int64)
    leader = _leader(priorities, ages, age_limit)
    turn = priorities[leader]
    peers = np.flatnonzero(priorities == turn)
    others = ((np.flatnonzero(priorities > turn), budget), (np.flatnonzero(priorities < turn), fill_tokens))
    if padded:
        batch = np.empty(0, dtype=np.intp)
        for stretch, most in ((1, budget), (STRETCH, min(budget, fill_tokens))):
            reach = lengths * (1 + slack * stretch) + grace * stretch
            run = peers[_best_run(lengths[peers], reach[peers], int(np.searchsorted(peers, leader)), most)]
            for more, limit in others:
                run = _with_neighbours(run, more, lengths, reach, min(limit, most))
            if lengths[run].sum() > lengths[batch].sum():
                batch = run
    else:
        batch = np.array([leader])
        for more, limit in ((peers[peers != leader], budget), *others):
            turns = more[np.lexsort((-ages[more], -priorities[more]))]
            batch = _with_oldest(batch, turns, lengths, min(limit, budget))
    return batch[np.argsort(lengths[batch], kind="stable")]


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


def _leader(priorities: NDArray[np.generic], ages: NDArray[np.float64], age_limit: float) -> int:
    first = priorities == priorities.max()
    overdue = ~first & (ages >= age_limit)
    return int(np.argmax(np.where(overdue if overdue.any() else first, ages, -np.inf)))


def _with_oldest(batch: Positions, turns: Positions, lengths: NDArray[np.int64], limit: int) -> Positions:
    """Add those whose turn it is while they fit; then, of the next few, those that fit still."""
    room = limit - int(lengths[batch].sum())
    whole = int(np.searchsorted(np.cumsum(lengths[turns]), room, side="right"))
    chosen = turns[:whole].tolist()
    room -= int(lengths[chosen].sum())
    for position in turns[whole : whole + LOOK_AHEAD].tolist():
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


def _best_run(lengths: NDArray[np.int64], reaches: NDArray[np.float64], leader: int, budget: int) -> Positions:
    order = np.argsort(lengths, kind="stable")
    ranked = lengths[order]
    place = int(np.flatnonzero(order == leader)[0])
    if ranked[place] > budget:
        return order[place : place + 1]
    # A run is named by its ends, lo..hi in order of length. For each place of the longest pair (hi) exactly one lo is
    # worth a look, the lowest allowed: every pair within reach adds more than it costs.
    reach = reaches[order]
    hi = np.arange(place, np.searchsorted(ranked, min(reach[place], budget), side="right"))
    longest = ranked[hi]
    lo = np.maximum(np.searchsorted(reach, longest, side="left"), hi - budget // longest + 1)
    lo, hi, longest = (ends[lo <= place] for ends in (lo, hi, longest))
    total = np.concatenate(([0.0], np.cumsum(reach)))
    worth = total[hi + 1] - total[lo] - longest * (hi - lo + 1)
    best = int(np.argmax(worth))
    return order[lo[best] : hi[best] + 1]
