"""An engine without a model: a stated cost per token, scores from a hash. No torch."""

from __future__ import annotations

import math
import re
import time
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from .errors import ModelUnusable
from .protocol import (
    QUERY_MAX_TOKENS,
    Logits,
    LogitsFuture,
    PairLimits,
    TokenisedPair,
    checked_length,
    finished,
)
from .scheduling.batching import cost
from .scheduling.unqueued import score_in_batches

#: Seconds per token: about what a small model takes on a large GPU.
SECONDS_PER_TOKEN = 1e-6

#: Ids that stand for the special tokens before the query, between query and chunk, and after the chunk.
_OPEN, _BETWEEN, _CLOSE = 0, 1, 2
_SPECIAL_TOKENS = 3


class StubEngine:
    """Sleeps ``seconds_per_token`` times the cost of a batch in tokens, and answers hashes as logits.

    Words between white space are tokens. The same query and chunk get the same logit in every process; the scores do
    not reflect relevance.

    >>> engine = StubEngine(seconds_per_token=0)
    >>> engine.score([("a query", "a chunk"), ("a query", "another")]).round(3)
    array([-3.085,  0.258], dtype=float32)
    """

    dtype = "float32"
    device = "none"
    #: Its words stand before those of the query.
    takes_instruction = True
    vocabulary: int | None = None

    def __init__(
        self,
        *,
        name: str = "stub",
        seconds_per_token: float = SECONDS_PER_TOKEN,
        max_length: int = 512,
        max_batch_tokens: int = 4096,
        padded: bool = True,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self.max_length = max_length
        self.max_batch_tokens = max_batch_tokens
        self.padded = padded
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
        hashes: Sequence[bytes] | None = None,  # noqa: ARG002 - nothing is remembered
        instruction: str = "",
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order; words are tokens."""
        told = _words(instruction, self.max_length)
        limits = self._limits(max_length, query_max_tokens, beside=len(told))
        asked = _words(query, limits.total + 1)
        pairs = []
        for chunk in chunks:
            read = _words(chunk, limits.total + 1)
            kept = limits.kept(len(asked), len(read))
            head = [_OPEN, *told, *asked[: kept[0]], _BETWEEN]
            ids = np.array([*head, *read[: kept[1]], _CLOSE], dtype=np.uint32).view(np.int32)
            pairs.append(TokenisedPair(ids, len(head), kept != (len(asked), len(read))))
        return pairs

    def characters_read(
        self, query: str, chunk: str, *, max_length: int | None = None, query_max_tokens: int = QUERY_MAX_TOKENS
    ) -> int | None:
        """Tell how many characters of a chunk are kept in a pair that does not fit."""
        limits = self._limits(max_length, query_max_tokens)
        kept = limits.beside(min(len(_words(query, limits.total + 1)), limits.query))
        ends = [word.end() for word in islice(re.finditer(r"\S+", chunk), kept + 1)]
        return len(chunk) if len(ends) <= kept else ends[kept - 1]

    def _limits(self, max_length: int | None, query_max_tokens: int, *, beside: int = 0) -> PairLimits:
        length = checked_length(max_length, self.max_length)
        return PairLimits.within(length, special_tokens=_SPECIAL_TOKENS + beside, query_max_tokens=query_max_tokens)

    def launch(self, batch: Sequence[TokenisedPair]) -> LogitsFuture:
        """Run the batch; it is finished when this returns."""
        return finished(self.forward(batch))

    def forward(self, batch: Sequence[TokenisedPair]) -> Logits:
        """Take the stated time for the batch and answer one logit per pair, shape ``(len(batch),)``."""
        if batch:
            self._sleep(self._seconds(batch))
        return _logits(batch)

    def score(self, pairs: Sequence[tuple[str, str]]) -> Logits:
        """Score ``(query, chunk)`` pairs: same order, same length."""
        return score_in_batches(self, pairs)

    def warm_up(self) -> None:
        """Do nothing: there is no start-up cost."""

    def most_tokens(self, batch: Sequence[TokenisedPair]) -> float:  # noqa: ARG002 - no batch takes memory
        """Answer infinity: batches take no memory of a device."""
        return math.inf

    def release_memory(self) -> None:
        """Do nothing: no memory is cached."""

    def _seconds(self, batch: Sequence[TokenisedPair]) -> float:
        return self._seconds_per_token * cost([pair.length for pair in batch], padded=self.padded)


class AsynchronousStubEngine(StubEngine):
    """A stub that works asynchronously, as a GPU does: a launch returns at once, batches run one after the other.

    ``clock`` and ``sleep`` are in seconds. ``idle_s`` counts the seconds without a batch between the first launch and
    the last.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, **options: Any) -> None:
        super().__init__(**options)
        self._clock = clock
        self._free_at = math.inf
        self.idle_s = 0.0

    def launch(self, batch: Sequence[TokenisedPair]) -> LogitsFuture:
        """Queue the batch behind those launched before; its time runs from the end of the last of them."""
        logits, now = _logits(batch), self._clock()
        self.idle_s += max(0.0, now - self._free_at)
        self._free_at = (now if math.isinf(self._free_at) else max(now, self._free_at)) + self._seconds(batch)
        return _TimedLogits(logits, self._free_at, self._clock, self._sleep)

    def forward(self, batch: Sequence[TokenisedPair]) -> Logits:
        """Launch the batch and wait for it."""
        return self.launch(batch).result()


class _TimedLogits:
    """Logits of a batch that is finished at a given time of the clock."""

    def __init__(
        self, logits: Logits, ready_at: float, clock: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._logits, self._ready_at, self._clock, self._sleep = logits, ready_at, clock, sleep

    def done(self) -> bool:
        return self._clock() >= self._ready_at

    def result(self) -> Logits:
        if (left := self._ready_at - self._clock()) > 0:
            self._sleep(left)
        return self._logits


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
        raise ModelUnusable(f"{model!r}: 'stub:' must be followed by the seconds per token, such as 'stub:2e-6'")
    return cost


def _words(text: str, most: int) -> list[int]:
    words = text.split(maxsplit=most)[:most]
    return [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words]


def _logits(batch: Sequence[TokenisedPair]) -> Logits:
    return np.array([_logit(pair) for pair in batch], dtype=np.float32)


def _logit(pair: TokenisedPair) -> float:
    digest = blake2b(pair.ids.tobytes(), digest_size=8, salt=pair.second_from.to_bytes(4, "little")).digest()
    chance = (int.from_bytes(digest, "little") + 0.5) / 2**64
    return math.log(chance / (1 - chance))
