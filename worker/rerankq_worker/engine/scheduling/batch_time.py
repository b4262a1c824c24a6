"""How fast the device is, and how much it can hold: small decisions of the batcher as frozen values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

#: Weight of everything measured before, against one new batch.
_MEMORY = 0.9
#: Squared, the relative difference in tokens at which batches teach as much of each token as is assumed.
PRIOR_WEIGHT = 0.01
#: Batches without trouble after which a lowered budget is doubled again.
_CALM_BATCHES = 64


@dataclass(frozen=True, slots=True)
class BatchTimeModel:
    """What a batch takes: some seconds whatever it holds, and some for each token. The older, the less batches count.

    >>> pace = Pace().after(1000, 2.0)
    >>> pace.predict(500)
    1.0
    >>> round(pace.after(2000, 3.0).predict(1500), 2)
    2.5
    """

    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def after(self, tokens: int, seconds: float) -> BatchTimeModel:
        """Learn from a batch that cost so many tokens."""
        return BatchTimeModel(
            _MEMORY * self.weight + 1,
            _MEMORY * self.tokens + tokens,
            _MEMORY * self.seconds + seconds,
            _MEMORY * self.squares + tokens * tokens,
            _MEMORY * self.products + tokens * seconds,
        )

    def predict(self, tokens: float) -> float:
        """Seconds that a batch takes which costs so many tokens; 0 while nothing was measured."""
        if not self.tokens:
            return 0.0
        mean_tokens, mean_seconds = self.tokens / self.weight, self.seconds / self.weight
        in_proportion = mean_seconds / mean_tokens
        variance = self.squares / self.weight - mean_tokens**2
        covariance = self.products / self.weight - mean_tokens * mean_seconds
        # Batches that are all alike say nothing of others: the less they differ, the more a token costs its share.
        doubt = PRIOR_WEIGHT * mean_tokens**2
        each = (covariance + doubt * in_proportion) / (variance + doubt)
        return mean_seconds + min(max(each, 0.0), in_proportion) * (tokens - mean_tokens)


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens that a batch may cost: ``full`` as configured, ``now`` what the device's memory holds at present.

    >>> Budget(4096, 4096).after_out_of_memory(3000)
    Budget(full=4096, now=1500, calm=0)
    """

    full: int
    now: int
    calm: int = 0

    def after_out_of_memory(self, tokens: int) -> Budget:
        """Halve: a batch that costs so many tokens did not fit."""
        return Budget(self.full, max(1, min(self.now, tokens // 2)))

    def after_success(self) -> Budget:
        """Count a batch that fitted; after enough of them try twice as much, since what took the memory may be gone."""
        if self.now >= self.full:
            return self
        if self.calm + 1 < _CALM_BATCHES:
            return replace(self, calm=self.calm + 1)
        return Budget(self.full, min(self.full, self.now * 2))


@dataclass(frozen=True, slots=True)
class FairShare:
    """When bulk may lead a batch although interactive pairs wait: it keeps ``share`` of the device's time.

    >>> turn = BulkTurn(share=0.2).after(now=0.0, seconds=1.0)
    >>> turn.due_at, turn.after(now=5.5, seconds=1.0).due_at
    (4.0, 9.5)
    """

    share: float
    due_at: float = -math.inf

    def after(self, now: float, seconds: float) -> FairShare:
        """Note a turn of bulk, which takes so many seconds of the device from now on.

        A little lateness is made up for, so that the share holds; a turn taken early, while nobody else waited, is not
        held against it.
        """
        due_at = min(max(self.due_at, now - seconds), now)
        return replace(self, due_at=due_at + seconds / self.share)
