"""Start-time fair queueing: the virtual times of flows that share one device, by tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Mapping
from itertools import count, islice
from typing import Generic, TypeVar

F = TypeVar("F", bound=Hashable)


class FairQueue(Generic[F]):
    """The flows that have something waiting, each with the virtual time at which its next turn begins.

    Whoever starts earliest goes next; what a flow is served moves its start by as many tokens. A clock goes on with the
    service, divided by the number of flows, as if all were served at once. A newcomer starts at the clock: before those
    who have had more than their share, and with no credit from the time in which it wanted nothing. The clock is never
    ahead of a flow that was served and waits again: so no newcomer waits for more than is due to each, nor does any
    number of newcomers hold up who came before. A flow that left with more than its share, and comes back before the
    clock has made up for it, starts where it left.

    >>> queue = FairQueue()
    >>> queue.enter("large"), queue.charge({"large": 2048}), queue.enter("small")
    (None, None, None)
    >>> [(flow, start) for start, flow in queue]
    [('small', 0.0), ('large', 2048.0)]
    """

    def __init__(self) -> None:
        self._line: list[tuple[float, int, F]] = []
        self._entries: dict[F, tuple[float, int]] = {}
        self._served: list[tuple[float, int]] = []
        self._numbers = count()
        self._clock = 0.0
        # What the clock goes on by when the next turn begins: the service of the present one is not over yet.
        self._underway = 0.0
        self._ahead: dict[F, float] = {}

    def __len__(self) -> int:
        return len(self._line)

    def __contains__(self, flow: F) -> bool:
        return flow in self._entries

    def __iter__(self) -> Iterator[tuple[float, F]]:
        """Go through starts and flows, earliest first; of equal starts whoever came first."""
        return ((start, flow) for start, _, flow in self._line)

    def first(self, most: int) -> list[tuple[float, F]]:
        """Look at the starts of the first flows."""
        return list(islice(self, most))

    def enter(self, flow: F) -> None:
        """Let a flow take part, one that does not yet."""
        start, number = max(self._clock, self._ahead.pop(flow, 0.0)), next(self._numbers)
        self._entries[flow] = start, number
        insort(self._line, (start, number, flow))

    def leave(self, flow: F, *, returns: bool = False) -> None:
        """Let a flow take part no more; one that ``returns`` gets no second share by it."""
        start, _ = self._take(flow)
        if returns and start > self._clock:
            self._ahead[flow] = start

    def charge(self, tokens: Mapping[F, float], *, leader: F | None = None, least: float = 0) -> None:
        """Count a turn: what it serves of each flow, in tokens. Its leader pays for ``least`` of them at least.

        So small a turn takes the device as long; and whoever leads, with little of its own, full turns of what others
        have moves on all the same.
        """
        flows = len(self._line)
        self._clock += self._underway
        if leader is not None:
            self._clock = max(self._clock, self._entries[leader][0])
        for flow, served in tokens.items():
            start, number = self._take(flow)
            start += max(served, least) if flow == leader else served
            self._entries[flow] = start, number
            insort(self._line, (start, number, flow))
            insort(self._served, (start, number))
        self._underway = max(sum(tokens.values()), least) / max(1, flows)
        if self._served:
            self._clock = min(self._clock, self._served[0][0])
        self._ahead = {flow: start for flow, start in self._ahead.items() if start > self._clock}

    def _take(self, flow: F) -> tuple[float, int]:
        entry = self._entries.pop(flow)
        del self._line[bisect_left(self._line, entry)]
        place = bisect_left(self._served, entry)
        if self._served[place : place + 1] == [entry]:
            del self._served[place]
        return entry
