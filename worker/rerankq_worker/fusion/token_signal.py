"""The token signal of a job, from its texts to one number per chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .analyser import Analyser, Ids, token_ids
from .blending import FusionSpec
from .coverage import Finds, covered, idf, merged, playing
from .ragflow import SMOOTHING, chunk_keys, query_keys

Floats = NDArray[np.float64]


class TextFields(Protocol):
    """The texts of a chunk: what the token signal looks into."""

    @property
    def text(self) -> str:
        """The content."""

    @property
    def title(self) -> str:
        """The title, empty if there is none."""

    @property
    def keywords(self) -> Sequence[str]:
        """Keywords, each a word or a few."""

    @property
    def questions(self) -> Sequence[str]:
        """Questions that the chunk answers."""

    @property
    def tokens(self) -> Sequence[str] | None:
        """The caller's own tokens of the content, used as given; None = analyse the text."""


def token_signal(
    query: str,
    query_tokens: Sequence[tuple[str, float]] | None,
    chunks: Sequence[TextFields],
    fusion: FusionSpec,
    analyser: Analyser,
) -> Floats:
    """Measure how much of the query each chunk's words cover: shape ``(chunks,)``, in [0, 1].

    ``query_tokens`` (token, weight) are used as given; without them the query is analysed, and each token weighs its
    idf over the job's chunks. ``fusion.token_rule`` chooses between our coverage
    (:func:`~rerankq_worker.fusion.coverage.token_similarity`) and RAGFlow's
    (:func:`~rerankq_worker.fusion.ragflow.token_similarity` over content, title and keywords once each). A query
    without tokens has no signal (NaN) under the first, and covers every chunk (1.0) under the second.

    Raises:
        ValueError: if the rule does not exist, or on weights or boosts that :func:`token_similarity` cannot take.
    """
    rule = fusion.token_rule
    if rule == "ragflow":
        return _by_ragflow(query, query_tokens, chunks, analyser)
    if rule != "coverage":
        raise ValueError(f"no token rule {rule!r}; there are coverage, ragflow")
    fields = {name: [_ids(chunk, name, analyser) for chunk in chunks] for name in playing(fusion.boosts)}
    if query_tokens is None:
        tokens, weights = list(dict.fromkeys(analyser.analyse(query))), None
    else:
        tokens, weights = merged(query_tokens)
    finds = {name: _find(tokens, ids) for name, ids in fields.items()}
    if weights is None:
        weights = idf(finds.values(), len(tokens), len(chunks))
    occurring = {name for name, ids in fields.items() if any(found.size for found in ids)}
    return covered(weights, finds, occurring, fusion.boosts, len(chunks))


def _by_ragflow(
    query: str, query_tokens: Sequence[tuple[str, float]] | None, chunks: Sequence[TextFields], analyser: Analyser
) -> Floats:
    ids = [_ragflow_ids(chunk, analyser) for chunk in chunks]
    if query_tokens is None:
        tokens = analyser.analyse(query)
        distinct = list(dict.fromkeys(tokens))
        weights = dict(zip(distinct, idf([_find(distinct, ids)], len(distinct), len(chunks)).tolist(), strict=True))
        query_tokens = [(token, weights[token]) for token in tokens]
    # The same sum as ragflow.token_similarity, over ids.
    wanted = query_keys(query_tokens)
    values = np.fromiter(wanted.values(), dtype=np.float64, count=len(wanted))
    finds = _find(list(wanted), ids)
    earned = np.bincount(finds.chunks, values[finds.tokens], minlength=len(chunks))
    similarity: Floats = (SMOOTHING + earned) / (SMOOTHING + values.sum())
    return similarity


def _ids(chunk: TextFields, field: str, analyser: Analyser) -> Ids:
    if field == "content":
        return analyser.token_ids(chunk.text) if chunk.tokens is None else token_ids(chunk.tokens)
    if field == "title":
        return analyser.token_ids(chunk.title)
    # A line each: no word of one joins a word of the next.
    return analyser.token_ids("\n".join(chunk.keywords if field == "keywords" else chunk.questions))


def _ragflow_ids(chunk: TextFields, analyser: Analyser) -> Ids:
    if chunk.tokens is None:
        return analyser.ragflow_ids(chunk.text, chunk.title, chunk.keywords)
    # Who brings tokens has made them as RAGFlow does, where a keyword is one token, blanks and all.
    return token_ids(chunk_keys([*chunk.tokens, *analyser.analyse(chunk.title), *chunk.keywords]))


def _find(tokens: Sequence[str], chunks: Sequence[Ids]) -> Finds:
    """Look for distinct tokens in all chunks at once, by their ids."""
    ids = np.fromiter(map(hash, tokens), dtype=np.int64, count=len(tokens))
    order = np.argsort(ids, kind="stable")
    everything = np.concatenate([*chunks, ids[:0]])
    places = np.searchsorted(ids[order], everything)
    places[places == ids.size] = 0
    found = np.flatnonzero(ids[order][places] == everything) if ids.size else np.zeros(0, dtype=np.intp)
    owners = np.repeat(np.arange(len(chunks)), [held.size for held in chunks])
    return Finds(owners[found], order[places[found]])
