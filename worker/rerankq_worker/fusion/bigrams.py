"""Unigrams and bigrams: what a query is looked for by where neighbours count, and how much of it a chunk holds.

The arithmetic under RAGFlow's rule (:mod:`rerankq_worker.fusion.ragflow`) and under ``token_rule = "ragflow"``, whose
constants these are.
"""

from __future__ import annotations

from collections.abc import Sequence

Tokens = Sequence[tuple[str, float]]

UNIGRAM_SHARE, BIGRAM_SHARE = 0.4, 0.6
SMOOTHING = 1e-9


def query_keys(query_tokens: Tokens) -> dict[str, float]:
    """List what to look for: unigrams at 0.4 of their weight, bigrams at 0.6 of the heavier token's.

    >>> query_keys([("data", 1.0), ("base", 0.5)])
    {'data': 0.4, 'database': 0.6, 'base': 0.2}
    """
    keys: dict[str, float] = {}
    for position, (token, weight) in enumerate(query_tokens):
        keys[token] = keys.get(token, 0.0) + UNIGRAM_SHARE * weight
        if position + 1 < len(query_tokens):
            after, weight_after = query_tokens[position + 1]
            pair = token + after
            keys[pair] = keys.get(pair, 0.0) + BIGRAM_SHARE * max(weight, weight_after)
    return keys


def chunk_keys(tokens: Sequence[str]) -> set[str]:
    """Collect a chunk's tokens and the joins of each two neighbours.

    >>> sorted(chunk_keys(["data", "base", "size"]))
    ['base', 'basesize', 'data', 'database', 'size']
    """
    keys = set(tokens)
    keys.update(map(str.__add__, tokens, tokens[1:]))
    return keys
