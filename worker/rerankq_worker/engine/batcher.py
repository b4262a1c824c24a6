"""One thread that owns the device and forms its batches from the pairs of all jobs in flight.

It is a thread of the worker's process, not a process of its own: what it needs of the interpreter's lock is an eighth
(py-spy, 32 jobs in flight at 5 500 pairs/s; Celery's main thread has three quarters), and its gaps do not change with
``sys.setswitchinterval`` from 5 ms to 0.2 ms. With batches of 8 ms the device stood idle for 0 to 1 % of its time at
2 000 pairs/s, and at 5 000 mostly for 1 to 12 %, on two cores that others used too; there a process of its own had gaps
as well, shorter in two of three comparisons. Worth another look where a device does more than 5 000 pairs/s
(``benchmarks/pipeline.py``).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Literal

from ..batching import WINDOW, cost, fill_of, plan
from .errors import EngineClosed, EngineDied, EngineError, PairFailed, is_out_of_memory
from .flights import Flights, Landing
from .pace import Budget, BulkTurn
from .protocol import Engine, TokenisedPair
from .tally import BatcherStats, Tally
from .ticket import SharedPair, Ticket
from .waiting import BULK, INTERACTIVE, NOWHERE, WaitingPairs

logger = logging.getLogger(__name__)

Priority = Literal["interactive", "bulk"]
_PRIORITIES = {"interactive": INTERACTIVE, "bulk": BULK}
_CLOSED = "the engine was closed"


#: A batch is launched ahead so many seconds before the device should be free: a few turns of the interpreter's lock,
#: for which this thread may have to wait. Earlier would only make pairs wait that are more urgent and come meanwhile.
LEAD_S = 0.01
#: While it is too early, whether the device is done all the same is looked at so often, in seconds; it is not worth a
#: sleep when less is left than the second figure.
_GLANCE_S, _NAP_S = 0.002, 0.0002


class Batcher:
    """Takes tokenised pairs from any thread, and gives each ticket its logits.

    Its one thread asks ``batching.plan`` for a batch shortly before the device is free (``lead_s`` seconds), and
    launches it before it gives out the results of the one before: never more than one ahead. An engine that computes
    at once is asked for one batch after the other.

    Interactive pairs go first; bulk keeps ``bulk_share`` of the device's time however many of them wait, and fills
    their batches up to ``fill_tokens`` (default: ``batching.fill_of`` the budget). So an interactive pair waits for the
    batch on the device and at most one more. Pairs with the same key are computed once while in flight.

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
        fill_tokens: int | None = None,
        lead_s: float = LEAD_S,
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
        self._fill_tokens = fill_of(full) if fill_tokens is None else fill_tokens
        self._lead_s = lead_s
        self._window = window
        self._on_progress = on_progress
        self._clock = clock

        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._hurry = threading.Condition(self._lock)
        self._waiting: WaitingPairs[SharedPair] = WaitingPairs()
        self._in_flight: dict[bytes, SharedPair] = {}
        self._tickets: set[Ticket] = set()
        self._budget = Budget(full, full)
        self._flights = Flights(engine, clock)
        self._bulk_turn = BulkTurn(bulk_share)
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
            started, predicted = self._flights.oldest or (None, None)
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
        """Stop: after everything waiting was computed, or else after the present micro-batch.

        Whoever still waits when the thread has ended, or after ``timeout`` seconds, gets EngineClosed.
        """
        with self._lock:
            self._closing = True
            self._work.notify()
            self._hurry.notify()
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
            while self._step():
                pass
        except BaseException as error:
            # Nobody is above this thread, and its tickets must hear of its end, whatever it is.
            logger.exception("the engine's thread ends")
            with self._lock:
                self._death = f"the engine died: {error!r}"
                self._flights.oldest = None
            self._end_everyone(EngineDied, self._death)

    def _step(self) -> bool:
        """Launch a batch and land those before it; False when closed and nothing is left."""
        flights = self._flights
        if batch := self._next_batch():
            flights.launch(batch, self._cost(batch))
        elif not flights:
            return False
        # One stays in the air, unless there is nothing to launch after it, or it has landed already.
        keep = 1 if batch and not flights.all_done else 0
        failed = []
        while len(flights) > keep:
            landing = flights.land()
            self._count(landing)
            if landing.failure is None:
                self._deliver(landing)
            else:
                # What failed is tried again with nothing else on the device.
                failed.append(landing)
                keep = 0
        for landing in failed:
            self._recover(landing)
        return True

    def _next_batch(self) -> list[SharedPair]:
        """Choose from what waits; waits for work, unless a batch is in flight: then empty where there is none."""
        with self._lock:
            self._hold()
            while not len(self._waiting):
                if self._closing or self._flights:
                    return []
                self._work.wait()
            return self._choose()

    def _hold(self) -> None:
        """Wait until the device is about to be free."""
        while not self._closing and (early := self._flights.free_in() - self._lead_s) > _NAP_S:
            self._hurry.wait(min(early, _GLANCE_S))

    def _choose(self) -> list[SharedPair]:
        window, now, budget = self._waiting.window(self._window), self._clock(), self._budget.now
        ages = now - window.arrived
        pace = self._flights.pace
        # What is wanted is a share, not that a backlog goes first: old as they are, bulk pairs wait for their turn.
        age_limit = math.inf if now < self._bulk_turn.due_at else self._patience * pace.predict(budget) or math.inf
        chosen = plan(
            window.lengths,
            window.priorities,
            ages,
            budget,
            padded=self._engine.padded,
            fill_tokens=self._fill_tokens,
            age_limit=age_limit,
        )
        bulk = window.priorities == BULK
        if bulk.all() or (ages[bulk] >= age_limit).any():
            share = window.lengths[chosen[bulk[chosen]]].sum() / window.lengths[chosen].sum()
            cost_of_bulk = share * cost(window.lengths[chosen], padded=self._engine.padded)
            self._bulk_turn = self._bulk_turn.after(now, pace.predict(cost_of_bulk))
        return self._waiting.take(window.places[chosen].tolist())

    def _cost(self, pairs: Sequence[SharedPair]) -> int:
        return cost([shared.length for shared in pairs], padded=self._engine.padded)

    def _recover(self, landing: Landing) -> None:
        """Compute in halves what failed as a whole, down to the pair that fails alone."""
        self._note_failure(landing)
        pairs, failure = landing.pairs, landing.failure
        if len(pairs) == 1:
            self._judge(pairs[0], failure)
            return
        middle = len(pairs) // 2
        for half in (pairs[:middle], pairs[middle:]):
            self._try_again(half)

    def _try_again(self, pairs: list[SharedPair]) -> None:
        with self._lock:
            wanted = [shared for shared in pairs if shared.waiters]
        if not wanted:
            return
        middle = len(wanted) // 2
        # What one half taught holds for the other: nothing is tried above a budget lowered meanwhile.
        if middle and self._cost(wanted) > self._budget.now:
            self._try_again(wanted[:middle])
            self._try_again(wanted[middle:])
            return
        self._flights.launch(wanted, self._cost(wanted))
        landing = self._flights.land()
        self._count(landing)
        if landing.failure is None:
            self._deliver(landing)
        else:
            self._recover(landing)

    def _note_failure(self, landing: Landing) -> None:
        if landing.failure is None or not is_out_of_memory(landing.failure):
            return
        with self._lock:
            self._tally.out_of_memory += 1
            self._budget = self._budget.after_out_of_memory(landing.cost)
            logger.warning("out of memory at %d tokens; batches of %d for a while", landing.cost, self._budget.now)
        self._engine.release_memory()

    def _count(self, landing: Landing) -> None:
        with self._lock:
            tally = self._tally
            tally.busy_s += landing.seconds
            if landing.failure is not None:
                return
            tally.batches += 1
            tally.pairs += len(landing.pairs)
            tally.tokens += sum(shared.length for shared in landing.pairs)
            tally.padded_tokens += landing.cost
            tally.last_progress = self._clock()
            self._budget = self._budget.after_success()

    def _deliver(self, landing: Landing) -> None:
        with self._lock:
            touched = set()
            for shared, logit in zip(landing.pairs, landing.logits, strict=True):
                self._forget(shared)
                for ticket, index in shared.waiters:
                    ticket.deliver(index, logit)
                    touched.add(ticket)
            ended = [ticket for ticket in touched if ticket.done_pairs == ticket.pairs]
            for ticket in touched:
                ticket.notify()
            for ticket in ended:
                self._release(ticket, None)
        for ticket in ended:
            ticket.announce()
        if self._on_progress is not None:
            self._on_progress()

    def _judge(self, shared: SharedPair, error: Exception | None) -> None:
        """Fail a pair that failed alone, unless it is the device that fails."""
        with self._flights.unpredicted():
            try:
                self._engine.warm_up()
            except Exception as second:
                raise RuntimeError(f"a pair fails alone ({error}), and so does a warm-up ({second})") from second
        logger.error("a pair of %d tokens fails even alone: %s", shared.length, error)
        with self._lock:
            self._tally.failed_pairs += 1
            self._tally.last_progress = self._clock()
            ended = list(dict.fromkeys(ticket for ticket, _ in shared.waiters))
            for ticket in ended:
                self._release(ticket, PairFailed(f"a pair of {shared.length} tokens cannot be scored: {error}"))
        for ticket in ended:
            ticket.announce()
