"""A worker's slots: how many jobs are in flight, and whether bulk, or a suspect, may have one more. No I/O."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from rerankq.contract import Priority
from rerankq.ledger import Deferred, Doorbell


def kept_for_interactive(total: int) -> int:
    """Count the slots of *total* that bulk never takes, so that an interactive job finds one free.

    With one slot none can be kept: there an interactive job is the next one taken.

    >>> [kept_for_interactive(total) for total in (1, 2, 3, 4, 32)]
    [0, 1, 1, 2, 2]
    """
    return min(2, total // 2)


class Slots:
    """Counts jobs in flight, and says whether a slot is free for another.

    The same job may be in flight twice, after a second doorbell: each doorbell has a slot of its own.

    >>> slots = Slots(4)
    >>> slots.take("a", bulk=True), slots.take("b", bulk=True), slots.available(bulk=True), slots.available(bulk=False)
    (None, None, False, True)
    >>> slots.give_back("a"), slots.available(bulk=True), slots.give_back("no such job")
    (True, True, False)
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._bulk_share = total - kept_for_interactive(total)
        self._lock = threading.Lock()
        self._in_flight: dict[str, list[bool]] = {}
        self._taken = 0
        self._bulk = 0

    @property
    def total(self) -> int:
        """Slots in all."""
        return self._total

    @property
    def taken(self) -> int:
        """Slots taken."""
        return self._taken

    def available(self, *, bulk: bool) -> bool:
        """Whether another job of this class may be received."""
        return self._taken < self._total and not (bulk and self._bulk >= self._bulk_share)

    def take(self, job_id: str, *, bulk: bool) -> None:
        """Count a job that was received; it counts even where no slot was free."""
        with self._lock:
            self._in_flight.setdefault(job_id, []).append(bulk)
            self._taken += 1
            self._bulk += bulk

    def give_back(self, job_id: str) -> bool:
        """Count a job as ended; answers True if a class of jobs has a free slot now that had none before.

        A job that was never received changes nothing.
        """
        with self._lock:
            doorbells = self._in_flight.get(job_id)
            if not doorbells:
                return False
            before = self.available(bulk=False), self.available(bulk=True)
            self._taken -= 1
            self._bulk -= doorbells.pop()
            if not doorbells:
                del self._in_flight[job_id]
            return before != (self.available(bulk=False), self.available(bulk=True))


class SuspectSlots:
    """Which suspects a worker takes: two of each class, one of each below eight slots, one at all below four.

    They run alone, so more would only wait, in slots and threads that others need. The second of a class waits so that
    the lock of the device knows of it when the first ends, and lets few others in between. Those that arrive meanwhile
    are remembered, and :meth:`next_doorbell` tells whose turn is next: interactive ones first, else in order of
    arrival.

    With a single slot no other job can run beside them. There an interactive suspect is taken by a doorbell of its own,
    sent behind all that wait, so that those go first.
    """

    # Suspects beyond this number are left to the sweeps of the ledger.
    MOST_REMEMBERED = 10_000
    # Seconds for which a single slot waits for the suspect whose turn it is; another worker may have it.
    INVITED_S = 10.0

    def __init__(self, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._lock = threading.Lock()
        self._taken: Counter[Priority] = Counter()
        self._remembered: dict[str, Deferred] = {}
        self._invited: tuple[str, float] | None = None

    def take(self, suspect: Deferred) -> bool:
        """Take a suspect if it is its turn; else remember it."""
        with self._lock:
            turn = self._has_slot(suspect.priority) and self._goes_first(suspect)
            if turn:
                self._remembered.pop(suspect.doorbell.id, None)
                self._taken[suspect.priority] += 1
                self._invited = None
            elif len(self._remembered) < self.MOST_REMEMBERED:
                self._remembered[suspect.doorbell.id] = suspect
            return turn

    def give_back(self, suspect: Deferred) -> None:
        """Count one that was taken and has ended."""
        with self._lock:
            self._taken[suspect.priority] -= 1

    def next_doorbell(self) -> Doorbell | None:
        """Give the doorbell of the remembered suspect whose turn it is now, if any; its first one was used up."""
        with self._lock:
            if self._is_invited():
                return None
            priorities: tuple[Priority, Priority] = ("interactive", "bulk")
            for priority in priorities:
                found = self._first(priority)
                if found is not None and self._has_slot(priority):
                    del self._remembered[found.doorbell.id]
                    if self._total > 1 or priority == "bulk":
                        return found.doorbell
                    self._invited = found.doorbell.id, self._clock() + self.INVITED_S
                    return found.doorbell._replace(ahead=False)
            return None

    def forget(self) -> list[Doorbell]:
        """Forget the remembered suspects; answers their doorbells, for other workers."""
        with self._lock:
            remembered, self._remembered = self._remembered, {}
            return [suspect.doorbell for suspect in remembered.values()]

    def _goes_first(self, suspect: Deferred) -> bool:
        if self._total > 1:
            return self._total >= 4 or suspect.priority == "interactive" or self._first("interactive") is None
        if suspect.priority == "interactive":
            return self._invited is not None and self._invited[0] == suspect.doorbell.id
        return not self._is_invited() and self._first("interactive") is None

    def _has_slot(self, priority: Priority) -> bool:
        if self._total < 4:
            return not self._taken.total()
        return self._taken[priority] < (2 if self._total >= 8 else 1)

    def _is_invited(self) -> bool:
        return self._invited is not None and self._clock() < self._invited[1]

    def _first(self, priority: Priority) -> Deferred | None:
        return next((one for one in self._remembered.values() if one.priority == priority), None)
