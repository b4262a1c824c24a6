"""One thread that owns the device and forms its batches from the pairs of all jobs in flight."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np

from ..batching import WINDOW, plan
from .errors import EngineClosed, EngineDied, EngineError, PairFailed, is_out_of_memory
from .pace import Budget, Pace
from .protocol import Engine, TokenisedPair
from .ticket import SharedPair, Ticket
from .waiting import BULK, INTERACTIVE, NOWHERE, WaitingPairs

logger = logging.getLogger(__name__)

Priority = Literal["interactive", "bulk"]
_PRIORITIES = {"interactive": INTERACTIVE, "bulk": BULK}
_CLOSED = "the engine was closed"


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """What the batcher did since it began, and what it does now.

    ``tokens`` are real, ``padded_tokens`` computed; ``busy_s`` is time inside the engine. While a batch runs,
    ``batch_started`` is its start on the batcher's clock and ``batch_predicted_s`` what its padded tokens should take
    (0 while nothing was measured); both are None in between. ``last_progress`` is when the last batch ended.
    """

    batches: int
    pairs: int
    joined_pairs: int
    failed_pairs: int
    tokens: int
    padded_tokens: int
    out_of_memory: int
    busy_s: float
    waiting_pairs: int
    tickets: int
    batch_tokens: int
    batch_started: float | None
    batch_predicted_s: float | None
    last_progress: float
    alive: bool

    @property
    def padding(self) -> float:
        """Tokens computed ÷ real tokens; 1 before the first batch."""
        return self.padded_tokens / self.tokens if self.tokens else 1.0


@dataclass(slots=True)
class _Tally:
    """The counters behind BatcherStats, changed under the batcher's lock."""

    last_progress: float
    batches: int = 0
    pairs: int = 0
    joined_pairs: int = 0
    failed_pairs: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    out_of_memory: int = 0
    busy_s: float = 0.0
    batch_started: float | None = None
    batch_predicted_s: float | None = None


class Batcher:
    """Takes tokenised pairs from any thread, and gives each ticket its logits.

    Its one thread asks ``batching.plan`` for a batch whenever the device is free. Interactive pairs go first; bulk
    keeps ``bulk_share`` of the device's time however many interactive pairs wait. Pairs with the same key are
    computed once while in flight.

    A batch that does not fit into memory is halved, and the budget stays lower for a while. A batch that fails
    otherwise is halved too, until the pair is found that fails alone: it fails the tickets that wait for it, and no
    others. When the engine does not even warm up then, it is dead: every ticket fails with EngineDied, and so does
    every later ``submit``.

    ``on_progress()`` is called by the engine's thread after every micro-batch.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch_tokens: int | None = None,
        bulk_share: float = 0.2,
        window: int = WINDOW // 2,
        on_progress: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < bulk_share < 1:
            raise ValueError(f"bulk_share is a share of the device's time, between 0 and 1, not {bulk_share}")
        full = engine.max_batch_tokens if max_batch_tokens is None else max_batch_tokens
        if full < 1:
            raise ValueError(f"a budget of {full} tokens holds no pair")
        self._engine = engine
        self._patience = (1 - bulk_share) / bulk_share
        self._window = window
        self._on_progress = on_progress
        self._clock = clock

        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._waiting: WaitingPairs[SharedPair] = WaitingPairs()
        self._in_flight: dict[bytes, SharedPair] = {}
        self._tickets: set[Ticket] = set()
        self._budget = Budget(full, full)
        self._pace = Pace()
        self._bulk_served = -math.inf
        self._closing = False
        self._death: str | None = None
        self._tally = _Tally(last_progress=clock())

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
    ) -> Ticket:
        """Hand pairs to the device; returns at once.

        ``keys``, one per pair, name what is to be computed: pairs with equal keys are computed once while one of them
        is in flight; None never joins. Raises EngineDied or EngineClosed when nothing will be computed any more, and
        ValueError for an unknown priority or a wrong number of keys.
        """
        if priority not in _PRIORITIES:
            raise ValueError(f"priority {priority!r} is neither 'interactive' nor 'bulk'")
        keys = [None] * len(pairs) if keys is None else keys
        if len(keys) != len(pairs):
            raise ValueError(f"one key per pair: got {len(keys)} keys for {len(pairs)} pairs")
        ticket = Ticket(len(pairs), _PRIORITIES[priority], self._lock, self._withdraw)
        with self._lock:
            if self._death is not None:
                raise EngineDied(self._death)
            if self._closing:
                raise EngineClosed(_CLOSED)
            if not pairs:
                ticket.end()
                return ticket
            self._tickets.add(ticket)
            enlisted = (self._enlist(ticket, *numbered) for numbered in zip(count(), pairs, keys, strict=False))
            new = [shared for shared in enlisted if shared is not None]
            self._waiting.join(new, ticket.priority, self._clock())
            self._work.notify()
        return ticket

    def stats(self) -> BatcherStats:
        """Take a snapshot."""
        with self._lock:
            tally = self._tally
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
                batch_started=tally.batch_started,
                batch_predicted_s=tally.batch_predicted_s,
                last_progress=tally.last_progress,
                alive=self._death is None and self._thread.is_alive(),
            )

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Stop: after everything waiting was computed, or else after the present micro-batch.

        Whoever still waits when the thread has ended, or after ``timeout`` seconds, gets EngineClosed.
        """
        with self._lock:
            self._closing = True
            self._work.notify()
        if not drain:
            self._end_everyone(EngineClosed, _CLOSED)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
        self._end_everyone(EngineClosed, _CLOSED)

    # -- entering and leaving, with the lock held where it is not taken ----------------------------------------------

    def _enlist(self, ticket: Ticket, index: int, pair: TokenisedPair, key: bytes | None) -> SharedPair | None:
        """Let the ticket wait for this pair; returns it if it is new to the line."""
        known = None if key is None else self._in_flight.get(key)
        shared = known or SharedPair(pair, key)
        shared.waiters.append((ticket, index))
        ticket.shared.append(shared)
        if known is not None:
            self._tally.joined_pairs += 1
            self._reconsider(shared)
            return None
        if key is not None:
            self._in_flight[key] = shared
        return shared

    def _reconsider(self, shared: SharedPair) -> None:
        """Drop a pair that nobody waits for; else let it go as early as its most urgent waiter."""
        if not shared.waiters:
            self._forget(shared)
            if shared.place != NOWHERE:
                self._waiting.leave(shared)
        elif shared.place != NOWHERE:
            self._waiting.prioritise(shared, shared.priority)

    def _forget(self, shared: SharedPair) -> None:
        if shared.key is not None and self._in_flight.get(shared.key) is shared:
            del self._in_flight[shared.key]

    def _release(self, ticket: Ticket, error: EngineError | None) -> None:
        """End a ticket; the pairs it waited for go on for others."""
        self._tickets.discard(ticket)
        # Not those already computed: they left, and their waiters do not matter any more.
        for shared in ticket.shared if error is not None else ():
            shared.forsake(ticket)
            self._reconsider(shared)
        ticket.end(error)

    def _withdraw(self, ticket: Ticket, error: EngineError) -> None:
        with self._lock:
            if ticket.done:
                return
            self._release(ticket, error)
        ticket.announce()

    def _end_everyone(self, kind: type[EngineError], reason: str) -> None:
        with self._lock:
            ended = list(self._tickets)
            for ticket in ended:
                self._release(ticket, kind(reason))
        for ticket in ended:
            ticket.announce()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while batch := self._next_batch():
                self._compute(batch)
        except BaseException as error:
            # Nobody is above this thread, and its tickets must hear of its end, whatever it is.
            logger.exception("the engine's thread ends")
            with self._lock:
                self._death = f"the engine died: {error!r}"
            self._end_everyone(EngineDied, self._death)

    def _next_batch(self) -> list[SharedPair]:
        """Wait for work and choose from it; empty when closed and nothing is left."""
        with self._lock:
            while not len(self._waiting):
                if self._closing:
                    return []
                self._work.wait()
            window = self._waiting.window(self._window)
            # Bulk counts its age from its last turn: what is wanted is a share, not that a backlog goes first.
            since = np.where(window.priorities == BULK, np.maximum(window.arrived, self._bulk_served), window.arrived)
            budget = self._budget.now
            chosen = plan(
                window.lengths,
                window.priorities,
                self._clock() - since,
                budget,
                age_limit=self._patience * self._pace.predict(budget) or math.inf,
            )
            return self._waiting.take(window.places[chosen].tolist())

    def _compute(self, batch: list[SharedPair]) -> None:
        """Compute a batch, in halves where it does not go as a whole."""
        parts = [batch]
        while parts:
            part = self._still_wanted(parts.pop())
            if not part:
                continue
            if len(part) == 1:
                if (error := self._attempt(part)) is not None:
                    self._judge(part[0], error)
            # What one half taught holds for the other: nothing is tried above a budget lowered meanwhile.
            elif _padded(part) > self._budget.now or self._attempt(part) is not None:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]

    def _still_wanted(self, part: list[SharedPair]) -> list[SharedPair]:
        with self._lock:
            return [shared for shared in part if shared.waiters]

    def _attempt(self, part: list[SharedPair]) -> Exception | None:
        """Run one micro-batch and deliver it; returns what went wrong."""
        padded = _padded(part)
        with self._lock:
            self._tally.batch_predicted_s = self._pace.predict(padded)
            self._tally.batch_started = started = self._clock()
        try:
            logits = np.asarray(self._engine.forward([shared.pair for shared in part]), dtype=np.float32)
            if logits.shape != (len(part),):
                raise RuntimeError(f"{len(part)} pairs went in, and logits of shape {logits.shape} came out")  # noqa: TRY301
        except Exception as error:  # noqa: BLE001 - whatever it is, the neighbours go on and the waiters hear of it
            failure = error
        else:
            self._deliver(part, logits.tolist(), padded, self._clock() - started)
            return None
        finally:
            with self._lock:
                self._tally.batch_started = self._tally.batch_predicted_s = None
        self._note_failure(failure, padded)
        return failure

    def _note_failure(self, failure: Exception, padded: int) -> None:
        # The traceback's frames hold the batch's tensors, and what is tried next needs their memory.
        failure.__traceback__ = None
        if not is_out_of_memory(failure):
            return
        with self._lock:
            self._tally.out_of_memory += 1
            self._budget = self._budget.after_out_of_memory(padded)
            logger.warning("out of memory at %d padded tokens; batches of %d for a while", padded, self._budget.now)
        self._engine.release_memory()

    def _deliver(self, part: list[SharedPair], logits: list[float], padded: int, seconds: float) -> None:
        with self._lock:
            touched = set()
            for shared, logit in zip(part, logits, strict=True):
                self._forget(shared)
                for ticket, index in shared.waiters:
                    ticket.deliver(index, logit)
                    touched.add(ticket)
            ended = [ticket for ticket in touched if ticket.done_pairs == ticket.pairs]
            for ticket in touched:
                ticket.notify()
            for ticket in ended:
                self._release(ticket, None)
            self._account(part, padded, seconds)
        for ticket in ended:
            ticket.announce()
        if self._on_progress is not None:
            self._on_progress()

    def _account(self, part: list[SharedPair], padded: int, seconds: float) -> None:
        tally, now = self._tally, self._clock()
        tally.batches += 1
        tally.pairs += len(part)
        tally.tokens += sum(shared.length for shared in part)
        tally.padded_tokens += padded
        tally.busy_s += seconds
        tally.last_progress = now
        self._pace = self._pace.after(padded, seconds)
        self._budget = self._budget.after_success()
        if any(shared.priority == BULK for shared in part):
            self._bulk_served = now

    def _judge(self, shared: SharedPair, error: Exception) -> None:
        """Fail a pair that failed alone, unless it is the device that fails."""
        with self._lock:
            # For the watchdog: a device that is gone may never answer this either.
            self._tally.batch_started, self._tally.batch_predicted_s = self._clock(), 0.0
        try:
            self._engine.warm_up()
        except Exception as second:
            raise RuntimeError(f"a pair fails alone ({error}), and so does a warm-up ({second})") from second
        finally:
            with self._lock:
                self._tally.batch_started = self._tally.batch_predicted_s = None
        logger.error("a pair of %d tokens fails even alone: %s", shared.length, error)
        with self._lock:
            self._tally.failed_pairs += 1
            self._tally.last_progress = self._clock()
            ended = list(dict.fromkeys(ticket for ticket, _ in shared.waiters))
            for ticket in ended:
                self._release(ticket, PairFailed(f"a pair of {shared.length} tokens cannot be scored: {error}"))
        for ticket in ended:
            ticket.announce()


def _padded(part: list[SharedPair]) -> int:
    return len(part) * max(shared.length for shared in part)
