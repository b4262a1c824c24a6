"""One thread that owns the device and forms its batches from the pairs of all jobs in flight.

It is a thread of the worker's process, not a separate process: it holds the interpreter's lock for an eighth of the
time (py-spy, 32 jobs in flight at 5 500 pairs/s; Celery's main thread holds it for three quarters), and its gaps do not
change with ``sys.setswitchinterval`` from 5 ms to 0.2 ms. With batches of 8 ms the device was idle for 0 to 1 % of its
time at 2 000 pairs/s, and at 5 000 mostly for 1 to 12 %, on two cores that were shared; a separate process had gaps as
well, shorter in two of three comparisons. To be measured again for a device that does more than 5 000 pairs/s
(``benchmarks/pipeline.py``).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from ..errors import EngineClosed, EngineDied, EngineError, PairFailed, is_out_of_memory
from ..protocol import Engine, TokenisedPair
from .batch_time import Budget, FairShare
from .batching import LOOK_AHEAD, WINDOW, cost, fill_of, leading_priority, plan
from .in_flight import FinishedBatch, InFlightBatches
from .tally import BatcherStats, Tally
from .ticket import SharedPair, Ticket
from .waiting_pairs import BULK, INTERACTIVE, NOT_WAITING, JobQueue, WaitingPairs

logger = logging.getLogger(__name__)

Priority = Literal["interactive", "bulk"]
_PRIORITIES = {"interactive": INTERACTIVE, "bulk": BULK}
_CLOSED = "the engine was closed"


#: Seconds before the predicted end of a batch at which the next one is launched: a few switch intervals of the
#: interpreter's lock, for which this thread may have to wait. Earlier launches delay urgent pairs that come meanwhile.
LEAD_S = 0.01
#: Seconds between checks whether the device has finished earlier than predicted, and the shortest wait worth a sleep.
_POLL_S, _SHORTEST_WAIT_S = 0.002, 0.0002
#: Nearly every pair has at least so many tokens.
_SHORT = 8


class Batcher:
    """Takes tokenised pairs from any thread, and delivers the logits to their tickets.

    Its one thread asks ``batching.plan`` for a batch shortly before the device is free (``lead_s`` seconds), and
    launches it before it delivers the logits of the one before; at most one batch is launched ahead. An engine whose
    ``launch`` blocks runs one batch after the other.

    Jobs of one priority share the device by tokens: tenants share it equally, and the jobs of a tenant share the
    tenant's part equally. So a small job waits for a turn of every other job, not for their ends.

    Interactive pairs go first; bulk gets ``bulk_share`` of the device's time however many of them wait, and fills their
    batches up to ``fill_tokens`` (default: ``batching.fill_of`` the budget). So an interactive pair waits for the batch
    on the device and at most one more. Pairs with the same key are computed once while in flight.

    A batch that does not fit into memory is halved, and the budget stays lower for a while. A batch that fails
    otherwise is halved too, until the pair is found that fails alone, or has no finite logit: the tickets that wait for
    it fail, and no others. If the engine then fails to warm up as well, it is dead: every ticket fails with EngineDied,
    and so does every later ``submit``.

    ``seconds_per_token`` predicts the first batch, for ``stats``.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch_tokens: int | None = None,
        bulk_share: float = 0.2,
        fill_tokens: int | None = None,
        lead_s: float = LEAD_S,
        seconds_per_token: float = 0.0,
        window: int = WINDOW // 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < bulk_share < 1:
            raise ValueError(f"bulk_share must be between 0 and 1, not {bulk_share}")
        full = engine.max_batch_tokens if max_batch_tokens is None else max_batch_tokens
        if full < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, not {full}")
        self._engine = engine
        #: Batches of others for each one of bulk.
        self._batches_between_bulk = (1 - bulk_share) / bulk_share
        self._fill_tokens = fill_of(full) if fill_tokens is None else fill_tokens
        self._lead_s = lead_s
        self._window = window
        self._clock = clock

        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._closed = threading.Condition(self._lock)
        self._waiting: WaitingPairs[SharedPair] = WaitingPairs()
        self._by_key: dict[bytes, SharedPair] = {}
        self._tickets: set[Ticket] = set()
        self._budget = Budget(full, full)
        self._in_flight = InFlightBatches(engine, clock, seconds_per_token)
        self._bulk = FairShare(bulk_share)
        self._closing = False
        self._death: str | None = None
        self._tally = Tally(last_progress=clock())

        self._thread = threading.Thread(target=self._run, name="rerankq-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def submit(
        self,
        pairs: Sequence[TokenisedPair],
        *,
        priority: Priority = "interactive",
        keys: Sequence[bytes | None] | None = None,
        tenant: str = "",
        note_on_device: Callable[[bool], None] | None = None,
    ) -> Ticket:
        """Queue a job's pairs for the device; returns at once.

        ``keys``, one per pair, identify what is to be computed: pairs with equal keys are computed once while one of
        them is in flight; None shares with no other. ``note_on_device`` is told True before a batch with any of these
        pairs is launched, and False once none is on the device; a batch that failed is there until it was retried, and
        the last one of an engine that died for ever. It is called with the batcher's lock held, and never after the
        ticket has ended. The ticket fails at once if a pair has no tokens, more than the
        engine reads, or unknown ones. Raises EngineDied or EngineClosed if the engine no longer computes, and
        ValueError for an unknown priority or a wrong number of keys.
        """
        if priority not in _PRIORITIES:
            raise ValueError(f"priority must be 'interactive' or 'bulk', not {priority!r}")
        keys = [None] * len(pairs) if keys is None else keys
        if len(keys) != len(pairs):
            raise ValueError(f"one key per pair: got {len(keys)} keys for {len(pairs)} pairs")
        # Before anything is changed, so that a malformed pair or key fails its own submission only.
        wanted = [SharedPair(pair, pair.length, key) for pair, key in zip(pairs, keys, strict=True)]
        hash(tuple(keys))
        reason = self._refusal(pairs)
        now = self._clock()
        queue = JobQueue(_PRIORITIES[priority], tenant)
        ticket = Ticket(len(pairs), queue, now, self._lock, self._withdraw, note_on_device=note_on_device)
        with self._lock:
            if self._death is not None:
                raise EngineDied(self._death)
            if self._closing:
                raise EngineClosed(_CLOSED)
            if reason or not wanted:
                ticket.end(now, PairFailed(reason) if reason else None)
                return ticket
            self._tickets.add(ticket)
            # Each pair once, however often it occurs.
            queued: dict[SharedPair, None] = {}
            for index, pair in enumerate(wanted):
                shared, new = self._share(ticket, index, pair)
                if new or shared.index != NOT_WAITING:
                    queued[shared] = None
            self._waiting.add(ticket.queue, list(queued), now)
            self._work.notify()
        return ticket

    def stats(self) -> BatcherStats:
        """Return a snapshot of the counters."""
        with self._lock:
            tally = self._tally
            started, predicted = self._in_flight.oldest or (None, None)
            return BatcherStats(
                batches=tally.batches,
                pairs=tally.pairs,
                joined_pairs=tally.joined_pairs,
                failed_pairs=tally.failed_pairs,
                tokens=tally.tokens,
                padded_tokens=tally.padded_tokens,
                out_of_memory=tally.out_of_memory,
                busy_s=tally.busy_s,
                waiting_pairs=len(self._waiting),
                tickets=len(self._tickets),
                batch_tokens=self._budget.now,
                batch_started=started,
                batch_predicted_s=predicted,
                last_progress=tally.last_progress,
                alive=self._death is None and self._thread.is_alive(),
            )

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Stop after everything that waits was computed (``drain``), or after the current micro-batch.

        Tickets that are not done when the thread has ended, or after ``timeout`` seconds, fail with EngineClosed.
        """
        with self._lock:
            self._closing = True
            self._work.notify()
            self._closed.notify()
        if not drain:
            self._fail_all(EngineClosed, _CLOSED)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
        self._fail_all(EngineClosed, _CLOSED)

    # -- submitting and ending tickets, called with the lock held, or taking it themselves ---------------------------

    def _refusal(self, pairs: Sequence[TokenisedPair]) -> str | None:
        """Say why one of these pairs cannot be scored, if that is so."""
        most = self._engine.max_length
        for length in (pair.length for pair in pairs):
            if length < 1:
                return "a pair without tokens cannot be scored"
            if length > most:
                return f"a pair of {length} tokens cannot be scored: the model reads at most {most}"
        return self._unknown_ids(pairs)

    def _unknown_ids(self, pairs: Sequence[TokenisedPair]) -> str | None:
        """Say that a pair has unknown token ids, if one does: on some devices they crash the process."""
        vocabulary = self._engine.vocabulary
        if vocabulary is None or not pairs:
            return None
        try:
            ids = np.concatenate([pair.ids for pair in pairs])
        except ValueError:
            return "a pair cannot be scored: its token ids must be a one-dimensional array"
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocabulary:
            return f"a pair cannot be scored: token ids must be integers below {vocabulary}, the model's vocabulary"
        return None

    def _share(self, ticket: Ticket, index: int, pair: SharedPair) -> tuple[SharedPair, bool]:
        """Let the ticket wait for this pair, or for the one in flight with the same key; tells whether it is new."""
        known = None if pair.key is None else self._by_key.get(pair.key)
        shared = known or pair
        shared.waiters.append((ticket, index))
        ticket.shared.append(shared)
        if shared.on_device:
            ticket.enter_device()
        if known is not None:
            self._tally.joined_pairs += 1
        elif pair.key is not None:
            self._by_key[pair.key] = pair
        return shared, known is None

    def _unshare(self, shared: SharedPair) -> None:
        if shared.key is not None and self._by_key.get(shared.key) is shared:
            del self._by_key[shared.key]

    def _release(self, ticket: Ticket, error: EngineError | None) -> None:
        """End a ticket; the pairs it waited for are still computed for others."""
        self._tickets.discard(ticket)
        # Without an error all its pairs are computed, and their waiters no longer matter.
        for shared in ticket.shared if error is not None else ():
            shared.remove_waiter(ticket)
            if not shared.waiters:
                self._unshare(shared)
        self._waiting.close(ticket.queue)
        ticket.end(self._clock(), error)

    def _withdraw(self, ticket: Ticket, error: EngineError) -> None:
        with self._lock:
            if not ticket.done:
                self._release(ticket, error)

    def _fail_all(self, kind: type[EngineError], reason: str) -> None:
        with self._lock:
            for ticket in list(self._tickets):
                self._release(ticket, kind(reason))

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            # Nothing else catches what this thread raises, and its tickets would wait for ever.
            logger.exception("the engine thread ended")
            with self._lock:
                self._death = f"the engine died: {error!r}"
                self._in_flight.oldest = None
            self._fail_all(EngineDied, self._death)

    def _step(self) -> bool:
        """Launch a batch and finish those before it; False when closed and nothing is left."""
        in_flight = self._in_flight
        if batch := self._next_batch():
            in_flight.launch(batch, self._cost(batch))
        elif not in_flight:
            return False
        # One batch stays in flight, unless there is nothing to launch after it, or it is done already.
        keep = 1 if batch and not in_flight.all_done else 0
        failed = []
        while len(in_flight) > keep:
            finished = in_flight.finish_oldest()
            if self._delivered(finished):
                continue
            # Retries run with nothing else on the device.
            failed.append(finished)
            keep = 0
        for finished in failed:
            self._recover(finished)
        return True

    def _next_batch(self) -> list[SharedPair]:
        """Plan a batch; waits for work, unless a batch is in flight: then empty where there is none."""
        with self._lock:
            self._wait_for_device()
            while not len(self._waiting):
                if self._closing or self._in_flight:
                    return []
                self._work.wait()
            return self._choose()

    def _wait_for_device(self) -> None:
        """Wait until shortly before the device is free."""
        while not self._closing and (early := self._in_flight.free_in() - self._lead_s) > _SHORTEST_WAIT_S:
            self._closed.wait(min(early, _POLL_S))

    def _choose(self) -> list[SharedPair]:
        now, budget = self._clock(), self._budget.now
        # Padded batches need many pairs to find neighbours in length; others only those with the earliest turns.
        size = self._window if self._engine.padded else min(self._window, budget // _SHORT + LOOK_AHEAD)
        window = self._waiting.window(size)
        ages = now - window.arrived
        predict = self._in_flight.time_model.predict
        # Bulk gets its share and no more: before it is due, even the oldest bulk pairs wait.
        age_limit = math.inf if now < self._bulk.due_at else self._batches_between_bulk * predict(budget) or math.inf
        chosen = plan(
            window.lengths,
            window.priorities,
            ages,
            budget,
            padded=self._engine.padded,
            starts=window.starts,
            fill_tokens=self._fill_tokens,
            age_limit=age_limit,
        )
        turn = leading_priority(window.priorities, ages, age_limit)
        if turn == BULK:
            bulk = window.priorities == BULK
            share = window.lengths[chosen[bulk[chosen]]].sum() / window.lengths[chosen].sum()
            cost_of_bulk = share * cost(window.lengths[chosen], padded=self._engine.padded)
            self._bulk = self._bulk.after(now, predict(cost_of_bulk))
        batch = self._waiting.take(window, chosen, led_by=turn, least=min(self._fill_tokens, budget))
        for shared in batch:
            shared.enter_device()
        return batch

    def _cost(self, pairs: Sequence[SharedPair]) -> int:
        return cost([shared.length for shared in pairs], padded=self._engine.padded)

    def _delivered(self, batch: FinishedBatch) -> bool:
        """Count a batch and deliver its logits; True if every pair has one."""
        self._count(batch)
        if batch.error is None:
            self._deliver(batch)
        return not batch.unscored

    def _recover(self, batch: FinishedBatch) -> None:
        """Retry the unscored pairs of a batch in halves, down to the pair that fails alone."""
        self._note_error(batch)
        if len(batch.pairs) == 1:
            self._fail_pair(batch.pairs[0], batch.error or ArithmeticError("its logit is not finite"))
            return
        pairs = batch.unscored
        middle = len(pairs) // 2
        for half in (pairs[:middle], pairs[middle:]):
            self._retry(half)

    def _retry(self, pairs: list[SharedPair]) -> None:
        with self._lock:
            wanted = [shared for shared in pairs if shared.waiters]
        if not wanted:
            return
        middle = len(wanted) // 2
        # The first half may have lowered the budget: nothing is retried above it.
        if middle and self._cost(wanted) > self._budget.now:
            self._retry(wanted[:middle])
            self._retry(wanted[middle:])
            return
        self._in_flight.launch(wanted, self._cost(wanted))
        batch = self._in_flight.finish_oldest()
        if not self._delivered(batch):
            self._recover(batch)

    def _note_error(self, batch: FinishedBatch) -> None:
        if batch.error is None or not is_out_of_memory(batch.error):
            return
        with self._lock:
            self._tally.out_of_memory += 1
            self._budget = self._budget.after_out_of_memory(batch.cost)
            logger.warning("out of memory at %d tokens; batch budget lowered to %d", batch.cost, self._budget.now)
        try:
            self._engine.release_memory()
        except BaseException:  # the next batch shows whether the device is gone
            logger.exception("the engine could not release memory")

    def _count(self, batch: FinishedBatch) -> None:
        with self._lock:
            tally = self._tally
            tally.busy_s += batch.ended - batch.began
            for ticket in {ticket for shared in batch.pairs for ticket, _ in shared.waiters}:
                ticket.note_batch(batch.began, batch.ended)
            if batch.error is not None:
                return
            tally.batches += 1
            tally.pairs += len(batch.pairs)
            tally.tokens += sum(shared.length for shared in batch.pairs)
            tally.padded_tokens += batch.cost
            tally.last_progress = batch.ended
            self._budget = self._budget.after_success()

    def _deliver(self, batch: FinishedBatch) -> None:
        with self._lock:
            touched = set()
            for shared, logit in batch.scored:
                self._unshare(shared)
                for ticket, _ in shared.waiters[:1]:
                    ticket.tokens += shared.length
                for ticket, index in shared.waiters:
                    ticket.leave_device()
                    ticket.deliver(index, logit)
                    touched.add(ticket)
            for ticket in touched:
                if ticket.done_pairs == ticket.pairs:
                    self._release(ticket, None)

    def _fail_pair(self, shared: SharedPair, error: BaseException) -> None:
        """Fail the tickets of a pair that failed alone; raises RuntimeError if the device fails to warm up, too."""
        with self._in_flight.unpredicted():
            try:
                self._engine.warm_up()
            except BaseException as second:
                raise RuntimeError(f"a pair failed alone ({error}), and then the warm-up ({second})") from second
        logger.error("a pair of %d tokens failed alone: %s", shared.length, error)
        with self._lock:
            self._tally.failed_pairs += 1
            self._tally.last_progress = self._clock()
            for ticket in dict.fromkeys(ticket for ticket, _ in shared.waiters):
                self._release(ticket, PairFailed(f"a pair of {shared.length} tokens cannot be scored: {error}"))
