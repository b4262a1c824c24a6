"""What every worker does beside ranking: heartbeats, sweeps, sending doorbells, receiving cancellations."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from redis.exceptions import RedisError

from rerankq.errors import RerankqError
from rerankq.ledger import Counted, Doorbell, LedgerLimits, Swept, calls
from rerankq.ledger.lease_policy import BEAT_S, Watch
from rerankq.ledger.runner import Ledger

from .crash_record import CrashRecords
from .processes import has_ended, mark_of

logger = logging.getLogger("rerankq")

SWEEP_EVERY_S = BEAT_S
# Seconds of silence after which a worker's process is looked for.
SILENT_S = 2 * BEAT_S
# Doorbells of one round: more than a worker answers meanwhile, and few enough for one batch to the broker.
SEND_AT_ONCE = 256
# Seconds that stopping waits for what is under way: the ledger may hang.
JOIN_S = 3.0


class Sender(Protocol):
    """Sends doorbells."""

    def send(self, doorbells: Sequence[Doorbell]) -> None: ...  # noqa: D102


class Counts(Protocol):
    """Counts the messages that the broker holds, without blocking the caller."""

    def ask(self, queues: Sequence[str], at: float) -> None: ...  # noqa: D102
    def take(self) -> Counted: ...  # noqa: D102


def recover_ended(
    ledger: Ledger, limits: LedgerLimits, records: CrashRecords, ended: Callable[[str], bool] = has_ended
) -> None:
    """Queue again the jobs of workers on this machine that have ended without signing off, and sign them off.

    *records* say who has ended, and which of its jobs only waited. *ended* tells by the mark of a process, for those
    that left no record: all that they held are suspects.

    Raises:
        BrokerUnavailable: if the ledger does not answer; records that it was not told of are kept.
        QueueFull: if its memory is full; likewise.
    """
    silent = [one for one in ledger.workers() if one.age_s > SILENT_S]
    for worker in sorted({*records.ended(), *(one.id for one in silent if ended(one.process))}):
        found = ledger.ask(calls.recover(worker, records.waiting(worker), limits))
        records.remove(worker)
        logger.warning(
            "worker %s ended without signing off: %d jobs queued again, %d as suspects, %d dead", worker, *found
        )


class Sweeper:
    """Sends a heartbeat and sweeps every second, and sends doorbells whenever a claim says that the window has a gap.

    *describe* says what the registry shall show of this worker; *can_work* whether it can work: a worker whose device
    hangs or died sends no heartbeat. *counts* is asked for the messages of queues whose doorbells are overdue.
    *records* tell which workers of this machine have ended, and *ended* whether a process has.
    """

    def __init__(
        self,
        ledger: Ledger,
        limits: LedgerLimits,
        doorbells: Sender,
        counts: Counts,
        records: CrashRecords,
        *,
        worker: str,
        queues: Sequence[str],
        describe: Callable[[], Mapping[str, Any]],
        can_work: Callable[[], bool] = lambda: True,
        ended: Callable[[str], bool] = has_ended,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._limits = limits
        self._doorbells = doorbells
        self._counts = counts
        self._records = records
        self._worker = worker
        self._queues = queues
        self._describe = describe
        self._can_work = can_work
        self._ended = ended
        self._clock = clock
        self._watch = Watch(limits.lease_policy)
        self._wake = threading.Event()
        self._stopped = False
        self._away = False
        self._thread = threading.Thread(target=self._run, name="rerankq-sweeper", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and take this worker out of the registry."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)
        try:
            self._ledger.ask(calls.sign_off([self._worker]))
        except RerankqError as error:
            logger.info("cannot sign off: %s", error)

    def refill_window(self) -> None:
        """Send the doorbells that the window has a gap for, soon; returns at once."""
        self._wake.set()

    def sweep(self) -> Swept:
        """Send a heartbeat, sweep once, and send doorbells; nothing of it where this worker cannot work."""
        if not self._can_work():
            return Swept()
        asked = self._clock()
        ledger_now = self.beat()
        now = self._clock()
        self._watch = self._watch.saw(asked, now, ledger_now=ledger_now, server=self._ledger.server())
        recover_ended(self._ledger, self._limits, self._records, self._ended)
        swept = self._ledger.ask(
            calls.sweep(self._worker, self._limits, watched_s=self._watch.watched_s(now), counted=self._counts.take())
        )
        if swept.lapsed or swept.doorbells:
            logger.warning(
                "%d leases lapsed (%d jobs dead), %d doorbells were lost", swept.lapsed, swept.dead, swept.doorbells
            )
        if swept.overdue:
            self._counts.ask(swept.overdue, ledger_now)
        self._send_doorbells()
        return swept

    def beat(self) -> float:
        """Tell the registry that this worker lives; answers the ledger's time."""
        forget_after_s = self._limits.lease_policy.forget_after_s
        info = {
            **self._describe(),
            "queues": list(self._queues),
            "process": mark_of(os.getpid()),
            "forget_after_s": forget_after_s,
        }
        return self._ledger.ask(calls.beat(self._worker, json.dumps(info), forget_after_s=forget_after_s))

    def _send_doorbells(self) -> None:
        while doorbells := self._ledger.ask(calls.refill_window(self._queues, self._limits, most=SEND_AT_ONCE)):
            self._doorbells.send(doorbells)
            if len(doorbells) < SEND_AT_ONCE:
                return

    def _run(self) -> None:
        next_sweep = 0.0
        while not self._stopped:
            try:
                if self._clock() >= next_sweep:
                    next_sweep = self._clock() + SWEEP_EVERY_S
                    self.sweep()
                else:
                    self._send_doorbells()
                self._log_outage(None)
            except RerankqError as error:
                self._watch = self._watch.lost(self._clock())
                self._log_outage(error)
                self._wake.wait(SWEEP_EVERY_S)
            except Exception:
                # Without this thread lost doorbells stay lost: it must outlive any bug in it.
                logger.exception("the sweep failed")
                self._wake.wait(SWEEP_EVERY_S)
            self._wake.wait(max(0.0, next_sweep - self._clock()))
            self._wake.clear()

    def _log_outage(self, error: RerankqError | None) -> None:
        # Logged once, not every second for as long as an outage lasts.
        if error is not None and not self._away:
            logger.warning("cannot sweep the ledger: %s", error)
        elif error is None and self._away:
            logger.warning("the ledger can be reached again, sweeping")
        self._away = error is not None


class CancelListener:
    """Receives cancellations on the deployment's channel; *cancel* gets the claims, ``(id, fence)``, that they end."""

    def __init__(self, ledger: Ledger, limits: LedgerLimits, cancel: Callable[[list[tuple[str, int]]], None]) -> None:
        self._ledger = ledger
        self._channel = limits.cancel_channel
        self._cancel = cancel
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rerankq-cancellations", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Stop listening."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        # A cancellation missed during an outage is noticed by the next renewal of the lease.
        while not self._stopped.is_set():
            pubsub: Any = self._ledger.redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
            try:
                pubsub.subscribe(self._channel)
                while not self._stopped.is_set():
                    message = pubsub.get_message(timeout=1.0)
                    if message is not None:
                        self._receive(message["data"])
            except (RedisError, OSError) as error:
                logger.info("cannot listen for cancellations: %s", error)
                self._stopped.wait(1.0)
            except Exception:
                # This thread must outlive any bug in it: without it running jobs are cancelled only in the ledger.
                logger.exception("a cancellation was not acted on")
                self._stopped.wait(1.0)
            finally:
                pubsub.close()

    def _receive(self, message: bytes) -> None:
        try:
            job_id, fence = message.decode().split()
            claim = job_id, int(fence)
        except ValueError:
            # Any client of the ledger can publish anything there.
            logger.warning("malformed cancellation: %.100r", message)
        else:
            self._cancel([claim])
