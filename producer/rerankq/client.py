"""The client: submit jobs, wait for rankings. One implementation, for asyncio; ``Client`` runs it in a thread."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import math
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeVar

from . import catalogue, errors
from .broker import Bells, make_app
from .contract import (
    ENDED,
    Chunk,
    DeadJob,
    JobStatus,
    Ranking,
    RerankJob,
    State,
    digest,
    job_id,
    label_of,
    parse_job,
    payload_of,
)
from .errors import JobFailed, JobRejected, JobTimedOut, JobTooLarge, JobUnknown, ModelUnknown, QueueFull, RerankqError
from .ledger import AsyncLedger, Bell, Entry, Look, Terms, WorkerInfo, breathe, calls, connect_async, line
from .placing import Place, find_place, queue_name
from .settings import Settings
from .waiting import Ears

T = TypeVar("T")
Job = RerankJob | Mapping[str, Any] | str | bytes

# Jobs and bytes of one round trip of submit_many.
SUBMIT_AT_ONCE = 300
SUBMIT_BYTES = 4_000_000
# Seconds that a look at a job may take once its caller's time is over.
LAST_LOOK_S = 1.0
# Seconds for which what the registry said is believed.
BELIEVE_S = 1.0


def terms_of(settings: Settings) -> Terms:
    """Pick what the ledger's scripts need of the settings."""
    return Terms(
        channel=settings.channel,
        result_ttl_s=settings.result_ttl_s,
        ring_window=settings.ring_window,
        max_queued_pairs=settings.max_queued_pairs,
        max_attempts=settings.max_attempts,
        lease_s=settings.lease_s,
    )


def live_for(lease_s: float) -> float:
    """Seconds without a sign of life for which a worker still counts as alive."""
    return max(10.0, 3 * lease_s)


def refuse_too_large(data: Job, settings: Settings) -> None:
    """Refuse what is over a limit by its looks, before the work of reading it is done.

    Raises:
        JobTooLarge: if it cannot be a job within ``MAX_CHUNKS`` and ``MAX_JOB_BYTES``.
        JobRejected: if it is nothing that a job could be read from.
    """
    if not isinstance(data, RerankJob | Mapping | str | bytes):
        raise JobRejected(f"expected a RerankJob, a mapping or JSON, not {type(data).__name__}", field="job")
    if isinstance(data, str | bytes):
        # JSON that escapes all but ASCII takes three bytes for one of UTF-8, at most: six for the two of an é.
        if len(data) > 3 * settings.max_job_bytes:
            raise JobTooLarge(f"{len(data)} bytes of JSON; at most {settings.max_job_bytes} are allowed", field="job")
        return
    chunks = data.chunks if isinstance(data, RerankJob) else data.get("chunks")
    count = len(chunks) if isinstance(chunks, list | tuple) else 0
    if count > settings.max_chunks:
        raise JobTooLarge(f"{count} chunks; at most {settings.max_chunks} are allowed", field="chunks")


def enter(job: RerankJob, place: Place, settings: Settings) -> Entry:
    """Check a job against the deployment's limits and write it as the ledger takes it.

    Raises:
        JobTooLarge: over ``MAX_CHUNKS`` or ``MAX_JOB_BYTES``.
        JobRejected: if it names an unknown fusion profile, or asks for what no worker can do yet.
    """
    refuse_too_large(job, settings)
    if job.long_chunks == "window":
        raise JobRejected("'window' is not available yet; use 'truncate'", field="long_chunks")
    # The numbers travel, not a profile's name: a profile edited later must not change an accepted job.
    # And the model's full name, whatever alias was used; a job that names none is for whatever is the default then.
    named = {} if job.model is None else {"model": place.model}
    resolved = job.model_copy(update={"fusion": catalogue.resolve(job.fusion, settings.conf_dir), **named})
    payload = payload_of(resolved)
    if len(payload) > settings.max_job_bytes:
        raise JobTooLarge(f"{len(payload)} bytes as JSON; at most {settings.max_job_bytes} are allowed", field="job")
    content = digest(payload)
    return Entry(
        id=job_id(job, content),
        content=content,
        queue=queue_name(job.priority, place.suffix),
        tenant=job.tenant,
        priority=job.priority,
        pairs=len(job.chunks),
        deadline_s=job.deadline_s,
        label=label_of(job, model=place.model),
        model=place.model,
        payload=payload,
        weights=place.weights,
    )


def outcome(look: Look) -> Ranking | RerankqError:
    """Say what became of an ended job: its ranking, or the error that tells why there is none."""
    status = look.status
    if look.ranking is not None:
        return look.ranking
    if status.state in {"unknown", "done"}:
        return JobUnknown(f"job {status.job_id} is not known: never submitted, forgotten, or past its time to live")
    kind = getattr(errors, look.error_type, None)
    # A worker of another version may know errors that we do not.
    if not (isinstance(kind, type) and issubclass(kind, RerankqError)):
        kind = JobFailed
    return kind(f"job {status.job_id}: {status.error or status.state}")


def _or_raise(found: Ranking | RerankqError) -> Ranking:
    if isinstance(found, RerankqError):
        raise found
    return found


def _ending(future: asyncio.Future[Look]) -> Ranking | RerankqError:
    try:
        return outcome(future.result())
    except JobFailed as error:  # this job's alone; an outage is everyone's, and goes through
        return error


class Submission:
    """One bulk submission. While a round trip is under way, the jobs of the next are checked and written.

    Every error of ours that it raises carries ``accepted``: the ids accepted until then, by all round trips.
    """

    def __init__(
        self, enter: Callable[[Job], Awaitable[Entry]], submit: Callable[[list[Entry]], asyncio.Task[list[str]]]
    ) -> None:
        self._enter = enter
        self._submit = submit
        self._accepted: list[str] = []
        self._sending: asyncio.Task[list[str]] | None = None

    async def add(self, jobs: Iterable[Job]) -> None:
        """Submit these too; the last round trip of them may still be under way."""
        entries: list[Entry] = []
        weight, since = 0, time.monotonic()
        try:
            for job in jobs:
                try:
                    entries.append(await self._enter(job))
                except RerankqError:
                    # Those before the one that is refused are accepted.
                    await self._send(entries)
                    await self._sent()
                    raise
                weight += len(entries[-1].payload)
                if weight > SUBMIT_BYTES or len(entries) >= SUBMIT_AT_ONCE:
                    await self._send(entries)
                    entries, weight = [], 0
                since = await breathe(since)
            await self._send(entries)
        except RerankqError as error:
            error.accepted = self._accepted + error.accepted
            raise

    async def end(self) -> list[str]:
        """Wait for what is under way; answer the ids of all that was accepted, in order."""
        try:
            await self._sent()
        except RerankqError as error:
            error.accepted = self._accepted + error.accepted
            raise
        return self._accepted

    async def _send(self, entries: list[Entry]) -> None:
        await self._sent()
        if entries:
            self._sending = self._submit(entries)

    async def _sent(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            # Whoever is cancelled leaves it under way: what the ledger has accepted must still be rung for.
            self._accepted += await asyncio.shield(sending)


class AsyncClient:
    """Submit rerank jobs and await their rankings; never blocks the event loop.

    Raises (every method): BrokerUnavailable if Redis does not answer.

    .. code-block:: python

        async with AsyncClient() as client:
            ranking = await client.rerank("why tides?", ["Bread rises.", "The moon pulls."])
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.terms = terms_of(self.settings)
        self._bells = Bells(make_app(self.settings))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ledger: AsyncLedger
        self._ears: Ears
        self._under_way: set[asyncio.Task[list[str]]] = set()
        self._asking: asyncio.Lock
        self._asked_at = -math.inf
        self._workers: list[WorkerInfo] = []
        self._places: dict[str | None, Place] = {}

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
        """Begin a bulk submission whose jobs come bit by bit."""
        return Submission(self._enter, self._begin_to_submit)

    async def result(self, job_id: str, timeout: float | None = None) -> Ranking:  # noqa: ASYNC109  # the contract's name
        """Wait for a job's ranking, at most *timeout* seconds.

        Raises:
            JobTimedOut, JobFailed, JobExpired, JobCancelled, JobDead, JobUnknown
        """
        if not isinstance(job_id, str):
            raise JobUnknown(f"a job's id is a string, not {job_id!r}")
        ledger, ears = self._here()
        future = ears.expect(job_id)
        try:
            async with asyncio.timeout(timeout):
                found = outcome(await future)
        except TimeoutError:
            # However short the timeout: a job that has ended is answered, unless the ledger hangs.
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_LOOK_S):
                    look = await ledger.ask(calls.look(job_id, self.terms, with_ranking=True))
                found = outcome(look)
                if look.status.state in ENDED:
                    return _or_raise(found)
            raise JobTimedOut(f"job {job_id}: no ranking within {timeout} s; it may still come") from None
        finally:
            ears.drop(job_id, future)
        return _or_raise(found)

    async def as_completed(
        self,
        job_ids: Iterable[str],
        timeout: float | None = None,  # noqa: ASYNC109  # the contract's name
    ) -> AsyncIterator[tuple[str, Ranking | RerankqError]]:
        """Yield ``(job_id, ranking or error)`` as jobs end, each id once; *timeout* (seconds) is for them all.

        Raises:
            JobTimedOut: if some have not ended by then.
        """
        ears = self._here()[1]
        ended: asyncio.Queue[str] = asyncio.Queue()
        futures = {}
        for one in dict.fromkeys(job_ids):
            futures[one] = ears.expect(one)
            futures[one].add_done_callback(partial(_announce, ended, one))
        ends_at = None if timeout is None else time.monotonic() + timeout
        try:
            while futures:
                try:
                    async with asyncio.timeout(None if ends_at is None else ends_at - time.monotonic()):
                        one = await ended.get()
                except TimeoutError:
                    raise JobTimedOut(f"{len(futures)} jobs have not ended within {timeout} s") from None
                yield one, _ending(futures.pop(one))
        finally:
            for one, future in futures.items():
                ears.drop(one, future)

    async def status(self, job_id: str) -> JobStatus:
        """Say where a job stands; a job that is not there has the state ``unknown``."""
        return (await self._here()[0].ask(calls.look(job_id, self.terms))).status

    async def cancel(self, job_id: str) -> State:
        """Cancel a job for everyone who submitted the same content; answer its state now.

        A queued job never runs, a running one stops before its next micro-batch, an ended one stays as it is.

        Raises:
            JobUnknown: if there is no such job.
        """
        state = await self._here()[0].ask(calls.cancel(job_id, self.terms))
        if state == "unknown":
            raise JobUnknown(f"job {job_id} is not known")
        return state

    async def forget(self, *job_ids: str) -> None:
        """Drop what is stored of ended jobs; those that have not ended, and dead ones, stay."""
        for answer in await self._here()[0].ask_all([calls.forget(one, self.terms) for one in job_ids]):
            if isinstance(answer, RerankqError):
                raise answer

    async def dead(self) -> list[DeadJob]:
        """List the jobs that killed their workers and were set aside, the longest dead first, without payloads."""
        ledger = self._here()[0]
        found: list[DeadJob] = []
        ids = await ledger.ask(calls.dead())
        for at in range(0, len(ids), SUBMIT_AT_ONCE):
            for answer in await ledger.ask_all([calls.record(one) for one in ids[at : at + SUBMIT_AT_ONCE]]):
                if isinstance(answer, RerankqError):
                    raise answer
                if isinstance(answer, DeadJob):
                    found.append(answer)
        return found

    async def dead_job(self, job_id: str, *, payload: bool = False) -> DeadJob:
        """Say why a dead job is dead; with its texts, if *payload*.

        Raises:
            JobUnknown: if it is not a dead job.
        """
        found = await self._here()[0].ask(calls.record(job_id, with_payload=payload))
        if not isinstance(found, DeadJob):
            raise JobUnknown(f"job {job_id} is not dead: {found}")
        return found

    async def retry(self, job_id: str) -> State:
        """Queue a dead job again, without attempts, to be taken alone; answer its state now.

        A job that is not dead stays as it is: submit it again.
        """
        answer = await self._here()[0].ask(calls.retry(job_id, self.terms))
        self._bells.ring([answer.bell] if answer.bell else [])
        return answer.state

    async def drop(self, job_id: str) -> State:
        """Forget a dead job: its id is free again. Answer the state that it was in; a job that is not dead stays."""
        return await self._here()[0].ask(calls.forget(job_id, self.terms, dead=True))

    async def rerank(
        self,
        query: str,
        chunks: Sequence[str | Chunk | Mapping[str, Any]],
        timeout: float | None = None,  # noqa: ASYNC109  # the contract's name
        **job_fields: Any,
    ) -> Ranking:
        """Submit and wait; chunks may be plain strings. Raises what :meth:`submit` and :meth:`result` raise."""
        return await self.result(await self.submit({"query": query, "chunks": chunks, **job_fields}), timeout)

    async def workers(self) -> list[WorkerInfo]:
        """List the workers that give signs of life."""
        found = await self._here()[0].workers()
        return [worker for worker in found if worker.age_s <= live_for(self.settings.lease_s)]

    async def aclose(self) -> None:
        """Ring what is left to ring and close the connections; whoever still waits gets a BrokerUnavailable."""
        await self._disconnect()
        await asyncio.to_thread(self._bells.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _disconnect(self) -> None:
        if self._loop is asyncio.get_running_loop():
            if self._under_way:
                await asyncio.wait(self._under_way)
            self._loop = None
            await self._ears.close()
            await self._ledger.redis.aclose()

    def _here(self) -> tuple[AsyncLedger, Ears]:
        # Connections belong to the loop that made them; a client that outlives its loop starts afresh.
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._ledger = AsyncLedger(connect_async(self.settings.ledger))
            self._ears = Ears(self._ledger, partial(line, self.settings.ledger), self.terms)
            self._asking = asyncio.Lock()
            self._under_way = set()
        return self._ledger, self._ears

    async def _enter(self, data: Job) -> Entry:
        refuse_too_large(data, self.settings)
        job = parse_job(data)
        return enter(job, await self._place(job), self.settings)

    def _begin_to_submit(self, entries: list[Entry]) -> asyncio.Task[list[str]]:
        task = asyncio.create_task(self._submit(entries))
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[list[str]]) -> None:
        self._under_way.discard(task)
        # Looked at: if its caller was cancelled, nobody else does.
        if not task.cancelled():
            task.exception()

    async def _submit(self, entries: list[Entry]) -> list[str]:
        answers = await self._here()[0].ask_all([calls.submit(entry, self.terms) for entry in entries])
        accepted, bells, fault = [], [], None
        for entry, answer in zip(entries, answers, strict=True):
            refused = self._refusal(entry, answer)
            if refused is not None:
                fault = fault or refused
                continue
            accepted.append(entry.id)
            if isinstance(answer, calls.Acceptance) and answer.ring:
                bells.append(Bell(entry.id, entry.queue, entry.label))
        self._bells.ring(bells)
        if fault is not None:
            fault.accepted = accepted
            raise fault
        return accepted

    def _refusal(self, entry: Entry, answer: calls.Acceptance | RerankqError) -> RerankqError | None:
        if isinstance(answer, RerankqError):
            return answer
        if answer.state == "conflict":
            return JobRejected(f"{entry.id!r} already stands for other content", field="id")
        if answer.state == "crowded":
            return QueueFull(f"the ledger's memory would be {answer.memory_percent}% full", retry_after_s=5)
        if answer.state == "full":
            excess = answer.pairs_waiting + entry.pairs - self.settings.max_queued_pairs
            pace = sum(worker.pairs_per_s for worker in self._workers)
            return QueueFull(
                f"{answer.pairs_waiting} pairs are waiting; at most {self.settings.max_queued_pairs} may",
                retry_after_s=min(60.0, max(1.0, excess / pace)) if pace else 5.0,
            )
        return None

    async def _place(self, job: RerankJob) -> Place:
        await self._ask_around(not_before=time.monotonic() - BELIEVE_S)
        name = None if job.model is None else catalogue.canonical(job.model, self.settings.conf_dir)
        try:
            return self._find(name)
        except ModelUnknown:
            # A worker may have registered this very moment.
            await self._ask_around(not_before=time.monotonic())
            return self._find(name)

    def _find(self, model: str | None) -> Place:
        if model not in self._places:
            self._places[model] = find_place(
                model,
                self._workers,
                listed=[catalogue.canonical(name, self.settings.conf_dir) for name in self.settings.models],
                default=catalogue.canonical(self.settings.default_model or self.settings.model, self.settings.conf_dir),
                live_s=live_for(self.settings.lease_s),
            )
        return self._places[model]

    async def _ask_around(self, *, not_before: float) -> None:
        """Read the registry, unless somebody did so after *not_before* already."""
        ledger = self._here()[0]
        if self._asked_at >= not_before:
            return
        async with self._asking:
            if self._asked_at < not_before:
                asked_at = time.monotonic()
                self._workers = await ledger.workers()
                self._places, self._asked_at = {}, asked_at


class Client:
    """As :class:`AsyncClient`, with methods that block; safe to share between threads.

    .. code-block:: python

        with Client() as client:
            ranking = client.rerank("why tides?", ["Bread rises.", "The moon pulls."])
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._begin()
        _OPEN.add(self)

    def _begin(self) -> None:
        self._inner = AsyncClient(self.settings)
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> str:
        """Enqueue one job, given as a model, a mapping or JSON; answer its id.

        Raises:
            JobRejected, JobTooLarge, QueueFull, ModelUnknown: and nothing was accepted.
        """
        return self._run(self._inner.submit(job))

    def submit_many(self, jobs: Iterable[Job]) -> list[str]:
        """Enqueue many jobs, a few hundred a round trip; answer their ids in order.

        Raises:
            JobRejected, JobTooLarge, QueueFull, ModelUnknown, BrokerUnavailable: ``accepted`` on the error holds the
                ids accepted until then.
        """
        submission = self._inner.submission()
        source = iter(jobs)
        # Iterated here: a slow source must not hold up the thread that serves everyone.
        while some := list(islice(source, SUBMIT_AT_ONCE)):
            self._run(submission.add(some))
        return self._run(submission.end())

    def result(self, job_id: str, timeout: float | None = None) -> Ranking:
        """Wait for a job's ranking, at most *timeout* seconds.

        Raises:
            JobTimedOut, JobFailed, JobExpired, JobCancelled, JobDead, JobUnknown
        """
        return self._run(self._inner.result(job_id, timeout))

    def as_completed(
        self, job_ids: Iterable[str], timeout: float | None = None
    ) -> Iterator[tuple[str, Ranking | RerankqError]]:
        """Yield ``(job_id, ranking or error)`` as jobs end, each id once; *timeout* (seconds) is for them all.

        Raises:
            JobTimedOut: if some have not ended by then.
        """
        endings = self._inner.as_completed(job_ids, timeout)
        try:
            while True:
                try:
                    yield self._run(anext(endings))
                except StopAsyncIteration:
                    return
        finally:
            # Not waited for: the garbage collector may bring us here, on the very thread that would have to do it.
            with suppress(RuntimeError):
                self._soon(endings.aclose())  # type: ignore[attr-defined]  # it is a generator

    def status(self, job_id: str) -> JobStatus:
        """Say where a job stands; a job that is not there has the state ``unknown``."""
        return self._run(self._inner.status(job_id))

    def cancel(self, job_id: str) -> State:
        """Cancel a job for everyone who submitted the same content; answer its state now.

        Raises:
            JobUnknown: if there is no such job.
        """
        return self._run(self._inner.cancel(job_id))

    def forget(self, *job_ids: str) -> None:
        """Drop what is stored of ended jobs; those that have not ended, and dead ones, stay."""
        self._run(self._inner.forget(*job_ids))

    def dead(self) -> list[DeadJob]:
        """List the jobs that killed their workers and were set aside, the longest dead first, without payloads."""
        return self._run(self._inner.dead())

    def dead_job(self, job_id: str, *, payload: bool = False) -> DeadJob:
        """Say why a dead job is dead; with its texts, if *payload*.

        Raises:
            JobUnknown: if it is not a dead job.
        """
        return self._run(self._inner.dead_job(job_id, payload=payload))

    def retry(self, job_id: str) -> State:
        """Queue a dead job again, without attempts, to be taken alone; answer its state now.

        A job that is not dead stays as it is: submit it again.
        """
        return self._run(self._inner.retry(job_id))

    def drop(self, job_id: str) -> State:
        """Forget a dead job: its id is free again. Answer the state that it was in; a job that is not dead stays."""
        return self._run(self._inner.drop(job_id))

    def rerank(
        self,
        query: str,
        chunks: Sequence[str | Chunk | Mapping[str, Any]],
        timeout: float | None = None,
        **job_fields: Any,
    ) -> Ranking:
        """Submit and wait; chunks may be plain strings. Raises what :meth:`submit` and :meth:`result` raise."""
        return self._run(self._inner.rerank(query, chunks, timeout, **job_fields))

    def workers(self) -> list[WorkerInfo]:
        """List the workers that give signs of life."""
        return self._run(self._inner.workers())

    def close(self) -> None:
        """Ring what is left to ring and close the connections; whoever still waits gets a BrokerUnavailable."""
        with self._starting:
            loop, self._loop = self._loop, None
            thread, self._thread = self._thread, None
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(_wind_up(self._inner), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
        # Not by the event loop: when the process ends, it can no longer hand work to other threads.
        self._inner._bells.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Awaitable[T]) -> T:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="rerankq-client", daemon=True)
                self._thread.start()
        future = self._soon(work)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C, most likely: the work must not go on behind the caller's back.
            future.cancel()
            raise

    def _soon(self, work: Awaitable[T]) -> Future[T]:
        if self._loop is None:
            msg = "the client is closed"
            raise RuntimeError(msg)
        return asyncio.run_coroutine_threadsafe(_as_coroutine(work), self._loop)


# Clients to be closed at the end of the process, and to begin anew in a forked child.
_OPEN: weakref.WeakSet[Client] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for client in list(_OPEN):
        client.close()


def _begin_anew() -> None:
    """Leave to the parent what is the parent's: thread, event loop and connections.

    Finalisers would take the parent's sockets out of the event loop's epoll, which both processes share, and the
    parent would wait for ever. So these objects stay alive to the very end: a reference too many, on purpose.
    """
    for client in list(_OPEN):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((client._inner, client._loop)))
        client._begin()


os.register_at_fork(after_in_child=_begin_anew)


def _announce(ended: asyncio.Queue[str], job_id: str, _: asyncio.Future[Look]) -> None:
    ended.put_nowait(job_id)


async def _as_coroutine(work: Awaitable[T]) -> T:
    # run_coroutine_threadsafe takes coroutines alone, and anext() of a generator is only an awaitable.
    return await work


async def _wind_up(client: AsyncClient) -> None:
    """Close, and leave nothing behind in this event loop."""
    await client._disconnect()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
