"""Send doorbells, and count the messages that wait."""

from __future__ import annotations

import _thread
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
    """Sends doorbells from its own thread: no caller waits for the broker, and doorbells are sent in batches.

    A doorbell that cannot be sent is only late: the job is in the ledger, and a worker's sweeper sends another.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._begin()
        _ALL.add(self)

    def _begin(self) -> None:
        self._waiting: deque[Doorbell] = deque()
        self._made_with = _thread.start_new_thread
        self._publishing = threading.Lock()
        self._wanted = threading.Condition()
        self._sending = 0
        self._closed = False
        self._outage = Outage()
        self._thread: threading.Thread | None = None

    def _renew_if_patched(self) -> None:
        """Begin anew where gevent or eventlet have replaced threads by greenlets since.

        All greenlets are one thread to the condition that was made before: one that takes it back after waiting, while
        another holds it, would stop them all for ever.
        """
        if self._made_with is not _thread.start_new_thread:
            waiting = self._waiting
            self._begin()
            self._waiting = waiting

    def send(self, doorbells: Iterable[Doorbell]) -> None:
        """Send soon; after :meth:`close` too, by a new thread."""
        self._renew_if_patched()
        with self._wanted:
            self._waiting.extend(doorbells)
            if self._waiting and (self._thread is None or not self._thread.is_alive()):
                self._closed = False
                # A script that submits and ends must still send its doorbells.
                atexit.register(self.close)
                self._thread = threading.Thread(target=self._run, name="rerankq-doorbells", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # the interpreter ends, or the system has no more threads
                    logger.warning("%d doorbells not sent, a sweeper will: %s", len(self._waiting), error)
                    self._waiting.clear()
                    self._thread = None
            self._wanted.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all doorbells are sent; answers whether they are."""
        with self._wanted:
            return self._wanted.wait_for(lambda: not self._waiting and not self._sending, timeout_s)

    def close(self, timeout_s: float = 5) -> None:
        """Send those that are left, for at most *timeout_s*, and stop."""
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
                            logger.warning("%d doorbells not sent, a sweeper will: %s", len(batch), error)
                        break
            with self._wanted:
                self._sending = 0
                self._wanted.notify_all()
        connection.release()

    def _closing(self, pause_s: float) -> bool:
        with self._wanted:
            return self._wanted.wait_for(lambda: self._closed, pause_s)

    def _next(self) -> list[Doorbell]:
        with self._wanted:
            self._wanted.wait_for(lambda: self._waiting or self._closed)
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), 200))]
            self._sending = len(batch)
            return batch

    def _publish(self, batch: list[Doorbell], connection: Connection) -> None:
        # A doorbell that arrives twice does no harm, so a batch that failed midway is simply sent again.
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
                # Answered once all before it has arrived: without it, messages lost on the network count as sent.
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
        """Take what was counted since the last call; empty if nothing was."""
        found, self._found = self._found, Counted()
        return found

    def _count(self, queues: Sequence[str], at: float) -> None:
        try:
            self._found = Counted(at, {name: self._messages(name) for name in queues})
        except Exception as error:  # noqa: BLE001  # whatever the broker's library raises, they are counted another time
            logger.info("messages not counted: %s", error)
            self._close()

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
            # RabbitMQ closes a channel on which an unknown queue is declared passively.
            self._close()
            return 0

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.release()


# Seconds that a fork waits for a batch of doorbells that is on its way.
FORK_WAITS_S = 1.0

_ALL: weakref.WeakSet[DoorbellSender] = weakref.WeakSet()
_held: list[threading.Lock] = []


def _before_fork() -> None:
    """Wait until no batch is being sent: a child would inherit its locks, the import system's among them."""
    _held.extend(
        doorbells._publishing for doorbells in list(_ALL) if doorbells._publishing.acquire(timeout=FORK_WAITS_S)
    )


def _after_fork() -> None:
    while _held:
        _held.pop().release()


def _after_fork_in_child() -> None:
    """Begin anew: the thread runs in the parent, which sends the doorbells that were copied here."""
    _held.clear()
    for doorbells in list(_ALL):
        doorbells._begin()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
