"""The batcher's counters, and the snapshot that others read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """What the batcher did since it began, and what it does now.

    ``tokens`` are real, ``padded_tokens`` computed: equal where the engine does not pad. ``joined_pairs`` were shared
    with a pair in flight. ``busy_s`` is the time with at least one batch in flight. While there is one,
    ``batch_started`` is when the device began the oldest, on the batcher's clock, and ``batch_predicted_s`` its
    predicted seconds (0 while nothing was measured); otherwise both are None. ``last_progress`` is when the last batch
    ended, on the same clock.
    """

    batches: int
    pairs: int
    joined_pairs: int
    failed_pairs: int
    tokens: int
    padded_tokens: int
    out_of_memory: int
    busy_s: float
    waiting_pairs: int
    tickets: int
    batch_tokens: int
    batch_started: float | None
    batch_predicted_s: float | None
    last_progress: float
    alive: bool

    @property
    def padding(self) -> float:
        """Tokens computed ÷ real tokens; 1 before the first batch."""
        return self.padded_tokens / self.tokens if self.tokens else 1.0


@dataclass(slots=True)
class Tally:
    """The counters behind BatcherStats, changed under the batcher's lock."""

    last_progress: float
    batches: int = 0
    pairs: int = 0
    joined_pairs: int = 0
    failed_pairs: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    out_of_memory: int = 0
    busy_s: float = 0.0
