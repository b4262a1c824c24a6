"""The client for asyncio: submit jobs, await rankings."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self

from .. import catalogue, errors
from ..broker.celery_app import make_app
from ..broker.doorbells import DoorbellSender
from ..contract import ENDED, Chunk, DeadJob, JobStatus, Ranking, State, parse_job
from ..errors import (
    ClientClosed,
    ClientUnusable,
    JobFailed,
    JobRejected,
    JobTimedOut,
    JobUnknown,
    ModelUnknown,
    QueueFull,
    RerankqError,
    SettingsInvalid,
)
from ..ledger import Doorbell, JobSnapshot, NewJob, calls
from ..ledger.limits import LedgerLimits
from ..ledger.registry import WorkerInfo
from ..settings import Settings
from .completions import READ_AT_ONCE
from .loop_connections import Connections
from .routing import Route, resolve_route
from .submission import SUBMIT_AT_ONCE, Job, Submission, T, prepare, refuse_too_large

# Seconds that reading a job may take once its caller's time is over.
LAST_READ_S = 1.0
# States of a job of which nothing more is to come.
FINAL = ENDED | {"unknown"}
# Seconds for which the registry is not read again.
REGISTRY_TTL_S = 1.0


def outcome(snapshot: JobSnapshot) -> Ranking | RerankqError:
    """Answer an ended job's ranking, or the error that says why there is none."""
    status = snapshot.status
    if snapshot.ranking is not None:
        return snapshot.ranking
    if status.state in {"unknown", "done"}:
        return JobUnknown(f"job {status.job_id} is not known: never submitted, forgotten, or past its time to live")
    kind = getattr(errors, snapshot.error_type, None)
    # A worker of another version may know errors that we do not.
    if not (isinstance(kind, type) and issubclass(kind, RerankqError)):
        kind = JobFailed
    return kind(f"job {status.job_id}: {status.error or status.state}")


def _or_raise(found: Ranking | RerankqError) -> Ranking:
    if isinstance(found, RerankqError):
        raise found
    return found


def _ending(future: asyncio.Future[JobSnapshot]) -> Ranking | RerankqError:
    try:
        return outcome(future.result())
    except JobFailed as error:  # of this job only; an outage concerns all, and passes through
        return error


def seconds_of(timeout: float | None) -> float | None:
    """Read a caller's timeout: seconds, not below zero; None for ever.

    Raises:
        JobRejected: if it is no number.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool | str | bytes):
        raise JobRejected(f"expected seconds, not {timeout!r}", field="timeout")
    try:
        seconds = float(timeout)
    except OverflowError:
        return None
    except (TypeError, ValueError):
        seconds = math.nan
    if math.isnan(seconds):
        raise JobRejected(f"expected seconds, not {timeout!r}", field="timeout")
    return None if seconds == math.inf else max(0.0, seconds)


def known_id(job_id: object) -> str:
    """Check that a job's id is one that the ledger could know.

    Raises:
        JobUnknown: if it is not.
    """
    try:
        if isinstance(job_id, str) and job_id.encode():
            return job_id
    except UnicodeEncodeError:
        pass
    raise JobUnknown(f"a job's id is a string that is not empty, not {job_id!r}")


def settings_of(settings: Settings | str | None, url: str | None) -> Settings:
    """Take settings as they are, or a broker's URL with everything else from the environment.

    Raises:
        SettingsInvalid: if they are neither, or both.
    """
    if url is not None and settings is not None:
        raise SettingsInvalid("give settings or a URL, not both")
    given = settings if url is None else url
    if given is None:
        return Settings()
    if isinstance(given, str):
        return Settings(broker_url=given)
    if isinstance(given, Settings):
        return given
    raise SettingsInvalid(f"expected Settings or a URL (redis://HOST:PORT/DATABASE), not {type(given).__name__}")


class AsyncClient:
    """Submit rerank jobs and await their rankings; never blocks the event loop. Safe to share between event loops.

    Takes settings, or a broker's URL with everything else from the environment; nothing: all from the environment.

    Raises (every method): BrokerUnavailable if Redis does not answer; ClientClosed once it is closed.

    .. code-block:: python

        async with AsyncClient() as client:
            ranking = await client.rerank("why tides?", ["Bread rises.", "The moon pulls."])
    """

    def __init__(self, settings: Settings | str | None = None, *, url: str | None = None) -> None:
        self.settings = settings_of(settings, url)
        self.limits = LedgerLimits.of(self.settings)
        self._doorbells = DoorbellSender(make_app(self.settings))
        self._closed = False
        self._asked_at = -math.inf
        self._workers: list[WorkerInfo] = []
        self._routes: dict[str | None, Route] = {}
        self._begin()
        _ASYNC.add(self)

    def _begin(self) -> None:
        self._by_loop: dict[asyncio.AbstractEventLoop, Connections] = {}
        self._changing = threading.RLock()
        # Garbage-collected without having been closed: nobody can use its connections.
        weakref.finalize(self, _close_all_of, self._by_loop).atexit = False

    async def submit(self, job: Job) -> str:
        """Enqueue one job, given as a model, a mapping or JSON; answer its id.

        Raises:
            JobRejected, JobTooLarge, QueueFull, ModelUnknown: and nothing was accepted.
        """
        return (await self.submit_many([job]))[0]

    async def submit_many(self, jobs: Iterable[Job]) -> list[str]:
        """Enqueue many jobs, a few hundred a round trip; answer their ids in order.

        Raises:
            JobRejected, JobTooLarge, QueueFull, ModelUnknown, BrokerUnavailable: ``accepted`` on the error holds the
                ids accepted until then.
        """
        submission = self.submission()
        await submission.add(jobs)
        return await submission.end()

    def submission(self) -> Submission:
        """Begin a bulk submission whose jobs are added step by step."""
        self._require_open()
        return Submission(self._prepare, self._begin_to_submit)

    async def result(self, job_id: str, timeout: float | None = None) -> Ranking:  # noqa: ASYNC109  # the contract's name
        """Wait for a job's ranking, at most *timeout* seconds.

        Raises:
            JobTimedOut, JobFailed, JobExpired, JobCancelled, JobDead, JobUnknown
        """
        here, limit_s = self._here(), seconds_of(timeout)
        future = here.completions.expect(known_id(job_id))
        try:
            async with asyncio.timeout(limit_s):
                return _or_raise(outcome(await future))
        except TimeoutError:
            if (found := (await self._read_once_more([job_id])).get(job_id)) is not None:
                return _or_raise(found)
            raise JobTimedOut(f"job {job_id}: no ranking within {limit_s:g} s; it may still come") from None
        finally:
            here.completions.drop(job_id, future)

    def as_completed(
        self, job_ids: Iterable[str], timeout: float | None = None
    ) -> AsyncGenerator[tuple[str, Ranking | RerankqError], None]:
        """Yield ``(job_id, ranking or error)`` as jobs end, each id once; *timeout* (seconds) is for them all.

        Raises:
            JobTimedOut: if some have not ended by then.
        """
        self._require_open()
        if isinstance(job_ids, str | bytes):
            raise JobRejected("expected several ids, not one string", field="job_ids")
        return self._as_completed(list(dict.fromkeys(job_ids)), seconds_of(timeout))

    async def _as_completed(
        self, job_ids: list[str], limit_s: float | None
    ) -> AsyncGenerator[tuple[str, Ranking | RerankqError], None]:
        here = self._here()
        ended: asyncio.Queue[str] = asyncio.Queue()
        futures = {}
        for one in job_ids:
            with suppress(JobUnknown):
                futures[one] = here.completions.expect(known_id(one))
                futures[one].add_done_callback(partial(_announce, ended, one))
        ends_at = None if limit_s is None else here.loop.time() + limit_s
        try:
            for one in job_ids:
                if one not in futures:
                    yield one, JobUnknown(f"a job's id is a string that is not empty, not {one!r}")
            while futures:
                try:
                    async with asyncio.timeout_at(ends_at):
                        one = await ended.get()
                except TimeoutError:
                    break
                yield one, _ending(futures.pop(one))
            ended_ids = await self._pick_ended(list(futures)) if futures else []
            for at in range(0, len(ended_ids), READ_AT_ONCE):
                for one, found in (await self._read_once_more(ended_ids[at : at + READ_AT_ONCE])).items():
                    here.completions.drop(one, futures.pop(one))
                    yield one, found
            if futures:
                raise JobTimedOut(f"{len(futures)} jobs have not ended within {limit_s:g} s")
        finally:
            for one, future in futures.items():
                here.completions.drop(one, future)

    async def _pick_ended(self, job_ids: list[str]) -> list[str]:
        """Pick the jobs that have ended, without their rankings: most of what is left at a timeout has not."""
        if len(job_ids) <= READ_AT_ONCE:
            return job_ids
        snapshots = await self._ask_briefly([calls.snapshot(one, self.limits) for one in job_ids])
        return [
            snapshot.status.job_id
            for snapshot in snapshots
            if isinstance(snapshot, JobSnapshot) and snapshot.status.state in FINAL
        ]

    async def _read_once_more(self, job_ids: list[str]) -> dict[str, Ranking | RerankqError]:
        """Find the jobs that have ended: however short a timeout is, and however long this process was suspended."""
        snapshots = await self._ask_briefly([calls.snapshot(one, self.limits, with_ranking=True) for one in job_ids])
        found: dict[str, Ranking | RerankqError] = {}
        for one, snapshot in zip(job_ids, snapshots, strict=False):
            if isinstance(snapshot, JobFailed):  # its ranking cannot be read
                found[one] = snapshot
            elif isinstance(snapshot, JobSnapshot) and snapshot.status.state in FINAL:
                found[one] = outcome(snapshot)
        return found

    async def _ask_briefly(self, wanted: Sequence[calls.Call[JobSnapshot]]) -> list[JobSnapshot | RerankqError]:
        """Ask without waiting for other calls; answer nothing if the ledger hangs."""
        with suppress(TimeoutError, RerankqError):
            async with asyncio.timeout(LAST_READ_S):
                return await self._here().ledger.ask_all(wanted)
        return []

    async def status(self, job_id: str) -> JobStatus:
        """Read the state of a job; a job that is not there has the state ``unknown``."""
        return (await self._ask(calls.snapshot(known_id(job_id), self.limits))).status

    async def cancel(self, job_id: str) -> State:
        """Cancel a job for everyone who submitted the same content; answer its state now.

        A queued job never runs, a running one stops before its next micro-batch, an ended one stays as it is.

        Raises:
            JobUnknown: if there is no such job.
        """
        state = await self._ask(calls.cancel(known_id(job_id), self.limits))
        if state == "unknown":
            raise JobUnknown(f"job {job_id} is not known")
        return state

    async def forget(self, *job_ids: str) -> None:
        """Drop what is stored of ended jobs; those that have not ended, and dead ones, stay."""
        for answer in await self._ask_all([calls.forget(known_id(one), self.limits) for one in job_ids]):
            if isinstance(answer, RerankqError):
                raise answer

    async def dead(self) -> list[DeadJob]:
        """List the jobs that killed their workers and were set aside, the longest dead first, without payloads."""
        found: list[DeadJob] = []
        ids = await self._ask(calls.dead())
        for at in range(0, len(ids), SUBMIT_AT_ONCE):
            for answer in await self._ask_all([calls.record(one) for one in ids[at : at + SUBMIT_AT_ONCE]]):
                if isinstance(answer, RerankqError):
                    raise answer
                if isinstance(answer, DeadJob):
                    found.append(answer)
        return found

    async def dead_job(self, job_id: str, *, payload: bool = False) -> DeadJob:
        """Show why a job is dead, with its history; with its texts, if *payload*.

        Raises:
            JobUnknown: if it is not a dead job.
        """
        found = await self._ask(calls.record(known_id(job_id), with_payload=payload))
        if not isinstance(found, DeadJob):
            raise JobUnknown(f"job {job_id} is not dead: {found}")
        return found

    async def retry_dead(self, job_id: str) -> State:
        """Queue a dead job again, without attempts, to be taken alone; answer its state now.

        A job that is not dead stays as it is: submit it again.
        """
        answer = await self._ask(calls.retry(known_id(job_id), self.limits))
        self._doorbells.send([answer.doorbell] if answer.doorbell else [])
        return answer.state

    async def drop_dead(self, job_id: str) -> State:
        """Forget a dead job: its id is free again. Answer the state that it was in; a job that is not dead stays."""
        return await self._ask(calls.forget(known_id(job_id), self.limits, dead=True))

    async def rerank(
        self,
        query: str,
        chunks: Sequence[str | Chunk | Mapping[str, Any]],
        timeout: float | None = None,  # noqa: ASYNC109  # the contract's name
        **job_fields: Any,
    ) -> Ranking:
        """Submit and wait; chunks may be plain strings. Raises what :meth:`submit` and :meth:`result` raise."""
        limit_s, began_at = seconds_of(timeout), time.monotonic()
        job = {"query": query, "chunks": chunks, **job_fields}
        if limit_s is None:
            return await self.result(await self.submit(job))
        try:
            async with asyncio.timeout(max(limit_s, LAST_READ_S)):
                job_id = await self.submit(job)
        except TimeoutError:
            raise JobTimedOut(f"the ledger has not confirmed the job within {limit_s:g} s") from None
        return await self.result(job_id, limit_s - (time.monotonic() - began_at))

    async def workers(self) -> list[WorkerInfo]:
        """List the workers that are alive."""
        live_s = self.limits.lease_policy.alive_for_s
        return [worker for worker in await self.registered_workers() if worker.age_s <= live_s]

    async def registered_workers(self) -> list[WorkerInfo]:
        """List the workers that have not signed off: those that are alive, and those that lately were."""
        async with self._here().turn():
            return await self._here().ledger.workers()

    async def backlog(self) -> dict[str, int]:
        """Count the pairs that wait: in all queues (``*``), in each, and in each for a tenant (``QUEUE|TENANT``)."""
        async with self._here().turn():
            return await self._here().ledger.backlog()

    async def recent_workers(self) -> list[WorkerInfo]:
        """List the workers that were alive a second ago at most: costs nothing most of the time."""
        await self._refresh_registry(not_before=time.monotonic() - REGISTRY_TTL_S)
        return [worker for worker in self._workers if worker.age_s <= self.limits.lease_policy.alive_for_s]

    async def load(self) -> calls.Load:
        """Count the jobs that run, wait and are dead, by queue, with the age of the oldest."""
        return await self._ask(calls.load())

    async def serving(self, model: str | None = None) -> tuple[str, list[WorkerInfo]]:
        """Name the model that ranks the jobs that name *model* (None = the default), and list its living workers.

        Raises:
            ModelUnknown: if the deployment does not have it.
        """
        found = await self._serving(model)
        if not found[1]:
            # A worker may have registered just now.
            await self._refresh_registry(not_before=time.monotonic())
            found = await self._serving(model)
        return found

    async def aclose(self) -> None:
        """Send the doorbells that are left and close the connections; whoever still waits gets a ClientClosed."""
        await self._disconnect()
        await asyncio.to_thread(self._doorbells.close)

    async def __aenter__(self) -> Self:
        self._require_open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _disconnect(self) -> None:
        self._closed = True
        with self._changing:
            here = self._by_loop.pop(asyncio.get_running_loop(), None)
            _close_all_of(self._by_loop)
        if here is not None:
            await here.close()

    def __reduce__(self) -> tuple[type[Self], tuple[Settings]]:
        # In another process, a client of the same settings.
        return type(self), (self.settings,)

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def _require_open(self) -> None:
        if self._closed:
            raise ClientClosed("the client is closed; make a new one")

    def _here(self) -> Connections:
        self._require_open()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ClientUnusable("AsyncClient works in event loops of asyncio only") from None
        found = self._by_loop.get(loop)
        if found is None:
            with self._changing:
                # Event loops that were closed while we had connections open in them.
                ended = {each: self._by_loop.pop(each) for each in list(self._by_loop) if each.is_closed()}
                _close_all_of(ended)
                found = self._by_loop[loop] = Connections(self.settings, self.limits)
        return found

    async def _ask(self, call: calls.Call[T]) -> T:
        here = self._here()
        async with here.turn():
            return await here.ledger.ask(call)

    async def _ask_all(self, wanted: Sequence[calls.Call[T]]) -> list[T | RerankqError]:
        here = self._here()
        async with here.turn():
            return await here.ledger.ask_all(wanted)

    async def _prepare(self, data: Job) -> NewJob:
        refuse_too_large(data, self.settings)
        job = parse_job(data)
        return prepare(job, await self._route_of(job.model), self.settings)

    def _begin_to_submit(self, new_jobs: list[NewJob]) -> asyncio.Task[list[str]]:
        here = self._here()
        task = asyncio.create_task(self._submit(new_jobs))
        here.under_way.add(task)
        task.add_done_callback(partial(_submitted, here.under_way))
        return task

    async def _submit(self, new_jobs: list[NewJob]) -> list[str]:
        answers = await self._ask_all([calls.submit(new_job, self.limits) for new_job in new_jobs])
        accepted, doorbells, fault = [], [], None
        for new_job, answer in zip(new_jobs, answers, strict=True):
            refused = self._refusal(new_job, answer)
            if refused is not None:
                fault = fault or refused
                continue
            accepted.append(new_job.id)
            if isinstance(answer, calls.Acceptance) and answer.send:
                doorbells.append(Doorbell(new_job.id, new_job.queue, new_job.label))
        self._doorbells.send(doorbells)
        if fault is not None:
            fault.accepted = accepted
            raise fault
        return accepted

    def _refusal(self, new_job: NewJob, answer: calls.Acceptance | RerankqError) -> RerankqError | None:
        if isinstance(answer, RerankqError):
            return answer
        if answer.state == "conflict":
            return JobRejected(f"{new_job.id!r} is already the id of a job with other content", field="id")
        if answer.state == "memory_full":
            return QueueFull(f"the ledger's memory would be {answer.memory_percent}% full", retry_after_s=5)
        if answer.state == "full":
            excess = answer.pairs_waiting + new_job.pairs - self.settings.max_queued_pairs
            pace = sum(worker.pairs_per_s for worker in self._workers)
            return QueueFull(
                f"{answer.pairs_waiting} pairs are waiting; at most {self.settings.max_queued_pairs} may",
                retry_after_s=min(60.0, max(1.0, excess / pace)) if pace else 5.0,
            )
        return None

    async def _serving(self, model: str | None) -> tuple[str, list[WorkerInfo]]:
        route = await self._route_of(model)
        live_s = self.limits.lease_policy.alive_for_s
        live = [one for one in self._workers if one.age_s <= live_s and one.queues and one.suffix == route.suffix]
        return route.model, live

    async def _route_of(self, model: str | None) -> Route:
        await self._refresh_registry(not_before=time.monotonic() - REGISTRY_TTL_S)
        name = None if model is None else catalogue.canonical(model, self.settings.conf_dir)
        try:
            return self._find_route(name)
        except ModelUnknown:
            # A worker may have registered just now.
            await self._refresh_registry(not_before=time.monotonic())
            return self._find_route(name)

    def _find_route(self, model: str | None) -> Route:
        routes = self._routes  # another thread's event loop may replace it
        if model not in routes:
            routes[model] = resolve_route(
                model,
                self._workers,
                listed=[catalogue.canonical(name, self.settings.conf_dir) for name in self.settings.models],
                default=catalogue.canonical(self.settings.default_model or self.settings.model, self.settings.conf_dir),
                live_s=self.limits.lease_policy.alive_for_s,
            )
        return routes[model]

    async def _refresh_registry(self, *, not_before: float) -> None:
        """Read the registry, unless it was read after *not_before*."""
        here = self._here()
        if self._asked_at >= not_before:
            return
        async with here.asking:
            if self._asked_at < not_before:
                asked_at = time.monotonic()
                async with here.turn():
                    self._workers = await here.ledger.workers()
                self._routes, self._asked_at = {}, asked_at


_ASYNC: weakref.WeakSet[AsyncClient] = weakref.WeakSet()


def _submitted(under_way: set[asyncio.Task[list[str]]], task: asyncio.Task[list[str]]) -> None:
    under_way.discard(task)
    # Retrieved: if its caller was cancelled, nobody else does.
    if not task.cancelled():
        task.exception()


def _close_all_of(by_loop: dict[asyncio.AbstractEventLoop, Connections]) -> None:
    while by_loop:
        by_loop.popitem()[1].close_from_elsewhere()


def _announce(ended: asyncio.Queue[str], job_id: str, _: asyncio.Future[JobSnapshot]) -> None:
    ended.put_nowait(job_id)
