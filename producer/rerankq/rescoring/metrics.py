"""Ranking metrics, computed as trec_eval does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ctypes import c_float
from math import log2


def trec_order(scores: Mapping[str, float]) -> list[str]:
    """Order documents as trec_eval does: by score in single precision, equal scores by id, the greater id first.

    >>> trec_order({"a": 1.0, "b": 2.0, "c": 1.0})
    ['b', 'c', 'a']
    """
    return sorted(scores, key=lambda name: (c_float(scores[name]).value, name.encode()), reverse=True)


def dcg(gains: Iterable[float]) -> float:
    """Sum gains, the one at place *i* (from 1) divided by log2(i + 1): Järvelin & Kekäläinen 2002, linear gain.

    >>> dcg([3, 0, 2])
    4.0
    """
    return sum(gain / log2(place + 1) for place, gain in enumerate(gains, start=1))


def ndcg(order: Sequence[str], grades: Mapping[str, int], *, depth: int = 10) -> float:
    """DCG of the first *depth* documents over the DCG of the best order possible, as trec_eval's ``ndcg_cut``.

    A document without a judgement, or with one below zero, gains nothing. Without any relevant document: 0.

    >>> ndcg(["b", "a"], {"a": 1})  # 1 / log2(3)
    0.6309297535714575
    """
    ideal = dcg(sorted((grade for grade in grades.values() if grade > 0), reverse=True)[:depth])
    return dcg(max(grades.get(name, 0), 0) for name in order[:depth]) / ideal if ideal else 0.0


def mean(values: Sequence[float]) -> float | None:
    """Average values; None if there are none.

    >>> mean([0.5, 1.0]), mean([])
    (0.75, None)
    """
    return sum(values) / len(values) if values else None
