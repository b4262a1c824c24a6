"""Send doorbells, and count the messages that wait."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress

from celery import Celery
from kombu import Connection

from ..ledger.calls import Counted, Doorbell
from ..outage import Outage
from .celery_app import AHEAD, IN_LINE, NOT_FOUND, TASK, _connection_with_limits, logger, queue


class DoorbellSender:
    """Ring doorbells from a thread of its own: no caller waits for the broker, and doorbells travel in batches.

    A doorbell that cannot be rung is only late: the job is in the ledger, and a worker's sweeper rings for it.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._begin()
        _ALL.add(self)

    def _begin(self) -> None:
        self._bells: deque[Doorbell] = deque()
        self._publishing = threading.Lock()
        self._wanted = threading.Condition()
        self._ringing = 0
        self._closed = False
        self._outage = Outage()
        self._thread: threading.Thread | None = None

    def send(self, doorbells: Iterable[Doorbell]) -> None:
        """Ring soon; after :meth:`close` too, by a new thread."""
        with self._wanted:
            self._bells.extend(doorbells)
            if self._bells and (self._thread is None or not self._thread.is_alive()):
                self._closed = False
                # A script that submits and ends must still ring.
                atexit.register(self.close)
                self._thread = threading.Thread(target=self._run, name="rerankq-doorbells", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # the interpreter ends, or the system has no more threads
                    logger.warning("%d doorbells not rung, the sweeper will: %s", len(self._bells), error)
                    self._bells.clear()
                    self._thread = None
            self._wanted.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all doorbells are out; answers whether they are."""
        with self._wanted:
            return self._wanted.wait_for(lambda: not self._bells and not self._ringing, timeout_s)

    def close(self, timeout_s: float = 5) -> None:
        """Ring what is left, for at most *timeout_s*, and stop."""
        atexit.unregister(self.close)
        thread = self._thread
        if thread is not None:
            self.flush(timeout_s)
            with self._wanted:
                self._closed, self._thread = True, None
                self._wanted.notify_all()
            thread.join(timeout_s)
        self._app.close()

    def _run(self) -> None:
        with self._publishing:
            connection = _connection_with_limits(self._app)
        while batch := self._next():
            for pause_s in (0.2, 1, 3, 10, None):
                try:
                    with self._publishing:
                        self._publish(batch, connection)
                    if (lasted_s := self._outage.works(time.monotonic())) is not None:
                        logger.warning("the broker takes doorbells again, after %.0f s", lasted_s)
                    break
                except Exception as error:  # noqa: BLE001  # whatever the broker's library raises, the job is safe
                    connection.release()
                    connection = _connection_with_limits(self._app)
                    if pause_s is None or self._closing(pause_s):
                        if self._outage.fails(time.monotonic()):
                            logger.warning("%d doorbells not rung, the sweeper will: %s", len(batch), error)
                        break
            with self._wanted:
                self._ringing = 0
                self._wanted.notify_all()
        connection.release()

    def _closing(self, pause_s: float) -> bool:
        with self._wanted:
            return self._wanted.wait_for(lambda: self._closed, pause_s)

    def _next(self) -> list[Doorbell]:
        with self._wanted:
            self._wanted.wait_for(lambda: self._bells or self._closed)
            batch = [self._bells.popleft() for _ in range(min(len(self._bells), 200))]
            self._ringing = len(batch)
            return batch

    def _publish(self, batch: list[Doorbell], connection: Connection) -> None:
        # A doubled doorbell does no harm, so a batch that failed midway is simply rung again.
        with connection.Producer(auto_declare=False) as producer, producer.batch():
            for doorbell in batch:
                self._app.send_task(
                    TASK,
                    args=(doorbell.id,),
                    task_id=doorbell.id,
                    queue=queue(doorbell.queue),
                    producer=producer,
                    ignore_result=True,
                    argsrepr=doorbell.label or doorbell.id,
                    priority=AHEAD if doorbell.ahead else IN_LINE,
                    kwargsrepr="{}",
                    retry=False,
                )
            if connection.transport.driver_type == "amqp":
                # Answered once all before it has arrived: what a network swallows looks as if it were sent.
                producer.channel.basic_qos(0, 0, False)


class MessageCounts:
    """Count the messages that the broker holds, in a thread of its own: a broker that hangs holds up nobody else."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection: Connection | None = None
        self._counting: threading.Thread | None = None
        self._found = Counted()

    def ask(self, queues: Sequence[str], at: float) -> None:
        """Begin to count, unless a count is under way; *at* is the ledger's time."""
        if self._counting is None or not self._counting.is_alive():
            self._counting = threading.Thread(
                target=self._count, args=(queues, at), name="rerankq-message-counts", daemon=True
            )
            self._counting.start()

    def take(self) -> Counted:
        """Take what was counted since this was asked last; no messages of no queue where nothing was."""
        found, self._found = self._found, Counted()
        return found

    def _count(self, queues: Sequence[str], at: float) -> None:
        try:
            self._found = Counted(at, {name: self._messages(name) for name in queues})
        except Exception as error:  # noqa: BLE001  # whatever the broker's library raises, they are counted another time
            logger.info("messages not counted: %s", error)
            self._hang_up()

    def _messages(self, name: str) -> int:
        if self._connection is None:
            self._connection = _connection_with_limits(self._app)
            self._connection.ensure_connection(max_retries=1)
        try:
            # kombu looks for a queue in Redis under a name without our prefix; there, declaring one changes nothing.
            passive = self._connection.transport.driver_type != "redis"
            return int(self._connection.default_channel.queue_declare(name, passive=passive).message_count)
        except self._connection.channel_errors as error:
            if str(getattr(error, "reply_code", "")) != NOT_FOUND:
                raise
            # RabbitMQ closes a channel on which a queue is asked for that is not there.
            self._hang_up()
            return 0

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.release()


# Seconds that a fork waits for a batch of doorbells that is on its way.
FORK_WAITS_S = 1.0

_ALL: weakref.WeakSet[DoorbellSender] = weakref.WeakSet()
_held: list[threading.Lock] = []


def _before_fork() -> None:
    """Let no ringing be under way: a child would inherit the locks of the moment, the import system's among them."""
    _held.extend(
        doorbells._publishing for doorbells in list(_ALL) if doorbells._publishing.acquire(timeout=FORK_WAITS_S)
    )


def _after_fork() -> None:
    while _held:
        _held.pop().release()


def _after_fork_in_child() -> None:
    """Begin anew: the thread stayed with the parent, which rings the doorbells that came along."""
    _held.clear()
    for doorbells in list(_ALL):
        doorbells._begin()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
