"""The pairs that wait for the device, in lines of their jobs, kept as arrays so that planning stays cheap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .batching import even_share, virtual_starts
from .fair_queue import FairQueue

BULK, INTERACTIVE = 0, 1
NOWHERE = -1

_SMALLEST = 1024
#: So many jobs of a priority are looked at for one batch, those whose turn comes first; more would make planning slow.
_LINES = 128

Places = NDArray[np.intp]
_NO_PLACES: Places = np.empty(0, dtype=np.intp)


class Waiter(Protocol):
    """Anything that can wait here: it knows its length in tokens, and is told its place and the lines it stands in."""

    place: int
    lines: list[Line]

    @property
    def length(self) -> int:
        """Tokens."""


W = TypeVar("W", bound=Waiter)


class Line:
    """What one job waits for, in its own order. A pair that several jobs wait for stands in each one's line."""

    __slots__ = ("_front", "_rest", "left", "priority", "tenant", "waiting")

    def __init__(self, priority: int, tenant: str) -> None:
        self.priority = priority
        self.tenant = tenant
        self.waiting = 0
        #: Whether somebody left since the last look.
        self.left = False
        self._front = self._rest = _NO_PLACES

    def extend(self, places: Places) -> None:
        """Stand at these places, behind those before."""
        self._rest = np.concatenate((self._rest, places))

    def look(self, most: int, here: NDArray[np.bool_]) -> Places:
        """Find the first places at which somebody is ``here``."""
        front = self._front[here[self._front]] if self.left else self._front
        while front.size < most and self._rest.size:
            step = max(most, _SMALLEST)
            more, self._rest = self._rest[:step], self._rest[step:]
            front = np.concatenate((front, more[here[more]]))
        self._front, self.left = front, False
        return front[:most]

    def move(self, moved: Places) -> None:
        """Learn that everybody got another place, or is there no more (NOWHERE)."""
        places = moved[np.concatenate((self._front, self._rest))]
        self._front, self._rest = _NO_PLACES, places[places != NOWHERE]


@dataclass(frozen=True, slots=True)
class Window:
    """Those that the next plan looks at, one entry each.

    Places, tokens, priorities, times of arrival, virtual starts, and in whose turn each would be served: the position
    in ``lines``.
    """

    places: Places
    lengths: NDArray[np.int32]
    priorities: NDArray[np.int8]
    arrived: NDArray[np.float64]
    starts: NDArray[np.float64]
    turns: NDArray[np.intp]
    lines: list[Line]


class _Shares:
    """The jobs of one priority: tenants share the device, a tenant's jobs share what is the tenant's."""

    def __init__(self) -> None:
        self._tenants: FairQueue[str] = FairQueue()
        self._jobs: dict[str, FairQueue[Line]] = {}

    def enter(self, line: Line) -> None:
        if line.tenant not in self._jobs:
            self._jobs[line.tenant] = FairQueue()
            self._tenants.enter(line.tenant)
        self._jobs[line.tenant].enter(line)

    def leave(self, line: Line) -> None:
        jobs = self._jobs[line.tenant]
        jobs.leave(line)
        if not len(jobs):
            del self._jobs[line.tenant]
            self._tenants.leave(line.tenant, returns=True)

    def charge(self, tokens: dict[Line, float], leader: Line | None, least: float) -> None:
        by_tenant: dict[str, dict[Line, float]] = {}
        for line, served in tokens.items():
            by_tenant.setdefault(line.tenant, {})[line] = served
        for tenant, served_jobs in by_tenant.items():
            led = leader if leader is not None and leader.tenant == tenant else None
            self._jobs[tenant].charge(served_jobs, leader=led, least=least if led else 0)
        sums = {tenant: sum(served_jobs.values()) for tenant, served_jobs in by_tenant.items()}
        self._tenants.charge(sums, leader=leader.tenant if leader else None, least=least if leader else 0)

    def first(self, size: int) -> Iterator[tuple[float, list[tuple[float, Line, int]]]]:
        """Say of each tenant where it starts, with its jobs: where they start, and how many pairs of each to look at.

        At most ``size`` pairs and ``_LINES`` jobs, those whose turn comes first, each with its share.
        """
        tenants = self._tenants.first(min(size, _LINES))
        jobs = [self._jobs[tenant].first(max(1, _LINES // len(tenants))) for _, tenant in tenants]
        waiting = [sum(line.waiting for _, line in lines) for lines in jobs]
        most = even_share(waiting, size)
        for (start, _), lines, pairs in zip(tenants, jobs, waiting, strict=True):
            kept = lines[: min(most, pairs)]
            each = even_share([line.waiting for _, line in kept], min(most, pairs))
            yield start, [(at, line, min(each, line.waiting)) for at, line in kept]


class WaitingPairs(Generic[W]):
    """Lines that can be left from anywhere, in constant time per pair.

    Leaving clears a mark; the arrays are packed or grown when they are full, so that each pair moves a few times only.
    """

    def __init__(self) -> None:
        self._waiters: list[W | None] = []
        self._lengths = np.zeros(_SMALLEST, dtype=np.int32)
        self._arrived = np.zeros(_SMALLEST, dtype=np.float64)
        self._here = np.zeros(_SMALLEST, dtype=np.bool_)
        self._count = 0
        self._shared = 0
        self._lines: set[Line] = set()
        self._shares = {INTERACTIVE: _Shares(), BULK: _Shares()}

    def __len__(self) -> int:
        return self._count

    def join(self, line: Line, waiters: Sequence[W], now: float) -> None:
        """Let a job wait for these, in the given order, each of them once; some may wait already for another's sake."""
        if not waiters:
            return
        self._settle([waiter for waiter in waiters if waiter.place == NOWHERE], now)
        for waiter in waiters:
            waiter.lines.append(line)
            self._shared += len(waiter.lines) == 2
        line.extend(np.array([waiter.place for waiter in waiters], dtype=np.intp))
        line.waiting = len(waiters)
        self._lines.add(line)
        self._shares[line.priority].enter(line)

    def close(self, line: Line) -> None:
        """End a job's line; those in it who stand in no other wait no more."""
        if line not in self._lines:
            return
        for place in line.look(line.waiting, self._here).tolist():
            waiter = self._waiters[place]
            if waiter is None:
                continue
            if len(waiter.lines) == 1:
                self._vacate(waiter)
                continue
            self._shared -= len(waiter.lines) == 2
            waiter.lines.remove(line)
        self._end(line)

    def window(self, size: int) -> Window:
        """Look at the first ``size`` of each priority, some of every job."""
        lines: list[Line] = []
        parts = [self._part(kind, size, lines) for kind in (INTERACTIVE, BULK)]
        places, priorities, starts, turns = (np.concatenate(rows) for rows in zip(*parts, strict=True))
        if self._shared:
            # Whoever stands in several lines is served in the most urgent turn.
            order = np.lexsort((starts, -priorities))
            _, first = np.unique(places[order], return_index=True)
            once = order[np.sort(first)]
            places, priorities, starts, turns = places[once], priorities[once], starts[once], turns[once]
        return Window(places, self._lengths[places], priorities, self._arrived[places], starts, turns, lines)

    def take(self, window: Window, chosen: NDArray[np.intp], *, led_by: int, least: float) -> list[W]:
        """Take the chosen ones of a window out of their lines, in the given order, and count their turn.

        ``led_by`` is the priority of the batch's leader, whose job pays for ``least`` tokens at least.
        """
        leaders = chosen[window.priorities[chosen] == led_by]
        leader = window.lines[window.turns[leaders[np.argmin(window.starts[leaders])]]]
        served = np.bincount(window.turns[chosen], window.lengths[chosen], minlength=len(window.lines)).tolist()
        for kind, shares in self._shares.items():
            tokens = {
                line: paid for line, paid in zip(window.lines, served, strict=True) if paid and line.priority == kind
            }
            if tokens:
                led = kind == led_by
                shares.charge(tokens, leader if led else None, least if led else 0)
        taken = [waiter for place in window.places[chosen].tolist() if (waiter := self._waiters[place]) is not None]
        for waiter in taken:
            self._shared -= len(waiter.lines) > 1
            for line in waiter.lines:
                line.waiting -= 1
                if not line.waiting:
                    self._end(line)
            self._vacate(waiter)
        return taken

    def _part(
        self, kind: int, size: int, lines: list[Line]
    ) -> tuple[Places, NDArray[np.int8], NDArray[np.float64], NDArray[np.intp]]:
        """Look at one priority: places, priorities, starts, and positions in ``lines``, which grow by its jobs."""
        looks = [_NO_PLACES]
        job_starts: list[float] = []
        tenants: list[int] = []
        tenant_starts: list[float] = []
        before = len(lines)
        for start, jobs in self._shares[kind].first(size):
            for at, line, most in jobs:
                looks.append(line.look(most, self._here))
                job_starts.append(at)
                tenants.append(len(tenant_starts))
                lines.append(line)
            tenant_starts.append(start)
        places = np.concatenate(looks)
        jobs_of = np.repeat(np.arange(len(job_starts)), [look.size for look in looks[1:]])
        starts = virtual_starts(self._lengths[places], jobs_of, job_starts, tenants, tenant_starts)
        return places, np.full(places.size, kind, dtype=np.int8), starts, jobs_of + before

    def _end(self, line: Line) -> None:
        self._lines.remove(line)
        self._shares[line.priority].leave(line)

    def _settle(self, waiters: list[W], now: float) -> None:
        self._make_room(len(waiters))
        start = len(self._waiters)
        for place, waiter in enumerate(waiters, start):
            waiter.place = place
        self._waiters += waiters
        new = slice(start, len(self._waiters))
        self._lengths[new] = [waiter.length for waiter in waiters]
        self._arrived[new] = now
        self._here[new] = True
        self._count += len(waiters)

    def _vacate(self, waiter: W) -> None:
        self._here[waiter.place] = False
        self._waiters[waiter.place] = None
        waiter.place = NOWHERE
        for line in waiter.lines:
            line.left = True
        waiter.lines = []
        self._count -= 1

    def _make_room(self, more: int) -> None:
        if len(self._waiters) + more <= self._here.size:
            return
        kept = np.flatnonzero(self._here[: len(self._waiters)])
        moved = np.full(self._here.size, NOWHERE, dtype=np.intp)
        moved[kept] = np.arange(kept.size)
        size = max(_SMALLEST, 2 * (kept.size + more))
        for name in ("_lengths", "_arrived", "_here"):
            old = getattr(self, name)
            packed = np.zeros(size, dtype=old.dtype)
            packed[: kept.size] = old[kept]
            setattr(self, name, packed)
        self._waiters = [waiter for waiter in self._waiters if waiter is not None]
        for place, waiter in enumerate(self._waiters):
            if waiter is not None:
                waiter.place = place
        for line in self._lines:
            line.move(moved)
