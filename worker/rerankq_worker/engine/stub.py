"""An engine without a model: a stated cost per token, scores from a hash. No torch."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from .errors import ModelUnusable
from .protocol import (
    QUERY_MAX_TOKENS,
    Logits,
    TokenisedPair,
    checked_length,
    room_for,
    score_in_batches,
)

#: Seconds per padded token: about what a small model takes on a large GPU.
SECONDS_PER_TOKEN = 1e-6

#: Stand-ins for the marks round the query and behind the chunk.
_OPEN, _BETWEEN, _CLOSE = 0, 1, 2
_SPECIAL_TOKENS = 3


class StubEngine:
    """Sleeps for ``seconds_per_token`` times the padded tokens of a batch and answers hashes as logits.

    Words between white space are tokens. The same query and chunk get the same logit in every process; scores say
    nothing about relevance.

    >>> engine = StubEngine(seconds_per_token=0)
    >>> engine.score([("a query", "a chunk"), ("a query", "another")]).round(3)
    array([-3.085,  0.258], dtype=float32)
    """

    dtype = "float32"
    device = "none"

    def __init__(
        self,
        *,
        name: str = "stub",
        seconds_per_token: float = SECONDS_PER_TOKEN,
        max_length: int = 512,
        max_batch_tokens: int = 4096,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self.max_length = max_length
        self.max_batch_tokens = max_batch_tokens
        self.fingerprint = blake2b(b"rerankq stub 1", digest_size=16).hexdigest()
        self._seconds_per_token = seconds_per_token
        self._sleep = sleep

    def tokenise(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order; words are tokens."""
        room = room_for(checked_length(max_length, self.max_length), _SPECIAL_TOKENS, query_max_tokens)
        asked, query_cut = _words(query, room.query)
        kept = room.for_chunk(len(asked))
        head = [_OPEN, *asked, _BETWEEN]
        pairs = []
        for chunk in chunks:
            read, chunk_cut = _words(chunk, kept)
            ids = np.array([*head, *read, _CLOSE], dtype=np.uint32).view(np.int32)
            pairs.append(TokenisedPair(ids, len(head), query_cut or chunk_cut))
        return pairs

    def forward(self, batch: Sequence[TokenisedPair]) -> Logits:
        """Take the stated time for the padded batch and answer one logit per pair, shape ``(len(batch),)``."""
        if batch:
            self._sleep(self._seconds_per_token * len(batch) * max(pair.length for pair in batch))
        return np.array([_logit(pair) for pair in batch], dtype=np.float32)

    def score(self, pairs: Sequence[tuple[str, str]]) -> Logits:
        """Score ``(query, chunk)`` pairs: same order, same length."""
        return score_in_batches(self, pairs)

    def warm_up(self) -> None:
        """Nothing to warm."""

    def release_memory(self) -> None:
        """Nothing is held."""


def parse_stub(model: str) -> float:
    """Read the seconds per token out of ``stub`` or ``stub:SECONDS``.

    >>> parse_stub("stub:2e-6")
    2e-06
    """
    _, _, seconds = model.partition(":")
    try:
        cost = float(seconds) if seconds else SECONDS_PER_TOKEN
    except ValueError:
        cost = math.nan
    if not 0 <= cost < math.inf:
        raise ModelUnusable(f"{model!r}: after 'stub:' comes the cost of a token in seconds, such as 'stub:2e-6'")
    return cost


def _words(text: str, limit: int) -> tuple[list[int], bool]:
    words = text.split(maxsplit=limit)
    return [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words[:limit]], len(words) > limit


def _logit(pair: TokenisedPair) -> float:
    digest = blake2b(pair.ids.tobytes(), digest_size=8, salt=pair.second_from.to_bytes(4, "little")).digest()
    chance = (int.from_bytes(digest, "little") + 0.5) / 2**64
    return math.log(chance / (1 - chance))
