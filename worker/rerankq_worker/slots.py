"""A worker's slots: how many jobs are in flight, and whether bulk may have another. Pure bookkeeping, no I/O."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Slots that bulk never takes, so that an interactive job finds one at once.
KEPT_FOR_INTERACTIVE = 2


class Slots:
    """Counts jobs in flight, says whether there is room for another, and for how long there has been.

    The same job may be in flight twice, where its bell rang twice: each ring has a slot of its own.

    >>> slots = Slots(4)
    >>> slots.take("a", bulk=True), slots.take("b", bulk=True), slots.has_room(bulk=True), slots.has_room(bulk=False)
    (None, None, False, True)
    >>> slots.give_back("a"), slots.has_room(bulk=True), slots.give_back("no such job")
    (True, True, False)
    """

    def __init__(self, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._bulk_share = max(1, total - KEPT_FOR_INTERACTIVE)
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight: dict[str, list[bool]] = {}
        self._taken = 0
        self._bulk = 0
        now = clock()
        self._free_since: dict[bool, float | None] = {False: now, True: now}

    @property
    def taken(self) -> int:
        """Slots taken."""
        return self._taken

    def has_room(self, *, bulk: bool) -> bool:
        """Whether another job of this kind may come in."""
        return self._taken < self._total and not (bulk and self._bulk >= self._bulk_share)

    def take(self, job_id: str, *, bulk: bool) -> None:
        """Count a job that came in. It did come in, so it counts even where there was no room."""
        with self._lock:
            self._in_flight.setdefault(job_id, []).append(bulk)
            self._taken += 1
            self._bulk += bulk
            self._note()

    def give_back(self, job_id: str) -> bool:
        """Count a job that went out; answers True if there was no room before it went, and now there is.

        A job that never came in changes nothing.
        """
        with self._lock:
            rings = self._in_flight.get(job_id)
            if not rings:
                return False
            before = self.has_room(bulk=False), self.has_room(bulk=True)
            self._taken -= 1
            self._bulk -= rings.pop()
            if not rings:
                del self._in_flight[job_id]
            self._note()
            return before != (self.has_room(bulk=False), self.has_room(bulk=True))

    def free_for(self, *, bulk: bool) -> float | None:
        """Seconds for which a slot has been free without a break; None where none is."""
        with self._lock:
            since = self._free_since[bulk]
            return None if since is None else self._clock() - since

    def _note(self) -> None:
        for bulk in (False, True):
            if not self.has_room(bulk=bulk):
                self._free_since[bulk] = None
            elif self._free_since[bulk] is None:
                self._free_since[bulk] = self._clock()
