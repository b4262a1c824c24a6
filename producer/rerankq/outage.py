"""How often an outage is logged: when it begins, at growing intervals, and when it is over."""

from __future__ import annotations

# Seconds from the first message to the second, and between messages at most; each interval is twice the one before.
FIRST_INTERVAL_S = 10.0
LONGEST_INTERVAL_S = 3_600.0


class Outage:
    """One thing that works or fails. Times are seconds of any clock that never steps back.

    >>> ledger = Outage()
    >>> [now for now in range(100) if ledger.fails(now)]
    [0, 10, 30, 70]
    >>> ledger.works(100), ledger.works(101)
    (100, None)
    """

    def __init__(self) -> None:
        self._began_at: float | None = None
        self._log_at = 0.0
        self._interval_s = FIRST_INTERVAL_S

    @property
    def lasts(self) -> bool:
        """Whether the last thing noted was a failure."""
        return self._began_at is not None

    def fails(self, now: float) -> bool:
        """Note a failure; answer whether it is to be logged."""
        if self._began_at is None:
            self._began_at, self._log_at, self._interval_s = now, now, FIRST_INTERVAL_S
        if now < self._log_at:
            return False
        self._log_at = now + self._interval_s
        self._interval_s = min(2 * self._interval_s, LONGEST_INTERVAL_S)
        return True

    def works(self, now: float) -> float | None:
        """Note that it works; answer how many seconds the outage lasted that is over now, if there was one."""
        began_at, self._began_at = self._began_at, None
        return None if began_at is None else now - began_at
