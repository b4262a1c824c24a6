"""How long a batch takes, how many tokens fit, whose turn it is: decisions of the batcher as frozen values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

#: What the weight of every earlier batch is multiplied by when a new one is added.
_DECAY = 0.9
#: Weight of the prior, that seconds are proportional to tokens: the relative variance in tokens (0.1 squared) at which
#: the measured slope counts as much.
PRIOR_WEIGHT = 0.01
#: Successful batches after which a lowered budget is doubled again.
_BATCHES_TO_RAISE = 64


@dataclass(frozen=True, slots=True)
class BatchTimeModel:
    """A line fitted to the seconds of batches by their tokens, by least squares; older batches weigh less.

    >>> model = BatchTimeModel().after(1000, 2.0)
    >>> model.predict(500)
    1.0
    >>> round(model.after(2000, 3.0).predict(1500), 2)
    2.5
    """

    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def after(self, tokens: int, seconds: float) -> BatchTimeModel:
        """Add a batch that cost so many tokens and took so many seconds."""
        return BatchTimeModel(
            _DECAY * self.weight + 1,
            _DECAY * self.tokens + tokens,
            _DECAY * self.seconds + seconds,
            _DECAY * self.squares + tokens * tokens,
            _DECAY * self.products + tokens * seconds,
        )

    def predict(self, tokens: float) -> float:
        """Predict the seconds of a batch that costs so many tokens; 0 while nothing was measured."""
        if not self.tokens:
            return 0.0
        mean_tokens, mean_seconds = self.tokens / self.weight, self.seconds / self.weight
        proportional = mean_seconds / mean_tokens
        variance = self.squares / self.weight - mean_tokens**2
        covariance = self.products / self.weight - mean_tokens * mean_seconds
        # Batches of equal size give no slope: the less they differ, the closer it is to proportional.
        prior = PRIOR_WEIGHT * mean_tokens**2
        slope = (covariance + prior * proportional) / (variance + prior)
        return mean_seconds + min(max(slope, 0.0), proportional) * (tokens - mean_tokens)


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens that a batch may cost: ``full`` as configured, ``now`` what fits into the device's memory at present.

    >>> Budget(4096, 4096).after_out_of_memory(3000)
    Budget(full=4096, now=1500, successes=0)
    """

    full: int
    now: int
    successes: int = 0

    def after_out_of_memory(self, tokens: int) -> Budget:
        """Halve the budget: a batch that costs so many tokens did not fit."""
        return Budget(self.full, max(1, min(self.now, tokens // 2)))

    def after_success(self) -> Budget:
        """Count a batch that fitted; after enough of them double the budget: whatever took the memory may be gone."""
        if self.now >= self.full:
            return self
        if self.successes + 1 < _BATCHES_TO_RAISE:
            return replace(self, successes=self.successes + 1)
        return Budget(self.full, min(self.full, self.now * 2))


@dataclass(frozen=True, slots=True)
class FairShare:
    """When bulk may lead a batch although interactive pairs wait, so that it gets ``share`` of the device's time.

    >>> bulk = FairShare(share=0.2).after(now=0.0, seconds=1.0)
    >>> bulk.due_at, bulk.after(now=5.5, seconds=1.0).due_at
    (4.0, 9.5)
    """

    share: float
    due_at: float = -math.inf

    def after(self, now: float, seconds: float) -> FairShare:
        """Record a turn of bulk that takes so many seconds of the device from now on.

        A small delay is made up for, so that the share holds; a turn taken early, while nothing else waited, is not
        counted against it.
        """
        due_at = min(max(self.due_at, now - seconds), now)
        return replace(self, due_at=due_at + seconds / self.share)
