"""Arrays become a ranking: order, cut, and the fields of each chunk. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerankq.contract import Ranking, RerankJob

from .fusion import Blend, rank

Fields = dict[str, Any]


def ranked_chunks(
    job: RerankJob,
    blended: Blend,
    *,
    logits: NDArray[np.float64],
    truncated: NDArray[np.bool_],
    cached: NDArray[np.bool_],
    parts: Mapping[str, NDArray[np.float64]] = MappingProxyType({}),
    characters_read: Mapping[int, int] = MappingProxyType({}),
) -> list[Fields]:
    """Order a job's chunks by fused score, then logit, and cut them; gives the fields of each that stays, best first.

    The arrays have shape ``(chunks,)``; a logit is NaN where the model scored nothing. ``characters_read`` is by
    position.
    """
    names = job.chunk_names()
    order = rank(blended.scores, job.min_score, job.top_k, logits=logits).tolist()
    # Lists of Python's own numbers: to pick single ones out of arrays costs more than the fusion.
    scores, cut, known = blended.scores.tolist(), truncated.tolist(), cached.tolist()
    raw = _or_none(logits)
    signals = {name: _or_none(row) for name, row in blended.normalised.items()}
    added = {name: _or_none(row) for name, row in parts.items()}
    return [
        _chunk(
            job,
            at,
            position,
            id=names[at],
            score=scores[at],
            scores=_present(signals, at),
            # Left out unless asked for: a producer of an older version refuses fields that it does not know.
            **({"parts": _present(added, at)} if added else {}),
            **({"span": (0, characters_read[at])} if at in characters_read else {}),
            missing=blended.missing[at],
            model_logit=raw[at],
            truncated=cut[at],
            cached=known[at],
        )
        for position, at in enumerate(order, 1)
    ]


def unscored_chunks(job: RerankJob) -> list[Fields]:
    """Keep a job's chunks in its own order, cut to ``top_k`` and without scores."""
    names = job.chunk_names()
    return [
        _chunk(job, at, at + 1, id=names[at], score=0.0, missing=["model"])
        for at in range(len(job.chunks))[: job.top_k]
    ]


def ranking_of(job: RerankJob, chunks: list[Fields], **fields: Any) -> Ranking:
    """Make a ranking of its chunks' fields and its own; ``dropped`` are the chunks of the job that are not among them.

    One validation of them all costs half of making each chunk by itself.
    """
    return Ranking.model_validate({"chunks": chunks, "dropped": len(job.chunks) - len(chunks), **fields})


def _chunk(job: RerankJob, at: int, position: int, **fields: Any) -> Fields:
    chunk = job.chunks[at]
    fields |= {"index": at, "rank": position}
    if job.return_text:
        fields["text"] = chunk.text
    if chunk.metadata:
        fields["metadata"] = chunk.metadata
    return fields


def _present(rows: Mapping[str, Sequence[float | None]], at: int) -> dict[str, float]:
    return {name: value for name, row in rows.items() if (value := row[at]) is not None}


def _or_none(row: NDArray[np.float64]) -> list[float | None]:
    values = row.tolist()
    return values if np.isfinite(row).all() else [value if math.isfinite(value) else None for value in values]
