"""RAGFlow's way to fuse, number for number, so that a deployment that moves over keeps its scores.

Six plain functions over lists. Formulas as RAGFlow computes them at commit b1b8cd62 (``rag/nlp/query.py``,
``rag/nlp/search.py``, ``rag/llm/rerank_model.py``), surprises included:

- the token similarity is a coverage of the query: a chunk's repeats and length do not count, so repeating the title
  two, the keywords five and the questions six times adds one wrap-around bigram for each field and nothing else;
- bigrams are joined without a separator, so "data" + "base" is the token "database";
- an empty query covers every chunk wholly (1.0);
- one NaN among the model's scores makes every score NaN;
- pagerank is added raw, tags as ten times their cosine.

Our own fusion (:mod:`rerankq_worker.fusion.blending`) shares none of these, and imports nothing from here.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bigrams import SMOOTHING, Tokens, chunk_keys, query_keys
from .normalise import FLAT_SPAN

Floats = NDArray[np.float64]
Fields = Mapping[str, Any]

PAGERANK = "pagerank_fea"
TAGS = "tag_feas"
TAG_SCALE = 10.0


def token_similarity(query_tokens: Tokens, chunks_tokens: Sequence[Sequence[str]]) -> Floats:
    """Measure the share of the query's weighted unigrams and bigrams that each chunk holds.

    Takes (token, weight) in the query's order, repeats included, and each chunk's tokens in order; gives shape
    ``(chunks,)`` in (0, 1].

    >>> token_similarity([("batch", 1.0), ("size", 1.0)], [["batch", "size"], ["size"], []]).round(3)
    array([1.   , 0.286, 0.   ])
    """
    wanted = query_keys(query_tokens)
    total = SMOOTHING + sum(wanted.values())
    matches = (chunk_keys(tokens) & wanted.keys() for tokens in chunks_tokens)
    return _floats((SMOOTHING + sum(wanted[key] for key in wanted if key in held)) / total for held in matches)


def hybrid_similarity(  # noqa: PLR0917 - the order in which RAGFlow takes them
    query_vector: Sequence[float],
    chunk_vectors: Sequence[Sequence[float] | str | None],
    query_tokens: Tokens,
    chunks_tokens: Sequence[Sequence[str]],
    tkweight: float,
    vtweight: float,
) -> tuple[Floats, Floats, Floats]:
    """Fused, token and vector similarities, each of shape ``(chunks,)``.

    A missing vector counts as zeros, a zero vector has cosine 0. Where the cosines add up to exactly 0 (no vectors, or
    some that cancel) the fused score is the token similarity *unweighted*.

    Raises:
        ValueError: on a vector of another dimension, or with a part that is not a finite number.

    >>> fused, token, vector = hybrid_similarity([1.0, 0.0], [[2.0, 0.0]], [("tide", 1.0)], [["moon"]], 0.3, 0.7)
    >>> fused.round(3), vector
    (array([0.7]), array([1.]))
    """
    token = token_similarity(query_tokens, chunks_tokens)
    vector = _cosines(query_vector, chunk_vectors)
    fused = token.copy() if vector.sum() == 0 else vtweight * vector + tkweight * token
    return fused, token, vector


def normalise_model_scores(raw: ArrayLike) -> Floats:
    """Keep scores within [0, 1], stretch others from their minimum to their maximum, clip almost equal ones.

    "Almost equal" is a span under 1e-3. Infinities and NaN go through the same arithmetic: with NaN or -inf every
    score is NaN; with +inf the finite ones are 0 and the infinite one is NaN.

    >>> normalise_model_scores([10.0, -3.0, 0.0]).round(3), normalise_model_scores([0.9, 0.1])
    (array([1.   , 0.   , 0.231]), array([0.9, 0.1]))
    """
    scores = np.array(raw, dtype=np.float64)
    if not scores.size:
        return scores
    low, high = scores.min(), scores.max()
    if low >= 0.0 and high <= 1.0:
        return scores
    with np.errstate(invalid="ignore", over="ignore"):
        span = high - low
        return np.clip(scores, 0.0, 1.0) if span < FLAT_SPAN else (scores - low) / span


def rank_feature_scores(query_tags: Mapping[str, float] | None, chunks: Sequence[Fields]) -> Floats:
    """Ten times the cosine of the tags, plus the pagerank as it is; shape ``(chunks,)``.

    ``pagerank_fea`` may be a number, a numeric string, absent (0) or None (NaN); ``tag_feas`` a mapping, or one written
    as JSON or as a Python literal. A chunk's tag called ``pagerank_fea`` counts in the dot product though the query's
    norm leaves it out, so its score can exceed ten.

    Raises:
        ValueError: if a pagerank is a string that is no number.

    >>> rank_feature_scores({"tide": 3}, [{"tag_feas": '{"tide": 1}'}, {"pagerank_fea": "2"}, {}])
    array([10.,  2.,  0.])
    """
    pageranks = np.array([chunk.get(PAGERANK, 0) for chunk in chunks], dtype=np.float64)
    tags = dict(query_tags or {})
    norm = math.sqrt(sum(weight * weight for tag, weight in tags.items() if tag != PAGERANK))
    if not norm:
        return pageranks
    return TAG_SCALE * _floats(_tag_cosine(tags, norm, _tags_of(chunk.get(TAGS))) for chunk in chunks) + pageranks


def rerank_by_model(  # noqa: PLR0917 - the order in which RAGFlow takes them
    query_tokens: Tokens,
    chunks: Sequence[Fields],
    model_scores: ArrayLike,
    tkweight: float,
    vtweight: float,
    query_tags: Mapping[str, float] | None = None,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Fused, token, normalised model and rank feature scores, where a model scored; each of shape ``(chunks,)``.

    Content, title and keywords count once each and the questions not at all.

    Raises:
        KeyError: if a chunk has no ``content_tokens``.
        ValueError: on a pagerank that is no number, or scores of another length than the chunks.
    """
    token = token_similarity(query_tokens, [_flat_for_model(chunk) for chunk in chunks])
    model = normalise_model_scores(model_scores)
    if model.shape != token.shape:
        raise ValueError(f"{model.size} model scores for {token.size} chunks")
    feature = rank_feature_scores(query_tags, chunks)
    return tkweight * token + vtweight * model + feature, token, model, feature


def rerank(  # noqa: PLR0917 - the order in which RAGFlow takes them
    query_tokens: Tokens,
    chunks: Sequence[Fields],
    query_vector: Sequence[float],
    tkweight: float,
    vtweight: float,
    query_tags: Mapping[str, float] | None = None,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Fused, token, vector and rank feature scores, where no model is set; each of shape ``(chunks,)``.

    A chunk's ``vector`` may be absent or None (zeros) or a string of numbers between tabs.

    Raises:
        KeyError: if a chunk has no ``content_tokens``.
        ValueError: on a pagerank or a vector that :func:`hybrid_similarity` cannot take.
    """
    vectors = [chunk.get("vector") for chunk in chunks]
    flat = [_flat_without_model(chunk) for chunk in chunks]
    fused, token, vector = hybrid_similarity(query_vector, vectors, query_tokens, flat, tkweight, vtweight)
    feature = rank_feature_scores(query_tags, chunks)
    return fused + feature, token, vector, feature


def _floats(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)


def _flat_for_model(chunk: Fields) -> list[str]:
    return [*_words(chunk["content_tokens"]), *_words(chunk.get("title_tokens")), *_entries(chunk.get("important_kwd"))]


def _flat_without_model(chunk: Fields) -> list[str]:
    return [
        *dict.fromkeys(_words(chunk["content_tokens"])),
        *_words(chunk.get("title_tokens")) * 2,
        *_entries(chunk.get("important_kwd")) * 5,
        *_words(chunk.get("question_tokens")) * 6,
    ]


def _words(tokens: str | Sequence[str] | None) -> list[str]:
    """Tokens from either form that RAGFlow stores: a list, or one string with blanks between."""
    return tokens.split() if isinstance(tokens, str) else [] if tokens is None else list(tokens)


def _entries(keywords: str | Sequence[str] | None) -> list[str]:
    """Each keyword is one token, blanks and all; a bare string is one keyword."""
    return [keywords] if isinstance(keywords, str) else [] if keywords is None else list(keywords)


def _cosines(query: Sequence[float], vectors: Sequence[Sequence[float] | str | None]) -> Floats:
    if len(vectors) == 0:
        return np.zeros(0)
    rows = np.array([_vector(vector, len(query)) for vector in vectors], dtype=np.float64)
    wanted = np.array(query, dtype=np.float64)
    if rows.shape != (len(vectors), wanted.size) or not (np.isfinite(rows).all() and np.isfinite(wanted).all()):
        raise ValueError(f"vectors must have {wanted.size} finite parts, as the query's has")
    cosines: Floats = _unit(rows) @ _unit(wanted[None, :])[0]
    return cosines


def _vector(vector: Sequence[float] | str | None, size: int) -> Sequence[float]:
    if vector is None:
        return [0.0] * size
    return [_part(part) for part in vector.split("\t")] if isinstance(vector, str) else vector


def _part(text: str) -> float:
    # What cannot be read becomes infinite, which the check for finite parts then refuses.
    try:
        return float(text)
    except ValueError:
        return -math.inf


def _unit(rows: Floats) -> Floats:
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    norms[norms == 0] = 1.0
    unit: Floats = rows / norms[:, None]
    return unit


def _tag_cosine(query: Mapping[str, float], query_norm: float, tags: Mapping[str, float]) -> float:
    norm = math.sqrt(sum(weight * weight for weight in tags.values()))
    return sum(query[tag] * weight for tag, weight in tags.items() if tag in query) / norm / query_norm if norm else 0.0


def _tags_of(written: object) -> dict[str, float]:
    """Keep the tags with finite numbers, whatever the form; blanks around a name are cut, nameless ones dropped."""
    parsed = _parsed(written) if isinstance(written, str) else written
    if not isinstance(parsed, Mapping):
        return {}
    named = ((name.strip(), weight) for name, weight in parsed.items() if isinstance(name, str))
    return {name: float(weight) for name, weight in named if name and _is_finite_number(weight)}


def _parsed(text: str) -> object:
    for read in (json.loads, ast.literal_eval):
        # Deep nesting raises RecursionError or MemoryError from either reader: junk, like anything else unreadable.
        try:
            parsed: object = read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if parsed is not None:
            return parsed
    return None


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False
