"""Start-time fair queueing: the virtual times of flows that share one device, by tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Mapping
from itertools import count, islice
from typing import Generic, TypeVar

F = TypeVar("F", bound=Hashable)


class FairQueue(Generic[F]):
    """The flows that have something waiting, each with the virtual time at which its next turn begins.

    The flow with the earliest start goes next; the tokens that a flow is served move its start forward by as many. The
    virtual clock advances with the service, divided by the number of flows, as if all were served at once. A new flow
    starts at the clock: before those that have had more than their share, and with no credit from the time in which it
    had nothing waiting. The clock is never ahead of a flow that was served and waits again: so no new flow waits for
    more than each flow is due, and no number of new flows delays an earlier one. A flow that is removed with more than
    its share, and returns before the clock has made up for it, starts where it stopped.

    >>> queue = FairQueue()
    >>> queue.add("large"), queue.charge({"large": 2048}), queue.add("small")
    (None, None, None)
    >>> [(flow, start) for start, flow in queue]
    [('small', 0.0), ('large', 2048.0)]
    """

    def __init__(self) -> None:
        self._order: list[tuple[float, int, F]] = []
        self._entries: dict[F, tuple[float, int]] = {}
        self._served: list[tuple[float, int]] = []
        self._numbers = count()
        self._clock = 0.0
        # What the clock advances by when the next turn begins: the service of the present one is not over yet.
        self._underway = 0.0
        self._ahead: dict[F, float] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, flow: F) -> bool:
        return flow in self._entries

    def __iter__(self) -> Iterator[tuple[float, F]]:
        """Iterate over starts and flows, earliest first; equal starts in the order in which the flows were added."""
        return ((start, flow) for start, _, flow in self._order)

    def first(self, most: int) -> list[tuple[float, F]]:
        """Return the starts and flows of the earliest, at most ``most``."""
        return list(islice(self, most))

    def add(self, flow: F) -> None:
        """Add a flow that is not in the queue."""
        start, number = max(self._clock, self._ahead.pop(flow, 0.0)), next(self._numbers)
        self._entries[flow] = start, number
        insort(self._order, (start, number, flow))

    def remove(self, flow: F, *, may_return: bool = False) -> None:
        """Remove a flow; one that ``may_return`` gets no second share by being added again."""
        start, _ = self._take(flow)
        if may_return and start > self._clock:
            self._ahead[flow] = start

    def charge(self, tokens: Mapping[F, float], *, leader: F | None = None, least: float = 0) -> None:
        """Charge flows for a turn: the tokens served of each. The leader is charged for ``least`` tokens at least.

        A smaller turn takes the device as long; and a flow that leads, with little of its own, full turns of what
        others have must move on all the same.
        """
        flows = len(self._order)
        self._clock += self._underway
        if leader is not None:
            self._clock = max(self._clock, self._entries[leader][0])
        for flow, served in tokens.items():
            start, number = self._take(flow)
            start += max(served, least) if flow == leader else served
            self._entries[flow] = start, number
            insort(self._order, (start, number, flow))
            insort(self._served, (start, number))
        self._underway = max(sum(tokens.values()), least) / max(1, flows)
        if self._served:
            self._clock = min(self._clock, self._served[0][0])
        self._ahead = {flow: start for flow, start in self._ahead.items() if start > self._clock}

    def _take(self, flow: F) -> tuple[float, int]:
        entry = self._entries.pop(flow)
        del self._order[bisect_left(self._order, entry)]
        at = bisect_left(self._served, entry)
        if self._served[at : at + 1] == [entry]:
            del self._served[at]
        return entry
