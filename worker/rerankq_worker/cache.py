"""The score cache: raw logits by model, query and chunk. Broken or full, it slows jobs down and never fails them."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import redis
from numpy.typing import NDArray
from redis.exceptions import RedisError, ResponseError

from rerankq.connections.opening import cache as connect

__all__ = ["TRUNCATED", "CachedScores", "ScoreCache", "connect", "score_fingerprint"]

logger = logging.getLogger("rerankq")

Logits = NDArray[np.float32]
Flags = NDArray[np.bool_]

# Seconds to leave the cache alone after it did not answer: a broken cache must not cost every job a timeout.
CIRCUIT_OPEN_S = 5.0
# A pair that was cut has a second field beside its logit, whose four bytes have no room for it: a truncation is never
# silent, not even from the cache. In the same hash, so that no eviction or expiry takes one without the other.
TRUNCATED = b"cut"
# The server does not serve, or a client that was told to decode replies could not: scores are no text.
_BROKEN = (RedisError, OSError, UnicodeError)


class CachedScores(NamedTuple):
    """What the cache knows of a job's chunks.

    ``logits`` (n,) is valid where ``mask`` (n,) is true; ``truncated`` (n,) says which of those pairs were cut.
    """

    logits: Logits
    mask: Flags
    truncated: Flags

    @classmethod
    def nothing(cls, chunks: int) -> CachedScores:
        """Know nothing of so many chunks."""
        flags = np.zeros(chunks, np.bool_)
        return cls(np.full(chunks, np.nan, np.float32), flags, flags.copy())


def score_fingerprint(engine: str, *, max_length: int, query_max_tokens: int, long_chunks: str, rule: str) -> str:
    """Name everything beside the texts that changes a logit.

    *engine* stands for weights, precision and template, *rule* for how pairs are cut that do not fit.
    """
    parts = f"{engine}|{max_length}|{query_max_tokens}|{long_chunks}|{rule}"
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


class ScoreCache:
    """Read and write scores, one round trip per job each way. Safe to share between threads."""

    def __init__(self, client: redis.Redis, *, ttl_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = client
        self._ttl_s = ttl_s
        self._clock = clock
        self._rests_until = -math.inf
        self._quiet_until = -math.inf

    def read(self, fingerprint: str, query: bytes, chunks: Sequence[bytes]) -> CachedScores:
        """Read the logits of a query's chunks, given by their hashes."""
        nothing = CachedScores.nothing(len(chunks))
        if not chunks or self._resting():
            return nothing
        fields = [*chunks, *(chunk + TRUNCATED for chunk in chunks)]
        try:
            values = cast("list[Any]", self._redis.hmget(_key(fingerprint, query), fields))
        except _BROKEN as error:
            self._refused(error)
            return nothing
        values, cut = values[: len(chunks)], values[len(chunks) :]
        # Anything that is not four bytes was not written by us, or was made into text on its way.
        mask = np.fromiter((isinstance(value, bytes) and len(value) == 4 for value in values), np.bool_, len(chunks))
        nothing.logits[mask] = np.frombuffer(b"".join(itertools.compress(values, mask)), "<f4")
        mask &= np.isfinite(nothing.logits)
        return CachedScores(
            nothing.logits, mask, np.fromiter((flag is not None for flag in cut), np.bool_, len(cut)) & mask
        )

    def write(self, fingerprint: str, query: bytes, chunks: Sequence[bytes], logits: Logits, truncated: Flags) -> None:
        """Remember logits, and which pairs were cut; logits that are not finite are not worth remembering."""
        worth = np.isfinite(logits)
        if not worth.any() or self._resting():
            return
        fields = {
            chunk: logit.tobytes() for chunk, logit, ok in zip(chunks, logits.astype("<f4"), worth, strict=True) if ok
        }
        fields |= {chunk + TRUNCATED: b"" for chunk in itertools.compress(chunks, truncated & worth)}
        # A mark of an earlier writer says nothing about this score.
        whole = [chunk + TRUNCATED for chunk in itertools.compress(chunks, worth & ~np.asarray(truncated, np.bool_))]
        key = _key(fingerprint, query)
        try:
            pipe = self._redis.pipeline(transaction=False)
            pipe.hset(key, mapping=fields)  # type: ignore[arg-type]  # bytes are welcome as field names
            if whole:
                pipe.hdel(key, *whole)
            pipe.expire(key, self._ttl_s)
            pipe.execute()
        except _BROKEN as error:
            self._refused(error)

    def _resting(self) -> bool:
        return self._clock() < self._rests_until

    def _refused(self, error: Exception) -> None:
        now = self._clock()
        if isinstance(error, ResponseError):
            # The server is there and answers: a full cache still gives what it has, and a spoilt key is but one key.
            if now >= self._quiet_until:
                self._quiet_until = now + CIRCUIT_OPEN_S
                logger.warning("the score cache refuses: %s", error)
            return
        self._rests_until = now + CIRCUIT_OPEN_S
        logger.warning("the score cache does not serve, computing without it for %.0f s: %s", CIRCUIT_OPEN_S, error)


def _key(fingerprint: str, query: bytes) -> str:
    return f"rerankq:scores:{fingerprint}:{query.hex()}"
