"""Signals that a chunk carries with it: its tags."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Tags = Mapping[str, float]


def rank_feature_scores(query_tags: Tags, chunks_tags: Sequence[Tags]) -> Floats:
    """Compare the query's tags with each chunk's: their cosine, shape ``(chunks,)``, in [-1, 1].

    A query without tags asks for none, so the signal is missing everywhere (NaN). A chunk without tags simply does not
    match: 0. Weights that are not finite do not count.

    >>> rank_feature_scores({"tide": 3, "moon": 4}, [{"tide": 1}, {"bread": 1}, {}])
    array([0.6, 0. , 0. ])
    >>> rank_feature_scores({}, [{"tide": 1}])
    array([nan])
    """
    query = _unit(query_tags)
    if not query:
        return np.full(len(chunks_tags), np.nan)
    return np.array([_cosine(query, _unit(tags)) for tags in chunks_tags], dtype=np.float64)


def _unit(tags: Tags) -> dict[str, float]:
    finite = {tag: weight for tag, weight in tags.items() if weight and math.isfinite(weight)}
    if not finite:
        return {}
    # By the largest first: a norm of very large or very small weights would overflow or vanish.
    largest = max(map(abs, finite.values()))
    scaled = {tag: weight / largest for tag, weight in finite.items()}
    norm = math.hypot(*scaled.values())
    return {tag: weight / norm for tag, weight in scaled.items()}


def _cosine(query: Tags, tags: Tags) -> float:
    product = math.fsum(query[tag] * weight for tag, weight in tags.items() if tag in query)
    return min(1.0, max(-1.0, product))
