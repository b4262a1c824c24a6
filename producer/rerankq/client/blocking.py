"""The client with blocking methods: one thread per process runs the client for asyncio."""

from __future__ import annotations

import atexit
import math
import os
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import Any, Self

from ..contract import Chunk, DeadJob, JobStatus, Ranking, State
from ..errors import (
    ClientClosed,
    ClientUnusable,
    JobTimedOut,
    RerankqError,
)
from ..ledger.registry import WorkerInfo
from ..settings import Settings
from .asynchronous import _ASYNC, LAST_READ_S, AsyncClient, seconds_of, settings_of
from .loop_thread import SHARED, NotServed
from .submission import SUBMIT_AT_ONCE, Job, T

# Seconds that the client's thread may take beyond what it was given, and to close a client.
SPARE_S = 1.0
CLOSED_WITHIN_S = 12.0


class Client:
    """As :class:`AsyncClient`, with methods that block; safe to share between threads, and between greenlets.

    Its work is done by one thread for all clients of the process. A timeout is kept whatever happens to that thread.

    Raises (every method): BrokerUnavailable if Redis does not answer; ClientClosed once it is closed; ClientUnusable
    where it cannot work.

    .. code-block:: python

        with Client() as client:
            ranking = client.rerank("why tides?", ["Bread rises.", "The moon pulls."])
    """

    def __init__(self, settings: Settings | str | None = None, *, url: str | None = None) -> None:
        self.settings = settings_of(settings, url)
        self._closed = False
        self._begin()
        _OPEN.add(self)

    def _begin(self) -> None:
        self._inner = AsyncClient(self.settings)
        self._under_way: set[Future[Any]] = set()

    def submit(self, job: Job) -> str:
        """Enqueue one job, given as a model, a mapping or JSON; answer its id.

        Raises:
            JobRejected, JobTooLarge, QueueFull, ModelUnknown: and nothing was accepted.
        """
        return self._run(lambda: self._inner.submit(job))

    def submit_many(self, jobs: Iterable[Job]) -> list[str]:
        """Enqueue many jobs, a few hundred a round trip; answer their ids in order.

        Raises:
            JobRejected, JobTooLarge, QueueFull, ModelUnknown, BrokerUnavailable: ``accepted`` on the error holds the
                ids accepted until then.
        """
        self._require_open()
        submission = self._inner.submission()
        source = iter(jobs)
        try:
            # Iterated here: a slow source must not hold up the thread that serves everyone.
            while some := list(islice(source, SUBMIT_AT_ONCE)):
                self._run(lambda: submission.add(some))
            return self._run(submission.end)
        except (ClientClosed, ClientUnusable) as error:
            error.accepted = error.accepted or submission.accepted
            raise

    def result(self, job_id: str, timeout: float | None = None) -> Ranking:
        """Wait for a job's ranking, at most *timeout* seconds.

        Raises:
            JobTimedOut, JobFailed, JobExpired, JobCancelled, JobDead, JobUnknown
        """
        limit_s = seconds_of(timeout)
        try:
            return self._run(lambda: self._inner.result(job_id, limit_s), _longest(limit_s))
        except NotServed:
            raise JobTimedOut(f"job {job_id}: no ranking within {limit_s:g} s; the client's thread hangs") from None

    def as_completed(
        self, job_ids: Iterable[str], timeout: float | None = None
    ) -> Iterator[tuple[str, Ranking | RerankqError]]:
        """Yield ``(job_id, ranking or error)`` as jobs end, each id once; *timeout* (seconds) is for them all.

        Raises:
            JobTimedOut: if some have not ended by then.
        """
        self._require_open()
        limit_s = seconds_of(timeout)
        return self._endings(self._inner.as_completed(job_ids, limit_s), limit_s)

    def _endings(
        self, endings: AsyncGenerator[tuple[str, Ranking | RerankqError], None], limit_s: float | None
    ) -> Iterator[tuple[str, Ranking | RerankqError]]:
        ends_at = math.inf if limit_s is None else time.monotonic() + limit_s
        try:
            while True:
                left_s = None if limit_s is None else max(0.0, ends_at - time.monotonic())
                try:
                    yield self._run(lambda: anext(endings), _longest(left_s))
                except StopAsyncIteration:
                    return
                except NotServed:
                    raise JobTimedOut(f"no answer within {limit_s:g} s; the client's thread hangs") from None
        finally:
            # Not waited for: the garbage collector may run this on the very thread that would have to do it.
            if not self._closed:
                with suppress(RerankqError):
                    SHARED.serving(self).soon(endings.aclose)

    def status(self, job_id: str) -> JobStatus:
        """Read the state of a job; a job that is not there has the state ``unknown``."""
        return self._run(lambda: self._inner.status(job_id))

    def cancel(self, job_id: str) -> State:
        """Cancel a job for everyone who submitted the same content; answer its state now.

        Raises:
            JobUnknown: if there is no such job.
        """
        return self._run(lambda: self._inner.cancel(job_id))

    def forget(self, *job_ids: str) -> None:
        """Drop what is stored of ended jobs; those that have not ended, and dead ones, stay."""
        self._run(lambda: self._inner.forget(*job_ids))

    def dead(self) -> list[DeadJob]:
        """List the jobs that killed their workers and were set aside, the longest dead first, without payloads."""
        return self._run(self._inner.dead)

    def dead_job(self, job_id: str, *, payload: bool = False) -> DeadJob:
        """Show why a job is dead, with its history; with its texts, if *payload*.

        Raises:
            JobUnknown: if it is not a dead job.
        """
        return self._run(lambda: self._inner.dead_job(job_id, payload=payload))

    def retry_dead(self, job_id: str) -> State:
        """Queue a dead job again, without attempts, to be taken alone; answer its state now.

        A job that is not dead stays as it is: submit it again.
        """
        return self._run(lambda: self._inner.retry_dead(job_id))

    def drop_dead(self, job_id: str) -> State:
        """Forget a dead job: its id is free again. Answer the state that it was in; a job that is not dead stays."""
        return self._run(lambda: self._inner.drop_dead(job_id))

    def rerank(
        self,
        query: str,
        chunks: Sequence[str | Chunk | Mapping[str, Any]],
        timeout: float | None = None,
        **job_fields: Any,
    ) -> Ranking:
        """Submit and wait; chunks may be plain strings. Raises what :meth:`submit` and :meth:`result` raise."""
        limit_s = seconds_of(timeout)
        try:
            return self._run(lambda: self._inner.rerank(query, chunks, limit_s, **job_fields), _longest(limit_s))
        except NotServed:
            raise JobTimedOut(f"no ranking within {limit_s:g} s; the client's thread hangs") from None

    def workers(self) -> list[WorkerInfo]:
        """List the workers that are alive."""
        return self._run(self._inner.workers)

    def close(self) -> None:
        """Send the doorbells that are left and close the connections; whoever still waits gets a ClientClosed."""
        closed, self._closed = self._closed, True
        if not closed:
            with suppress(NotServed, RerankqError):
                self._wind_up()
            SHARED.leave(self)
        # Not by the event loop: when the process ends, it can no longer give work to other threads.
        self._inner._doorbells.close()

    def _wind_up(self) -> None:
        thread = SHARED.current
        if thread is None or not self._inner._by_loop:
            self._inner._closed = True
            return
        closing = thread.soon(self._inner._disconnect)
        if not thread.is_current:
            thread.wait(closing, CLOSED_WITHIN_S)
        for future in list(self._under_way):
            future.cancel()

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Self], tuple[Settings]]:
        # In another process, a client of the same settings.
        return type(self), (self.settings,)

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def _require_open(self) -> None:
        if self._closed:
            raise ClientClosed("the client is closed; make a new one")

    def _run(self, call: Callable[[], Awaitable[T]], timeout_s: float | None = None) -> T:
        self._require_open()
        thread = SHARED.serving(self)
        future = thread.soon(call)
        self._under_way.add(future)
        try:
            return thread.wait(future, timeout_s)
        except CancelledError:
            self._require_open()
            raise ClientUnusable("the thread that serves this client has ended") from None
        except BaseException:
            # Ctrl-C, most likely: the work must not go on unknown to the caller.
            with suppress(RuntimeError):
                future.cancel()
            raise
        finally:
            self._under_way.discard(future)


def _longest(limit_s: float | None) -> float | None:
    """Seconds for which the client's thread is waited for: its own *limit_s*, a last reading, and some to spare."""
    return None if limit_s is None else limit_s + 2 * LAST_READ_S + SPARE_S


# Clients to be closed at the end of the process, and to begin anew in a forked child.
_OPEN: weakref.WeakSet[Client] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for client in list(_OPEN):
        client.close()


def _begin_anew() -> None:
    """Leave the parent its thread, event loops and connections."""
    SHARED.begin_anew()
    for inner in list(_ASYNC):
        inner._begin()
    for client in list(_OPEN):
        client._under_way = set()


os.register_at_fork(after_in_child=_begin_anew)
