"""What a worker overrides of Celery and kombu, all of it, each with its reason.

Tested with Celery 5.7.0 and 5.6.0 (whose parts are those of 5.6.3, and whose own sender of events may lose some of
them under load), and kombu 5.7.0. ``tests/worker/test_celery_overrides.py`` fails where a library's own code, for which
something stands here, is another one than in those. What the producer's side overrides is in ``rerankq.broker``.

==========================================  ===========================================================================
overridden                                  reason
==========================================  ===========================================================================
``Consumer.on_send_event_buffered``         events of 50 ms travel together; Celery sends at every turn of its loop
``Consumer.shutdown``                       the events of the last jobs are sent, too
``Consumer.on_connection_error_after_...``  Celery 5.7.0 ends when a broker restarts while jobs run
``Consumer.cancel_active_requests``         SIGQUIT hands jobs back; Celery's way raises with a pool of threads
``Consumer.ensure_connected``               a broker that cannot be reached is tried at least every 3 s
``Consumer.create_task_handler``            a malformed message is dropped, and neither ends the worker nor keeps a slot
``pool.on_apply``                           a slot is free when its thread has ended, however it ended
``channel.qos.can_consume``                 messages are received only while there is a free slot
``channel.qos.ack``                         nothing to acknowledge: a worker's queues on Redis record no message
``channel.priority_steps``, ``.priority``   the list of urgent doorbells is the one under a longer key
``channel.client.parse_response``           a large message is refused before it is parsed
``channel.handlers["BRPOP"]``               what is no message at all is dropped; kombu would end the worker
``connection.ensure_connection``            the pauses between tries to reach the broker, as above
==========================================  ===========================================================================
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Empty
from typing import Any

from celery import bootsteps
from celery.exceptions import WorkerShutdown
from celery.worker.consumer import Consumer
from kombu import Queue
from kombu.common import ignore_errors

from rerankq.broker.celery_app import AHEAD, IN_LINE, queue

from . import doorbell
from .worker import WorkerProcess

logger = logging.getLogger("rerankq")

# Exit status after SIGQUIT.
HURRIED = 1
# Seconds for which events wait for each other.
EVENTS_EVERY_S = 0.05
# Seconds between tries to reach a broker that is away: the first pause, what each next one is longer, the longest.
RECONNECT = {"interval_start": 1, "interval_step": 1, "interval_max": 3}


def worker_queue(name: str, broker: str) -> Queue:
    """Make a queue as a worker consumes it from a *broker*, by its URL.

    On Redis without acknowledgements: kombu would record each doorbell and delete the record, which costs more than
    ranking a job whose pairs are all known; the sweeper notices a doorbell that is lost with its worker. RabbitMQ
    would then send all doorbells at once.
    """
    return queue(name, no_ack=not broker.startswith("amqp"))


class SafeConsumer(Consumer):  # type: ignore[misc]  # Celery ships no types
    """Celery's consumer for doorbells: it outlives its broker, drops other messages, and stops as the worker does.

    ``bulk_consumer`` consumes the bulk queue on a channel of its own, see :class:`BulkConsumer`; None before that, and
    where this worker does not consume it.
    """

    bulk_consumer: Any = None
    _flush_at = -math.inf
    # Calls of update_bulk that are not answered yet: one that runs answers those that arrive meanwhile.
    _bulk_updates = 0

    @property
    def process(self) -> WorkerProcess:
        """What this process holds."""
        process: WorkerProcess = self.app.process
        return process

    def on_send_event_buffered(self) -> None:
        """Send the events of a twentieth of a second together; Celery would send at every turn of its loop.

        Called from any thread. By the clock, not by a flag: a timer that was lost with its connection is made again.
        """
        now = time.monotonic()
        if self.hub and now >= self._flush_at:
            self._flush_at = now + EVENTS_EVERY_S
            self.hub.call_soon(self._flush_later)

    def shutdown(self) -> None:
        """Send the events of the jobs that ended last, too."""
        self._flush_events()
        super().shutdown()

    def _flush_later(self) -> None:
        self.hub.call_later(EVENTS_EVERY_S, self._flush_events)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Keep the connection's pools when the broker is lost.

        Celery 5.7.0 closes them, and then fails on a broker that restarts while jobs run; 5.6 did not. Acknowledging
        early does not help: of 13 busy workers whose Redis was killed or shut down and started again 3 ended, with
        this none.
        """
        if self.connection is not None:
            self.connection.close = lambda: None
        super().on_connection_error_after_connected(exc)
        dispatcher = self.event_dispatcher
        if dispatcher is not None and dispatcher.connection.transport.driver_type == "amqp":
            # It goes to the same broker. Celery would close it politely, and wait for the answer without end.
            ignore_errors(dispatcher.connection, dispatcher.connection.collect)

    def cancel_active_requests(self) -> None:
        """Hand back what runs, and stop as after SIGTERM: SIGQUIT calls this, in the middle of anything.

        Celery would cancel the tasks, which raises with threads; and then stop the pool here, inside of a signal, which
        never ends where the signal came amid a submission to the pool.
        """
        if self.bulk_consumer is not None:
            ignore_errors(self, self.bulk_consumer.cancel)
        self.process.begin_to_stop(hurry=True)
        raise WorkerShutdown(HURRIED)

    def ensure_connected(self, conn: Any) -> Any:
        """Try every few seconds, however long the broker is away; Celery's pauses would grow to half a minute."""
        conn.ensure_connection = partial(conn.ensure_connection, **RECONNECT)
        # Doorbells are sent by other connections.
        conn.transport.only_listens = True
        return super().ensure_connected(conn)

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        """Make what receives messages: doorbells. Others are dropped, where Celery might end or keep their slot."""
        receive = super().create_task_handler(*args, **options)

        def receive_or_drop(message: Any) -> None:
            with _dropping(self.connection_errors):
                try:
                    doorbell.sized(message.body or b"")
                    message.headers = doorbell.headers_of(message.headers, message.payload)
                    receive(message)
                except Exception:
                    message.reject_log_error(logger, self.connection_errors)
                    raise

        return receive_or_drop

    def queues(self) -> list[Any]:
        """List the queues that are consumed, on both channels."""
        consumers = [consumer for consumer in (self.task_consumer, self.bulk_consumer) if consumer is not None]
        return [queue for consumer in consumers for queue in consumer.queues]

    def update_bulk(self) -> None:
        """Pause or resume the bulk queue, by whether it has a free slot. Belongs to the consumer's thread.

        Each turn of its loop asks the channels of Redis; from RabbitMQ, which pushes, the bulk consumer is withdrawn.
        """
        worker, bulk = self.process.worker, self.bulk_consumer
        if worker is None or bulk is None or hasattr(bulk.channel, "qos"):
            return
        # RabbitMQ confirms both, and while that is awaited messages arrive: this is called again from inside.
        self._bulk_updates += 1
        if self._bulk_updates > 1:
            return
        try:
            while self._bulk_updates:
                self._bulk_updates = 1
                available = worker.slots.available(bulk=True)
                if available != bulk.consuming_from(worker.bulk):
                    (bulk.consume if available else bulk.cancel)()
                self._bulk_updates -= 1
        finally:
            self._bulk_updates = 0


class BulkConsumer(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Consumes each queue while there is a slot for it; the bulk queue on a channel of its own.

    On one channel, resuming bulk would wait up to 1 s for the BRPOP that was sent without it, while the device starves.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        give_slots_back(consumer.pool, consumer.app.process)

    def start(self, c: Any) -> None:
        """Move the bulk queue, if this worker is to consume it, from Celery's channel to ours."""
        worker = c.process.worker
        if worker is None:
            return
        slots, chosen = worker.slots, {queue.name for queue in c.task_consumer.queues}
        receive_while(c.task_consumer.channel, lambda: slots.available(bulk=False))
        if worker.bulk in chosen:
            c.task_consumer.cancel_by_queue(worker.bulk)
            channel = c.connection.channel()
            bulk = worker_queue(worker.bulk, worker.settings.broker)
            c.bulk_consumer = c.app.amqp.TaskConsumer(channel, queues=[bulk], on_decode_error=c.on_decode_error)
            c.bulk_consumer.on_message = c.create_task_handler()
            # With one slot for all an interactive message is the next to be taken.
            first = [worker.interactive] if slots.total == 1 and worker.interactive in chosen else []
            receive_while(channel, lambda: slots.available(bulk=True) and not any(map(channel._size, first)))
            c.bulk_consumer.consume()
        # The consumer sleeps in its poll while there is no free slot; whoever gives one back wakes it.
        worker.on_free_slot = lambda: c.call_soon(c.update_bulk)

    def stop(self, c: Any) -> None:
        """Consume no more."""
        if c.bulk_consumer is not None:
            ignore_errors(c, c.bulk_consumer.cancel)

    def shutdown(self, c: Any) -> None:
        """Close the channel."""
        bulk, c.bulk_consumer = c.bulk_consumer, None
        if bulk is not None and bulk.channel:
            ignore_errors(c, bulk.channel.close)


class EngineInfo(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Shows the engine's figures among the worker's stats, where Flower finds them; drains at every orderly end."""

    def close(self, controller: Any) -> None:
        """Begin to drain. No signal says so where a control command, Flower's among them, shuts the worker down."""
        controller.app.process.begin_to_stop()

    def info(self, controller: Any) -> dict[str, Any]:
        """Say how the engine does."""
        worker = controller.app.process.worker
        return {} if worker is None else {"engine": worker.figures()}


def give_slots_back(pool: Any, process: WorkerProcess) -> None:
    """Give a slot back when its thread has ended, however it ended; no signal of Celery's says so of every message."""
    apply = pool.on_apply

    def give_back(job_id: str) -> None:
        if process.worker is not None:
            process.worker.give_slot_back(job_id)

    def on_apply(target: Any, args: Any = None, *rest: Any, **options: Any) -> Any:
        applied = apply(target, args, *rest, **options)
        applied.f.add_done_callback(lambda _: give_back(args[1]))
        return applied

    pool.on_apply = on_apply


def receive_while(channel: Any, available: Callable[[], bool]) -> None:
    """Receive from a channel only while a slot is available: as Celery's ``worker_disable_prefetch``, by our slots."""
    if not hasattr(channel, "qos"):
        # RabbitMQ: one doorbell at most waits here for a thread.
        channel.basic_qos(0, 1, False)
        return
    asked = channel.qos.can_consume
    channel.qos.can_consume = lambda: available() and asked()
    # kombu would delete what it never recorded, see ``worker_queue``.
    channel.qos.ack = lambda _: None
    # The other way round than kombu, whose first is the plain list, whose length monitors take for the queue's.
    channel.priority_steps, channel.priority = [AHEAD, IN_LINE], lambda number: number
    channel.client.parse_response = _sized(channel.client.parse_response)
    channel.handlers["BRPOP"] = _reading(channel.handlers["BRPOP"], channel.connection)


def _sized(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a large message as it comes from Redis; kombu would parse it, and delay all others."""

    def parse_and_measure(connection: Any, command: str, **options: Any) -> Any:
        answer = parse(connection, command, **options)
        if command == "BRPOP" and answer:
            doorbell.sized(answer[1])
        return answer

    return parse_and_measure


def _reading(read: Callable[[], Any], transport: Any) -> Callable[[], Any]:
    """Read from Redis what is no message at all, and go on; kombu would end the worker. It is out of the queue then."""

    def read_or_drop() -> Any:
        with _dropping((Empty, *transport.connection_errors, *transport.channel_errors)):
            return read()
        raise Empty

    return read_or_drop


@contextmanager
def _dropping(but: tuple[type[Exception], ...]) -> Iterator[None]:
    """Log and swallow what a malformed message raises, and nothing of the kinds in *but*."""
    try:
        yield
    except Exception as error:
        # Of kombu's connection errors, KeyError too; but what lacks a key is most likely the message.
        if isinstance(error, but) and not isinstance(error, KeyError):
            raise
        # Never the message's own text: any client may have written it, at any length.
        said = error if isinstance(error, doorbell.NoDoorbell) else type(error).__name__
        logger.warning("dropped a message that is no doorbell: %s", said)
