"""The token signal's arithmetic: how much of a query's token weight a chunk's fields cover.

A token of the query found in several fields counts more than in one, with a saturation: with ``X`` the sum of the
boosts of the fields that hold it, the token is covered to ``X / (1 + X)``. That is BM25F with k1 = 1, binary term
frequencies and no length normalisation (Robertson, Zaragoza and Taylor, "Simple BM25 extension to multiple weighted
fields", CIKM 2004). It is divided by the same for all fields that occur in the job, so that a job with contents alone
gives exactly the share of the query's weight that each chunk covers. One more field thus never lowers its chunk among
the others; a field that no chunk had before raises the divisor for the whole job alike. Nothing here depends on how a
chunk's tokens were found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .weights import scale_of

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]

FIELDS = ("content", "title", "keywords", "questions")
# Without boosts a token counts once, wherever among these it is found.
UNBOOSTED = ("content", "title", "keywords")
# A larger boost acts as this one, from which on a token is covered to 1 whatever else holds it.
MAX_BOOST = 1e300


@dataclass(frozen=True)
class Matches:
    """Where the query's tokens were found: token ``tokens[i]`` in chunk ``chunks[i]``, each pair at most once.

    In order of chunks, then of tokens: sums over them are the same in every process.
    """

    chunks: Positions
    tokens: Positions


def idf_weights(query_tokens: Sequence[str], chunks_tokens: Sequence[Iterable[str]]) -> list[tuple[str, float]]:
    """Weigh each distinct token of the query by its rarity among the job's chunks; weights are above zero.

    ``ln(1 + (N - n + 0.5) / (n + 0.5))`` for a token that n of N chunks hold (the idf of BM25 as Lucene computes it).
    A token that the query repeats is one token, at its first position.

    >>> [(token, round(weight, 2)) for token, weight in idf_weights(["tide", "moon", "tide"], [["moon"], ["moon"]])]
    [('tide', 1.79), ('moon', 0.18)]
    """
    distinct = list(dict.fromkeys(query_tokens))
    matches = find(distinct, [frozenset(tokens) for tokens in chunks_tokens])
    return list(zip(distinct, idf([matches], len(distinct), len(chunks_tokens)).tolist(), strict=True))


def token_similarity(
    query_tokens: Sequence[tuple[str, float]],
    chunks_fields: Sequence[Mapping[str, Iterable[str]]],
    boosts: Mapping[str, float] | None = None,
) -> Floats:
    """Measure how much of the query's token weight each chunk's fields cover: shape ``(chunks,)``, in [0, 1].

    Takes (token, weight), weights of a repeated token adding up, and for each chunk the tokens of its fields among
    content, title, keywords and questions. A boost of zero leaves a field out; so does not naming it, but for the
    content, which then counts 1. Without any boosts a token counts once, whether in content, title or keywords. Without
    any token weight there is nothing to cover: NaN, a missing signal.

    Raises:
        ValueError: on a field that does not exist, or a boost or weight that is negative or not finite.

    >>> query = [("tide", 3.0), ("moon", 1.0)]
    >>> token_similarity(query, [{"content": ["tide"]}, {"content": ["moon", "sun"]}])
    array([0.75, 0.25])
    >>> token_similarity(query, [{"content": ["tide"]}, {"title": ["tide"]}], {"title": 2.0}).round(3)
    array([0.5  , 0.667])
    """
    tokens, weights = sum_repeats(query_tokens)
    sets = {name: [frozenset(chunk.get(name, ())) for chunk in chunks_fields] for name in active_fields(boosts or {})}
    matches = {name: find(tokens, chunks) for name, chunks in sets.items()}
    occurring = {name for name, chunks in sets.items() if any(chunks)}
    return covered(weights, matches, occurring, boosts or {}, len(chunks_fields))


def sum_repeats(query_tokens: Sequence[tuple[str, float]]) -> tuple[list[str], Floats]:
    """Sum the weights of repeated tokens; where weights are huge, all are scaled down alike.

    Raises:
        ValueError: if a weight is negative or not finite.
    """
    sums: dict[str, float] = {}
    scale = scale_of([weight for _, weight in query_tokens])
    for token, weight in query_tokens:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of query token {token!r} must be finite and not negative: {weight}")
        sums[token] = sums.get(token, 0.0) + weight * scale
    return list(sums), np.fromiter(sums.values(), dtype=np.float64, count=len(sums))


def active_fields(boosts: Mapping[str, float]) -> dict[str, float]:
    """Name the fields that count, with their boosts.

    Raises:
        ValueError: on a field that does not exist, or a boost that is negative or not finite.

    >>> active_fields({}), active_fields({"title": 2, "keywords": 0})
    ({'content': 1.0, 'title': 1.0, 'keywords': 1.0}, {'content': 1.0, 'title': 2})
    """
    if not boosts:
        return dict.fromkeys(UNBOOSTED, 1.0)
    for name, boost in boosts.items():
        if name not in FIELDS or not (boost >= 0 and math.isfinite(boost)):
            raise ValueError(f"boosts go to {', '.join(FIELDS)}, finite and not negative: {name}={boost}")
    return {name: min(boost, MAX_BOOST) for name, boost in {"content": 1.0, **boosts}.items() if boost}


def find(tokens: Sequence[str], chunks: Sequence[AbstractSet[str]]) -> Matches:
    """Look for distinct tokens in each chunk's set."""
    positions = {token: position for position, token in enumerate(tokens)}
    pairs = sorted((chunk, positions[token]) for chunk, held in enumerate(chunks) for token in positions.keys() & held)
    rows = np.array(pairs, dtype=np.intp).reshape(-1, 2)
    return Matches(rows[:, 0], rows[:, 1])


def idf(matches: Iterable[Matches], tokens: int, chunks: int) -> Floats:
    """Compute the idf of each of the query's tokens; a chunk counts once in however many fields it holds the token."""
    listed = list(matches)
    held, _ = _cells(listed, [1.0] * len(listed), tokens)
    frequency = np.bincount(held % tokens, minlength=tokens) if tokens else np.zeros(0)
    weights: Floats = np.log1p((chunks - frequency + 0.5) / (frequency + 0.5))
    return weights


def covered(
    weights: Floats, matches: Mapping[str, Matches], occurring: Iterable[str], boosts: Mapping[str, float], chunks: int
) -> Floats:
    """Turn matches by field into coverages of shape ``(chunks,)``; see :func:`token_similarity`."""
    total = weights.sum()
    if not total > 0:
        return np.full(chunks, np.nan)
    fields = {name: boost for name, boost in active_fields(boosts).items() if name in set(occurring)}
    cells, strengths = _cells([matches[name] for name in fields], list(fields.values()), weights.size)
    shares = _saturated(strengths, sum(fields.values())) if boosts else np.ones(cells.size)
    earned = np.bincount(cells // weights.size, shares * weights[cells % weights.size], minlength=chunks)
    coverage: Floats = np.clip(earned / total, 0.0, 1.0)
    return coverage


def _saturated(strengths: Floats, most: float) -> Floats:
    # In this order neither a huge nor a tiny boost leaves the range of floats.
    shares: Floats = (strengths / most) * ((1.0 + most) / (1.0 + strengths))
    return shares


def _cells(matches: Sequence[Matches], boosts: Sequence[float], tokens: int) -> tuple[Positions, Floats]:
    """Join matches into the distinct cells (chunk x tokens + token) with the sum of their boosts.

    Sparse on purpose: a table of all chunks by all tokens of a long query would not fit into memory.
    """
    if not matches or not tokens:
        return np.zeros(0, dtype=np.intp), np.zeros(0)
    keys = np.concatenate([found.chunks * tokens + found.tokens for found in matches])
    strengths = np.repeat(boosts, [found.chunks.size for found in matches])
    cells, cell_of = np.unique(keys, return_inverse=True)
    return cells, np.bincount(cell_of, strengths, minlength=cells.size).astype(np.float64)
