"""Wait for thousands of jobs over one connection: subscribe first, read second, read again now and then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import RedisError

from .contract import ENDED
from .errors import BrokerUnavailable, QueueFull, RerankqError
from .ledger import AsyncLedger, Look, Terms, calls, heeded

logger = logging.getLogger("rerankq")

# Seconds between readings of all that is waited for: deadlines pass without a word, and words get lost.
READ_AGAIN_S = 3.0
# Jobs of those readings per second, at most: ten thousand waiters must not make a flood of it.
READ_AGAIN_PER_S = 1_000
# Rankings read in one round trip: bounds what is held at once, a ranking can weigh megabytes.
READ_AT_ONCE = 64
# Channels of one command.
HEAR_AT_ONCE = 500
# Seconds of silence after a question that make a line a dead one.
SILENCE_S = 10.0
# Seconds between tries to reach a ledger that is away.
TRY_AGAIN_S = 0.5


class Ears:
    """Hears when jobs end. Belongs to one event loop; two of its tasks serve all who wait.

    A job's channel is subscribed to before the job is read, so no ending slips between the two. An outage of the
    ledger only delays: everything is subscribed to and read again.
    """

    def __init__(self, ledger: AsyncLedger, dial: Callable[[], AbstractConnection], terms: Terms) -> None:
        self._ledger = ledger
        self._dial = dial
        self._terms = terms
        self._waiters: dict[str, set[asyncio.Future[Look]]] = defaultdict(set)
        self._to_hear: set[str] = set()
        self._to_leave: set[str] = set()
        self._to_read: set[str] = set()
        self._wake = asyncio.Event()
        # Written to by the reading task alone, read from by the listening one.
        self._line: AbstractConnection | None = None
        self._opened_at = 0.0
        self._pinged_at: float | None = None
        self._heard_once = False
        self._reading: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    def expect(self, job_id: str) -> asyncio.Future[Look]:
        """Make a future of the job's end, or of its being unknown. Give it back with :meth:`drop` in any case."""
        future: asyncio.Future[Look] = asyncio.get_running_loop().create_future()
        if not self._waiters[job_id]:
            self._to_leave.discard(job_id)
            self._to_hear.add(job_id)
        else:
            self._to_read.add(job_id)
        self._waiters[job_id].add(future)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
            self._reading.add_done_callback(self._reading_ended)
        self._wake.set()
        return future

    def drop(self, job_id: str, future: asyncio.Future[Look]) -> None:
        """Stop waiting."""
        if not future.cancel() and not future.cancelled():
            future.exception()  # looked at: asyncio complains of exceptions that nobody sees
        waiters = self._waiters.get(job_id)
        if waiters is not None:
            waiters.discard(future)
            if not waiters:
                self._leave(job_id)

    async def close(self) -> None:
        """Stop listening; whoever still waits gets a BrokerUnavailable."""
        self._fail_all("the client was closed while waiting")
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        await self._hang_up()

    def _leave(self, job_id: str) -> None:
        self._waiters.pop(job_id, None)
        self._to_hear.discard(job_id)
        self._to_read.discard(job_id)
        self._to_leave.add(job_id)
        self._wake.set()

    async def _read(self) -> None:
        """Subscribe, unsubscribe and read, in batches, as long as the client lives."""
        clock = asyncio.get_running_loop().time
        again_at = clock() + READ_AGAIN_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(again_at):
                    await self._wake.wait()
            self._wake.clear()
            # By the clock, however busy it is: a job whose word was lost must not wait for a quiet moment.
            time_to_ask = clock() >= again_at
            if time_to_ask:
                self._to_read |= self._waiters.keys() - self._to_hear
                again_at = clock() + max(READ_AGAIN_S, len(self._waiters) / READ_AGAIN_PER_S)
            try:
                with heeded():
                    await self._mind_the_line()
                    await self._subscribe()
                    await self._read_batches()
                    if time_to_ask:
                        await self._ask_the_line()
                self._heard_once = True
            except (RedisError, RerankqError, OSError) as error:
                await self._start_over(error)

    async def _mind_the_line(self) -> None:
        """Open it where there is none or the last one broke."""
        clock = asyncio.get_running_loop().time
        if self._listening is not None and self._listening.done():
            await self._hang_up()
            self._to_hear |= self._waiters.keys()
            # One that breaks as soon as it is opened (a user without rights to our channels) is not opened at once.
            await asyncio.sleep(max(0.0, self._opened_at + TRY_AGAIN_S - clock()))
        if self._line is None:
            self._opened_at = clock()
            self._line = self._dial()
            await self._line.connect()  # type: ignore[no-untyped-call]  # of redis-py
            self._to_leave.clear()
            self._listening = asyncio.create_task(self._listen(self._line))
            self._listening.add_done_callback(lambda _: self._wake.set())

    async def _subscribe(self) -> None:
        hear, self._to_hear = self._to_hear, set()
        leave, self._to_leave = self._to_leave, set()
        for names, command in ((leave, "UNSUBSCRIBE"), (hear, "SUBSCRIBE")):
            channels = [self._channel(job_id) for job_id in names]
            for at in range(0, len(channels), HEAR_AT_ONCE):
                await self._say(command, *channels[at : at + HEAR_AT_ONCE])

    async def _say(self, *words: str) -> None:
        # A connection that broke would be opened again by what we say, and nobody would listen to it.
        if self._line is None or not self._line.is_connected:
            raise LostConnection("the line broke")
        await self._line.send_command(*words, check_health=False)

    async def _ask_the_line(self) -> None:
        """See that somebody is at its other end: a connection can die without a word."""
        now = asyncio.get_running_loop().time()
        if self._pinged_at is None:
            self._pinged_at = now
            await self._say("PING")
        elif now - self._pinged_at > SILENCE_S:
            raise LostConnection("the line is silent")

    async def _read_batches(self) -> None:
        while self._to_read:
            batch = [self._to_read.pop() for _ in range(min(len(self._to_read), READ_AT_ONCE))]
            looks = await self._ledger.ask_all([calls.look(job_id, self._terms, with_ranking=True) for job_id in batch])
            for job_id, look in zip(batch, looks, strict=True):
                if isinstance(look, BrokerUnavailable | QueueFull):
                    raise look
                if isinstance(look, RerankqError) or look.status.state in ENDED or look.status.state == "unknown":
                    self._resolve(job_id, look)

    def _resolve(self, job_id: str, look: Look | RerankqError) -> None:
        for future in self._waiters.get(job_id, ()):
            if future.done():
                continue
            if isinstance(look, RerankqError):
                future.set_exception(look)
            else:
                future.set_result(look)
        self._leave(job_id)

    async def _listen(self, line: AbstractConnection) -> None:
        prefix = self._channel("").encode()
        while True:
            try:
                kind, channel, *_ = await line.read_response()
            except (RedisError, OSError) as error:
                logger.info("the line broke, subscribing again: %s", error)
                return
            self._pinged_at = None
            # "subscribe": the confirmation. From here on nothing is missed, so this is the time to read.
            if kind in {b"subscribe", b"message"}:
                job_id = channel.removeprefix(prefix).decode()
                if job_id in self._waiters:
                    self._to_read.add(job_id)
                    self._wake.set()

    async def _start_over(self, error: Exception) -> None:
        if not self._heard_once:
            # Never reached: more likely a wrong URL than an outage. Say so instead of waiting for ever.
            self._fail_all(f"the ledger does not answer: {error}")
            await self._hang_up()
            return
        logger.warning("the ledger does not answer, trying again: %s", error)
        await self._hang_up()
        self._to_hear |= self._waiters.keys()
        await asyncio.sleep(TRY_AGAIN_S)
        self._wake.set()

    def _fail_all(self, why: str) -> None:
        for job_id in list(self._waiters):
            self._resolve(job_id, BrokerUnavailable(why))

    def _reading_ended(self, reading: asyncio.Task[None]) -> None:
        # By a bug alone. Nobody may wait for ever for that.
        if not reading.cancelled() and (error := reading.exception()) is not None:
            self._fail_all(f"waiting broke off: {error!r}")

    async def _hang_up(self) -> None:
        line, self._line, self._pinged_at = self._line, None, None
        listening, self._listening = self._listening, None
        # The line first: we may be cancelled while we wait for the listener.
        if line is not None:
            with contextlib.suppress(RedisError, OSError):
                await line.disconnect(nowait=True)
        if listening is not None:
            listening.cancel()
            await asyncio.wait([listening])

    def _channel(self, job_id: str) -> str:
        return f"{self._terms.channel}:job:{job_id}"
