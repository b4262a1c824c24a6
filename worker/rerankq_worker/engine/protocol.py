"""What an engine is: it tokenises pairs and computes batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import LimitTooSmall, PairFailed

Logits = NDArray[np.float32]

#: The most tokens of a query that are kept in a pair that does not fit, unless half of the pair is less.
QUERY_MAX_TOKENS = 128


@dataclass(frozen=True, slots=True, eq=False)
class TokenisedPair:
    """One query and one chunk as the model reads them, special tokens included.

    ``ids`` are the token ids, int32; the second segment begins at ``second_from`` (the length, where a model knows but
    one segment). ``truncated`` says that the query or the chunk was cut to fit.

    Raises PairFailed where there is no token: such a pair must not get to a device.
    """

    ids: NDArray[np.int32]
    second_from: int
    truncated: bool

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise PairFailed("query and chunk have no token that the model knows")

    @property
    def length(self) -> int:
        """The number of its tokens."""
        return len(self.ids)


class LogitsFuture(Protocol):
    """The result of a batch on the device, in the way of ``concurrent.futures.Future``, which is one too."""

    def done(self) -> bool:
        """Tell whether the batch is finished."""

    def result(self) -> Logits:
        """Wait for the logits, shape ``(len(batch),)``; raises what the device raised."""


def finished(logits: Logits) -> LogitsFuture:
    """Wrap logits that are computed already, for an engine whose ``launch`` blocks.

    >>> finished(np.zeros(2, dtype=np.float32)).result()
    array([0., 0.], dtype=float32)
    """
    future: Future[Logits] = Future()
    future.set_result(logits)
    return future


class Engine(Protocol):
    """One model on one device.

    ``fingerprint`` names everything of the model that changes a logit: weights, precision ("fp32", "reduced" or
    "int8"), tokeniser and pair template, no activation. ``max_length`` is in tokens. A batch costs *longest × count*
    tokens where ``padded``, else the sum of its lengths; ``max_batch_tokens`` is the most that one should cost. Token
    ids are below ``vocabulary``; None where an engine takes any. ``takes_instruction`` says whether pairs have a place
    for an instruction.

    ``launch`` and ``forward`` belong to one thread at a time; ``tokenise`` may be called from any number at once.
    """

    name: str
    fingerprint: str
    vocabulary: int | None
    max_length: int
    max_batch_tokens: int
    padded: bool
    dtype: str
    device: str
    takes_instruction: bool

    def tokenise(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
        hashes: Sequence[bytes] | None = None,
        instruction: str = "",
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order, cut to ``max_length`` tokens.

        ``hashes``, one per chunk, are those of the chunks' texts where the caller knows them: equal where the texts
        are equal, and only there. ``instruction`` takes the place of the model's own; raises PairFailed where the model
        takes none.
        """

    def characters_read(
        self, query: str, chunk: str, *, max_length: int | None = None, query_max_tokens: int = QUERY_MAX_TOKENS
    ) -> int | None:
        """Tell how many characters of a chunk are kept in a pair that does not fit; None where that is not known."""

    def launch(self, batch: Sequence[TokenisedPair]) -> LogitsFuture:
        """Start one batch; returns before it is finished where the device works asynchronously.

        A batch may be launched while another is in flight; they finish in the order of their launches.
        """

    def forward(self, batch: Sequence[TokenisedPair]) -> Logits:
        """Run one batch, ``launch(batch).result()``: raw logits, shape ``(len(batch),)``."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> Logits:
        """Score ``(query, chunk)`` pairs: raw logits, same order, same length."""

    def warm_up(self) -> None:
        """Run a small batch, so that the first job pays no start-up cost; raises what the device raises."""

    def most_tokens(self, batch: Sequence[TokenisedPair]) -> float:
        """Estimate the tokens of the largest batch that fits into free memory, from what this batch takes.

        Infinite where memory is not limited by the device.
        """

    def release_memory(self) -> None:
        """Return unused cached memory of the device's allocator to the system."""


@dataclass(frozen=True, slots=True)
class PairLimits:
    """The rule of truncation: a pair that fits is whole; else its query is cut to ``query``, its chunk to the rest.

    ``total`` are the tokens that query and chunk may have together, ``query`` those that a query keeps at most in a
    pair that does not fit. Every tokeniser asks here. Whoever changes the rule changes ``RULE``: scores are cached by
    it.
    """

    query: int
    total: int

    #: Part of every score's fingerprint.
    RULE: ClassVar[str] = "whole where the pair fits 2"

    @classmethod
    def within(cls, max_length: int, *, special_tokens: int, query_max_tokens: int) -> PairLimits:
        """Divide a pair's tokens: a query that has to be cut gets at most half of them.

        >>> PairLimits.within(512, special_tokens=3, query_max_tokens=128)
        PairLimits(query=128, total=509)
        >>> PairLimits.within(64, special_tokens=3, query_max_tokens=128)
        PairLimits(query=30, total=61)

        Raises LimitTooSmall if not one token of each fits, and ValueError for a query of none.
        """
        total = max_length - special_tokens
        if total < 2:
            raise LimitTooSmall(
                f"max_length {max_length} leaves no token for query and chunk beside {special_tokens} others"
            )
        if query_max_tokens < 1:
            raise ValueError(f"query_max_tokens must be at least 1, not {query_max_tokens}")
        return cls(query=min(query_max_tokens, total // 2), total=total)

    def kept(self, query: int, chunk: int) -> tuple[int, int]:
        """Return how many of a query's and a chunk's tokens are kept.

        >>> limits = PairLimits(query=30, total=61)
        >>> limits.kept(50, 11), limits.kept(50, 12), limits.kept(20, 99)
        ((50, 11), (30, 12), (20, 41))
        """
        if chunk <= self.beside(query):
            return query, chunk
        query = min(query, self.query)
        return query, min(chunk, self.beside(query))

    def beside(self, query: int) -> int:
        """Return how many tokens of a chunk fit beside so many of a query; negative where those alone are too many.

        >>> limits = PairLimits(query=30, total=61)
        >>> limits.beside(50), limits.beside(70)
        (11, -9)
        """
        return self.total - query


def checked_length(asked: int | None, limit: int) -> int:
    """Return the maximum length asked for, or the engine's own; raises ValueError beyond what the model reads."""
    if asked is None:
        return limit
    if asked > limit:
        raise ValueError(f"max_length {asked} is more than this model reads ({limit} tokens)")
    return asked
