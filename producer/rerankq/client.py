"""The client: submit jobs, wait for rankings. One implementation, for asyncio; ``Client`` runs it in a thread."""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
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
from .errors import (
    ClientClosed,
    ClientUnusable,
    JobFailed,
    JobRejected,
    JobTimedOut,
    JobTooLarge,
    JobUnknown,
    ModelUnknown,
    QueueFull,
    RerankqError,
    SettingsInvalid,
)
from .ledger import Bell, Entry, Look, Terms, WorkerInfo, breathe, calls
from .loop_connections import Connections
from .loop_thread import SHARED, NotServed, keep_for_ever
from .placing import Place, find_place, queue_name
from .settings import Settings
from .waiting import READ_AT_ONCE

T = TypeVar("T")
Job = RerankJob | Mapping[str, Any] | str | bytes

# Jobs and bytes of one round trip of submit_many.
SUBMIT_AT_ONCE = 300
SUBMIT_BYTES = 4_000_000
# Seconds that a look at a job may take once its caller's time is over.
LAST_LOOK_S = 1.0
# Seconds that the client's thread may take beyond what it was given, and to close a client.
SPARE_S = 1.0
CLOSED_WITHIN_S = 12.0
# States of a job of which nothing more is to come.
OVER = ENDED | {"unknown"}
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
    """See that a job's id is one that the ledger could know.

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

    @property
    def accepted(self) -> list[str]:
        """The ids of the jobs that the ledger has said to have accepted, in order."""
        return list(self._accepted)

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
    """Submit rerank jobs and await their rankings; never blocks the event loop. Safe to share between event loops.

    Takes settings, or a broker's URL with everything else from the environment; nothing: all from the environment.

    Raises (every method): BrokerUnavailable if Redis does not answer; ClientClosed once it is closed.

    .. code-block:: python

        async with AsyncClient() as client:
            ranking = await client.rerank("why tides?", ["Bread rises.", "The moon pulls."])
    """

    def __init__(self, settings: Settings | str | None = None, *, url: str | None = None) -> None:
        self.settings = settings_of(settings, url)
        self.terms = terms_of(self.settings)
        self._bells = Bells(make_app(self.settings))
        self._closed = False
        self._asked_at = -math.inf
        self._workers: list[WorkerInfo] = []
        self._places: dict[str | None, Place] = {}
        self._begin()
        _ASYNC.add(self)

    def _begin(self) -> None:
        self._by_loop: dict[asyncio.AbstractEventLoop, Connections] = {}
        self._changing = threading.RLock()
        # Collected without having been closed: its connections are of no use to anybody.
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
        """Begin a bulk submission whose jobs come bit by bit."""
        self._see_that_it_is_open()
        return Submission(self._enter, self._begin_to_submit)

    async def result(self, job_id: str, timeout: float | None = None) -> Ranking:  # noqa: ASYNC109  # the contract's name
        """Wait for a job's ranking, at most *timeout* seconds.

        Raises:
            JobTimedOut, JobFailed, JobExpired, JobCancelled, JobDead, JobUnknown
        """
        here, limit_s = self._here(), seconds_of(timeout)
        future = here.ears.expect(known_id(job_id))
        try:
            async with asyncio.timeout(limit_s):
                return _or_raise(outcome(await future))
        except TimeoutError:
            if (found := (await self._look_once_more([job_id])).get(job_id)) is not None:
                return _or_raise(found)
            raise JobTimedOut(f"job {job_id}: no ranking within {limit_s:g} s; it may still come") from None
        finally:
            here.ears.drop(job_id, future)

    def as_completed(
        self, job_ids: Iterable[str], timeout: float | None = None
    ) -> AsyncGenerator[tuple[str, Ranking | RerankqError], None]:
        """Yield ``(job_id, ranking or error)`` as jobs end, each id once; *timeout* (seconds) is for them all.

        Raises:
            JobTimedOut: if some have not ended by then.
        """
        self._see_that_it_is_open()
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
                futures[one] = here.ears.expect(known_id(one))
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
            over = await self._over(list(futures)) if futures else []
            for at in range(0, len(over), READ_AT_ONCE):
                for one, found in (await self._look_once_more(over[at : at + READ_AT_ONCE])).items():
                    here.ears.drop(one, futures.pop(one))
                    yield one, found
            if futures:
                raise JobTimedOut(f"{len(futures)} jobs have not ended within {limit_s:g} s")
        finally:
            for one, future in futures.items():
                here.ears.drop(one, future)

    async def _over(self, job_ids: list[str]) -> list[str]:
        """Pick the jobs that have ended, without their rankings: most of what is left at a timeout has not."""
        if len(job_ids) <= READ_AT_ONCE:
            return job_ids
        looks = await self._within_moments([calls.look(one, self.terms) for one in job_ids])
        return [look.status.job_id for look in looks if isinstance(look, Look) and look.status.state in OVER]

    async def _look_once_more(self, job_ids: list[str]) -> dict[str, Ranking | RerankqError]:
        """Find those that have ended: however short a timeout is, and however long this process was suspended."""
        looks = await self._within_moments([calls.look(one, self.terms, with_ranking=True) for one in job_ids])
        found: dict[str, Ranking | RerankqError] = {}
        for one, look in zip(job_ids, looks, strict=False):
            if isinstance(look, JobFailed):  # its ranking cannot be read
                found[one] = look
            elif isinstance(look, Look) and look.status.state in OVER:
                found[one] = outcome(look)
        return found

    async def _within_moments(self, wanted: Sequence[calls.Call[Look]]) -> list[Look | RerankqError]:
        """Ask without waiting in line; nothing where the ledger hangs."""
        with suppress(TimeoutError, RerankqError):
            async with asyncio.timeout(LAST_LOOK_S):
                return await self._here().ledger.ask_all(wanted)
        return []

    async def status(self, job_id: str) -> JobStatus:
        """Say where a job stands; a job that is not there has the state ``unknown``."""
        return (await self._ask(calls.look(known_id(job_id), self.terms))).status

    async def cancel(self, job_id: str) -> State:
        """Cancel a job for everyone who submitted the same content; answer its state now.

        A queued job never runs, a running one stops before its next micro-batch, an ended one stays as it is.

        Raises:
            JobUnknown: if there is no such job.
        """
        state = await self._ask(calls.cancel(known_id(job_id), self.terms))
        if state == "unknown":
            raise JobUnknown(f"job {job_id} is not known")
        return state

    async def forget(self, *job_ids: str) -> None:
        """Drop what is stored of ended jobs; those that have not ended, and dead ones, stay."""
        for answer in await self._ask_all([calls.forget(known_id(one), self.terms) for one in job_ids]):
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
        """Say why a dead job is dead; with its texts, if *payload*.

        Raises:
            JobUnknown: if it is not a dead job.
        """
        found = await self._ask(calls.record(known_id(job_id), with_payload=payload))
        if not isinstance(found, DeadJob):
            raise JobUnknown(f"job {job_id} is not dead: {found}")
        return found

    async def retry(self, job_id: str) -> State:
        """Queue a dead job again, without attempts, to be taken alone; answer its state now.

        A job that is not dead stays as it is: submit it again.
        """
        answer = await self._ask(calls.retry(known_id(job_id), self.terms))
        self._bells.ring([answer.bell] if answer.bell else [])
        return answer.state

    async def drop(self, job_id: str) -> State:
        """Forget a dead job: its id is free again. Answer the state that it was in; a job that is not dead stays."""
        return await self._ask(calls.forget(known_id(job_id), self.terms, dead=True))

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
            async with asyncio.timeout(max(limit_s, LAST_LOOK_S)):
                job_id = await self.submit(job)
        except TimeoutError:
            raise JobTimedOut(f"the ledger has not said within {limit_s:g} s that it has the job") from None
        return await self.result(job_id, limit_s - (time.monotonic() - began_at))

    async def workers(self) -> list[WorkerInfo]:
        """List the workers that give signs of life."""
        async with self._here().turn():
            found = await self._here().ledger.workers()
        return [worker for worker in found if worker.age_s <= live_for(self.settings.lease_s)]

    async def aclose(self) -> None:
        """Ring what is left to ring and close the connections; whoever still waits gets a ClientClosed."""
        await self._disconnect()
        await asyncio.to_thread(self._bells.close)

    async def __aenter__(self) -> Self:
        self._see_that_it_is_open()
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

    def _see_that_it_is_open(self) -> None:
        if self._closed:
            raise ClientClosed("the client is closed; make a new one")

    def _here(self) -> Connections:
        self._see_that_it_is_open()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ClientUnusable("AsyncClient works in event loops of asyncio alone") from None
        found = self._by_loop.get(loop)
        if found is None:
            with self._changing:
                # Loops that were closed without a word to those who had something open in them.
                ended = {each: self._by_loop.pop(each) for each in list(self._by_loop) if each.is_closed()}
                _close_all_of(ended)
                found = self._by_loop[loop] = Connections(self.settings, self.terms)
        return found

    async def _ask(self, call: calls.Call[T]) -> T:
        here = self._here()
        async with here.turn():
            return await here.ledger.ask(call)

    async def _ask_all(self, wanted: Sequence[calls.Call[T]]) -> list[T | RerankqError]:
        here = self._here()
        async with here.turn():
            return await here.ledger.ask_all(wanted)

    async def _enter(self, data: Job) -> Entry:
        refuse_too_large(data, self.settings)
        job = parse_job(data)
        return enter(job, await self._place(job), self.settings)

    def _begin_to_submit(self, entries: list[Entry]) -> asyncio.Task[list[str]]:
        here = self._here()
        task = asyncio.create_task(self._submit(entries))
        here.under_way.add(task)
        task.add_done_callback(partial(_submitted, here.under_way))
        return task

    async def _submit(self, entries: list[Entry]) -> list[str]:
        answers = await self._ask_all([calls.submit(entry, self.terms) for entry in entries])
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
        places = self._places  # another thread's event loop may put another one there
        if model not in places:
            places[model] = find_place(
                model,
                self._workers,
                listed=[catalogue.canonical(name, self.settings.conf_dir) for name in self.settings.models],
                default=catalogue.canonical(self.settings.default_model or self.settings.model, self.settings.conf_dir),
                live_s=live_for(self.settings.lease_s),
            )
        return places[model]

    async def _ask_around(self, *, not_before: float) -> None:
        """Read the registry, unless somebody did so after *not_before* already."""
        here = self._here()
        if self._asked_at >= not_before:
            return
        async with here.asking:
            if self._asked_at < not_before:
                asked_at = time.monotonic()
                async with here.turn():
                    self._workers = await here.ledger.workers()
                self._places, self._asked_at = {}, asked_at


class Client:
    """As :class:`AsyncClient`, with methods that block; safe to share between threads, and between greenlets.

    Its work is done by one thread for all clients of the process. A timeout is kept whatever becomes of that thread.

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
        return self._run(self._inner.submit(job))

    def submit_many(self, jobs: Iterable[Job]) -> list[str]:
        """Enqueue many jobs, a few hundred a round trip; answer their ids in order.

        Raises:
            JobRejected, JobTooLarge, QueueFull, ModelUnknown, BrokerUnavailable: ``accepted`` on the error holds the
                ids accepted until then.
        """
        self._see_that_it_is_open()
        submission = self._inner.submission()
        source = iter(jobs)
        try:
            # Iterated here: a slow source must not hold up the thread that serves everyone.
            while some := list(islice(source, SUBMIT_AT_ONCE)):
                self._run(submission.add(some))
            return self._run(submission.end())
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
            return self._run(self._inner.result(job_id, limit_s), _longest(limit_s))
        except NotServed:
            raise JobTimedOut(f"job {job_id}: no ranking within {limit_s:g} s; the client's thread hangs") from None

    def as_completed(
        self, job_ids: Iterable[str], timeout: float | None = None
    ) -> Iterator[tuple[str, Ranking | RerankqError]]:
        """Yield ``(job_id, ranking or error)`` as jobs end, each id once; *timeout* (seconds) is for them all.

        Raises:
            JobTimedOut: if some have not ended by then.
        """
        self._see_that_it_is_open()
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
                    yield self._run(anext(endings), _longest(left_s))
                except StopAsyncIteration:
                    return
                except NotServed:
                    raise JobTimedOut(f"not served within {limit_s:g} s; the client's thread hangs") from None
        finally:
            # Not waited for: the garbage collector may bring us here, on the very thread that would have to do it.
            if not self._closed:
                with suppress(RerankqError):
                    SHARED.serving(self).soon(endings.aclose())

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
        limit_s = seconds_of(timeout)
        try:
            return self._run(self._inner.rerank(query, chunks, limit_s, **job_fields), _longest(limit_s))
        except NotServed:
            raise JobTimedOut(f"no ranking within {limit_s:g} s; the client's thread hangs") from None

    def workers(self) -> list[WorkerInfo]:
        """List the workers that give signs of life."""
        return self._run(self._inner.workers())

    def close(self) -> None:
        """Ring what is left to ring and close the connections; whoever still waits gets a ClientClosed."""
        closed, self._closed = self._closed, True
        if not closed:
            with suppress(NotServed, RerankqError):
                self._wind_up()
            SHARED.leave(self)
        # Not by the event loop: when the process ends, it can no longer hand work to other threads.
        self._inner._bells.close()

    def _wind_up(self) -> None:
        thread = SHARED.current
        if thread is None or not self._inner._by_loop:
            self._inner._closed = True
            return
        closing = thread.soon(self._inner._disconnect())
        if not thread.is_current:
            thread.wait(closing, CLOSED_WITHIN_S)
        for future in list(self._under_way):
            future.cancel()

    def __enter__(self) -> Self:
        self._see_that_it_is_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _see_that_it_is_open(self) -> None:
        if self._closed:
            raise ClientClosed("the client is closed; make a new one")

    def _run(self, work: Awaitable[T], timeout_s: float | None = None) -> T:
        try:
            self._see_that_it_is_open()
            thread = SHARED.serving(self)
        except RerankqError:
            if isinstance(work, Coroutine):
                work.close()
            raise
        future = thread.soon(work)
        self._under_way.add(future)
        try:
            return thread.wait(future, timeout_s)
        except CancelledError:
            self._see_that_it_is_open()
            raise ClientUnusable("the thread that serves this client has ended") from None
        except BaseException:
            # Ctrl-C, most likely: the work must not go on behind the caller's back.
            with suppress(RuntimeError):
                future.cancel()
            raise
        finally:
            self._under_way.discard(future)


def _longest(limit_s: float | None) -> float | None:
    """Seconds for which the client's thread is waited for where it has *limit_s* itself, and a last look after."""
    return None if limit_s is None else limit_s + 2 * LAST_LOOK_S + SPARE_S


# Clients to be closed at the end of the process, and to begin anew in a forked child.
_OPEN: weakref.WeakSet[Client] = weakref.WeakSet()
_ASYNC: weakref.WeakSet[AsyncClient] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for client in list(_OPEN):
        client.close()


def _begin_anew() -> None:
    """Leave to the parent what is the parent's: thread, event loops and connections."""
    SHARED.begin_anew()
    for inner in list(_ASYNC):
        keep_for_ever(inner._by_loop)
        inner._begin()
    for client in list(_OPEN):
        client._under_way = set()


os.register_at_fork(after_in_child=_begin_anew)


def _submitted(under_way: set[asyncio.Task[list[str]]], task: asyncio.Task[list[str]]) -> None:
    under_way.discard(task)
    # Looked at: if its caller was cancelled, nobody else does.
    if not task.cancelled():
        task.exception()


def _close_all_of(by_loop: dict[asyncio.AbstractEventLoop, Connections]) -> None:
    while by_loop:
        by_loop.popitem()[1].close_from_elsewhere()


def _announce(ended: asyncio.Queue[str], job_id: str, _: asyncio.Future[Look]) -> None:
    ended.put_nowait(job_id)
