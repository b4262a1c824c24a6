"""Which call is sent next: interactive ones before bulk, tenants and jobs in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, Protocol, TypeVar

from rerankq.contract import Priority

#: While both wait, every so manieth call is one of bulk: interactive calls delay it and do not stop it.
BULK_EVERY = 10


class Queued(Protocol):
    """What the order depends on; ``job`` is the same for all calls of a job."""

    @property
    def priority(self) -> Priority: ...  # noqa: D102
    @property
    def tenant(self) -> str: ...  # noqa: D102
    @property
    def job(self) -> object: ...  # noqa: D102


C = TypeVar("C", bound=Queued)


class CallQueue(Generic[C]):
    """Calls that wait. Belongs to one thread.

    >>> from types import SimpleNamespace as Call
    >>> queue = CallQueue()
    >>> for name, priority, tenant in [("a", "bulk", ""), ("b", "interactive", "x"), ("c", "interactive", "x"),
    ...                                ("d", "interactive", "y")]:
    ...     queue.add(Call(name=name, priority=priority, tenant=tenant, job=name))
    >>> [queue.next().name for _ in range(len(queue))]
    ['b', 'd', 'c', 'a']
    """

    def __init__(self) -> None:
        self._waiting: dict[Priority, _Turns[C]] = {"interactive": _Turns(), "bulk": _Turns()}
        self._passed_over = 0

    def __len__(self) -> int:
        return sum(turns.calls for turns in self._waiting.values())

    def add(self, call: C, *, first: bool = False) -> None:
        """Let a call wait; *first* of its job, where it was sent before."""
        self._waiting[call.priority].add(call, first=first)

    def next(self) -> C:
        """Take out the call that is sent next; raises IndexError if none waits."""
        interactive, bulk = self._waiting["interactive"], self._waiting["bulk"]
        if bulk.calls and (not interactive.calls or self._passed_over >= BULK_EVERY - 1):
            self._passed_over = 0
            return bulk.next()
        self._passed_over += bool(bulk.calls)
        return interactive.next()


class _Turns(Generic[C]):
    """Calls of one priority: tenants take turns, and so do the jobs of a tenant."""

    def __init__(self) -> None:
        self.calls = 0
        self._tenants: OrderedDict[str, OrderedDict[object, deque[C]]] = OrderedDict()

    def add(self, call: C, *, first: bool) -> None:
        jobs = self._tenants.setdefault(call.tenant, OrderedDict())
        of_job = jobs.setdefault(call.job, deque())
        (of_job.appendleft if first else of_job.append)(call)
        self.calls += 1

    def next(self) -> C:
        if not self.calls:
            raise IndexError("no call waits")
        tenant, jobs = self._tenants.popitem(last=False)
        job, of_job = jobs.popitem(last=False)
        call = of_job.popleft()
        # To the end of the line, each, if they have more.
        if of_job:
            jobs[job] = of_job
        if jobs:
            self._tenants[tenant] = jobs
        self.calls -= 1
        return call
