"""What the batcher counts, and what it tells of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """What the batcher did since it began, and what it does now.

    ``tokens`` are real, ``padded_tokens`` computed: the same where the engine does not pad. ``busy_s`` is time in which
    at least one batch was in flight. While one is, ``batch_started`` is when the device began with the oldest, on the
    batcher's clock, and ``batch_predicted_s`` what its tokens should take (0 while nothing was measured); both are None
    in between. ``last_progress`` is when the last batch ended.
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
