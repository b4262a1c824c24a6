"""Who may be on the device: many jobs that share it, or one suspect alone. Fair to both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# Others that want to be alone, and are more urgent, go before one that does for so many times; then it goes first.
PASSED_AT_MOST = 3
# Seconds between looks whether one that waits shall go on waiting.
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Waiter:
    """One that waits to be let in; ``passed``: so many others went in alone before it that had come after it."""

    exclusive: bool
    interactive: bool
    passed: int = 0


@dataclass(frozen=True)
class Holders:
    """Who is in: so many share it, or one is alone."""

    interactive: int = 0
    bulk: int = 0
    exclusive: bool = False


def admitted(line: Sequence[Waiter], holders: Holders, *, after_exclusive: bool = False) -> list[int]:
    """Say who of those in *line*, in order of arrival, goes in now, by their places.

    Turns alternate. Whenever one that was alone leaves (*after_exclusive*), everybody goes in who waits to share.
    Otherwise the first of those that wait to be alone has its turn: interactive before bulk, but nobody is passed more
    than ``PASSED_AT_MOST`` times. It goes in once nobody is in. Until then bulk waits behind it; interactive goes in
    beside bulk that is still in, for which it must wait anyway.

    So an interactive job waits for one that is alone, at most, and for interactive jobs that were in before; one that
    wants to be alone waits for those who are in, or were waiting, when its turn comes, and for no bulk that comes
    later.

    >>> alone, bulk, soon = Waiter(True, False), Waiter(False, False), Waiter(False, True)
    >>> admitted([alone, bulk, soon], Holders(bulk=1)), admitted([alone, bulk, soon], Holders(interactive=1))
    ([2], [])
    >>> admitted([alone, bulk, soon], Holders()), admitted([alone, bulk, soon], Holders(), after_exclusive=True)
    ([0], [1, 2])
    """
    if holders.exclusive:
        return []
    alone = [place for place, waiter in enumerate(line) if waiter.exclusive]
    sharing = [place for place, waiter in enumerate(line) if not waiter.exclusive]
    if not alone or (after_exclusive and sharing):
        return sharing
    if holders.bulk:
        return [place for place in sharing if line[place].interactive]
    return [] if holders.interactive else [_next_alone(line, alone)]


def _next_alone(line: Sequence[Waiter], alone: Sequence[int]) -> int:
    return min(alone, key=lambda place: (not line[place].interactive and line[place].passed < PASSED_AT_MOST, place))


class SharedExclusiveLock:
    """A lock that many may share, or one hold alone; whose turn it is, ``admitted`` decides."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: dict[int, Waiter] = {}
        self._arrivals = 0
        self._holders = Holders()

    @contextmanager
    def shared(self, *, interactive: bool, go_on: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Share the device. *go_on()* is asked now and then while waiting: what it raises ends that."""
        with self._held(Waiter(exclusive=False, interactive=interactive), go_on):
            yield

    @contextmanager
    def exclusive(self, *, interactive: bool, go_on: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Have the device to oneself; the rest as for :meth:`shared`."""
        with self._held(Waiter(exclusive=True, interactive=interactive), go_on):
            yield

    @contextmanager
    def _held(self, waiter: Waiter, go_on: Callable[[], None]) -> Iterator[None]:
        with self._changed:
            me = self._arrivals
            self._arrivals += 1
            self._line[me] = waiter
            self._admit()
            try:
                while me in self._line:
                    self._changed.wait(LOOK_EVERY_S)
                    go_on()
            except BaseException:
                # In the line or, let in meanwhile, inside: out of it either way.
                self._leave(me, waiter)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._leave(me, waiter)

    def _leave(self, me: int, waiter: Waiter) -> None:
        waited = self._line.pop(me, None) is not None
        if not waited:
            self._holders = _counted(self._holders, waiter, -1)
        self._admit(after_exclusive=waiter.exclusive and not waited)

    def _admit(self, *, after_exclusive: bool = False) -> None:
        places = admitted(list(self._line.values()), self._holders, after_exclusive=after_exclusive)
        arrivals = list(self._line)
        for arrival in [arrivals[place] for place in places]:
            waiter = self._line.pop(arrival)
            self._holders = _counted(self._holders, waiter, 1)
            if waiter.exclusive:
                self._line = {at: _passed(other) if at < arrival else other for at, other in self._line.items()}
        if places:
            self._changed.notify_all()


def _counted(holders: Holders, waiter: Waiter, change: int) -> Holders:
    if waiter.exclusive:
        return Holders(holders.interactive, holders.bulk, exclusive=change > 0)
    if waiter.interactive:
        return Holders(holders.interactive + change, holders.bulk)
    return Holders(holders.interactive, holders.bulk + change)


def _passed(waiter: Waiter) -> Waiter:
    return Waiter(waiter.exclusive, waiter.interactive, waiter.passed + waiter.exclusive)
