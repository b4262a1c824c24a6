"""A fair lock: many jobs share the device, or one suspect has it alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# How often more urgent requests for exclusive use, that came later, may overtake one; then it goes first.
PASSED_AT_MOST = 3
# Bulk jobs that go in between two exclusive holders while another waits for its turn: it waits for all of them.
BULK_BETWEEN = 4
# Seconds between checks whether a waiter shall go on waiting.
CHECK_EVERY_S = 0.5


@dataclass(frozen=True)
class Waiter:
    """One that waits for the lock; ``passed``: how many exclusive waiters that came after it went before it."""

    exclusive: bool
    interactive: bool
    passed: int = 0


@dataclass(frozen=True)
class Holders:
    """Who holds the lock: how many share it, or one alone."""

    interactive: int = 0
    bulk: int = 0
    exclusive: bool = False


def admitted(waiting: Sequence[Waiter], holders: Holders, *, after_exclusive: bool = False) -> list[int]:
    """Say which of *waiting*, in order of arrival, get the lock now, by their positions.

    Turns alternate. Whenever an exclusive holder leaves (*after_exclusive*), those get it that wait to share it: all
    that are interactive, and of bulk the first ``BULK_BETWEEN``; all of bulk where no other exclusive one waits.
    Otherwise the first exclusive waiter has its turn: interactive before bulk, but none is passed more than
    ``PASSED_AT_MOST`` times. It gets the lock once nobody holds it. Until then bulk waits behind it; interactive goes
    in beside bulk that still holds it, for which the exclusive one must wait anyway.

    So an interactive job waits for one exclusive holder at most, and for interactive jobs that held the lock before; an
    exclusive waiter waits for those that held the lock when its turn came, and for no bulk that comes later. Between
    exclusive holders bulk goes in in order of arrival.

    >>> alone, bulk, soon = Waiter(True, False), Waiter(False, False), Waiter(False, True)
    >>> admitted([alone, bulk, soon], Holders(bulk=1)), admitted([alone, bulk, soon], Holders(interactive=1))
    ([2], [])
    >>> admitted([alone, bulk, soon], Holders()), admitted([alone, bulk, soon], Holders(), after_exclusive=True)
    ([0], [1, 2])
    """
    if holders.exclusive:
        return []
    exclusive = [at for at, waiter in enumerate(waiting) if waiter.exclusive]
    sharing = [at for at, waiter in enumerate(waiting) if not waiter.exclusive]
    if not exclusive:
        return sharing
    if after_exclusive and sharing:
        bulk = [at for at in sharing if not waiting[at].interactive][:BULK_BETWEEN]
        return [at for at in sharing if waiting[at].interactive or at in bulk]
    if holders.bulk:
        return [at for at in sharing if waiting[at].interactive]
    return [] if holders.interactive else [_next_exclusive(waiting, exclusive)]


def _next_exclusive(waiting: Sequence[Waiter], exclusive: Sequence[int]) -> int:
    return min(exclusive, key=lambda at: (not waiting[at].interactive and waiting[at].passed < PASSED_AT_MOST, at))


class SharedExclusiveLock:
    """A lock that many may share, or one holds alone; ``admitted`` decides whose turn it is."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[int, Waiter] = {}
        self._arrivals = 0
        self._holders = Holders()

    @contextmanager
    def shared(self, *, interactive: bool, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lock beside others. *check()* is called now and then while waiting: what it raises ends the wait."""
        with self._held(Waiter(exclusive=False, interactive=interactive), check):
            yield

    @contextmanager
    def exclusive(self, *, interactive: bool, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lock alone; the rest as for :meth:`shared`."""
        with self._held(Waiter(exclusive=True, interactive=interactive), check):
            yield

    @contextmanager
    def _held(self, waiter: Waiter, check: Callable[[], None]) -> Iterator[None]:
        with self._changed:
            me = self._arrivals
            self._arrivals += 1
            self._waiting[me] = waiter
            self._admit()
            try:
                while me in self._waiting:
                    self._changed.wait(CHECK_EVERY_S)
                    check()
            except BaseException:
                # It may wait, or hold the lock by now: neither shall last.
                self._leave(me, waiter)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._leave(me, waiter)

    def _leave(self, me: int, waiter: Waiter) -> None:
        waited = self._waiting.pop(me, None) is not None
        if not waited:
            self._holders = _counted(self._holders, waiter, -1)
        self._admit(after_exclusive=waiter.exclusive and not waited)

    def _admit(self, *, after_exclusive: bool = False) -> None:
        positions = admitted(list(self._waiting.values()), self._holders, after_exclusive=after_exclusive)
        arrivals = list(self._waiting)
        for arrival in [arrivals[at] for at in positions]:
            waiter = self._waiting.pop(arrival)
            self._holders = _counted(self._holders, waiter, 1)
            if waiter.exclusive:
                self._waiting = {at: _passed(other) if at < arrival else other for at, other in self._waiting.items()}
        if positions:
            self._changed.notify_all()


def _counted(holders: Holders, waiter: Waiter, change: int) -> Holders:
    if waiter.exclusive:
        return Holders(holders.interactive, holders.bulk, exclusive=change > 0)
    if waiter.interactive:
        return Holders(holders.interactive + change, holders.bulk)
    return Holders(holders.interactive, holders.bulk + change)


def _passed(waiter: Waiter) -> Waiter:
    return Waiter(waiter.exclusive, waiter.interactive, waiter.passed + waiter.exclusive)
