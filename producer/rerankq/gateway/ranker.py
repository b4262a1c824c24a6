"""The synchronous side of the gateway: a call becomes a job, its caller waits, and the job ends when the wait does."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request

from ..client.asynchronous import AsyncClient
from ..contract import Ranking, RerankJob
from ..errors import (
    BrokerUnavailable,
    GatewayStopping,
    JobExpired,
    JobTimedOut,
    JobUnknown,
    ModelUnknown,
    NoWorker,
    QueueFull,
    RerankqError,
)
from .hosted_models import resolve
from .queue_state import QueueState, is_hopeless, retry_after_s
from .rerank_call import (
    CallOptions,
    RerankCall,
    RerankReply,
    ScoreCall,
    first_stage_reply,
    job_of_call,
    joined,
    reply_of,
)

logger = logging.getLogger("rerankq.gateway")

T = TypeVar("T")
# Seconds after its caller's time for which a job may still be started: it is cancelled before, if the gateway lives.
DEADLINE_MARGIN_S = 1.0
# Seconds that reading the queue's state may take once a call's time is over.
LAST_LOOK_S = 0.5
# Seconds between tries to submit while the queue is full.
LONGEST_PAUSE_S = 1.0
# How often a job is submitted again that the ledger has lost.
RESUBMITTED = 3
NO_ANSWER = "the queue cannot be reached"
# Why a call that takes its first stage was not ranked, as its caller is told.
UNRANKED: dict[type[RerankqError], str] = {
    QueueFull: "too much waits already",
    NoWorker: "no worker serves the model at the moment",
}


class CallerGone(Exception):
    """Raised where the caller has closed its connection."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T], *, closing: asyncio.Event) -> T:
    """Await *work*; if the caller hangs up first, or the gateway ends (*closing*), cancel it.

    Raises:
        CallerGone: if it hung up.
        GatewayStopping: if the gateway ends.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    stopping = asyncio.create_task(closing.wait())
    try:
        await asyncio.wait({working, gone, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise CallerGone if gone.done() else GatewayStopping("the gateway is stopping; ask again")
    finally:
        gone.cancel()
        stopping.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working


async def _gone(request: Request) -> None:
    # The body has been read: what comes next is the end of the connection.
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Waiters:
    """Who waits for which job in this process: a job is not cancelled while somebody else waits for it."""

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()

    @contextmanager
    def waiting(self, job_id: str) -> Iterator[None]:
        """Count one more for as long as the block lasts."""
        self._waiting[job_id] += 1
        try:
            yield
        finally:
            self._waiting[job_id] -= 1
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def __getitem__(self, job_id: str) -> int:
        return self._waiting[job_id]

    def __len__(self) -> int:
        return self._waiting.total()


class Ranker:
    """Ranks calls through the queue.

    Each call has a job of its own, so that its end disturbs nobody; equal pairs are still computed once.
    """

    def __init__(self, client: AsyncClient, *, timeout_s: float) -> None:
        self.client = client
        self.waiters = Waiters()
        self.queue = QueueState(client)
        self._timeout_s = timeout_s
        self._cancelling: set[asyncio.Task[None]] = set()
        #: Set when the gateway ends: who still waits is told to ask again.
        self.closing = asyncio.Event()

    async def rank(
        self, call: RerankCall | ScoreCall, options: CallOptions, *, began: float | None = None
    ) -> RerankReply:
        """Rank a call's documents; with several queries, by a job for each.

        *began* is when the caller's time began, by the monotonic clock; now, unless it waited for something before.

        Raises:
            JobTimedOut: after the caller's time, with ``job_id``; the job was cancelled unless somebody waits for it.
            NoWorker: if no worker serves the model.
            QueueFull: before it is submitted, if so much waits that it cannot be ranked within the caller's time.
            BrokerUnavailable: if the ledger does not answer. This and the three above: unless the caller takes its
                first stage instead.
            RerankqError: as ``AsyncClient.submit`` and ``result`` do.
        """
        ends_at = (time.monotonic() if began is None else began) + self.time_of(options)
        if isinstance(call, RerankCall):
            return await self._rank_one(call, options, ends_at)
        ranking = [asyncio.create_task(self._rank_one(one, options, ends_at)) for one in call.calls]
        try:
            return joined(call, await asyncio.gather(*ranking))
        finally:
            for task in ranking:
                task.cancel()

    def time_of(self, options: CallOptions) -> float:
        """Seconds that a call has."""
        return self._timeout_s if options.timeout_s is None else options.timeout_s

    async def _rank_one(self, call: RerankCall, options: CallOptions, ends_at: float) -> RerankReply:
        left_s, job_id = max(0.0, ends_at - time.monotonic()), f"call-{secrets.token_hex(16)}"
        job, model = None, ""
        try:
            # Whatever it waits for: a ledger that hangs, room in the queue, its ranking.
            async with asyncio.timeout(left_s + LAST_LOOK_S):
                call, options, model = await self._resolved(call, options)
                job = job_of_call(call, options, job_id=job_id, timeout_s=left_s + DEADLINE_MARGIN_S)
                if job is None:
                    nothing = Ranking(job_id="", model={"name": model, "fingerprint": ""}, chunks=[])
                    return replace(reply_of(call, options, nothing), call_id=job_id)
                return reply_of(call, options, await self._ranking(job, options, ends_at))
        except (TimeoutError, JobTimedOut, JobExpired):
            self._cancel(job_id)
            if options.on_timeout == "first-stage":
                return first_stage_reply(call, job_id=job_id, model=model or call.model or "")
            message = f"job {job_id}: no ranking within {self.time_of(options):g} s; it was cancelled"
            raise JobTimedOut(message, job_id=job_id, retry_after_s=await self._time_for(job)) from None
        except (QueueFull, NoWorker, BrokerUnavailable) as error:
            # It may have been accepted, where the answer was lost.
            self._cancel(job_id)
            if options.on_timeout == "error":
                raise
            return first_stage_reply(
                call, job_id=job_id, model=model or call.model or "", why=UNRANKED.get(type(error), NO_ANSWER)
            )
        except asyncio.CancelledError:
            # Its caller hung up; the job may have been accepted, or be about to be.
            self._cancel(job_id)
            raise

    async def _ranking(self, job: RerankJob, options: CallOptions, ends_at: float) -> Ranking:
        job_id, tries = job.id or "", 0
        while True:
            left_s = max(0.0, ends_at - time.monotonic())
            async with asyncio.timeout(left_s):
                await self._refuse_hopeless(job, options, left_s)
                await self._submit(job, ends_at=ends_at)
            with self.waiters.waiting(job_id):
                try:
                    return await self.client.result(job_id, max(0.0, ends_at - time.monotonic()))
                except JobUnknown:
                    # The ledger was started again without its data; the call is here.
                    tries += 1
                    if tries > RESUBMITTED:
                        raise BrokerUnavailable(f"the ledger has lost job {job_id}") from None

    async def _submit(self, job: RerankJob, *, ends_at: float) -> None:
        """Submit a job; while the queue is full, wait for room here.

        Raises:
            QueueFull: if there will be none in the caller's time.
        """
        while True:
            try:
                await self.client.submit(job)
            except QueueFull as full:
                left_s = ends_at - time.monotonic()
                if full.retry_after_s > left_s:
                    raise
                # Not all at the same moment.
                await asyncio.sleep(min(full.retry_after_s, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0))  # noqa: S311
            else:
                return

    async def refuse_if_full(self, options: CallOptions, *, within_s: float | None = None) -> None:
        """Refuse a call before its body is read, if the queue is full for longer than the call has time.

        *within_s* is what is left of the caller's time; all of it, unless it is given.

        Raises:
            QueueFull: says when to come back.
            JobTimedOut: if the ledger does not answer *within_s* seconds.
        """
        if options.on_timeout == "first-stage":
            return
        try:
            async with asyncio.timeout(within_s):
                await self._refuse_if_full(self.time_of(options) if within_s is None else within_s)
        except TimeoutError:
            message = f"the queue did not answer within {self.time_of(options):g} s"
            raise JobTimedOut(message, retry_after_s=retry_after_s(None)) from None

    async def _refuse_if_full(self, timeout_s: float) -> None:
        excess = (await self.queue.backlog()).get("*", 0) - self.client.settings.max_queued_pairs
        if excess < 0:
            return
        pace = sum(worker.pairs_per_s for worker in (await self.client.serving())[1])
        expected_s = excess / pace if pace else None
        # As long as no worker has said how fast it is, there may be room in time.
        if expected_s is not None and expected_s > timeout_s:
            message = f"{excess + self.client.settings.max_queued_pairs} pairs are waiting, and no more may"
            raise QueueFull(message, retry_after_s=retry_after_s(expected_s, timeout_s=timeout_s))

    async def _refuse_hopeless(self, job: RerankJob, options: CallOptions, timeout_s: float) -> None:
        """Refuse a call whose time cannot suffice, unless it takes its first stage then.

        Raises:
            QueueFull: says when to come back.
        """
        if options.on_timeout == "first-stage":
            return
        expected_s, pairs = await self.queue.expected(job.model, priority=job.priority, tenant=job.tenant)
        if is_hopeless(expected_s, timeout_s):
            message = f"{pairs} pairs are waiting, about {expected_s:.0f} s of work; this call has {timeout_s:g} s"
            raise QueueFull(message, retry_after_s=retry_after_s(expected_s, timeout_s=timeout_s))

    async def _time_for(self, job: RerankJob | None) -> float:
        """Say in how many seconds a job that came too late would be ranked."""
        expected_s = None
        if job is not None:
            with suppress(RerankqError, TimeoutError):
                async with asyncio.timeout(LAST_LOOK_S):
                    expected = await self.queue.expected(job.model, priority=job.priority, tenant=job.tenant)
                    expected_s = expected.seconds
        return retry_after_s(expected_s)

    async def _resolved(self, call: RerankCall, options: CallOptions) -> tuple[RerankCall, CallOptions, str]:
        """Say what a call means here, and the full name of the model that will rank it.

        Raises:
            NoWorker: if the deployment has the model, and no worker serves it now.
            ModelUnknown: if it does not have it.
            JobRejected: if there is no such fusion profile.
        """
        found = resolve(call, options, await self.client.recent_workers(), self.client.settings)
        # What is wrong with it is said whether there is a worker or not.
        job_of_call(*found, job_id="-", timeout_s=1.0)
        try:
            return *found, await self._require_worker(found[0].model)
        except (NoWorker, ModelUnknown):
            # The registry was read again: the name may be a way to write that of a worker that came just now.
            again = resolve(call, options, await self.client.recent_workers(), self.client.settings)
            if again[0].model == found[0].model:
                raise
            return *again, await self._require_worker(again[0].model)

    async def _require_worker(self, model: str | None) -> str:
        """Answer the full name of the model that will rank the call.

        Raises:
            NoWorker: if the deployment has it, and no worker serves it now.
            ModelUnknown: if it does not have it.
        """
        name, live = await self.client.serving(model)
        if not live:
            raise NoWorker(f"no worker serves {name!r} at the moment")
        return name

    def _cancel(self, job_id: str) -> None:
        """Cancel a job that nobody waits for, beside the caller's own end."""
        if self.waiters[job_id]:
            return
        task = asyncio.create_task(self._cancel_quietly(job_id))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel_quietly(self, job_id: str) -> None:
        try:
            await self.client.cancel(job_id)
        except RerankqError as error:
            # Its deadline ends it.
            logger.info("cannot cancel job %s: %s", job_id, error)

    async def aclose(self) -> None:
        """Wait for cancellations under way."""
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=2.0)
