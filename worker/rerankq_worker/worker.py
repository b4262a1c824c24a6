"""The worker, put together and alive: backend, ledger, cache and doorbells; how each job ends; how the worker ends."""

from __future__ import annotations

import enum
import gc
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rerankq import __version__, catalogue, errors
from rerankq.broker.celery_app import make_app
from rerankq.broker.doorbells import DoorbellSender, MessageCounts
from rerankq.client.routing import former_queues, queue_name, resolve_route, suffix_of
from rerankq.contract import Ranking, State
from rerankq.errors import BrokerUnavailable, JobCancelled, QueueFull, RerankqError
from rerankq.identity import job_of
from rerankq.ledger import Call, Claim, Deferred, calls, connect
from rerankq.ledger.limits import LedgerLimits
from rerankq.ledger.runner import Ledger
from rerankq.settings import Settings

from . import cache
from .backend import load_backend
from .crash_record import CrashRecords
from .engine import EngineClosed, EngineDied, EngineError
from .fusion.analyser import Analyser
from .leases import Leases
from .locks import SharedExclusiveLock
from .reranker import Reranker
from .shutdown import ShutdownWatchdog, within
from .slots import Slots, SuspectSlots
from .sweeping import CancelListener, Sweeper, recover_ended
from .work import Work

logger = logging.getLogger("rerankq")
Answer = TypeVar("Answer")

# Exit status for a supervisor to see, beside those of ``shutdown``: the device hangs, or is gone.
DEVICE_FAILED = 70
# Seconds of a stop that handing back may take, and then the rest: a ledger or broker that hangs is not waited for.
HAND_BACK_S = 2.0
CLOSE_S = 2.0
# Seconds between tries to tell the ledger how a job ended.
REPORT_AGAIN_S = 1.0
# Seconds between searches for jobs of this model in queues that no worker consumes any more.
ADOPT_EVERY_S = 5.0


class OtherModel(Exception):
    """Raised when a job names a model that this worker does not serve."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model


class DoorbellIgnored(Exception):
    """Raised when a doorbell ends without an outcome of its job; says why. Flower goes on showing what it showed."""


class Phase(enum.IntEnum):
    """How far a worker is on the way to its end."""

    RUNNING = 0  # claims jobs
    DRAINING = 1  # stopping: jobs in flight may finish
    HANDING_BACK = 2  # claims nothing, and gives back what it holds


class Lifecycle:
    """The phase that a worker is in, for all its threads; it only goes forward.

    >>> life = Lifecycle()
    >>> life.advance(Phase.DRAINING), life.advance(Phase.DRAINING, exit_status=70), life.exit_status
    (True, False, 0)
    >>> life.reached(Phase.DRAINING), life.wait(Phase.HANDING_BACK, timeout_s=0)
    (True, False)
    """

    def __init__(self) -> None:
        # Its lock can be taken again by the thread that has it: a signal's handler may advance in the midst of that.
        self._changed = threading.Condition()
        self._phase = Phase.RUNNING
        self._exit_status = 0

    @property
    def exit_status(self) -> int:
        """The status that the process shall end with; 0 unless the worker stops by its own fault."""
        return self._exit_status

    def reached(self, phase: Phase) -> bool:
        """Whether the worker is in this phase, or beyond."""
        return self._phase >= phase

    def advance(self, phase: Phase, *, exit_status: int = 0) -> bool:
        """Go on to a phase; answers False, and changes nothing, if it was reached before."""
        with self._changed:
            if self.reached(phase):
                return False
            self._phase, self._exit_status = phase, exit_status or self._exit_status
            self._changed.notify_all()
            return True

    def wait(self, phase: Phase, timeout_s: float | None = None) -> bool:
        """Wait until a phase is reached; answers whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self.reached(phase), timeout_s)


class RankedTotals:
    """What this process has ranked: jobs, their pairs, and how many of these came from the score cache. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs = self._pairs = self._cached_pairs = 0

    def add(self, ranking: Ranking) -> None:
        """Count a ranking."""
        with self._lock:
            self._jobs += 1
            self._pairs += ranking.usage.pairs
            self._cached_pairs += ranking.usage.cached_pairs

    def figures(self) -> dict[str, int]:
        """Give the totals by name."""
        with self._lock:
            return {"jobs": self._jobs, "pairs": self._pairs, "cached_pairs": self._cached_pairs}


class Worker:
    """One process, one backend: everything that lives from the start of the worker to its end.

    *on_free_slot* is called whenever a job that ended makes room for another where there was none.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.limits = LedgerLimits.of(settings)
        self.life = Lifecycle()
        self.on_free_slot: Callable[[], object] = lambda: None
        self.id = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.model = catalogue.canonical(settings.model, settings.conf_dir)
        self.default = catalogue.canonical(settings.default_model or settings.model, settings.conf_dir)
        folder = Path(self.model)
        self.names = {self.model, settings.model, *([folder.name] if folder.is_dir() else [])}
        self.interactive, self.bulk = queues_of(settings)
        self.ledger = Ledger(connect(settings.ledger))
        records = CrashRecords(settings.ledger)
        # Before minutes of loading a model: jobs of the process that this one replaces go to others, and a ledger that
        # cannot be reached is reported at once.
        recover_ended(self.ledger, self.limits, records)
        self.record = records.create(self.id, settings.concurrency)
        # An app of its own: closing it closes no connection of the consumer.
        app = make_app(settings)
        self.doorbells = DoorbellSender(app)
        self.slots = Slots(settings.concurrency)
        self.suspects = SuspectSlots(settings.concurrency)
        self.device = SharedExclusiveLock()
        self._handing_back = threading.Lock()
        self._ranked = RankedTotals()

        scores = cache.ScoreCache(cache.connect(settings.cache), ttl_s=settings.cache_ttl_s)
        self.backend = load_backend(self.model, settings, scores)
        analyser = Analyser()
        analyser.warm()
        self.reranker = Reranker(self.backend.scorer, analyser, name=self.model)

        self.leases = Leases(self.ledger, self.limits, device_hangs=self._hangs, give_up=self._give_up)
        self.listener = CancelListener(self.ledger, self.limits, self.leases.cancel)
        self.sweeper = Sweeper(
            self.ledger,
            self.limits,
            self.doorbells,
            MessageCounts(app),
            records,
            worker=self.id,
            queues=[self.interactive, self.bulk],
            describe=self._describe,
            can_work=self._can_work,
        )

    def start(self) -> None:
        """Begin to hold leases, sweep and listen. It registers first: jobs may name this model from now on."""
        # What was loaded, half a million objects, lives as long as this process: a garbage collection that looks
        # through them takes 0.3 s, in which no thread runs.
        gc.collect()
        gc.freeze()
        self.sweeper.beat()
        self.leases.start()
        self.listener.start()
        self.sweeper.start()
        threading.Thread(target=self.drain, name="rerankq-drain", daemon=True).start()
        threading.Thread(target=self._adopt_repeatedly, name="rerankq-adoption", daemon=True).start()

    def take_slot(self, job_id: str, queue: str) -> None:
        """Count a doorbell that was received from a queue."""
        self.slots.take(job_id, bulk=queue == self.bulk)

    def give_slot_back(self, job_id: str) -> None:
        """Count a doorbell as done; one that took no slot changes nothing."""
        if self.slots.give_back(job_id):
            self.on_free_slot()

    def adopt(self) -> int:
        """Move jobs of this model here from the queues that were its own under another default or an earlier version.

        Not from a queue that a living worker still consumes. Answers how many were moved.
        """
        live_s = self.limits.lease_policy.alive_for_s
        consumed = {queue for worker in self.ledger.workers() if worker.age_s <= live_s for queue in worker.queues}
        moves = {old: own for old, own in former_queues(self.model, self.default).items() if old not in consumed}
        return self.ledger.ask(calls.adopt(moves)) if moves else 0

    def _adopt_repeatedly(self) -> None:
        while True:
            try:
                if moved := self.adopt():
                    logger.warning("adopted %d jobs from queues that no worker consumes", moved)
            except RerankqError as error:
                logger.info("cannot adopt jobs from former queues: %s", error)
            except Exception:
                # This thread must outlive any bug in it.
                logger.exception("cannot adopt jobs from former queues")
            if self.life.wait(Phase.DRAINING, ADOPT_EVERY_S):
                return

    def drain(self) -> None:
        """Once the worker stops, let jobs finish for ``drain_s``; then hand back the rest, before it is killed."""
        self.life.wait(Phase.DRAINING)
        if not self.life.wait(Phase.HANDING_BACK, self.settings.drain_s):
            self.hand_back()

    def hand_back(self) -> None:
        """Stop work on the jobs that are held, queue them again, and sign off."""
        self.life.advance(Phase.HANDING_BACK)
        with self._handing_back:
            held = self.leases.stop()
            # First: the end of its jobs' threads must not wait for a ledger that hangs.
            self.leases.cancel(held)
            try:
                if held:
                    self.ledger.ask(calls.hand_back(held))
            except RerankqError as error:
                logger.warning("cannot hand back %d jobs, their leases will lapse: %s", len(held), error)
            self.doorbells.send(self.suspects.forget())
            self.sweeper.stop()

    def stop(self) -> None:
        """Hand back what is still held, sign off, and let the device go; in a few seconds, whatever hangs."""
        self.life.advance(Phase.HANDING_BACK)
        within(HAND_BACK_S, self.hand_back)
        within(
            CLOSE_S,
            self.listener.stop,
            partial(self.doorbells.close, CLOSE_S / 2),
            partial(self.backend.close, CLOSE_S),
        )
        self.record.close()

    def begin_to_stop(self, *, hurry: bool) -> None:
        """Begin to drain; in a *hurry*, hand back now. Returns at once."""
        self.life.advance(Phase.DRAINING)
        if hurry:
            threading.Thread(target=self.hand_back, name="rerankq-hand-back", daemon=True).start()

    def cancel(self, job_ids: Iterable[str]) -> None:
        """Cancel jobs in the ledger, which tells all workers; an unknown id does no harm."""
        for job_id in job_ids:
            try:
                self.ledger.ask(calls.cancel(job_id, self.limits))
            except RerankqError as error:
                logger.warning("cannot cancel job %s: %s", job_id, error)

    def rerank(self, job_id: str) -> str:
        """Claim a job, rank it, and tell the ledger how it ended. Answers a summary for Flower.

        Raises:
            DoorbellIgnored: if this worker does not answer for the job: it runs elsewhere, or was given back.
            RerankqError: how the job ended, where it was not ranked.
        """
        if self.life.reached(Phase.HANDING_BACK) or self.leases.hung or self.life.exit_status:
            # Doorbells for its own jobs, handed back, are sent at once: they are for others. A claim would count as a
            # heartbeat.
            raise DoorbellIgnored("this worker is stopping, or its device failed: a sweeper will send another doorbell")
        claim = self.ledger.ask(calls.claim_unless_suspect(job_id, self.id, self.limits))
        if not isinstance(claim, Deferred):
            return self._rerank(job_id, claim)
        with self._suspect_slot(claim):
            return self._rerank(job_id, self.ledger.ask(calls.claim(job_id, self.id, self.limits)))

    @contextmanager
    def _suspect_slot(self, suspect: Deferred) -> Iterator[None]:
        """Take a slot for suspects, or raise: one that waits for its turn keeps no other job from being claimed."""
        taken = self.suspects.take(suspect)
        try:
            if not taken:
                raise DoorbellIgnored("suspected of a crash: another doorbell is sent when its turn comes")
            yield
        finally:
            if taken:
                self.suspects.give_back(suspect)
            following = self.suspects.next_doorbell()
            self.doorbells.send([following] if following else [])

    def _rerank(self, job_id: str, claim: Claim | State) -> str:
        if isinstance(claim, str):
            return answer_unclaimed(claim)
        if claim.refill_window:
            self.sweeper.refill_window()
        slot = self.record.begin(job_id, claim.fence)
        work = Work(slot)
        self.leases.hold(job_id, claim.fence, work)
        accused = False
        try:
            with self._on_device(claim, work):
                ranking = self._rank(claim, work)
                # Before the next suspect has the device: a crash from then on is that one's.
                state = self._report(calls.complete(job_id, claim.fence, ranking, self.limits))
        except EngineDied as error:
            self._shut_down(error)
            # One of the jobs on the device may have caused it. They come back as suspects, when this process is found
            # to have ended: handed back, a job that kills the device would go round for ever.
            accused = slot.on_device
            if not accused:
                self._hand_back(claim)
            raise DoorbellIgnored(
                f"job {job_id} {'left to its lease' if accused else 'handed back'}: {error}"
            ) from error
        except (EngineClosed, BrokerUnavailable, QueueFull) as error:
            # Not the job's fault: another worker, or this one when it is back, will rank it.
            self._hand_back(claim)
            raise DoorbellIgnored(f"job {job_id} handed back: {error}") from error
        except OtherModel as other:
            raise DoorbellIgnored(f"job {job_id} rerouted to {self._reroute(claim, other)}") from other
        except Exception as error:
            self._fail(claim, error)
            raise
        finally:
            self.leases.release(job_id, claim.fence)
            if not accused:
                self.record.end(slot)
        if state != "done":
            raise DoorbellIgnored(f"job {job_id} was {state} meanwhile: this ranking is ignored")
        self._ranked.add(ranking)
        return summary(ranking)

    def _hand_back(self, claim: Claim) -> None:
        with suppress(RerankqError):
            self.ledger.ask(calls.hand_back([(claim.id, claim.fence)]))

    def _rank(self, claim: Claim, work: Work) -> Ranking:
        # Before it is parsed: any client that can write to the ledger decides what a payload holds.
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
        """Move a job of another model to the queue where that is served, or waited for; answers the queue."""
        settings = self.settings
        try:
            listed = [catalogue.canonical(name, settings.conf_dir) for name in settings.models]
            live_s = self.limits.lease_policy.alive_for_s
            route = resolve_route(
                other.model, self.ledger.workers(), listed=listed, default=self.default, live_s=live_s
            )
            suffix = route.suffix
        except errors.ModelUnknown:
            # It was accepted, so it is not failed for want of a worker: one may be starting. Its deadline holds.
            suffix = suffix_of(other.model, self.default)
        queue = queue_name(claim.priority, suffix)
        self._report(calls.reroute(claim.id, claim.fence, queue, other.model))
        return queue

    @contextmanager
    def _on_device(self, claim: Claim, work: Work) -> Iterator[None]:
        """Wait for the device: shared with other jobs or, for a suspect, alone."""
        if self.life.reached(Phase.HANDING_BACK):
            # Claimed while the others were handed back.
            raise EngineClosed("this worker is stopping")
        interactive = claim.priority == "interactive"
        lock = self.device.exclusive if claim.suspect else self.device.shared
        with ExitStack() as held:
            with work.waiting():
                held.enter_context(lock(interactive=interactive, check=work.raise_if_cancelled))
            if claim.suspect:
                work.raise_if_cancelled()
                if not self._report(calls.isolate(claim.id, claim.fence, self.id)):
                    raise JobCancelled("the lease was lost")
            yield

    def _fail(self, claim: Claim, error: Exception) -> None:
        if isinstance(error, JobCancelled):
            # Already so in the ledger; or the lease was lost, and another worker has the job.
            return
        kind = type(error).__name__ if isinstance(error, RerankqError) else "JobFailed"
        known = isinstance(error, RerankqError | EngineError)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        logger.warning("job %s failed: %s", claim.id, said)
        self._report(calls.fail(claim.id, claim.fence, kind, said, self.limits))

    def _report(self, call: Call[Answer]) -> Answer:
        """Tell the ledger, however long it cannot be reached: the work is done, only the report is left.

        A worker that stops does not wait for it: the scores are in the cache, and the lease lapses.
        """
        while True:
            try:
                return self.ledger.ask(call)
            except (BrokerUnavailable, QueueFull) as error:
                logger.warning("cannot write to the ledger, trying again: %s", error)
                if self.life.wait(Phase.DRAINING, REPORT_AGAIN_S):
                    raise

    def figures(self) -> dict[str, Any]:
        """Say what scores and what it did, as ``celery inspect stats`` and Flower show it."""
        return {"worker": self.id, "model": self.model, **self.backend.figures()}

    def _describe(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "aliases": sorted(self.names - {self.model}),
            "version": __version__,
            "channel": self.limits.channel,
            **self._ranked.figures(),
            **self.backend.description(),
        }

    def _can_work(self) -> bool:
        return not self.leases.hung and self.backend.can_work

    def _hangs(self) -> bool:
        return self.backend.hangs(self.limits.lease_policy)

    def _give_up(self) -> None:
        logger.critical("the device hangs and the leases have lapsed: exiting, to be started again")
        # No clean end is possible: a thread is stuck in the device.
        os._exit(DEVICE_FAILED)

    def _shut_down(self, error: Exception) -> None:
        if self.life.advance(Phase.DRAINING, exit_status=DEVICE_FAILED):
            logger.critical("the device failed, shutting down to be started again: %s", error)
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class WorkerProcess:
    """What a worker's process holds; its Celery app carries it as ``app.process``.

    There is no worker before the model is loaded, and no watchdog where the signals are another program's.
    """

    worker: Worker | None = None
    watchdog: ShutdownWatchdog | None = None

    def begin_to_stop(self, *, hurry: bool = False) -> None:
        """Begin to drain, in a *hurry* to hand back; from now on the watchdog counts."""
        if self.watchdog is not None:
            self.watchdog.arm(hurry=hurry)
        self.stop_worker(hurry)

    def stop_worker(self, hurry: bool) -> None:
        """Let the worker begin to stop, if there is one: what the watchdog calls on a signal."""
        if self.worker is not None:
            self.worker.begin_to_stop(hurry=hurry)


# What Flower shows of a job that had ended before its doorbell was received.
ENDINGS: dict[str, tuple[type[RerankqError], str]] = {
    "expired": (errors.JobExpired, "not started before its deadline"),
    "dead": (errors.JobDead, "it crashed its worker too often"),
    "cancelled": (errors.JobCancelled, "cancelled before it started"),
    "failed": (errors.JobFailed, "failed before"),
}


def answer_unclaimed(state: State) -> str:
    """Answer the doorbell of a job that cannot be claimed, so that Flower goes on showing the job's real state.

    Raises:
        DoorbellIgnored: if it is running: whoever has it will say how it ended.
        RerankqError: how it ended, where it was not ranked.
    """
    if state == "running":
        raise DoorbellIgnored("the job is running already")
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
