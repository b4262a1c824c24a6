"""Several signals become one score.

A signal is one raw number per chunk: ``model`` (logit), ``token`` (coverage in [0, 1]), ``vector`` (first-stage
similarity), ``keyword`` (first-stage score), ``pagerank`` (0 to 100), ``tags`` (cosine). NaN, an infinity or None means
that the chunk lacks it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .normalise import RULES, known
from .ranks import reciprocal_rank_fusion
from .weights import scale_of

Floats = NDArray[np.float64]

# What a fusion that does not name a rule gets, by signal; the keys are all the signals there are.
DEFAULT_RULES: Mapping[str, str] = MappingProxyType(
    {
        "model": "sigmoid",
        "token": "none",
        "vector": "none",
        "keyword": "minmax",
        "pagerank": "percent",
        "tags": "cosine",
    }
)


# What a weight above zero is at least, however much smaller it was made.
_SMALLEST = 5e-324

# A mapping's keys are invariant to the type checker: with str here, a mapping from literal names would not fit.
Name = Any


class FusionSpec(Protocol):
    """How to fuse: what a profile of ``conf/fusion.toml`` or a caller's own fusion says."""

    @property
    def method(self) -> str:
        """``weighted`` or ``rrf``."""

    @property
    def weights(self) -> Mapping[Name, float]:
        """Weight by signal, at least 0; what is not named weighs 0."""

    @property
    def normalise(self) -> Mapping[Name, str]:
        """Name of a rule by signal; what is not named follows ``DEFAULT_RULES``."""

    @property
    def boosts(self) -> Mapping[Name, float]:
        """Weight of the fields content, title, keywords and questions within the token signal."""

    @property
    def rrf_k(self) -> int:
        """The constant of reciprocal rank fusion."""

    @property
    def token_rule(self) -> str:
        """``coverage`` or ``ragflow``."""


@dataclass(frozen=True)
class Blend:
    """Fused scores with what made them.

    ``scores`` has shape ``(chunks,)``; ``normalised`` holds each active signal, NaN where a chunk lacks it;
    ``missing`` names, for each chunk, the signals with a weight that it lacks, alone or with all others.
    """

    scores: Floats
    normalised: dict[str, Floats]
    missing: list[list[str]]


def signals_needed(fusion: FusionSpec) -> frozenset[str]:
    """Name the signals worth computing: those with a weight above zero."""
    return frozenset(name for name, weight in fusion.weights.items() if weight)


def fuse(signals: Mapping[str, ArrayLike | None], fusion: FusionSpec) -> Floats:
    """Fuse the signals into one score per chunk, shape ``(chunks,)``; see :func:`blend` for the rules.

    Raises:
        ValueError: as :func:`blend`.
    """
    return blend(signals, fusion).scores


def blend(signals: Mapping[str, ArrayLike | None], fusion: FusionSpec) -> Blend:
    """Fuse the signals, and keep what made the scores.

    Active are the signals with a weight above zero that at least one chunk has; the weight of another is dropped, and
    every chunk's ``missing`` names it. ``weighted`` adds up weight times normalised value, undivided; weights beyond
    1e200 are made smaller, all alike. Where a chunk lacks an active signal, its weight is shared out over that chunk's
    other signals in proportion to theirs. A signal whose rule is ``raw`` is an extra on top: it neither gives nor
    receives shares. ``rrf`` adds up reciprocal ranks (:func:`~rerankq_worker.fusion.ranks.reciprocal_rank_fusion`). A
    chunk without any signal scores 0.

    Raises:
        ValueError: on a signal, rule or method that does not exist, a weight that is negative or not finite, or
            signals of different lengths.
    """
    prepared = _prepare(signals, fusion)
    chunks = prepared.chunks
    if fusion.method == "rrf":
        shares = reciprocal_rank_fusion(prepared.rows, fusion.rrf_k, prepared.weights)
        scores = shares if prepared.rows else np.zeros(chunks)
    else:
        scores = prepared.weighted_sum(prepared.normalised)
    weighted = [name for name in DEFAULT_RULES if fusion.weights.get(name, 0.0) > 0]
    return Blend(scores, prepared.normalised, _missing(weighted, prepared.normalised, chunks))


def contributions(signals: Mapping[str, ArrayLike | None], fusion: FusionSpec) -> dict[str, Floats]:
    """Tell what each active signal added to the scores of :func:`blend`; NaN where a chunk lacks it.

    They are the scores that are left if all other signals were zero, so they add up to the scores (but for rounding),
    shared-out weights included.

    Raises:
        ValueError: as :func:`blend`.
    """
    prepared = _prepare(signals, fusion)
    parts = {}
    for name, row in prepared.normalised.items():
        if fusion.method == "rrf":
            part = reciprocal_rank_fusion({name: prepared.rows[name]}, fusion.rrf_k, prepared.weights)
        else:
            # Zero times a row keeps its gaps: by them weights are shared out.
            part = prepared.weighted_sum(
                {other: values if other == name else 0.0 * values for other, values in prepared.normalised.items()}
            )
        parts[name] = np.where(np.isnan(row), np.nan, part)
    return parts


@dataclass(frozen=True)
class _Prepared:
    """The active signals' raw rows and normalised ones, their rules, and the weights, scaled so that they add up."""

    rows: dict[str, Floats]
    normalised: dict[str, Floats]
    rules: dict[str, str]
    weights: dict[str, float]
    chunks: int

    def weighted_sum(self, normalised: Mapping[str, Floats]) -> Floats:
        shared = {name: row for name, row in normalised.items() if self.rules[name] != "raw"}
        extra = {name: row for name, row in normalised.items() if self.rules[name] == "raw"}
        return _shared_sum(shared, self.weights, self.chunks) + _plain_sum(extra, self.weights, self.chunks)


def _prepare(signals: Mapping[str, ArrayLike | None], fusion: FusionSpec) -> _Prepared:
    _check(signals, fusion)
    rows = {name: known(values) for name, values in signals.items() if values is not None}
    if len({row.size for row in rows.values()}) > 1:
        raise ValueError(f"signals differ in length: { {name: row.size for name, row in rows.items()} }")
    chunks = next((row.size for row in rows.values()), 0)
    scale = scale_of(list(fusion.weights.values()))
    weights = {name: max(weight * scale, _SMALLEST) for name, weight in fusion.weights.items() if weight}
    # In the fixed order of DEFAULT_RULES, so that sums do not depend on how a caller orders a mapping.
    active = [name for name in DEFAULT_RULES if _is_active(rows.get(name), fusion.weights.get(name, 0.0))]
    rules = {name: fusion.normalise.get(name, DEFAULT_RULES[name]) for name in active}
    normalised = {name: RULES[rule](rows[name]) for name, rule in rules.items()}
    return _Prepared({name: rows[name] for name in active}, normalised, rules, weights, chunks)


def _check(signals: Mapping[str, ArrayLike | None], fusion: FusionSpec) -> None:
    for name in (*signals, *fusion.weights, *fusion.normalise):
        if name not in DEFAULT_RULES:
            raise ValueError(f"unknown signal {name!r}; expected one of {', '.join(DEFAULT_RULES)}")
    for name, rule in fusion.normalise.items():
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r} to normalise {name}; expected one of {', '.join(RULES)}")
    if fusion.method not in {"weighted", "rrf"}:
        raise ValueError(f"unknown method {fusion.method!r}; expected weighted or rrf")
    if not all(math.isfinite(weight) and weight >= 0 for weight in fusion.weights.values()):
        raise ValueError(f"weights must be finite and not negative: {dict(fusion.weights)}")


def _is_active(row: Floats | None, weight: float) -> bool:
    return row is not None and weight > 0 and not np.isnan(row).all()


def _shared_sum(rows: Mapping[str, Floats], weights: Mapping[str, float], chunks: int) -> Floats:
    """Add up as if each chunk's weights came to the same total, whatever it lacks."""
    scores = _plain_sum(rows, weights, chunks)
    # Only where something is missing: elsewhere the sum stays the plain one, to the last bit.
    if not any(np.isnan(row).any() for row in rows.values()):
        return scores
    # By the largest first, and none below a tiny one: the weights' own sum may overflow, or vanish beside others.
    largest = max(weights[name] for name in rows)
    parts = {name: max(weights[name] / largest, 1e-300) for name in rows}
    total = math.fsum(parts.values())
    present = np.sum([np.where(np.isnan(row), 0.0, parts[name]) for name, row in rows.items()], axis=0)
    partly = np.any([np.isnan(row) for row in rows.values()], axis=0) & (present > 0)
    shared = _plain_sum({name: row[partly] for name, row in rows.items()}, parts, int(partly.sum()))
    scores[partly] = _bounded(largest, _bounded(total, shared / present[partly]))
    return scores


def _plain_sum(rows: Mapping[str, Floats], weights: Mapping[str, float], chunks: int) -> Floats:
    scores = np.zeros(chunks)
    for name, row in rows.items():
        scores += _bounded(weights[name], np.where(np.isnan(row), 0.0, row))
    return scores


def _bounded(weight: float, row: Floats) -> Floats:
    # A huge first-stage score times a huge weight must not become an infinity, which no JSON can carry; an eighth of
    # the largest float leaves room to add all six signals.
    limit = np.finfo(np.float64).max / 8
    with np.errstate(over="ignore"):
        return np.clip(weight * row, -limit, limit)


def _missing(weighted: Sequence[str], rows: Mapping[str, Floats], chunks: int) -> list[list[str]]:
    missing: list[list[str]] = [[] for _ in range(chunks)]
    for name in weighted:
        for position in np.flatnonzero(np.isnan(rows[name])) if name in rows else range(chunks):
            missing[position].append(name)
    return missing
