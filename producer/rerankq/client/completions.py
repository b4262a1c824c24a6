"""Wait for thousands of jobs over one connection: subscribe first, read second, and read again every few seconds."""

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

# Seconds between readings of all that is waited for: deadlines pass without a message, and messages get lost.
READ_AGAIN_S = 3.0
# Seconds to the first of them if no connection for messages is open yet: opening it may take long.
FIRST_READ_S = 0.5
# Jobs of those readings per second, at most: ten thousand waiters must not make a flood of it.
READ_AGAIN_PER_S = 1_000
# Rankings read in one round trip: bounds what is held at once, a ranking can weigh megabytes.
READ_AT_ONCE = 64
# Seconds that one such round trip may take.
READ_S = 15.0
# Channels of one command.
CHANNELS_AT_ONCE = 500
# Seconds to open the connection in: through Sentinel, whose dead members cost one each, with TLS and authentication.
OPEN_S = 8.0
# Seconds for a command to be written: it cannot be if the server reads no more and the TCP window is full.
SEND_S = 5.0
# Seconds without a message before the server is pinged, without an answer before the connection counts as dead, and
# between checks of both.
PING_AFTER_S = 2.0
SILENCE_S = 5.0
CHECK_S = 1.0
# Seconds between tries to reach a ledger that is away: the first, and the longest; each is twice the one before.
TRY_AGAIN_S = 0.5
TRY_AGAIN_MAX_S = 4.0
# Failures to subscribe in a row before that is worth a warning: rankings come all the same.
TRIES = 3
# Seconds to close in.
CLOSE_S = 2.0


class CompletionListener:
    """Learns when jobs end. Belongs to one event loop; two of its tasks serve all waiters.

    One task reads jobs, the other keeps the connection on which the ledger publishes that a job has ended. Neither
    waits for the other: whatever happens to that connection, all jobs that are waited for are read every few seconds.
    A job's channel is subscribed to before the job is read, so no ending is missed between the two. An outage of the
    ledger only delays: everything is subscribed to and read again. Without waiters, nothing is connected or read.
    """

    def __init__(self, ledger: AsyncLedger, connect: Callable[[], AbstractConnection], limits: LedgerLimits) -> None:
        self._ledger = ledger
        self._connect = connect
        self._limits = limits
        self._waiters: dict[str, set[asyncio.Future[JobSnapshot]]] = defaultdict(set)
        self.connections: set[AbstractConnection] = set()
        self._to_subscribe: set[str] = set()
        self._to_unsubscribe: set[str] = set()
        self._to_read: set[str] = set()
        self._wake_reading = asyncio.Event()
        self._wake_subscribing = asyncio.Event()
        self._connected = False
        # Seconds since the oldest command that has no answer yet, and since the last message.
        self._unanswered_s: float | None = None
        self._quiet_s = 0.0
        self._received = False
        #: Whether the ledger has answered anything here, whoever asked.
        self.reached = False
        self._read_since_first_failure = False
        self._ledger_outage = Outage()
        self._subscription_outage = Outage()
        self._reading: asyncio.Task[None] | None = None
        self._subscribing: asyncio.Task[None] | None = None
        self._receiving: asyncio.Task[None] | None = None

    def expect(self, job_id: str) -> asyncio.Future[JobSnapshot]:
        """Make a future of the job's end, or of its being unknown. Give it back with :meth:`drop` in any case."""
        future: asyncio.Future[JobSnapshot] = asyncio.get_running_loop().create_future()
        if not self._waiters[job_id]:
            self._to_unsubscribe.discard(job_id)
            self._to_subscribe.add(job_id)
        else:
            self._to_read.add(job_id)
        self._waiters[job_id].add(future)
        self._reading = self._ensure_running(self._reading, self._read)
        self._subscribing = self._ensure_running(self._subscribing, self._stay_subscribed)
        self._wake()
        return future

    def drop(self, job_id: str, future: asyncio.Future[JobSnapshot]) -> None:
        """Stop waiting."""
        with suppress(RuntimeError):  # its event loop may be closed already
            if not future.cancel() and not future.cancelled():
                future.exception()  # retrieved: asyncio logs exceptions that nobody retrieves
        waiters = self._waiters.get(job_id)
        if waiters is not None:
            waiters.discard(future)
            if not waiters:
                self._forget(job_id)

    async def close(self) -> None:
        """Stop receiving, within ``CLOSE_S``; whoever still waits gets a ClientClosed."""
        self._fail_all(ClientClosed("the client was closed while waiting"))
        tasks = [task for task in (self._reading, self._subscribing, self._receiving) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)

    def abandon(self) -> None:
        """End without its event loop, which was closed under it."""
        for task in (self._reading, self._subscribing, self._receiving):
            if task is not None and not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's way to say: on purpose
                with suppress(RuntimeError):  # what awaits on its way out cannot
                    task.get_coro().close()

    def _ensure_running(
        self, task: asyncio.Task[None] | None, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> asyncio.Task[None]:
        if task is None or task.done():
            task = asyncio.create_task(work())
            task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        # Only by a bug. Waiters must not wait for ever then; without the other task they only learn later.
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.error("waiting for jobs failed: %r", error)
        if task is self._reading:
            self._fail_all(BrokerUnavailable(f"waiting failed: {error!r}"))

    def _wake(self) -> None:
        self._wake_reading.set()
        self._wake_subscribing.set()

    def _forget(self, job_id: str) -> None:
        self._waiters.pop(job_id, None)
        self._to_subscribe.discard(job_id)
        self._to_read.discard(job_id)
        self._to_unsubscribe.add(job_id)
        self._wake_subscribing.set()

    def _resolve(self, job_id: str, snapshot: JobSnapshot | RerankqError) -> None:
        for future in self._waiters.get(job_id, ()):
            if future.done():
                continue
            if isinstance(snapshot, RerankqError):
                future.set_exception(snapshot)
            else:
                future.set_result(snapshot)
        self._forget(job_id)

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
                again_at = clock() + (READ_AGAIN_S if self._connected else FIRST_READ_S)
            else:
                await _until(self._wake_reading, at=again_at)
            # By the clock, however busy it is: a job whose message was lost must not wait for a quiet moment.
            if clock() >= again_at:
                self._to_read |= self._waiters.keys()
                again_at = clock() + max(READ_AGAIN_S, len(self._waiters) / READ_AGAIN_PER_S)
            if not self._to_read:
                continue
            try:
                with reraise_cancelled():
                    await self._read_batches()
            except (RedisError, RerankqError, OSError) as error:
                self._reading_failed(error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, TRY_AGAIN_MAX_S)
            else:
                pause_s = TRY_AGAIN_S
                self.reached = self._read_since_first_failure = True
                if (lasted_s := self._ledger_outage.works(clock())) is not None:
                    logger.warning("the ledger answers again, after %.0f s", lasted_s)

    async def _read_batches(self) -> None:
        while self._to_read:
            batch = [self._to_read.pop() for _ in range(min(len(self._to_read), READ_AT_ONCE))]
            async with _within(READ_S):
                snapshots = await self._ledger.ask_all(
                    [calls.snapshot(job_id, self._limits, with_ranking=True) for job_id in batch]
                )
            for job_id, snapshot in zip(batch, snapshots, strict=True):
                if isinstance(snapshot, BrokerUnavailable | QueueFull):
                    raise snapshot
                if (
                    isinstance(snapshot, RerankqError)
                    or snapshot.status.state in ENDED
                    or snapshot.status.state == "unknown"
                ):
                    self._resolve(job_id, snapshot)

    def _reading_failed(self, error: Exception) -> None:
        if not self.reached:
            # Never reached: more likely a wrong URL than an outage. Raise instead of waiting for ever.
            self._fail_all(BrokerUnavailable(f"the ledger does not answer: {error}"))
            return
        self._to_read |= self._waiters.keys()
        self._wake_reading.set()
        if self._ledger_outage.fails(asyncio.get_running_loop().time()):
            logger.warning("waiting for %d jobs, trying again: %s", len(self._waiters), error)

    # Subscribing

    async def _stay_subscribed(self) -> None:
        """Keep a connection as long as somebody waits, and subscribe on it to all that is waited for."""
        clock = asyncio.get_running_loop().time
        tries = 0
        while True:
            while not self._waiters:
                await _until(self._wake_subscribing)
            tries, opened_at = tries + 1, clock()
            try:
                async with self._connection() as connection:
                    await self._serve(connection)
            except RuntimeError:
                raise  # of asyncio, whose event loop ends: nothing may be awaited any more
            except Exception as error:  # noqa: BLE001  # whatever redis-py raises: jobs are read meanwhile
                # One that received something is opened again at once; one that never did (a user without rights to
                # our channels, a server that is away) is not.
                tries = 0 if self._received else tries
                logger.info("the connection was lost, subscribing again: %r", error)
                self._connection_failed(tries, error)
                pause_s = min(TRY_AGAIN_S * 2**tries, TRY_AGAIN_MAX_S)
                await asyncio.sleep(max(0.0, opened_at + pause_s - clock()))

    def _connection_failed(self, tries: int, error: Exception) -> None:
        self._read_since_first_failure = self._read_since_first_failure and tries > 1
        self._to_read |= self._waiters.keys()
        self._wake_reading.set()
        # If the ledger does not answer at all, that is logged already, or will be: a reader may take longer to tell.
        if (
            tries >= TRIES
            and self._read_since_first_failure
            and not self._ledger_outage.lasts
            and self._subscription_outage.fails(asyncio.get_running_loop().time())
        ):
            logger.warning("no messages about ended jobs, reading jobs every %g s instead: %s", READ_AGAIN_S, error)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AbstractConnection]:
        self._received = False
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

    async def _serve(self, connection: AbstractConnection) -> None:
        """Subscribe and unsubscribe on it as jobs come and go, and check that the server still answers."""
        clock = asyncio.get_running_loop().time
        self._to_subscribe |= self._waiters.keys()
        self._to_unsubscribe.clear()
        self._connected, self._unanswered_s, self._quiet_s = True, None, 0.0
        self._receiving = receiving = asyncio.create_task(self._receive(connection))
        receiving.add_done_callback(self._receiving_ended)
        try:
            while not receiving.done():
                await self._subscribe(connection)
                await self._ping_if_quiet(connection)
                slept_at = clock()
                watch = self._waiters or self._unanswered_s is not None
                await _until(self._wake_subscribing, at=slept_at + CHECK_S if watch else None)
                # At most CHECK_S: if we were suspended ourselves, the answers may be here, unread.
                self._count_silence(min(clock() - slept_at, CHECK_S))
            receiving.result()
        finally:
            self._connected = False
            receiving.cancel()

    def _receiving_ended(self, receiving: asyncio.Task[None]) -> None:
        if not receiving.cancelled():
            receiving.exception()  # retrieved
        self._wake_subscribing.set()

    async def _subscribe(self, connection: AbstractConnection) -> None:
        joined, self._to_subscribe = self._to_subscribe, set()
        left, self._to_unsubscribe = self._to_unsubscribe, set()
        for names, command in ((left, "UNSUBSCRIBE"), (joined, "SUBSCRIBE")):
            channels = [self._channel(job_id) for job_id in names]
            for at in range(0, len(channels), CHANNELS_AT_ONCE):
                await self._send(connection, command, *channels[at : at + CHANNELS_AT_ONCE])

    async def _ping_if_quiet(self, connection: AbstractConnection) -> None:
        # A connection can die without being closed.
        if self._waiters and self._unanswered_s is None and self._quiet_s >= PING_AFTER_S:
            await self._send(connection, "PING")

    async def _send(self, connection: AbstractConnection, *command: str) -> None:
        # Sending would open a lost connection again, and nobody would read from it.
        if not connection.is_connected:
            raise LostConnection("the connection was lost")
        async with _within(SEND_S):
            with reraise_cancelled():
                await connection.send_command(*command, check_health=False)
        self._unanswered_s = self._unanswered_s or 0.0

    def _count_silence(self, seconds: float) -> None:
        self._quiet_s += seconds
        if self._unanswered_s is not None:
            self._unanswered_s += seconds
            if self._unanswered_s > SILENCE_S:
                raise LostConnection("the server does not answer")

    async def _receive(self, connection: AbstractConnection) -> None:
        prefix = self._channel("").encode()
        while True:
            answer = await connection.read_response()
            self._unanswered_s, self._quiet_s = None, 0.0
            if not self._received:
                self._received = self.reached = True
                self._subscription_outage.works(0.0)
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
    """Wait for the event, until the event loop's time *at*, and clear it."""
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
