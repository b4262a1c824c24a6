"""Places instead of values: ordering, cutting, and fusing by reciprocal rank."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .normalise import known

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]


def rank(scores: ArrayLike, min_score: float | None = None, top_k: int | None = None) -> Positions:
    """Order positions by descending score, keep scores of at least ``min_score``, and of those the best ``top_k``.

    Ties stay in the order of the job. NaN comes last, and never passes a ``min_score``.

    Raises:
        ValueError: if ``top_k`` is negative.

    >>> rank([0.2, 0.9, float("nan"), 0.9]).tolist(), rank([0.2, 0.9, 0.9], min_score=0.2, top_k=2).tolist()
    ([1, 3, 0, 2], [1, 2])
    """
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must not be negative: {top_k}")
    values = np.asarray(scores, dtype=np.float64)
    order: Positions = np.argsort(-values, kind="stable")
    if min_score is not None:
        order = order[values[order] >= min_score]
    return order[:top_k]


def places(values: ArrayLike) -> Floats:
    """Give each value its place, 1 for the highest; equal values share the better place, missing ones have none (NaN).

    >>> places([0.1, 0.7, float("nan"), 0.7])
    array([ 3.,  1., nan,  1.])
    """
    row = known(values)
    there = ~np.isnan(row)
    _, group, sizes = np.unique(-row[there], return_inverse=True, return_counts=True)
    row[there] = (np.cumsum(sizes) - sizes + 1)[group]
    return row


def reciprocal_rank_fusion(
    signals: Mapping[str, ArrayLike], k: int = 60, weights: Mapping[str, float] | None = None
) -> Floats:
    """Add up ``weight / (k + place)`` over the signals that a chunk has; shape ``(chunks,)``.

    Source: Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning
    methods", SIGIR 2009. Ties, on which the paper is silent, share the better place: equal values earn equal scores
    whatever the order of the job. A chunk that lacks a signal gets nothing from it. Weights default to 1.

    Raises:
        ValueError: if the signals differ in length or ``k`` is negative.

    >>> reciprocal_rank_fusion({"model": [3.0, 1.0], "keyword": [2.0, 9.0]}, k=1).round(3)
    array([0.833, 0.833])
    """
    if k < 0:
        raise ValueError(f"k must not be negative: {k}")
    rows = {name: places(values) for name, values in signals.items()}
    if len({row.size for row in rows.values()}) > 1:
        raise ValueError(f"signals differ in length: { {name: row.size for name, row in rows.items()} }")
    shares = [(1.0 if weights is None else weights[name]) / (k + row) for name, row in rows.items()]
    return np.nansum(shares, axis=0) if shares else np.zeros(0)
