"""How long a call would wait for its ranking, as the queue's counters and its workers' pace say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..client.asynchronous import AsyncClient
from ..client.routing import queue_name
from ..contract import Priority
from ..ledger import WorkerInfo

# Seconds for which counters are not read again: calls that come together ask once.
BELIEVED_S = 0.25
# Seconds after which to come back: at least, at most, and where nothing says when.
SOONEST_S, LATEST_S, UNKNOWN_S = 1.0, 600.0, 5.0
# A call is refused at once only if its ranking would take so many times its time limit: the estimate is rough, and
# known scores cost nothing.
HOPELESS = 2.0


class ExpectedWait(NamedTuple):
    """Seconds until a call's ranking, and the pairs that are before it; None: nothing says how long."""

    seconds: float | None
    pairs: int


def expected_wait(
    backlog: Mapping[str, int], workers: Sequence[WorkerInfo], *, suffix: str, priority: Priority, tenant: str
) -> ExpectedWait:
    """Estimate how long the pairs before a new job of a tenant take.

    Interactive jobs wait for interactive ones, bulk jobs for all. Tenants take turns: one that has little waiting does
    not wait for the backlog of another.

    >>> backlog = {"rerankq.interactive": 200, "rerankq.interactive|a": 180, "rerankq.interactive|b": 20}
    >>> worker = WorkerInfo("w", "m", (), "f", ("rerankq.interactive",), 0.0, pairs_per_s=50.0)
    >>> [expected_wait(backlog, [worker], suffix="", priority="interactive", tenant=one).seconds for one in "abc"]
    [4.0, 0.8, 0.0]
    >>> expected_wait(backlog, [], suffix="", priority="interactive", tenant="a")
    ExpectedWait(seconds=None, pairs=200)
    """
    queues = [queue_name("interactive", suffix), *([queue_name("bulk", suffix)] if priority == "bulk" else [])]
    pairs = 0
    for queue in queues:
        waiting = backlog.get(queue, 0)
        tenants = sum(1 for name in backlog if name.startswith(f"{queue}|"))
        pairs += min(waiting, backlog.get(f"{queue}|{tenant}", 0) * tenants)
    pace = sum(worker.pairs_per_s for worker in workers)
    return ExpectedWait(pairs / pace if pace else None, pairs)


def retry_after_s(expected_s: float | None, *, timeout_s: float = 0.0) -> float:
    """Say when to come back, so that a ranking is there within the time limit.

    >>> retry_after_s(None), retry_after_s(90.0, timeout_s=60.0), retry_after_s(0.1), retry_after_s(1e6)
    (5.0, 30.0, 1.0, 600.0)
    """
    if expected_s is None:
        return UNKNOWN_S
    return min(LATEST_S, max(SOONEST_S, expected_s - timeout_s))


def is_hopeless(expected_s: float | None, timeout_s: float) -> bool:
    """Whether a call cannot be ranked within its time limit, beyond doubt.

    >>> is_hopeless(100, 60), is_hopeless(121, 60), is_hopeless(None, 1)
    (False, True, False)
    """
    return expected_s is not None and expected_s > HOPELESS * timeout_s


class QueueState:
    """Reads the counters, once for calls that come together.

    Raises (every method): as ``AsyncClient.backlog`` and ``serving`` do.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self._backlog: dict[str, int] = {}

    async def backlog(self) -> dict[str, int]:
        """Count the pairs that wait, as of a moment ago."""
        if time.monotonic() - self._read_at < BELIEVED_S:
            return self._backlog
        async with self._reading:
            if time.monotonic() - self._read_at >= BELIEVED_S:
                self._backlog = await self._client.backlog()
                self._read_at = time.monotonic()
        return self._backlog

    async def expected(self, model: str | None, *, priority: Priority, tenant: str) -> ExpectedWait:
        """Estimate how long a new job waits for its ranking."""
        _, workers = await self._client.serving(model)
        suffix = workers[0].suffix if workers else ""
        return expected_wait(await self.backlog(), workers, suffix=suffix, priority=priority, tenant=tenant)
