"""The pairs that wait for the device, in order of arrival, kept as arrays so that planning stays cheap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

BULK, INTERACTIVE = 0, 1
NOWHERE = -1

_SMALLEST = 1024


class Waiter(Protocol):
    """Anything that can wait here: it knows its length in tokens, and is told its place."""

    place: int

    @property
    def length(self) -> int:
        """Tokens."""


W = TypeVar("W", bound=Waiter)


@dataclass(frozen=True, slots=True)
class Window:
    """Those that the next plan looks at: places, tokens, priorities and times of arrival, one entry each."""

    places: NDArray[np.intp]
    lengths: NDArray[np.int32]
    priorities: NDArray[np.int8]
    arrived: NDArray[np.float64]


class WaitingPairs(Generic[W]):
    """A line that can be left from anywhere, in constant time per pair.

    Leaving clears a mark; the arrays are packed or grown when they are full, so that each pair moves a few times only.
    """

    def __init__(self) -> None:
        self._waiters: list[W | None] = []
        self._lengths = np.zeros(_SMALLEST, dtype=np.int32)
        self._priorities = np.zeros(_SMALLEST, dtype=np.int8)
        self._arrived = np.zeros(_SMALLEST, dtype=np.float64)
        self._here = np.zeros(_SMALLEST, dtype=np.bool_)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def join(self, waiters: Sequence[W], priority: int, now: float) -> None:
        """Put them at the end of the line, in the given order."""
        self._make_room(len(waiters))
        start = len(self._waiters)
        for place, waiter in enumerate(waiters, start):
            waiter.place = place
        self._waiters += waiters
        new = slice(start, len(self._waiters))
        self._lengths[new] = [waiter.length for waiter in waiters]
        self._priorities[new] = priority
        self._arrived[new] = now
        self._here[new] = True
        self._count += len(waiters)

    def leave(self, waiter: W) -> None:
        """Take one out of the line; it must be in it."""
        self._here[waiter.place] = False
        self._waiters[waiter.place] = None
        waiter.place = NOWHERE
        self._count -= 1

    def take(self, places: Iterable[int]) -> list[W]:
        """Take those at these places out of the line, in the given order."""
        taken = [waiter for place in places if (waiter := self._waiters[place]) is not None]
        for waiter in taken:
            self.leave(waiter)
        return taken

    def prioritise(self, waiter: W, priority: int) -> None:
        """Change the priority of one that waits, without changing its place."""
        self._priorities[waiter.place] = priority

    def window(self, size: int) -> Window:
        """Look at the first ``size`` of each priority."""
        everyone = np.flatnonzero(self._here[: len(self._waiters)])
        urgent = self._priorities[everyone] == INTERACTIVE
        places = np.concatenate((everyone[urgent][:size], everyone[~urgent][:size]))
        return Window(places, self._lengths[places], self._priorities[places], self._arrived[places])

    def _make_room(self, more: int) -> None:
        if len(self._waiters) + more <= self._here.size:
            return
        kept = np.flatnonzero(self._here[: len(self._waiters)])
        size = max(_SMALLEST, 2 * (kept.size + more))
        for name in ("_lengths", "_priorities", "_arrived", "_here"):
            old = getattr(self, name)
            packed = np.zeros(size, dtype=old.dtype)
            packed[: kept.size] = old[kept]
            setattr(self, name, packed)
        self._waiters = [waiter for waiter in self._waiters if waiter is not None]
        for place, waiter in enumerate(self._waiters):
            if waiter is not None:
                waiter.place = place
