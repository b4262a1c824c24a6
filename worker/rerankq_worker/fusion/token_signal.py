"""The token signal of a job, from its texts to one number per chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .analyser import Analyser, Hashes, token_hashes
from .bigrams import SMOOTHING, chunk_keys, query_keys
from .blending import FusionSpec
from .coverage import Matches, active_fields, covered, idf, sum_repeats
from .weights import scale_of

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
        return _by_bigrams(query, query_tokens, chunks, analyser)
    if rule != "coverage":
        raise ValueError(f"unknown token rule {rule!r}; expected coverage or ragflow")
    fields = {name: _hashes(chunks, name, analyser) for name in active_fields(fusion.boosts)}
    if query_tokens is None:
        tokens, weights = list(dict.fromkeys(analyser.analyse(query))), None
    else:
        tokens, weights = sum_repeats(query_tokens)
    matches = {name: _find(tokens, hashes) for name, hashes in fields.items()}
    if weights is None:
        weights = idf(matches.values(), len(tokens), len(chunks))
    occurring = {name for name, hashes in fields.items() if any(found.size for found in hashes)}
    return covered(weights, matches, occurring, fusion.boosts, len(chunks))


def _by_bigrams(
    query: str, query_tokens: Sequence[tuple[str, float]] | None, chunks: Sequence[TextFields], analyser: Analyser
) -> Floats:
    hashes = _bigram_hashes(chunks, analyser)
    if query_tokens is None:
        tokens = analyser.analyse(query)
        distinct = list(dict.fromkeys(tokens))
        weights = dict(zip(distinct, idf([_find(distinct, hashes)], len(distinct), len(chunks)).tolist(), strict=True))
        query_tokens = [(token, weights[token]) for token in tokens]
    # The same sum as ragflow.token_similarity, over hashes. Huge weights are scaled down alike, beside which the
    # smoothing is nothing either way.
    scale = scale_of([weight for _, weight in query_tokens])
    wanted = query_keys([(token, weight * scale) for token, weight in query_tokens])
    values = np.fromiter(wanted.values(), dtype=np.float64, count=len(wanted))
    matches = _find(list(wanted), hashes)
    earned = np.bincount(matches.chunks, values[matches.tokens], minlength=len(chunks))
    similarity: Floats = (SMOOTHING + earned) / (SMOOTHING + values.sum())
    return similarity


def _hashes(chunks: Sequence[TextFields], field: str, analyser: Analyser) -> list[Hashes]:
    hashes = analyser.token_hashes([_TEXTS[field](chunk) for chunk in chunks])
    if field != "content":
        return hashes
    return [
        held if chunk.tokens is None else token_hashes(chunk.tokens) for chunk, held in zip(chunks, hashes, strict=True)
    ]


# A line each keyword or question: no word of one joins a word of the next. What comes with tokens is not analysed.
_TEXTS: Mapping[str, Callable[[TextFields], str]] = MappingProxyType(
    {
        "content": lambda chunk: chunk.text if chunk.tokens is None else "",
        "title": lambda chunk: chunk.title,
        "keywords": lambda chunk: "\n".join(chunk.keywords),
        "questions": lambda chunk: "\n".join(chunk.questions),
    }
)


def _bigram_hashes(chunks: Sequence[TextFields], analyser: Analyser) -> list[Hashes]:
    hashes = analyser.bigram_hashes(
        [() if chunk.tokens is not None else (chunk.text, chunk.title, *chunk.keywords) for chunk in chunks]
    )
    for at, chunk in enumerate(chunks):
        if chunk.tokens is not None:
            # Who brings tokens has made them as RAGFlow does, where a keyword is one token, blanks and all.
            hashes[at] = token_hashes(chunk_keys([*chunk.tokens, *analyser.analyse(chunk.title), *chunk.keywords]))
    return hashes


def _find(tokens: Sequence[str], chunks: Sequence[Hashes]) -> Matches:
    """Look for distinct tokens in all chunks at once, by their hashes; matches in order of chunks, then of tokens.

    A chunk's hashes come in the order of a set, which is another in each process and in each chunk: sums over matches
    would differ in the last bit, and equal chunks be no longer equal.
    """
    wanted = np.fromiter(map(hash, tokens), dtype=np.int64, count=len(tokens))
    everything = np.concatenate([*chunks, wanted[:0]])
    near = _sieved(everything, wanted)
    order = np.argsort(wanted, kind="stable")
    slots = np.searchsorted(wanted[order], everything[near])
    slots[slots == wanted.size] = 0
    equal = wanted[order][slots] == everything[near] if wanted.size else np.zeros(0, dtype=np.bool_)
    ends = np.cumsum([held.size for held in chunks], dtype=np.intp)
    found, held_by = order[slots[equal]], np.searchsorted(ends, near[equal], side="right")
    settled = np.lexsort((found, held_by))
    return Matches(held_by[settled], found[settled])


def _sieved(everything: Hashes, wanted: Hashes) -> NDArray[np.intp]:
    """Tell where a hash may be one that is wanted, by its last bits: most of a chunk's words are in no query."""
    size = 1 << (16 * wanted.size + 1024).bit_length()
    seen = np.zeros(size, dtype=np.bool_)
    seen[wanted & (size - 1)] = True
    return np.flatnonzero(seen[everything & (size - 1)])
