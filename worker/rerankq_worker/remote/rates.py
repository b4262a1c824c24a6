"""How often a server may be asked: a token bucket as a frozen value."""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Seconds of a rate that may be used at once, after a pause.
BURST_S = 1.0


@dataclass(frozen=True, slots=True)
class TokenBucket:
    """What may be spent now: fills at a rate, holds so much at most, and is in debt after more was spent.

    >>> bucket = TokenBucket.per_minute(60, now=0.0)
    >>> bucket.wait_s(0.0, need=1), bucket.after(0.0, 1).wait_s(0.0, need=1), bucket.after(0.0, 3).wait_s(1.0)
    (0.0, 1.0, 1.0)
    """

    per_s: float
    capacity: float
    level: float
    at: float

    @classmethod
    def per_minute(cls, amount: float, *, now: float) -> TokenBucket:
        """Make a full bucket; it can always hold one."""
        capacity = max(1.0, BURST_S * amount / 60)
        return cls(amount / 60, capacity, capacity, now)

    def wait_s(self, now: float, *, need: float = 0) -> float:
        """Seconds until it holds what is needed; 0 if it does."""
        return max(0.0, (need - self._level(now)) / self.per_s)

    def after(self, now: float, spent: float) -> TokenBucket:
        """Take out what was spent."""
        return replace(self, level=self._level(now) - spent, at=now)

    def _level(self, now: float) -> float:
        return min(self.capacity, self.level + (now - self.at) * self.per_s)
