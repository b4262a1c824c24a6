"""Ranks instead of values: ordering, cutting, and fusing by reciprocal rank."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .normalise import known

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]


def rank(
    scores: ArrayLike,
    min_score: float | None = None,
    top_k: int | None = None,
    *,
    logits: ArrayLike | None = None,
) -> Positions:
    """Order positions, keep scores of at least ``min_score``, and of those the best ``top_k``.

    The order of every ranking: by descending score; equal scores by the model's descending raw logit, which tells
    chunks apart where a sigmoid is 1 for both or its difference is lost in a sum; equal logits in the order of the job.
    NaN comes last among its like, and never passes a ``min_score``.

    Raises:
        ValueError: if ``top_k`` is negative, or there is not one logit per score.

    >>> rank([0.2, 0.9, float("nan"), 0.9]).tolist(), rank([0.2, 0.9, 0.9], min_score=0.2, top_k=2).tolist()
    ([1, 3, 0, 2], [1, 2])
    >>> rank([1.0, 1.0, 1.0], logits=[38.0, 60.0, 38.0]).tolist()
    [1, 0, 2]
    """
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must not be negative: {top_k}")
    values = np.asarray(scores, dtype=np.float64)
    raw = np.zeros(values.shape) if logits is None else np.asarray(logits, dtype=np.float64)
    if raw.shape != values.shape:
        raise ValueError(f"one logit per score: got {raw.shape} and {values.shape}")
    order: Positions = np.lexsort((-raw, -values))
    if min_score is not None:
        order = order[values[order] >= min_score]
    return order[:top_k]


def competition_ranks(values: ArrayLike) -> Floats:
    """Rank values, 1 for the highest: equal values share the better rank ("1224"), missing ones have none (NaN).

    >>> competition_ranks([0.1, 0.7, float("nan"), 0.7])
    array([ 3.,  1., nan,  1.])
    """
    row = known(values)
    present = ~np.isnan(row)
    _, group, sizes = np.unique(-row[present], return_inverse=True, return_counts=True)
    row[present] = (np.cumsum(sizes) - sizes + 1)[group]
    return row


def reciprocal_rank_fusion(
    signals: Mapping[str, ArrayLike], k: int = 60, weights: Mapping[str, float] | None = None
) -> Floats:
    """Add up ``weight / (k + rank)`` over the signals that a chunk has; shape ``(chunks,)``.

    Source: Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning
    methods", SIGIR 2009. Ties, on which the paper is silent, share the better rank: equal values earn equal scores
    whatever the order of the job. A chunk that lacks a signal gets nothing from it. Weights default to 1; whatever
    they and ``k`` are, no sum leaves the range of floats.

    Raises:
        ValueError: if the signals differ in length or ``k`` is negative.

    >>> reciprocal_rank_fusion({"model": [3.0, 1.0], "keyword": [2.0, 9.0]}, k=1).round(3)
    array([0.833, 0.833])
    """
    if k < 0:
        raise ValueError(f"k must not be negative: {k}")
    rows = {name: competition_ranks(values) for name, values in signals.items()}
    if len({row.size for row in rows.values()}) > 1:
        raise ValueError(f"signals differ in length: { {name: row.size for name, row in rows.items()} }")
    # An eighth of the largest float leaves room to add all six signals.
    limit = float(np.finfo(np.float64).max) / 8
    shares = [
        min(1.0 if weights is None else weights[name], limit) / (float(min(k, limit)) + row)
        for name, row in rows.items()
    ]
    return np.nansum(shares, axis=0) if shares else np.zeros(0)
