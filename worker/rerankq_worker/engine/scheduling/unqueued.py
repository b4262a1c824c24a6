"""Score pairs in batches without a batcher, for an engine that one caller uses alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from ..protocol import Engine, Logits, TokenisedPair
from .batching import plan_all


def score_in_batches(engine: Engine, pairs: Sequence[tuple[str, str]]) -> Logits:
    """Tokenise, plan and run ``(query, chunk)`` pairs on an engine that nothing else uses; same order, same length."""
    tokenised: list[TokenisedPair] = []
    for query, run in groupby(pairs, key=lambda pair: pair[0]):
        tokenised += engine.tokenise(query, [chunk for _, chunk in run])
    logits = np.empty(len(tokenised), dtype=np.float32)
    for batch in plan_all([pair.length for pair in tokenised], engine.max_batch_tokens, padded=engine.padded):
        logits[batch] = engine.forward([tokenised[position] for position in batch])
    return logits
