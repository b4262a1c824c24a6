"""The score cache: raw logits by model, query and chunk. Broken or full, it slows jobs down and never fails them."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import redis
from numpy.typing import NDArray
from redis.exceptions import RedisError

logger = logging.getLogger("rerankq")

Logits = NDArray[np.float32]
Flags = NDArray[np.bool_]

# Seconds to wait for the cache, and to leave it alone after it did not answer: a broken cache must not cost
# every job a timeout.
ANSWER_S = 0.5
REST_S = 5.0


class Known(NamedTuple):
    """What the cache knows of a job's chunks.

    ``logits`` (n,) is valid where ``mask`` (n,) is true; ``truncated`` (n,) says which of those pairs were cut.
    """

    logits: Logits
    mask: Flags
    truncated: Flags

    @classmethod
    def nothing(cls, chunks: int) -> Known:
        """Know nothing of so many chunks."""
        flags = np.zeros(chunks, np.bool_)
        return cls(np.full(chunks, np.nan, np.float32), flags, flags.copy())


def text_hash(text: str) -> bytes:
    """Hash a query or a chunk's text: BLAKE2b, 128 bits.

    >>> text_hash("tides") == text_hash("tides "), len(text_hash(""))
    (False, 16)
    """
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def score_fingerprint(engine: str, *, max_length: int, query_max_tokens: int, long_chunks: str) -> str:
    """Name everything beside the texts that changes a logit.

    *engine* stands for weights, precision and template.
    """
    parts = f"{engine}|{max_length}|{query_max_tokens}|{long_chunks}"
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


def connect(url: str) -> redis.Redis:
    """Open a pool of connections for the cache; connects on first use."""
    return redis.Redis.from_url(url, socket_connect_timeout=ANSWER_S, socket_timeout=ANSWER_S)


class ScoreCache:
    """Read and write scores, one round trip per job each way. Safe to share between threads."""

    def __init__(self, client: redis.Redis, *, ttl_s: int) -> None:
        self._redis = client
        self._ttl_s = ttl_s
        self._rests_until = 0.0

    def read(self, fingerprint: str, query: bytes, chunks: Sequence[bytes]) -> Known:
        """Read the logits of a query's chunks, given by their hashes."""
        nothing = Known.nothing(len(chunks))
        if not chunks or self._resting():
            return nothing
        key = _key(fingerprint, query)
        try:
            pipe = self._redis.pipeline(transaction=False)
            pipe.hmget(key, list(chunks))
            pipe.smembers(_cut(key))
            values, cut = pipe.execute()
        except (RedisError, OSError) as error:
            self._rest(error)
            return nothing
        # Anything that is not four bytes was not written by us.
        mask = np.fromiter((value is not None and len(value) == 4 for value in values), np.bool_, len(values))
        if not mask.any():
            return nothing
        nothing.logits[mask] = np.frombuffer(b"".join(itertools.compress(values, mask)), "<f4")
        truncated = np.fromiter((chunk in cut for chunk in chunks), np.bool_, len(chunks)) if cut else nothing.truncated
        return Known(nothing.logits, mask, truncated & mask)

    def write(self, fingerprint: str, query: bytes, chunks: Sequence[bytes], logits: Logits, truncated: Flags) -> None:
        """Remember logits, and which pairs were cut; logits that are not finite are not worth remembering."""
        worth = np.isfinite(logits)
        if not worth.any() or self._resting():
            return
        key = _key(fingerprint, query)
        kept = {
            chunk: logit.tobytes() for chunk, logit, ok in zip(chunks, logits.astype("<f4"), worth, strict=True) if ok
        }
        cut = list(itertools.compress(chunks, truncated & worth))
        try:
            pipe = self._redis.pipeline(transaction=False)
            pipe.hset(key, mapping=kept)  # type: ignore[arg-type]  # bytes are welcome as field names
            pipe.expire(key, self._ttl_s)
            if cut:
                pipe.sadd(_cut(key), *cut)
                pipe.expire(_cut(key), self._ttl_s)
            pipe.execute()
        except (RedisError, OSError) as error:
            self._rest(error)

    def _resting(self) -> bool:
        return time.monotonic() < self._rests_until

    def _rest(self, error: Exception) -> None:
        self._rests_until = time.monotonic() + REST_S
        logger.warning("the score cache does not serve, computing without it for %.0f s: %s", REST_S, error)


def _key(fingerprint: str, query: bytes) -> str:
    return f"rerankq:scores:{fingerprint}:{query.hex()}"


def _cut(key: str) -> str:
    # Beside the logits, whose four bytes have no room for it: a truncation is never silent, not even from the cache.
    return f"{key}:cut"
