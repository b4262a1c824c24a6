"""The worker, put together: settings are read, the engine loaded, the ledger and the cache connected, here alone.

Run as ``celery -A rerankq_worker.tasks worker``, or ``rerankq worker``.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any, TypeVar

from celery import bootsteps, signals
from celery.concurrency import get_implementation
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import CPendingDeprecationWarning, Ignore, SecurityWarning, WorkerShutdown
from celery.worker.consumer import Consumer
from celery.worker.control import control_command, inspect_command
from kombu import Queue
from kombu.common import ignore_errors

from rerankq import __version__, catalogue, errors
from rerankq.broker.celery_app import AHEAD, IN_LINE, TASK, forget_celerys_environment, make_app, queue
from rerankq.broker.doorbells import DoorbellSender, MessageCounts
from rerankq.client.routing import former_queues, queue_name, resolve_route, suffix_of
from rerankq.contract import Ranking, State
from rerankq.errors import BrokerUnavailable, JobCancelled, QueueFull, RerankqError
from rerankq.identity import job_of
from rerankq.ledger import Call, Claim, Deferred, calls, connect
from rerankq.ledger.lease_policy import hangs
from rerankq.ledger.limits import LedgerLimits, live_for
from rerankq.ledger.runner import Ledger
from rerankq.settings import Settings

from . import cache, doorbell, engine
from .engine import Batcher, EngineClosed, EngineDied, EngineError
from .fusion.analyser import Analyser
from .leases import Leases
from .locks import SharedExclusiveLock
from .reranker import Reranker
from .scoring import LocalScorer
from .shutdown import ShutdownWatchdog, within
from .slots import Slots, SuspectSlots
from .sweeping import CancelListener, Sweeper
from .work import Work

logger = logging.getLogger("rerankq")
Answer = TypeVar("Answer")

# Exit statuses for a supervisor to see, beside those of ``shutdown``: the device hangs, or is gone; SIGQUIT.
DEVICE_HANGS = 70
HURRIED = 1
# Seconds of a stop that handing back may take, and then the rest: a ledger or broker that hangs is not waited for.
HAND_BACK_S = 2.0
CLOSE_S = 2.0
# Seconds between tries to tell the ledger how a job ended.
TELL_AGAIN_S = 1.0
# Seconds between looks for jobs of this model in queues to which nobody listens any more.
ADOPT_EVERY_S = 5.0
# Seconds for which events wait for each other.
EVENTS_EVERY_S = 0.05
# Seconds between tries to reach a broker that is away: the first pause, what each next one is longer, the longest.
RECONNECT = {"interval_start": 1, "interval_step": 1, "interval_max": 3}


class OtherModel(Exception):
    """Raised when a job names a model that this worker does not serve."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model


class Worker:
    """One process, one engine: everything that lives from the start of the worker to its end."""

    def __init__(self, settings: Settings, app: Any) -> None:
        self.settings = settings
        self.limits = LedgerLimits.of(settings)
        self.id = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.model = catalogue.canonical(settings.model, settings.conf_dir)
        self.default = catalogue.canonical(settings.default_model or settings.model, settings.conf_dir)
        folder = Path(self.model)
        self.names = {self.model, settings.model, *([folder.name] if folder.is_dir() else [])}
        self.interactive, self.bulk = queues_of(settings)
        self.ledger = Ledger(connect(settings.ledger))
        # Before minutes of loading a model: a ledger that is not there is a mistake to hear of at once.
        self.ledger.workers()
        self.doorbells = DoorbellSender(app)
        self.slots = Slots(settings.concurrency)
        self.suspects = SuspectSlots(settings.concurrency)
        self.device = SharedExclusiveLock()
        self.stopping = threading.Event()
        self.dropped = False
        self.device_gone = False
        self._dropping = threading.Lock()
        self._stopped = threading.Event()

        self.engine = engine.load(
            self.model,
            settings.device,
            settings.dtype,
            max_batch_tokens="measured" if settings.max_batch_tokens == "auto" else settings.max_batch_tokens,
            runtime=settings.runtime,
        )
        self.batcher = Batcher(self.engine, seconds_per_token=engine.seconds_per_token(self.engine))
        analyser = Analyser()
        analyser.warm()
        scores = cache.ScoreCache(cache.connect(settings.cache), ttl_s=settings.cache_ttl_s)
        self.reranker = Reranker(LocalScorer(self.engine, self.batcher, scores), analyser, name=self.model)

        self.leases = Leases(self.ledger, self.limits, device_hangs=self._device_hangs, give_up=self._give_up)
        self.listener = CancelListener(self.ledger, self.limits, self.leases.cancel)
        self.sweeper = Sweeper(
            self.ledger,
            self.limits,
            self.doorbells,
            MessageCounts(app),
            worker=self.id,
            queues=[self.interactive, self.bulk],
            say=self._say,
            lives=self._lives,
        )
        self._started = time.monotonic()

    def start(self) -> None:
        """Begin to hold leases, sweep and listen. The registry is told first: jobs may name this model from now on."""
        self.sweeper.beat()
        self.leases.start()
        self.listener.start()
        self.sweeper.start()
        threading.Thread(target=self.drain, name="rerankq-drain", daemon=True).start()
        threading.Thread(target=self._adopt_again_and_again, name="rerankq-adoption", daemon=True).start()

    def adopt(self) -> int:
        """Move jobs of this model here from the queues that were its own under another default or an earlier version.

        Not where a living worker still listens. Answers how many were moved.
        """
        live_s = live_for(self.settings.lease_s)
        worker_queue = {queue for worker in self.ledger.workers() if worker.age_s <= live_s for queue in worker.queues}
        moves = {old: own for old, own in former_queues(self.model, self.default).items() if old not in worker_queue}
        return self.ledger.ask(calls.adopt(moves)) if moves else 0

    def _adopt_again_and_again(self) -> None:
        while True:
            try:
                if moved := self.adopt():
                    logger.warning("%d jobs adopted from queues to which nobody listens", moved)
            except RerankqError as error:
                logger.info("no jobs adopted: %s", error)
            except Exception:
                # This thread must outlive any bug in it.
                logger.exception("no jobs adopted")
            if self.stopping.wait(ADOPT_EVERY_S):
                return

    def drain(self) -> None:
        """Once told to stop, let jobs finish for ``drain_s``; then hand back the rest, before somebody kills us."""
        self.stopping.wait()
        if not self._stopped.wait(self.settings.drain_s):
            self.drop()

    def drop(self) -> None:
        """Stop work on what is held, hand it back, and sign off."""
        self.dropped = True
        self.stopping.set()
        with self._dropping:
            held = self.leases.stop()
            # First: whoever waits for its jobs' threads to end need not wait for a ledger that hangs.
            self.leases.cancel(held)
            try:
                if held:
                    self.ledger.ask(calls.hand_back(held))
            except RerankqError as error:
                logger.warning("%d jobs not handed back, their leases will lapse: %s", len(held), error)
            self.doorbells.send(self.suspects.forget())
            self.sweeper.stop()

    def stop(self) -> None:
        """Hand back what is still held, sign off, and let the device go; in a few seconds, whatever hangs."""
        self._stopped.set()
        within(HAND_BACK_S, self.drop)
        within(CLOSE_S, self.listener.stop, partial(self.doorbells.close, CLOSE_S / 2), self._close_engine)

    def _close_engine(self) -> None:
        self.batcher.close(drain=False, timeout=CLOSE_S)

    def told_to_stop(self, hurry: bool) -> None:
        """Begin to drain; in a *hurry*, hand back now."""
        self.stopping.set()
        if hurry:
            threading.Thread(target=self.drop, name="rerankq-drop", daemon=True).start()

    def cancel(self, job_ids: Iterable[str]) -> None:
        """Cancel jobs in the ledger, from which all workers hear of it; one that is not there is no harm."""
        for job_id in job_ids:
            try:
                self.ledger.ask(calls.cancel(job_id, self.limits))
            except RerankqError as error:
                logger.warning("job %s not cancelled: %s", job_id, error)

    def rerank(self, job_id: str) -> str:
        """Claim a job, rank it, and tell the ledger how it ended. Answers a summary for Flower.

        Raises:
            Ignore: if somebody else has it: the doorbell was a second one.
            RerankqError: how the job ended, where it was not ranked.
        """
        if self.dropped or self.leases.hung:
            # Its own jobs, handed back, are rung for at once: they are for others. A claim would be a sign of life.
            raise Ignore("in a hurry to stop, or the device hangs: a sweeper will ring again")
        claim = self.ledger.ask(calls.claim_unless_suspect(job_id, self.id, self.limits))
        if not isinstance(claim, Deferred):
            return self._rerank(job_id, claim)
        with self._turn_of(claim):
            return self._rerank(job_id, self.ledger.ask(calls.claim(job_id, self.id, self.limits)))

    @contextmanager
    def _turn_of(self, suspect: Deferred) -> Iterator[None]:
        """Have a slot for suspects, or none at all: one that waits its turn keeps no other job from being claimed."""
        taken = self.suspects.take(suspect)
        try:
            if not taken:
                raise Ignore("under suspicion: it is rung for again when its turn comes")
            yield
        finally:
            if taken:
                self.suspects.give_back(suspect)
            following = self.suspects.next_doorbell()
            self.doorbells.send([following] if following else [])

    def _rerank(self, job_id: str, claim: Claim | State) -> str:
        if isinstance(claim, str):
            return second_doorbell(claim)
        if claim.refill_window:
            self.sweeper.refill_window()
        work = Work()
        self.leases.hold(job_id, claim.fence, work)
        try:
            with self._on_the_device(claim, work):
                ranking = self._rank(claim, work)
                # Before the next suspect is let in: a death from then on is that one's.
                state = self._tell(calls.complete(job_id, claim.fence, ranking, self.limits))
        except EngineDied as error:
            # One of the jobs on the device may have done it. Their leases lapse, and they come back under suspicion:
            # handed back, a job that kills the device would go round for ever.
            self._shut_down(error)
            raise Ignore(f"job {job_id} left to its lease: {error}") from error
        except (EngineClosed, BrokerUnavailable, QueueFull) as error:
            # Not the job's fault: another worker, or this one when it is back, will rank it.
            with suppress(RerankqError):
                self.ledger.ask(calls.hand_back([(job_id, claim.fence)]))
            raise Ignore(f"job {job_id} handed back: {error}") from error
        except OtherModel as other:
            raise Ignore(f"job {job_id} sent on to {self._reroute(claim, other)}") from other
        except Exception as error:
            self._failed(claim, error)
            raise
        finally:
            self.leases.release(job_id, claim.fence)
        if state != "done":
            raise Ignore(f"job {job_id} was {state} meanwhile: this answer was not taken")
        return summary(ranking)

    def _rank(self, claim: Claim, work: Work) -> Ranking:
        # Before it is parsed: the ledger holds what anybody wrote who may write there.
        if len(claim.payload) > self.settings.max_job_bytes:
            said = f"{len(claim.payload)} bytes as JSON; this worker takes at most {self.settings.max_job_bytes}"
            raise errors.JobTooLarge(said, field="job")
        job = job_of(claim.payload)
        model = self.model if job.model is None else catalogue.canonical(job.model, self.settings.conf_dir)
        if model not in self.names:
            # The deployment's default model was changed while the job waited in its queue, most likely.
            raise OtherModel(model)
        return self.reranker.rank(claim.id, job, work, priority=claim.priority, waited_s=claim.waited_s)

    def _reroute(self, claim: Claim, other: OtherModel) -> str:
        """Send a job of another model on to where that is served, or waited for; answers its queue."""
        settings = self.settings
        try:
            listed = [catalogue.canonical(name, settings.conf_dir) for name in settings.models]
            live_s = live_for(settings.lease_s)
            place = resolve_route(
                other.model, self.ledger.workers(), listed=listed, default=self.default, live_s=live_s
            )
            suffix = place.suffix
        except errors.ModelUnknown:
            # It was accepted, so it is not failed for want of a worker: one may be starting. Its deadline holds.
            suffix = suffix_of(other.model, self.default)
        queue = queue_name(claim.priority, suffix)
        self._tell(calls.reroute(claim.id, claim.fence, queue, other.model))
        return queue

    @contextmanager
    def _on_the_device(self, claim: Claim, work: Work) -> Iterator[None]:
        """Wait to be let in: together with others, or, under suspicion, alone."""
        if self.dropped:
            # Claimed while the others were handed back.
            raise EngineClosed("in a hurry to stop")
        interactive = claim.priority == "interactive"
        if not claim.suspect:
            with self.device.shared(interactive=interactive, go_on=work.go_on):
                yield
            return
        with self.device.exclusive(interactive=interactive, go_on=work.go_on):
            work.go_on()
            if not self._tell(calls.isolate(claim.id, claim.fence, self.id)):
                raise JobCancelled("no longer ours")
            yield

    def _failed(self, claim: Claim, error: Exception) -> None:
        if isinstance(error, JobCancelled):
            # Already so in the ledger; or the lease was lost, and another worker has the job.
            return
        kind = type(error).__name__ if isinstance(error, RerankqError) else "JobFailed"
        known = isinstance(error, RerankqError | EngineError)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        logger.warning("job %s failed: %s", claim.id, said)
        self._tell(calls.fail(claim.id, claim.fence, kind, said, self.limits))

    def _tell(self, call: Call[Answer]) -> Answer:
        """Tell the ledger, however long it is away: the work is done, only the telling is left.

        A worker that is told to stop does not wait for it: the scores are in the cache, and the lease lapses.
        """
        while True:
            try:
                return self.ledger.ask(call)
            except (BrokerUnavailable, QueueFull) as error:
                logger.warning("the ledger could not be told, trying again: %s", error)
                if self.stopping.wait(TELL_AGAIN_S):
                    raise

    def _say(self) -> dict[str, Any]:
        stats = self.batcher.stats()
        return {
            "model": self.model,
            "aliases": sorted(self.names - {self.model}),
            "fingerprint": self.engine.fingerprint,
            "version": __version__,
            "device": f"{self.engine.device} ({self.engine.dtype})",
            "pairs_per_s": round(stats.pairs / max(1.0, stats.busy_s), 1) if stats.busy_s else 0,
            "last_progress_s": round(time.monotonic() - stats.last_progress, 1),
            "channel": self.limits.channel,
        }

    def _lives(self) -> bool:
        return not self.leases.hung and self.batcher.stats().alive

    def _device_hangs(self) -> bool:
        stats = self.batcher.stats()
        running = None if stats.batch_started is None else time.monotonic() - stats.batch_started
        return hangs(running, stats.batch_predicted_s or 0.0)

    def _give_up(self) -> None:
        logger.critical("the device hangs and the leases have lapsed: leaving, to be started again")
        # No clean end is possible: a thread is stuck in the device.
        os._exit(DEVICE_HANGS)

    def _shut_down(self, error: Exception) -> None:
        if not self.stopping.is_set():
            logger.critical("the device is gone, shutting down to be started again: %s", error)
            self.device_gone = True
            self.stopping.set()
            os.kill(os.getpid(), signal.SIGTERM)


# What Flower shows of a job that had ended before its doorbell was heard.
ENDINGS: dict[str, tuple[type[RerankqError], str]] = {
    "expired": (errors.JobExpired, "not started before its deadline"),
    "dead": (errors.JobDead, "set aside: it killed its worker again and again"),
    "cancelled": (errors.JobCancelled, "cancelled before it began"),
    "failed": (errors.JobFailed, "failed before"),
}


def second_doorbell(state: State) -> str:
    """Answer a doorbell whose job is not to be had, so that Flower goes on showing how the job really stands.

    Raises:
        Ignore: if it is running: whoever has it will say how it ended.
        RerankqError: how it ended, where it was not ranked.
    """
    if state == "running":
        raise Ignore("it is running already")
    if state in ENDINGS:
        kind, words = ENDINGS[state]
        raise kind(words)
    return f"nothing to do: {state}"


def summary(ranking: Ranking) -> str:
    """Say a ranking in what Flower shows of a result: short, and no text."""
    if ranking.skipped:
        return f"left unscored, {len(ranking.chunks)} chunks"
    usage = ranking.usage
    return f"ranked {usage.pairs} pairs, {usage.cached_pairs} cached, {ranking.timings_ms.total:.0f} ms"


def queues_of(settings: Settings) -> tuple[str, str]:
    """Name the interactive and the bulk queue of the settings' model."""
    model, default = (
        catalogue.canonical(name, settings.conf_dir)
        for name in (settings.model, settings.default_model or settings.model)
    )
    suffix = suffix_of(model, default)
    return queue_name("interactive", suffix), queue_name("bulk", suffix)


def worker_queue(name: str) -> Queue:
    """Make a queue as a worker listens to it.

    On Redis without acknowledgements: kombu would write each doorbell down and cross it out again, which costs more
    than ranking a job whose pairs are all known; the sweeper notices a doorbell that dies with its worker. RabbitMQ
    would then send all doorbells at once.
    """
    return queue(name, no_ack=not settings.broker.startswith("amqp"))


class SafeConsumer(Consumer):  # type: ignore[misc]  # Celery ships no types
    """Keeps the connection's pools when the broker is lost, comes back to it soon, and sends events in batches.

    Celery 5.7.0 closes them, and then fails on a broker that restarts while jobs run; 5.6 did not. Acknowledging early
    does not help: of 13 busy workers whose Redis was killed or shut down and started again 3 ended, with this none.
    """

    _flush_at = -math.inf

    def on_send_event_buffered(self) -> None:
        """Send what a twentieth of a second brings together; Celery would send at every turn of its loop.

        Called from any thread. By the clock, not by a flag: a timer that a lost connection took along is made again.
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

    def on_connection_error_after_connected(self, exc: Exception) -> None:  # noqa: D102
        if self.connection is not None:
            self.connection.close = lambda: None
        super().on_connection_error_after_connected(exc)
        dispatcher = self.event_dispatcher
        if dispatcher is not None and dispatcher.connection.transport.driver_type == "amqp":
            # It took the same way. Celery would close it politely, and wait for the answer without end.
            ignore_errors(dispatcher.connection, dispatcher.connection.collect)

    def cancel_active_requests(self) -> None:
        """Hand back what runs, and stop as after SIGTERM: SIGQUIT calls this, in the middle of anything.

        Celery would cancel the tasks, which raises with threads; and then stop the pool here, inside of a signal, which
        never ends where the signal came amid a submission to the pool.
        """
        if listening is not None and listening.bulk is not None:
            ignore_errors(self, listening.bulk.cancel)
        begin_to_stop(hurry=True)
        raise WorkerShutdown(HURRIED)

    def ensure_connected(self, conn: Any) -> Any:
        """Try every few seconds, however long the broker is away; Celery's pauses would grow to half a minute."""
        conn.ensure_connection = partial(conn.ensure_connection, **RECONNECT)
        # Bells go out by other connections.
        conn.transport.only_listens = True
        return super().ensure_connected(conn)

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        """Make what takes messages in: doorbells. Anything else is dropped, where Celery might end or keep its slot."""
        take_in = super().create_task_handler(*args, **options)

        def take_in_or_drop(message: Any) -> None:
            with _dropping(self.connection_errors):
                try:
                    doorbell.sized(message.body or b"")
                    message.headers = doorbell.headers_of(message.headers, message.payload)
                    take_in(message)
                except Exception:
                    message.reject_log_error(logger, self.connection_errors)
                    raise

        return take_in_or_drop


class Listening(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Listens to each queue while there is a slot for it; to the bulk queue on a channel of its own.

    On one channel bulk would come back late: whoever resumes it waits for the end of a blocking pop that was sent
    without it, up to a second in which the device starves.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.consumer = consumer
        self.bulk: Any = None
        # How often it was asked to look again while it did.
        self._look = 0
        _follow(consumer.pool)

    def start(self, c: Any) -> None:
        """Move the bulk queue, if this worker is to listen to it, from Celery's channel to ours."""
        global listening  # noqa: PLW0603  # Celery gives its signals no other place
        if worker is None:
            return
        slots, chosen = worker.slots, {queue.name for queue in c.task_consumer.queues}
        _open(c.task_consumer.channel, lambda: slots.has_room(bulk=False))
        if worker.bulk in chosen:
            c.task_consumer.cancel_by_queue(worker.bulk)
            channel = c.connection.channel()
            self.bulk = c.app.amqp.TaskConsumer(
                channel, queues=[worker_queue(worker.bulk)], on_decode_error=c.on_decode_error
            )
            self.bulk.on_message = c.create_task_handler()
            # With one slot for all an interactive message is the next to be taken.
            first = [worker.interactive] if slots.total == 1 and worker.interactive in chosen else []
            _open(channel, lambda: slots.has_room(bulk=True) and not any(map(channel._size, first)))
            self.bulk.consume()
        listening = self

    def stop(self, c: Any) -> None:
        """Listen no more."""
        if self.bulk is not None:
            ignore_errors(c, self.bulk.cancel)

    def shutdown(self, c: Any) -> None:
        """Close the channel."""
        bulk, self.bulk = self.bulk, None
        if bulk is not None and bulk.channel:
            ignore_errors(c, bulk.channel.close)

    def queues(self) -> list[Any]:
        """List what is listened to, on both channels."""
        consumers = [consumer for consumer in (self.consumer.task_consumer, self.bulk) if consumer is not None]
        return [queue for consumer in consumers for queue in consumer.queues]

    def look_again(self) -> None:
        """Ask anew which queues have room. Belongs to the consumer's thread.

        Each turn of its loop asks the channels of Redis; from RabbitMQ, which pushes, the bulk consumer is withdrawn.
        """
        if worker is None or self.bulk is None or hasattr(self.bulk.channel, "qos"):
            return
        # RabbitMQ confirms both, and while that is waited for messages come in: this is called again from inside.
        self._look += 1
        if self._look > 1:
            return
        try:
            while self._look:
                self._look = 1
                has_room = worker.slots.has_room(bulk=True)
                if has_room != self.bulk.consuming_from(worker.bulk):
                    (self.bulk.consume if has_room else self.bulk.cancel)()
                self._look -= 1
        finally:
            self._look = 0


def _follow(pool: Any) -> None:
    """Give a slot back when its thread is done, however it ended; Celery's signals leave out messages without sense."""
    apply = pool.on_apply

    def on_apply(target: Any, args: Any = None, *rest: Any, **options: Any) -> Any:
        applied = apply(target, args, *rest, **options)
        applied.f.add_done_callback(lambda _: _went_out(args[1]))
        return applied

    pool.on_apply = on_apply


def _open(channel: Any, has_room: Callable[[], bool]) -> None:
    """Take messages from a channel only while there is room: as Celery's ``worker_disable_prefetch``, by our slots."""
    if not hasattr(channel, "qos"):
        # RabbitMQ: one doorbell at most waits here for a thread.
        channel.basic_qos(0, 1, False)
        return
    asked = channel.qos.can_consume
    channel.qos.can_consume = lambda: has_room() and asked()
    # kombu would cross out what it never wrote down, see ``heard``.
    channel.qos.ack = lambda _: None
    # The other way round than kombu, whose first is the plain list, that everyone looks into who looks at a queue.
    channel.priority_steps, channel.priority = [AHEAD, IN_LINE], lambda number: number
    channel.client.parse_response = _sized(channel.client.parse_response)
    channel.handlers["BRPOP"] = _reading(channel.handlers["BRPOP"], channel.connection)


def _sized(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a large message as it comes from Redis; kombu would parse whatever it is, and hold up all others."""

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
    """Swallow what a message without sense raises."""
    try:
        yield
    except Exception as error:
        # Of kombu's connection errors, KeyError too; but what lacks a key is most likely the message.
        if isinstance(error, but) and not isinstance(error, KeyError):
            raise
        # Not the message's words: they may be anybody's, and of any length.
        said = error if isinstance(error, doorbell.NoDoorbell) else type(error).__name__
        logger.warning("dropped a message that is no doorbell: %s", said)


class EngineInfo(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Shows the engine's figures among the worker's stats, where Flower finds them; hears of every orderly end."""

    def close(self, _: Any) -> None:
        """Begin to drain. No signal says so where a control command, Flower's among them, shuts the worker down."""
        begin_to_stop()

    def info(self, _: Any) -> dict[str, Any]:
        """Say how the engine does."""
        if worker is None:
            return {}
        stats = worker.batcher.stats()
        return {
            "engine": {
                "worker": worker.id,
                "model": worker.model,
                "device": worker.engine.device,
                "dtype": worker.engine.dtype,
                "batches": stats.batches,
                "pairs": stats.pairs,
                "tokens": stats.tokens,
                "padded_tokens": stats.padded_tokens,
                "pairs_per_batch": round(stats.pairs / stats.batches, 1) if stats.batches else 0,
                "padding": round(stats.padding, 4),
                "busy_s": round(stats.busy_s, 1),
                "waiting_pairs": stats.waiting_pairs,
            }
        }


# It advises on late acknowledgements, of which there are none here, and would do so at every loss of the broker.
warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
# It warns of root, for messages might bring code: none does, JSON alone is read. Containers often run as root.
warnings.filterwarnings("ignore", category=SecurityWarning)

forget_celerys_environment()
try:
    settings = Settings()
    app = make_app(settings)
except RerankqError as error:
    # This module is a program: its reader is a person at a terminal.
    sys.exit(f"the worker cannot start: {error}")
app.conf.update(
    task_queues=[worker_queue(name) for name in queues_of(settings)],
    worker_pool="threads",
    worker_concurrency=settings.concurrency,
    worker_consumer=f"{__name__}:SafeConsumer",
    # Doorbells are acknowledged when they are heard; none waits in a worker that has no slot for it.
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
)
app.steps["worker"].add(EngineInfo)
app.steps["consumer"].add(Listening)

# Set when the worker starts; Celery's task functions and signals find it here.
worker: Worker | None = None
listening: Listening | None = None
watchdog: ShutdownWatchdog | None = None


# An error that we raise says how a job ended; that is no fault of the worker, and no traceback in its log.
@app.task(name=TASK, throws=(RerankqError, EngineError))  # type: ignore[untyped-decorator]  # Celery ships no types
def rerank(job_id: str) -> str:
    """Rank the job that the doorbell names."""
    if worker is None:
        msg = "the worker has not started"
        raise RuntimeError(msg)
    return worker.rerank(job_id)


@control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def revoke(state: Any, task_id: str | list[str], **_: Any) -> dict[str, str]:
    """Cancel jobs in the ledger, whether they wait, run, or have not been rung for yet.

    In place of Celery's own command, which knows only messages, cannot stop a thread, and remembers a revoked id for
    hours: the same content submitted again would not be ranked.
    """
    job_ids = [task_id] if isinstance(task_id, str) else list(task_id)
    if worker is not None:
        # Not here: this is the consumer's thread, and the ledger may be slow to answer.
        threading.Thread(target=worker.cancel, args=(job_ids,), name="rerankq-revoked", daemon=True).start()
    for job_id in job_ids:
        state.consumer.event_dispatcher.send("task-revoked", uuid=job_id, terminated=False, signum=None, expired=False)
    return {"ok": f"cancelled: {', '.join(job_ids)}"}


@inspect_command()  # type: ignore[untyped-decorator]
def active_queues(_: Any) -> list[dict[str, Any]]:
    """List the queues that this worker listens to; Celery's own command knows only those of its own channel."""
    return [dict(queue.as_dict(recurse=True)) for queue in listening.queues()] if listening else []


def chosen(settings: Settings, program: Any) -> Settings:
    """Take over the concurrency that Celery's own command line asks for.

    Raises:
        SettingsInvalid: if it asks for another pool: one engine serves all jobs from threads beside it.
    """
    pool = get_implementation(program.pool_cls)
    if pool is not ThreadPool:
        asked = pool.__module__.rpartition(".")[-1]
        raise errors.SettingsInvalid(f"--pool: expected threads, and not {asked}; leave it out")
    if isinstance(program.concurrency, int) and program.concurrency != settings.concurrency:
        return settings.model_copy(update={"concurrency": program.concurrency})
    return settings


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _load(sender: Any, **_: Any) -> None:
    # Before the pool and the consumer: the model is warm before the first job is taken.
    global worker, watchdog  # noqa: PLW0603  # Celery gives its signals no other place
    if threading.current_thread() is threading.main_thread():
        # Elsewhere, in a program that runs a worker in a thread, signals are that program's.
        watchdog = ShutdownWatchdog(settings.drain_s, begin=_told_to_stop)
        watchdog.install()
    try:
        worker = Worker(chosen(settings, sender), make_app(settings))
        worker.start()
    except Exception as error:
        logger.critical(
            "the worker cannot start: %s", error, exc_info=not isinstance(error, RerankqError | EngineError)
        )
        # Celery swallows exceptions of signals, and would take jobs without an engine.
        sys.exit(1)


@signals.task_received.connect  # type: ignore[untyped-decorator]
def _came_in(request: Any, **_: Any) -> None:
    # This runs on the consumer's own thread, before it reads the next message: bulk never overruns its share.
    if worker is None:
        return
    worker.slots.take(request.id, bulk=request.delivery_info.get("routing_key") == worker.bulk)
    if listening is not None:
        listening.look_again()


def _went_out(job_id: str) -> None:
    # The consumer sleeps in its poll while there is no slot; whoever gives one back wakes it.
    if worker is not None and worker.slots.give_back(job_id) and listening is not None:
        listening.consumer.call_soon(listening.look_again)


@signals.task_revoked.connect  # type: ignore[untyped-decorator]
def _revoked(request: Any, **_: Any) -> None:
    # By Celery's own means (a header, an id remembered from before): it never ran, and nobody else gives its slot back.
    _went_out(request.id)
    if worker is not None:
        worker.cancel([request.id])


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _stopping(**_: Any) -> None:
    begin_to_stop()


def begin_to_stop(*, hurry: bool = False) -> None:
    """Begin to drain, in a *hurry* to hand back; from now on the watchdog counts."""
    if watchdog is not None:
        watchdog.arm(hurry=hurry)
    _told_to_stop(hurry)


def _told_to_stop(hurry: bool) -> None:
    if worker is not None:
        worker.told_to_stop(hurry)


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _stop(sender: Any, **_: Any) -> None:
    # Celery has let all running jobs finish by now.
    if worker is not None:
        worker.stop()
        if worker.device_gone:
            sender.exitcode = DEVICE_HANGS
    if watchdog is not None:
        watchdog.finish()
