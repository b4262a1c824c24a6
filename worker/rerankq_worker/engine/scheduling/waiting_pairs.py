"""The pairs that wait for the device, in a queue per job, kept as arrays so that planning stays cheap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .batching import even_share, virtual_starts
from .fair_queue import FairQueue

BULK, INTERACTIVE = 0, 1
#: The index of a pair that is in no queue.
NOT_WAITING = -1

_SMALLEST = 1024
#: Jobs of one priority that are considered for a batch, those with the earliest turns; more would make planning slow.
_MOST_JOBS = 128

Indices = NDArray[np.intp]
_NO_INDICES: Indices = np.empty(0, dtype=np.intp)


class WaitingPair(Protocol):
    """What can wait here: it has a length in tokens, and holds its index in the arrays and the queues it is in."""

    index: int
    queues: list[JobQueue]

    @property
    def length(self) -> int:
        """Tokens."""


P = TypeVar("P", bound=WaitingPair)


class JobQueue:
    """The waiting pairs of one job, first in, first out. A pair that several jobs share is in the queue of each."""

    __slots__ = ("_front", "_rest", "priority", "stale", "tenant", "waiting")

    def __init__(self, priority: int, tenant: str) -> None:
        self.priority = priority
        self.tenant = tenant
        self.waiting = 0
        #: Whether a pair was removed since the last ``peek``.
        self.stale = False
        self._front = self._rest = _NO_INDICES

    def extend(self, indices: Indices) -> None:
        """Append pairs by their indices."""
        self._rest = np.concatenate((self._rest, indices))

    def peek(self, most: int, occupied: NDArray[np.bool_]) -> Indices:
        """Return the indices of the first pairs that still wait, at most ``most``."""
        front = self._front[occupied[self._front]] if self.stale else self._front
        while front.size < most and self._rest.size:
            step = max(most, _SMALLEST)
            more, self._rest = self._rest[:step], self._rest[step:]
            front = np.concatenate((front, more[occupied[more]]))
        self._front, self.stale = front, False
        return front[:most]

    def reindex(self, new_indices: Indices) -> None:
        """Replace every index by its new one; a pair whose new index is NOT_WAITING is gone."""
        indices = new_indices[np.concatenate((self._front, self._rest))]
        self._front, self._rest = _NO_INDICES, indices[indices != NOT_WAITING]


@dataclass(frozen=True, slots=True)
class Window:
    """The pairs that the next plan considers, one entry each.

    Indices, tokens, priorities, times of arrival, virtual starts, and the job in whose turn each would be served: a
    position in ``queues``.
    """

    indices: Indices
    lengths: NDArray[np.int32]
    priorities: NDArray[np.int8]
    arrived: NDArray[np.float64]
    starts: NDArray[np.float64]
    jobs: NDArray[np.intp]
    queues: list[JobQueue]


class _TenantQueues:
    """The jobs of one priority, in hierarchical fair queueing: tenants share the device, jobs their tenant's part."""

    def __init__(self) -> None:
        self._tenants: FairQueue[str] = FairQueue()
        self._jobs: dict[str, FairQueue[JobQueue]] = {}

    def add(self, queue: JobQueue) -> None:
        if queue.tenant not in self._jobs:
            self._jobs[queue.tenant] = FairQueue()
            self._tenants.add(queue.tenant)
        self._jobs[queue.tenant].add(queue)

    def remove(self, queue: JobQueue) -> None:
        jobs = self._jobs[queue.tenant]
        jobs.remove(queue)
        if not len(jobs):
            del self._jobs[queue.tenant]
            self._tenants.remove(queue.tenant, may_return=True)

    def charge(self, tokens: dict[JobQueue, float], leader: JobQueue | None, least: float) -> None:
        by_tenant: dict[str, dict[JobQueue, float]] = {}
        for queue, served in tokens.items():
            by_tenant.setdefault(queue.tenant, {})[queue] = served
        for tenant, served_jobs in by_tenant.items():
            leading_job = leader if leader is not None and leader.tenant == tenant else None
            self._jobs[tenant].charge(served_jobs, leader=leading_job, least=least if leading_job else 0)
        sums = {tenant: sum(served_jobs.values()) for tenant, served_jobs in by_tenant.items()}
        self._tenants.charge(sums, leader=leader.tenant if leader else None, least=least if leader else 0)

    def first(self, size: int) -> Iterator[tuple[float, list[tuple[float, JobQueue, int]]]]:
        """Yield per tenant its virtual start and its jobs: their starts, and how many pairs of each to consider.

        At most ``size`` pairs and ``_MOST_JOBS`` jobs, those with the earliest turns, divided evenly.
        """
        tenants = self._tenants.first(min(size, _MOST_JOBS))
        jobs = [self._jobs[tenant].first(max(1, _MOST_JOBS // len(tenants))) for _, tenant in tenants]
        waiting = [sum(queue.waiting for _, queue in queues) for queues in jobs]
        most = even_share(waiting, size)
        for (start, _), queues, pairs in zip(tenants, jobs, waiting, strict=True):
            kept = queues[: min(most, pairs)]
            each = even_share([queue.waiting for _, queue in kept], min(most, pairs))
            yield start, [(at, queue, min(each, queue.waiting)) for at, queue in kept]


class WaitingPairs(Generic[P]):
    """The queues of all jobs; a pair can be removed from anywhere in them, in constant time.

    Removing a pair clears a flag; the arrays are compacted or grown when they are full, so that each pair is moved a
    few times only.
    """

    def __init__(self) -> None:
        self._pairs: list[P | None] = []
        self._lengths = np.zeros(_SMALLEST, dtype=np.int32)
        self._arrived = np.zeros(_SMALLEST, dtype=np.float64)
        self._occupied = np.zeros(_SMALLEST, dtype=np.bool_)
        self._count = 0
        self._shared = 0
        self._queues: set[JobQueue] = set()
        self._tenants = {INTERACTIVE: _TenantQueues(), BULK: _TenantQueues()}

    def __len__(self) -> int:
        return self._count

    def add(self, queue: JobQueue, pairs: Sequence[P], now: float) -> None:
        """Queue a job's pairs in the given order, each of them once; some may wait already for another job."""
        if not pairs:
            return
        self._store([pair for pair in pairs if pair.index == NOT_WAITING], now)
        for pair in pairs:
            pair.queues.append(queue)
            self._shared += len(pair.queues) == 2
        queue.extend(np.array([pair.index for pair in pairs], dtype=np.intp))
        queue.waiting = len(pairs)
        self._queues.add(queue)
        self._tenants[queue.priority].add(queue)

    def close(self, queue: JobQueue) -> None:
        """Remove a job's queue, and those of its pairs that are in no other."""
        if queue not in self._queues:
            return
        for index in queue.peek(queue.waiting, self._occupied).tolist():
            pair = self._pairs[index]
            if pair is None:
                continue
            if len(pair.queues) == 1:
                self._remove(pair)
                continue
            self._shared -= len(pair.queues) == 2
            pair.queues.remove(queue)
        self._remove_queue(queue)

    def window(self, size: int) -> Window:
        """Return the first ``size`` pairs of each priority, some of every job."""
        queues: list[JobQueue] = []
        parts = [self._part(priority, size, queues) for priority in (INTERACTIVE, BULK)]
        indices, priorities, starts, jobs = (np.concatenate(rows) for rows in zip(*parts, strict=True))
        if self._shared:
            # A pair in several queues is served in the most urgent turn.
            order = np.lexsort((starts, -priorities))
            _, first = np.unique(indices[order], return_index=True)
            once = order[np.sort(first)]
            indices, priorities, starts, jobs = indices[once], priorities[once], starts[once], jobs[once]
        return Window(indices, self._lengths[indices], priorities, self._arrived[indices], starts, jobs, queues)

    def take(self, window: Window, chosen: NDArray[np.intp], *, led_by: int, least: float) -> list[P]:
        """Remove the chosen pairs of a window, return them in the given order, and charge their jobs for the turn.

        ``led_by`` is the priority of the batch's leader, whose job is charged for ``least`` tokens at least.
        """
        leaders = chosen[window.priorities[chosen] == led_by]
        leader = window.queues[window.jobs[leaders[np.argmin(window.starts[leaders])]]]
        served = np.bincount(window.jobs[chosen], window.lengths[chosen], minlength=len(window.queues)).tolist()
        for priority, tenants in self._tenants.items():
            tokens = {
                queue: paid
                for queue, paid in zip(window.queues, served, strict=True)
                if paid and queue.priority == priority
            }
            if tokens:
                leads = priority == led_by
                tenants.charge(tokens, leader if leads else None, least if leads else 0)
        taken = [pair for index in window.indices[chosen].tolist() if (pair := self._pairs[index]) is not None]
        for pair in taken:
            self._shared -= len(pair.queues) > 1
            for queue in pair.queues:
                queue.waiting -= 1
                if not queue.waiting:
                    self._remove_queue(queue)
            self._remove(pair)
        return taken

    def _part(
        self, priority: int, size: int, queues: list[JobQueue]
    ) -> tuple[Indices, NDArray[np.int8], NDArray[np.float64], NDArray[np.intp]]:
        """Return one priority's indices, priorities, starts and positions in ``queues``; adds its jobs to those."""
        fronts = [_NO_INDICES]
        job_starts: list[float] = []
        tenants: list[int] = []
        tenant_starts: list[float] = []
        before = len(queues)
        for start, jobs in self._tenants[priority].first(size):
            for at, queue, most in jobs:
                fronts.append(queue.peek(most, self._occupied))
                job_starts.append(at)
                tenants.append(len(tenant_starts))
                queues.append(queue)
            tenant_starts.append(start)
        indices = np.concatenate(fronts)
        jobs_of = np.repeat(np.arange(len(job_starts)), [front.size for front in fronts[1:]])
        starts = virtual_starts(self._lengths[indices], jobs_of, job_starts, tenants, tenant_starts)
        return indices, np.full(indices.size, priority, dtype=np.int8), starts, jobs_of + before

    def _remove_queue(self, queue: JobQueue) -> None:
        self._queues.remove(queue)
        self._tenants[queue.priority].remove(queue)

    def _store(self, pairs: list[P], now: float) -> None:
        self._reserve(len(pairs))
        start = len(self._pairs)
        for index, pair in enumerate(pairs, start):
            pair.index = index
        self._pairs += pairs
        new = slice(start, len(self._pairs))
        self._lengths[new] = [pair.length for pair in pairs]
        self._arrived[new] = now
        self._occupied[new] = True
        self._count += len(pairs)

    def _remove(self, pair: P) -> None:
        self._occupied[pair.index] = False
        self._pairs[pair.index] = None
        pair.index = NOT_WAITING
        for queue in pair.queues:
            queue.stale = True
        pair.queues = []
        self._count -= 1

    def _reserve(self, more: int) -> None:
        """Make the arrays hold so many pairs more, compacted where that is not so already."""
        if len(self._pairs) + more <= self._occupied.size:
            return
        kept = np.flatnonzero(self._occupied[: len(self._pairs)])
        new_indices = np.full(self._occupied.size, NOT_WAITING, dtype=np.intp)
        new_indices[kept] = np.arange(kept.size)
        size = max(_SMALLEST, 2 * (kept.size + more))
        for name in ("_lengths", "_arrived", "_occupied"):
            old = getattr(self, name)
            compacted = np.zeros(size, dtype=old.dtype)
            compacted[: kept.size] = old[kept]
            setattr(self, name, compacted)
        self._pairs = [pair for pair in self._pairs if pair is not None]
        for index, pair in enumerate(self._pairs):
            if pair is not None:
                pair.index = index
        for queue in self._queues:
            queue.reindex(new_indices)
