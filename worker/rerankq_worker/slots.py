"""A worker's slots: how many jobs are in flight, and whether bulk may have another. Pure bookkeeping, no I/O."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Slots that bulk never takes, so that an interactive job finds one at once (ledger.md, Slots).
KEPT_FOR_INTERACTIVE = 2


class Slots:
    """Counts jobs in flight, says when to stop and to resume taking bulk, and since when a slot is free.

    >>> slots = Slots(4)
    >>> [slots.take(bulk=True) for _ in range(2)], slots.give_back(bulk=True)
    ([False, True], True)
    """

    def __init__(self, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._bulk_share = max(1, total - KEPT_FOR_INTERACTIVE)
        self._clock = clock
        self._lock = threading.Lock()
        self._taken = 0
        self._bulk = 0
        now = clock()
        self._free_since: dict[bool, float | None] = {False: now, True: now}

    def take(self, *, bulk: bool) -> bool:
        """Count a job that came in; answers True if bulk has its share with it, and should be paused."""
        with self._lock:
            self._taken += 1
            self._bulk += bulk
            self._note()
            return bulk and self._bulk == self._bulk_share

    def give_back(self, *, bulk: bool) -> bool:
        """Count a job that went out; answers True if bulk was paused and should be resumed."""
        with self._lock:
            resume = bulk and self._bulk == self._bulk_share
            self._taken -= 1
            self._bulk -= bulk
            self._note()
            return resume

    @property
    def bulk_has_room(self) -> bool:
        """Whether bulk is below its share."""
        return self._bulk < self._bulk_share

    @property
    def taken(self) -> int:
        """Jobs in flight."""
        return self._taken

    def free_for(self, *, bulk: bool) -> float | None:
        """Seconds for which a slot has been free without a break; None where none is."""
        with self._lock:
            since = self._free_since[bulk]
            return None if since is None else self._clock() - since

    def _note(self) -> None:
        free = {False: self._taken < self._total, True: self._taken < self._total and self._bulk < self._bulk_share}
        for bulk, is_free in free.items():
            if not is_free:
                self._free_since[bulk] = None
            elif self._free_since[bulk] is None:
                self._free_since[bulk] = self._clock()
