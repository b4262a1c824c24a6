"""Is a ranking the one that the job would get alone? Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from rerankq import Ranking

TIE = 1e-5
"""Logits nearer than this are a tie: float32 adds in another order when a batch has another shape."""


def logits_of(ranking: Ranking) -> list[float]:
    """Give a ranking's raw logits in the order of the job's chunks; those of chunks that it lacks are NaN."""
    by_index = {chunk.index: chunk.model_logit for chunk in ranking.chunks}
    return [float("nan") if (logit := by_index.get(at)) is None else logit for at in range(max(by_index) + 1)]


def order_of(ranking: Ranking) -> list[int]:
    """Give the chunks' positions in the job, best first."""
    return [chunk.index for chunk in ranking.chunks]


def farthest(logits: Sequence[float], alone: Sequence[float]) -> float:
    """Give the greatest distance between the two; infinity where they do not stand for the same chunks.

    >>> farthest([1.0, 2.0], [1.0, 2.5]), farthest([1.0], [1.0, 2.0]), farthest([float("nan")], [1.0])
    (0.5, inf, inf)
    """
    if len(logits) != len(alone):
        return float("inf")
    distances = [abs(one - other) for one, other in zip(logits, alone, strict=True)]
    return max((distance if distance == distance else float("inf") for distance in distances), default=0.0)


def in_order(order: Sequence[int], alone: Sequence[float], *, tie: float = TIE) -> bool:
    """Whether an order ranks all chunks by the logits that they have alone, up to ties.

    >>> in_order([1, 0, 2], [2.0, 3.0, 1.0]), in_order([0, 1], [1.0, 1.000001]), in_order([0, 1], [1.0, 2.0])
    (True, True, False)
    >>> in_order([0, 0], [1.0, 1.0])
    False
    """
    if sorted(order) != list(range(len(alone))):
        return False
    best_after = float("-inf")
    for at in reversed(order):
        if alone[at] < best_after - tie:
            return False
        best_after = max(best_after, alone[at])
    return True


def differs(ranking: Ranking, alone: Sequence[float], *, tie: float = TIE) -> str | None:
    """Say how a ranking by the model alone differs from the one that the job gets alone; None where it does not."""
    distance = farthest(logits_of(ranking), alone)
    if distance > tie:
        return f"logits differ by {distance:.2e}"
    return None if in_order(order_of(ranking), alone, tie=tie) else "ranked in another order"
