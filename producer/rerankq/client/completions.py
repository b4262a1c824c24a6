"""Wait for thousands of jobs over one connection: subscribe first, read second, read again now and then."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import RedisError

from ..contract import ENDED
from ..errors import BrokerUnavailable, ClientClosed, QueueFull, RerankqError
from ..ledger import JobSnapshot, LedgerLimits, calls
from ..ledger.runner import AsyncLedger, reraise_cancelled
from ..outage import Outage

logger = logging.getLogger("rerankq")

# Seconds between readings of all that is waited for: deadlines pass without a word, and words get lost.
READ_AGAIN_S = 3.0
# Seconds to the first of them where there was no connection for words yet: it may be long in coming.
FIRST_READ_S = 0.5
# Jobs of those readings per second, at most: ten thousand waiters must not make a flood of it.
READ_AGAIN_PER_S = 1_000
# Rankings read in one round trip: bounds what is held at once, a ranking can weigh megabytes.
READ_AT_ONCE = 64
# Seconds that one such round trip may take.
READ_S = 15.0
# Channels of one command.
HEAR_AT_ONCE = 500
# Seconds to open the connection in: through Sentinel, whose dead members cost one each, with TLS and authentication.
OPEN_S = 8.0
# Seconds for a command to leave in: it does not where the other end reads no more and its window is full.
SEND_S = 5.0
# Seconds without a word before the other end is asked for one, of silence after a question that make the connection a
# dead one, and between looks at that.
ASK_S = 2.0
SILENCE_S = 5.0
LOOK_S = 1.0
# Seconds between tries to reach a ledger that is away: the first, and the longest; each is twice the one before.
TRY_AGAIN_S = 0.5
TRY_AGAIN_MOST_S = 4.0
# Tries in a row to be told of endings that must fail before that is worth a warning: rankings come all the same.
TRIES = 3
# Seconds to close in.
CLOSE_S = 2.0


class CompletionListener:
    """Hears when jobs end. Belongs to one event loop; two of its tasks serve all who wait.

    One task reads jobs, the other keeps the connection on which the ledger says that a job has ended. Neither waits
    for the other: whatever becomes of that connection, all that is waited for is read every few seconds. A job's
    channel is subscribed to before the job is read, so no ending slips between the two. An outage of the ledger only
    delays: everything is subscribed to and read again. While nobody waits, nothing is sought or asked.
    """

    def __init__(self, ledger: AsyncLedger, connect: Callable[[], AbstractConnection], limits: LedgerLimits) -> None:
        self._ledger = ledger
        self._connect = connect
        self._limits = limits
        self._waiters: dict[str, set[asyncio.Future[JobSnapshot]]] = defaultdict(set)
        self.connections: set[AbstractConnection] = set()
        self._to_hear: set[str] = set()
        self._to_leave: set[str] = set()
        self._to_read: set[str] = set()
        self._wake_reading = asyncio.Event()
        self._wake_hearing = asyncio.Event()
        self._open = False
        # Seconds of silence since the oldest question without an answer, and since the last word.
        self._silent_s: float | None = None
        self._quiet_s = 0.0
        self._heard = False
        self._reached = False
        self._away = Outage()
        self._deaf = Outage()
        self._reading: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    def expect(self, job_id: str) -> asyncio.Future[JobSnapshot]:
        """Make a future of the job's end, or of its being unknown. Give it back with :meth:`drop` in any case."""
        future: asyncio.Future[JobSnapshot] = asyncio.get_running_loop().create_future()
        if not self._waiters[job_id]:
            self._to_leave.discard(job_id)
            self._to_hear.add(job_id)
        else:
            self._to_read.add(job_id)
        self._waiters[job_id].add(future)
        self._reading = self._going_on(self._reading, self._read)
        self._hearing = self._going_on(self._hearing, self._hear)
        self._wake()
        return future

    def drop(self, job_id: str, future: asyncio.Future[JobSnapshot]) -> None:
        """Stop waiting."""
        with suppress(RuntimeError):  # its event loop may be closed already
            if not future.cancel() and not future.cancelled():
                future.exception()  # looked at: asyncio complains of exceptions that nobody sees
        waiters = self._waiters.get(job_id)
        if waiters is not None:
            waiters.discard(future)
            if not waiters:
                self._leave(job_id)

    async def close(self) -> None:
        """Stop listening, within ``CLOSE_S``; whoever still waits gets a ClientClosed."""
        self._fail_all(ClientClosed("the client was closed while waiting"))
        tasks = [task for task in (self._reading, self._hearing, self._listening) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)

    def abandon(self) -> None:
        """End without its event loop, which was closed under it."""
        for task in (self._reading, self._hearing, self._listening):
            if task is not None and not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's way to say: on purpose
                with suppress(RuntimeError):  # what awaits on its way out cannot
                    task.get_coro().close()

    def _going_on(
        self, task: asyncio.Task[None] | None, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> asyncio.Task[None]:
        if task is None or task.done():
            task = asyncio.create_task(work())
            task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        # By a bug alone. Nobody may wait for ever for that; without the other task they are only told later.
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.error("waiting for jobs broke off: %r", error)
        if task is self._reading:
            self._fail_all(BrokerUnavailable(f"waiting broke off: {error!r}"))

    def _wake(self) -> None:
        self._wake_reading.set()
        self._wake_hearing.set()

    def _leave(self, job_id: str) -> None:
        self._waiters.pop(job_id, None)
        self._to_hear.discard(job_id)
        self._to_read.discard(job_id)
        self._to_leave.add(job_id)
        self._wake_hearing.set()

    def _resolve(self, job_id: str, snapshot: JobSnapshot | RerankqError) -> None:
        for future in self._waiters.get(job_id, ()):
            if future.done():
                continue
            if isinstance(snapshot, RerankqError):
                future.set_exception(snapshot)
            else:
                future.set_result(snapshot)
        self._leave(job_id)

    def _fail_all(self, error: RerankqError) -> None:
        for job_id in list(self._waiters):
            self._resolve(job_id, type(error)(str(error)))

    # Reading

    async def _read(self) -> None:
        """Read, in batches, what may have ended, and now and then all that is waited for."""
        clock = asyncio.get_running_loop().time
        again_at, pause_s = clock() + READ_AGAIN_S, TRY_AGAIN_S
        while True:
            if not self._waiters:
                await _until(self._wake_reading)
                again_at = clock() + (READ_AGAIN_S if self._open else FIRST_READ_S)
            else:
                await _until(self._wake_reading, at=again_at)
            # By the clock, however busy it is: a job whose word was lost must not wait for a quiet moment.
            if clock() >= again_at:
                self._to_read |= self._waiters.keys()
                again_at = clock() + max(READ_AGAIN_S, len(self._waiters) / READ_AGAIN_PER_S)
            if not self._to_read:
                continue
            try:
                with reraise_cancelled():
                    await self._read_batches()
            except (RedisError, RerankqError, OSError) as error:
                self._not_read(error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, TRY_AGAIN_MOST_S)
            else:
                pause_s = TRY_AGAIN_S
                self._reached = True
                if (lasted_s := self._away.works(clock())) is not None:
                    logger.warning("the ledger answers again, after %.0f s", lasted_s)

    async def _read_batches(self) -> None:
        while self._to_read:
            batch = [self._to_read.pop() for _ in range(min(len(self._to_read), READ_AT_ONCE))]
            async with _within(READ_S):
                looks = await self._ledger.ask_all(
                    [calls.snapshot(job_id, self._limits, with_ranking=True) for job_id in batch]
                )
            for job_id, snapshot in zip(batch, looks, strict=True):
                if isinstance(snapshot, BrokerUnavailable | QueueFull):
                    raise snapshot
                if (
                    isinstance(snapshot, RerankqError)
                    or snapshot.status.state in ENDED
                    or snapshot.status.state == "unknown"
                ):
                    self._resolve(job_id, snapshot)

    def _not_read(self, error: Exception) -> None:
        if not self._reached:
            # Never reached: more likely a wrong URL than an outage. Say so instead of waiting for ever.
            self._fail_all(BrokerUnavailable(f"the ledger does not answer: {error}"))
            return
        self._to_read |= self._waiters.keys()
        self._wake_reading.set()
        if self._away.fails(asyncio.get_running_loop().time()):
            logger.warning("%d jobs are waited for, trying again: %s", len(self._waiters), error)

    # Hearing

    async def _hear(self) -> None:
        """Keep a connection as long as somebody waits, and subscribe on it to all that is waited for."""
        clock = asyncio.get_running_loop().time
        tries = 0
        while True:
            while not self._waiters:
                await _until(self._wake_hearing)
            tries, opened_at = tries + 1, clock()
            try:
                async with self._connection() as connection:
                    await self._follow(connection)
            except RuntimeError:
                raise  # of asyncio, whose event loop ends: nothing may be awaited any more
            except Exception as error:  # noqa: BLE001  # whatever redis-py raises: jobs are read meanwhile
                # One that was of use is opened again at once. One that never was (a user without rights to our
                # channels, a server that is away) is not.
                tries = 0 if self._heard else tries
                logger.info("the connection broke, subscribing again: %r", error)
                self._deafened(tries, error)
                pause_s = min(TRY_AGAIN_S * 2**tries, TRY_AGAIN_MOST_S)
                await asyncio.sleep(max(0.0, opened_at + pause_s - clock()))

    def _deafened(self, tries: int, error: Exception) -> None:
        self._to_read |= self._waiters.keys()
        self._wake_reading.set()
        # Where the ledger does not answer at all, that is said already.
        if tries >= TRIES and not self._away.lasts and self._deaf.fails(asyncio.get_running_loop().time()):
            logger.warning("no word of jobs that end, reading every %g s instead: %s", READ_AGAIN_S, error)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AbstractConnection]:
        self._heard = False
        connection = self._connect()
        self.connections.add(connection)
        try:
            async with _within(OPEN_S):
                with reraise_cancelled():
                    await connection.connect()  # type: ignore[no-untyped-call]  # of redis-py
            yield connection
        finally:
            with suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)
            self.connections.discard(connection)

    async def _follow(self, connection: AbstractConnection) -> None:
        """Subscribe and unsubscribe on it as jobs come and go, and see that somebody is at its other end."""
        clock = asyncio.get_running_loop().time
        self._to_hear |= self._waiters.keys()
        self._to_leave.clear()
        self._open, self._silent_s, self._quiet_s = True, None, 0.0
        self._listening = listening = asyncio.create_task(self._listen(connection))
        listening.add_done_callback(self._listened)
        try:
            while not listening.done():
                await self._subscribe(connection)
                await self._ask(connection)
                looked_at = clock()
                watch = self._waiters or self._silent_s is not None
                await _until(self._wake_hearing, at=looked_at + LOOK_S if watch else None)
                # At most LOOK_S: if we were suspended ourselves, the answers may be here, unread.
                self._be_silent(min(clock() - looked_at, LOOK_S))
            listening.result()
        finally:
            self._open = False
            listening.cancel()

    def _listened(self, listening: asyncio.Task[None]) -> None:
        if not listening.cancelled():
            listening.exception()  # looked at
        self._wake_hearing.set()

    async def _subscribe(self, connection: AbstractConnection) -> None:
        hear, self._to_hear = self._to_hear, set()
        leave, self._to_leave = self._to_leave, set()
        for names, command in ((leave, "UNSUBSCRIBE"), (hear, "SUBSCRIBE")):
            channels = [self._channel(job_id) for job_id in names]
            for at in range(0, len(channels), HEAR_AT_ONCE):
                await self._send(connection, command, *channels[at : at + HEAR_AT_ONCE])

    async def _ask(self, connection: AbstractConnection) -> None:
        # A connection can die without a word.
        if self._waiters and self._silent_s is None and self._quiet_s >= ASK_S:
            await self._send(connection, "PING")

    async def _send(self, connection: AbstractConnection, *words: str) -> None:
        # A connection that broke would be opened again by what we send, and nobody would listen to it.
        if not connection.is_connected:
            raise LostConnection("the connection broke")
        async with _within(SEND_S):
            with reraise_cancelled():
                await connection.send_command(*words, check_health=False)
        self._silent_s = self._silent_s or 0.0

    def _be_silent(self, seconds: float) -> None:
        self._quiet_s += seconds
        if self._silent_s is not None:
            self._silent_s += seconds
            if self._silent_s > SILENCE_S:
                raise LostConnection("the connection is silent")

    async def _listen(self, connection: AbstractConnection) -> None:
        prefix = self._channel("").encode()
        while True:
            answer = await connection.read_response()
            self._silent_s, self._quiet_s = None, 0.0
            if not self._heard:
                self._heard = self._reached = True
                self._deaf.works(0.0)
            if not isinstance(answer, list):
                continue
            kind, channel, *_ = answer
            # "subscribe": the confirmation. From here on nothing is missed, so this is the time to read.
            if kind in {b"subscribe", b"message"}:
                job_id = channel.removeprefix(prefix).decode()
                if job_id in self._waiters:
                    self._to_read.add(job_id)
                    self._wake_reading.set()

    def _channel(self, job_id: str) -> str:
        return self._limits.completion_channel(job_id)


async def _until(event: asyncio.Event, *, at: float | None = None) -> None:
    """Wait for the event, until the event loop's time *at*, and take it back."""
    with suppress(TimeoutError):
        async with asyncio.timeout_at(at):
            await event.wait()
    event.clear()


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise LostConnection(f"no answer within {seconds:g} s") from None
