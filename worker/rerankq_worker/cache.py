"""The score cache: raw logits by model, query and chunk. Unreachable or full, it slows jobs down and fails none."""

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

# Circuit breaker: so many seconds without a request after one failed, or every job would pay a timeout.
CIRCUIT_OPEN_S = 5.0
# A truncated pair has a second field beside its logit, whose four bytes cannot hold the flag: a truncation is never
# silent, not even from the cache. In the same hash, so that no eviction or expiry takes one without the other.
TRUNCATED = b"cut"
# The server is unreachable or answers with an error, or a client that decodes responses met a logit that is not UTF-8.
_FAILURES = (RedisError, OSError, UnicodeError)


class CachedScores(NamedTuple):
    """Cached scores of a job's chunks, as arrays of shape ``(chunks,)``.

    ``logits`` is valid where ``mask`` is true; ``truncated`` says which of those pairs were truncated.
    """

    logits: Logits
    mask: Flags
    truncated: Flags

    @classmethod
    def nothing(cls, chunks: int) -> CachedScores:
        """Answer for so many chunks that none is cached."""
        flags = np.zeros(chunks, np.bool_)
        return cls(np.full(chunks, np.nan, np.float32), flags, flags.copy())


def score_fingerprint(
    engine: str, *, max_length: int, query_max_tokens: int, long_chunks: str, rule: str, instruction: str = ""
) -> str:
    """Name everything beside the texts that changes a logit.

    *engine* is the fingerprint of weights, precision and template, *rule* names the rule of truncation.
    """
    # Without one as before there were any.
    told = f"|{instruction}" if instruction else ""
    parts = f"{engine}|{max_length}|{query_max_tokens}|{long_chunks}|{rule}{told}"
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


class ScoreCache:
    """Read and write scores, one round trip per job each way. Safe to share between threads."""

    def __init__(self, client: redis.Redis, *, ttl_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = client
        self._ttl_s = ttl_s
        self._clock = clock
        self._open_until = -math.inf
        self._next_warning = -math.inf

    def read(self, fingerprint: str, query: bytes, chunks: Sequence[bytes]) -> CachedScores:
        """Read the logits of a query's chunks, given by their hashes."""
        nothing = CachedScores.nothing(len(chunks))
        if not chunks or self._circuit_open():
            return nothing
        fields = [*chunks, *(chunk + TRUNCATED for chunk in chunks)]
        try:
            values = cast("list[Any]", self._redis.hmget(_key(fingerprint, query), fields))
        except _FAILURES as error:
            self._note_failure(error)
            return nothing
        values, flags = values[: len(chunks)], values[len(chunks) :]
        # Anything but four bytes was not written by us, or was decoded to text by the client.
        mask = np.fromiter((isinstance(value, bytes) and len(value) == 4 for value in values), np.bool_, len(chunks))
        nothing.logits[mask] = np.frombuffer(b"".join(itertools.compress(values, mask)), "<f4")
        mask &= np.isfinite(nothing.logits)
        truncated = np.fromiter((flag is not None for flag in flags), np.bool_, len(flags))
        return CachedScores(nothing.logits, mask, truncated & mask)

    def write(self, fingerprint: str, query: bytes, chunks: Sequence[bytes], logits: Logits, truncated: Flags) -> None:
        """Store logits, and which pairs were truncated; logits that are not finite are left out."""
        finite = np.isfinite(logits)
        if not finite.any() or self._circuit_open():
            return
        fields = {
            chunk: logit.tobytes() for chunk, logit, ok in zip(chunks, logits.astype("<f4"), finite, strict=True) if ok
        }
        fields |= {chunk + TRUNCATED: b"" for chunk in itertools.compress(chunks, truncated & finite)}
        # A flag that an earlier writer left does not belong to this score.
        whole = [chunk + TRUNCATED for chunk in itertools.compress(chunks, finite & ~np.asarray(truncated, np.bool_))]
        key = _key(fingerprint, query)
        try:
            pipe = self._redis.pipeline(transaction=False)
            pipe.hset(key, mapping=fields)  # type: ignore[arg-type]  # bytes are welcome as field names
            if whole:
                pipe.hdel(key, *whole)
            pipe.expire(key, self._ttl_s)
            pipe.execute()
        except _FAILURES as error:
            self._note_failure(error)

    def _circuit_open(self) -> bool:
        return self._clock() < self._open_until

    def _note_failure(self, error: Exception) -> None:
        now = self._clock()
        if isinstance(error, ResponseError):
            # The server answers, so the circuit stays closed: a full cache still serves reads, and a key of another
            # type is one key.
            if now >= self._next_warning:
                self._next_warning = now + CIRCUIT_OPEN_S
                logger.warning("the score cache answered with an error: %s", error)
            return
        self._open_until = now + CIRCUIT_OPEN_S
        logger.warning("the score cache is unreachable, computing without it for %.0f s: %s", CIRCUIT_OPEN_S, error)


def _key(fingerprint: str, query: bytes) -> str:
    return f"rerankq:scores:{fingerprint}:{query.hex()}"
