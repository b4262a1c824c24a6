"""Sends requests to one server: within its limits, again after failures, from one thread with one event loop."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

import httpx

from rerankq import __version__
from rerankq.catalogue import RemoteCard
from rerankq.contract import Priority
from rerankq.outage import Outage

from ..engine import EngineClosed
from ..engine.errors import in_one_line
from .call_queue import CallQueue
from .dialects import DIALECTS, Reply, ReplyMalformed, read_reply
from .rates import TokenBucket
from .retrying import LONGEST_ASKED_S, LONGEST_PAUSE_S, MALFORMED_TRIES, Refused, Transient, failure_of, pause_s

logger = logging.getLogger("rerankq")

# Seconds to connect; the whole of a request has a limit of its own.
CONNECT_S = 10.0
# Requests or tokens a minute that no server answers.
UNLIMITED = 1e12
# What a reply may have at most: for each text its index and score, with room for servers that send the texts back.
REPLY_BYTES, REPLY_BYTES_PER_TEXT = 1 << 20, 1 << 16
# What is read of an error; its words are quoted if that is all of it.
ERROR_BYTES = 1 << 16
# Seconds after which the last failure says nothing of the server any more, if nothing was asked of it since.
TROUBLE_S = 60.0


class Unanswered(Exception):
    """Raised when a request failed for as long as it was tried again; says how often, and what was last."""


class Call:
    """One request for some texts of a job, at their *positions*; it is ``work``'s part until :attr:`result` is there.

    ``result`` holds the reply, or raises Refused, Unanswered or EngineClosed. ``waited_s`` are the seconds until it was
    sent first, ``took_s`` those from then on.
    """

    def __init__(
        self, body: bytes, positions: list[int], *, priority: Priority, tenant: str, job: object, sender: RequestSender
    ) -> None:
        self.body = body
        self.positions = positions
        self.priority = priority
        self.tenant = tenant
        self.job = job
        self.result: Future[Reply] = Future()
        self.done_pairs = 0
        self.failures = 0
        self.malformed = 0
        self.failing_since: float | None = None
        self.made_at = time.monotonic()
        self.sent_at: float | None = None
        self.task: asyncio.Task[None] | None = None
        self._sender = sender

    @property
    def waited_s(self) -> float:
        """Seconds from when it was made until it was sent first."""
        return 0.0 if self.sent_at is None else self.sent_at - self.made_at

    def announce_end(self, ended: SimpleQueue[Call]) -> None:
        """Put it into a queue when :attr:`result` is there, or when it is cancelled."""
        self.result.add_done_callback(lambda _: ended.put(self))

    def cancel(self) -> None:
        """Stop: a request that is under way is broken off."""
        if self.result.cancel():
            self._sender.withdraw(self)

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it was cancelled."""
        with suppress(InvalidStateError):
            self.result.set_exception(error)

    def succeed(self, reply: Reply) -> None:
        """End it with a reply, unless it was cancelled."""
        self.done_pairs = len(self.positions)
        with suppress(InvalidStateError):
            self.result.set_result(reply)


@dataclass(frozen=True, slots=True)
class SenderStats:
    """What a sender did and does; times are in seconds.

    ``calls`` are those answered, ``failures`` the tries that failed; ``trouble`` says why none succeeds now, if so.
    ``oldest_s`` is the age of the oldest try under way, None without one.
    """

    calls: int = 0
    failures: int = 0
    throttled: int = 0
    pairs: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    running: int = 0
    waiting: int = 0
    oldest_s: float | None = None
    last_progress: float = 0.0
    trouble: str = ""


class RequestSender:
    """Sends calls to a server of the catalogue. Safe to share between threads; what begins with ``_`` is the loop's.

    Interactive calls go before bulk, tenants and jobs in turn. A failed call waits outside of the queue and then is the
    first of its job again, so that it takes up none of the concurrency meanwhile.
    """

    def __init__(
        self,
        card: RemoteCard,
        *,
        name: str,
        api_key: str = "",
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._card = card
        self._name = name
        self._api_key = api_key
        self._clock = clock
        self._jitter = jitter
        self._dialect = DIALECTS[card.dialect]
        self._queue: CallQueue[Call] = CallQueue()
        self._unfinished: set[Call] = set()
        self._tries: dict[asyncio.Task[None], float] = {}
        now = clock()
        self._requests = TokenBucket.per_minute(card.requests_per_minute or UNLIMITED, now=now)
        self._tokens = TokenBucket.per_minute(card.tokens_per_minute or UNLIMITED, now=now)
        self._paused_until, self._pause_kind = now, ""
        self._timer: asyncio.TimerHandle | None = None
        self._outage = Outage()
        self._trouble, self._trouble_at = "", now
        self._calls = self._failures = self._throttled = self._pairs = self._used = 0
        self._busy_s, self._busy_since = 0.0, now
        self._last_progress = now
        self._ended = False
        self._stopped: asyncio.Event
        self._client: httpx.AsyncClient
        self._loop: asyncio.AbstractEventLoop
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="rerankq-remote", daemon=True)
        self._thread.start()
        started.result()

    @property
    def alive(self) -> bool:
        """Whether its thread lives."""
        return self._thread.is_alive()

    def send(self, call: Call) -> None:
        """Let a call wait for its turn; returns at once."""
        self._unfinished.add(call)
        # Called in whichever thread ends it.
        call.result.add_done_callback(lambda _: self._unfinished.discard(call))
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._add, call)
        # Asked after the call is among the unfinished ones: either we see the end here, or the thread sees the call.
        if self._ended:
            call.fail(EngineClosed("this worker is stopping"))

    def withdraw(self, call: Call) -> None:
        """Break off a call that was cancelled."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._break_off, call)

    def close(self, timeout_s: float) -> None:
        """Break off every call, with EngineClosed, and end the thread."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(timeout_s)

    def stats(self) -> SenderStats:
        """Say what it did and does."""
        now, began = self._clock(), list(self._tries.values())
        return SenderStats(
            calls=self._calls,
            failures=self._failures,
            throttled=self._throttled,
            pairs=self._pairs,
            tokens=self._used,
            busy_s=self._busy_s + (now - self._busy_since if began else 0.0),
            running=len(began),
            waiting=max(0, len(self._unfinished) - len(began)),
            oldest_s=now - min(began) if began else None,
            last_progress=self._last_progress,
            # A server that nobody asks may be well again, and readiness must not wait for jobs that wait for readiness.
            trouble=self._trouble if self._unfinished or now - self._trouble_at < TROUBLE_S else "",
        )

    def _run(self, started: Future[None]) -> None:
        try:
            asyncio.run(self._main(started))
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
                return
            logger.exception("the thread that sends requests has ended")
        finally:
            self._ended = True
            for call in list(self._unfinished):
                call.fail(EngineClosed("this worker is stopping"))

    async def _main(self, started: Future[None]) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        key = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        async with httpx.AsyncClient(
            headers={"Content-Type": "application/json", "User-Agent": f"rerankq/{__version__}", **key},
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self._card.concurrency),
            follow_redirects=False,
        ) as self._client:
            started.set_result(None)
            await self._stopped.wait()
            for task in self._tries:
                task.cancel()
            await asyncio.gather(*self._tries, return_exceptions=True)

    def _add(self, call: Call, *, again: bool = False) -> None:
        if call.result.done():
            return
        self._queue.add(call, first=again)
        self._dispatch()

    def _dispatch(self) -> None:
        """Send what may be sent now; look again when the next may be."""
        while len(self._queue) and len(self._tries) < self._card.concurrency and not self._stopped.is_set():
            now = self._clock()
            asked_s = self._paused_until - now
            if asked_s > max(self._card.retry_for_s, LONGEST_PAUSE_S):
                # More patience than a call has: those that wait fail as the one did that was told so.
                self._queue.next().fail(Unanswered(f"{self._pause_kind} (not tried; it asks to wait {asked_s:.0f} s)"))
                continue
            wait_s = max(asked_s, self._requests.wait_s(now, need=1), self._tokens.wait_s(now), 0.0)
            if wait_s:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_later(wait_s, self._dispatch)
                return
            call = self._queue.next()
            if call.result.done():
                continue
            self._requests = self._requests.after(now, 1)
            call.sent_at = call.sent_at or now
            call.task = task = self._loop.create_task(self._try(call))
            if not self._tries:
                self._busy_since = now
            self._tries[task] = now
            task.add_done_callback(self._tried)

    def _tried(self, task: asyncio.Task[None]) -> None:
        del self._tries[task]
        if not self._tries:
            self._busy_s += self._clock() - self._busy_since
        self._dispatch()

    async def _try(self, call: Call) -> None:
        try:
            reply = await self._post(call)
        except Transient as failure:
            self._note_failure(failure)
            self._try_again(call, failure)
        except Refused as refused:
            self._failures += 1
            if refused.trouble:
                self._note_trouble(refused.trouble)
            call.fail(refused)
        except Exception as error:
            # A bug of ours fails its job alone.
            logger.exception("a request could not be made")
            call.fail(error)
        else:
            self._note_success(reply)
            call.succeed(reply)

    async def _post(self, call: Call) -> Reply:
        texts, card = len(call.positions), self._card
        try:
            async with (
                asyncio.timeout(card.timeout_s),
                self._client.stream("POST", card.url, content=call.body) as response,
            ):
                most = REPLY_BYTES + texts * REPLY_BYTES_PER_TEXT if response.is_success else ERROR_BYTES
                content = await _content(response, most)
        except TimeoutError:
            raise Transient(f"no answer within {card.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            # The classes of httpx are named for what happened: ConnectError, ReadError, RemoteProtocolError.
            raise Transient(type(error).__name__, in_one_line(error)) from None
        if not response.is_success:
            raise failure_of(
                response.status_code,
                content or b"",
                response.headers.get("retry-after"),
                secret=self._api_key,
                api_key_env=card.api_key_env,
            )
        if content is None:
            raise Transient("its reply is too long", f"more than {most} bytes", malformed=True)
        try:
            return read_reply(
                self._dialect, content, response.headers, texts=texts, probabilities=card.score == "probability"
            )
        except ReplyMalformed as error:
            raise Transient("its reply makes no sense", str(error), malformed=True) from None

    def _try_again(self, call: Call, failure: Transient) -> None:
        now = self._clock()
        call.failures += 1
        call.malformed += failure.malformed
        call.failing_since = now if call.failing_since is None else call.failing_since
        wait_s = pause_s(call.failures, failure.retry_after_s, jitter=self._jitter())
        if failure.status == 429 or failure.retry_after_s is not None:
            # It asks for less of everybody, not of this call alone.
            believed_s = min(wait_s, max(LONGEST_ASKED_S, self._card.retry_for_s))
            self._paused_until, self._pause_kind = max(self._paused_until, now + believed_s), failure.kind
        lasted_s = now - call.failing_since
        if call.malformed >= MALFORMED_TRIES or lasted_s + wait_s > self._card.retry_for_s:
            tries = f"{call.failures} tries in {lasted_s:.0f} s" if call.failures > 1 else "one try"
            asked = f"; it asks to wait {failure.retry_after_s:.6g} s" if failure.retry_after_s else ""
            self._note_trouble(failure.kind)
            call.fail(Unanswered(f"{failure} ({tries}{asked})"))
            return
        self._loop.call_later(wait_s, lambda: self._add(call, again=True))

    def _break_off(self, call: Call) -> None:
        if call.task is not None:
            call.task.cancel()

    def _note_failure(self, failure: Transient) -> None:
        self._failures += 1
        if failure.status == 429:
            self._throttled += 1
            return
        self._note_trouble(failure.kind)
        if self._outage.fails(self._clock()):
            logger.warning("%s does not answer, trying again: %s", self._name, failure.kind)

    def _note_trouble(self, kind: str) -> None:
        self._trouble, self._trouble_at = kind, self._clock()

    def _note_success(self, reply: Reply) -> None:
        now = self._clock()
        self._calls += 1
        self._pairs += len(reply.scores)
        self._used += reply.tokens
        # Spent already: a limit of tokens holds back the calls after this one.
        self._tokens = self._tokens.after(now, reply.tokens)
        self._last_progress, self._trouble = now, ""
        if (lasted_s := self._outage.works(now)) is not None:
            logger.warning("%s answers again, after %.0f s", self._name, lasted_s)


async def _content(response: httpx.Response, most: int) -> bytes | None:
    """Read a body; None if it is longer than so many bytes."""
    found = bytearray()
    async for part in response.aiter_bytes():
        found += part
        if len(found) > most:
            return None
    return bytes(found)
