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
from typing import Literal

import numpy as np

from ..errors import EngineClosed, EngineDied, EngineError, PairFailed, is_out_of_memory
from ..protocol import Engine, TokenisedPair
from .batch_time import Budget, FairShare
from .batching import LOOK_AHEAD, WINDOW, cost, fill_of, leading_priority, plan
from .in_flight import InFlightBatches, Landing
from .tally import BatcherStats, Tally
from .ticket import SharedPair, Ticket
from .waiting_pairs import BULK, INTERACTIVE, NOWHERE, Line, WaitingPairs

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
#: Hardly any pair has fewer tokens.
_SHORT = 8


class Batcher:
    """Takes tokenised pairs from any thread, and gives each ticket its logits.

    Its one thread asks ``batching.plan`` for a batch shortly before the device is free (``lead_s`` seconds), and
    launches it before it gives out the results of the one before: never more than one ahead. An engine that computes
    at once is asked for one batch after the other.

    Jobs share the device by tokens, those of one priority: tenants alike, and the jobs of a tenant alike what is the
    tenant's. So a small job waits for a turn of every job beside it, not for their ends.

    Interactive pairs go first; bulk keeps ``bulk_share`` of the device's time however many of them wait, and fills
    their batches up to ``fill_tokens`` (default: ``batching.fill_of`` the budget). So an interactive pair waits for the
    batch on the device and at most one more. Pairs with the same key are computed once while in flight.

    A batch that does not fit into memory is halved, and the budget stays lower for a while. A batch that fails
    otherwise is halved too, until the pair is found that fails alone, or gives no finite logit: it fails the tickets
    that wait for it, and no others. When the engine does not even warm up then, it is dead: every ticket fails with
    EngineDied, and so does every later ``submit``.

    ``seconds_per_token`` predicts the first batch, in ``stats``.
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
            raise ValueError(f"bulk_share is a share of the device's time, between 0 and 1, not {bulk_share}")
        full = engine.max_batch_tokens if max_batch_tokens is None else max_batch_tokens
        if full < 1:
            raise ValueError(f"a budget of {full} tokens holds no pair")
        self._engine = engine
        self._vocabulary: int | None = getattr(engine, "vocabulary", None)
        self._patience = (1 - bulk_share) / bulk_share
        self._fill_tokens = fill_of(full) if fill_tokens is None else fill_tokens
        self._lead_s = lead_s
        self._window = window
        self._clock = clock

        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._hurry = threading.Condition(self._lock)
        self._waiting: WaitingPairs[SharedPair] = WaitingPairs()
        self._in_flight: dict[bytes, SharedPair] = {}
        self._tickets: set[Ticket] = set()
        self._budget = Budget(full, full)
        self._flights = InFlightBatches(engine, clock, seconds_per_token)
        self._bulk_turn = FairShare(bulk_share)
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
    ) -> Ticket:
        """Hand a job's pairs to the device; returns at once.

        ``keys``, one per pair, name what is to be computed: pairs with equal keys are computed once while one of them
        is in flight; None never joins. The ticket fails at once where a pair has no tokens, more than the engine reads,
        or such that it does not know. Raises EngineDied or EngineClosed when nothing will be computed any more, and
        ValueError for an unknown priority or a wrong number of keys.
        """
        if priority not in _PRIORITIES:
            raise ValueError(f"priority {priority!r} is neither 'interactive' nor 'bulk'")
        keys = [None] * len(pairs) if keys is None else keys
        if len(keys) != len(pairs):
            raise ValueError(f"one key per pair: got {len(keys)} keys for {len(pairs)} pairs")
        # Before anything is changed: whatever is wrong with a pair or a key is its owner's affair.
        wanted = [SharedPair(pair, pair.length, key) for pair, key in zip(pairs, keys, strict=True)]
        hash(tuple(keys))
        unfit = next((said for pair in wanted if (said := self._unfit(pair.length))), None) or self._unknown(pairs)
        now = self._clock()
        ticket = Ticket(len(pairs), Line(_PRIORITIES[priority], tenant), now, self._lock, self._withdraw)
        with self._lock:
            if self._death is not None:
                raise EngineDied(self._death)
            if self._closing:
                raise EngineClosed(_CLOSED)
            if unfit or not wanted:
                ticket.end(now, PairFailed(unfit) if unfit else None)
                return ticket
            self._tickets.add(ticket)
            # Each once, however often it is named.
            in_line: dict[SharedPair, None] = {}
            for index, pair in enumerate(wanted):
                shared, new = self._enlist(ticket, index, pair)
                if new or shared.place != NOWHERE:
                    in_line[shared] = None
            self._waiting.join(ticket.line, list(in_line), now)
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

    def _unfit(self, length: int) -> str | None:
        """Say why no engine could compute a pair of so many tokens, if that is so."""
        if length < 1:
            return "a pair of no tokens cannot be scored"
        if length > self._engine.max_length:
            return f"a pair of {length} tokens cannot be scored: the model reads {self._engine.max_length}"
        return None

    def _unknown(self, pairs: Sequence[TokenisedPair]) -> str | None:
        """Say that a pair holds what is no token id of this model, if one does: some devices die of it, some go on."""
        if self._vocabulary is None or not pairs:
            return None
        try:
            ids = np.concatenate([pair.ids for pair in pairs])
        except ValueError:
            return "a pair whose token ids are no single row cannot be scored"
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= self._vocabulary:
            return f"a pair cannot be scored: its token ids are not all among the model's {self._vocabulary}"
        return None

    def _enlist(self, ticket: Ticket, index: int, pair: SharedPair) -> tuple[SharedPair, bool]:
        """Let the ticket wait for this pair, or for its like in flight; says whether it is a new one."""
        known = None if pair.key is None else self._in_flight.get(pair.key)
        shared = known or pair
        shared.waiters.append((ticket, index))
        ticket.shared.append(shared)
        if known is not None:
            self._tally.joined_pairs += 1
        elif pair.key is not None:
            self._in_flight[pair.key] = pair
        return shared, known is None

    def _forget(self, shared: SharedPair) -> None:
        if shared.key is not None and self._in_flight.get(shared.key) is shared:
            del self._in_flight[shared.key]

    def _release(self, ticket: Ticket, error: EngineError | None) -> None:
        """End a ticket; the pairs it waited for go on for others."""
        self._tickets.discard(ticket)
        # Not those already computed: they left, and their waiters do not matter any more.
        for shared in ticket.shared if error is not None else ():
            shared.forsake(ticket)
            if not shared.waiters:
                self._forget(shared)
        self._waiting.close(ticket.line)
        ticket.end(self._clock(), error)

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
        in_flight = self._flights
        if batch := self._next_batch():
            in_flight.launch(batch, self._cost(batch))
        elif not in_flight:
            return False
        # One stays in the air, unless there is nothing to launch after it, or it has landed already.
        keep = 1 if batch and not in_flight.all_done else 0
        failed = []
        while len(in_flight) > keep:
            landing = in_flight.land()
            if self._gave_out(landing):
                continue
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
        now, budget = self._clock(), self._budget.now
        # Neighbours in length are looked for among many; whose turn it is, is known from the first.
        enough = self._window if self._engine.padded else min(self._window, budget // _SHORT + LOOK_AHEAD)
        window = self._waiting.window(enough)
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
            starts=window.starts,
            fill_tokens=self._fill_tokens,
            age_limit=age_limit,
        )
        turn = leading_priority(window.priorities, ages, age_limit)
        if turn == BULK:
            bulk = window.priorities == BULK
            share = window.lengths[chosen[bulk[chosen]]].sum() / window.lengths[chosen].sum()
            cost_of_bulk = share * cost(window.lengths[chosen], padded=self._engine.padded)
            self._bulk_turn = self._bulk_turn.after(now, pace.predict(cost_of_bulk))
        return self._waiting.take(window, chosen, led_by=turn, least=min(self._fill_tokens, budget))

    def _cost(self, pairs: Sequence[SharedPair]) -> int:
        return cost([shared.length for shared in pairs], padded=self._engine.padded)

    def _gave_out(self, landing: Landing) -> bool:
        """Count a batch, and give out its logits; whether that was all of them."""
        self._count(landing)
        if landing.failure is None:
            self._deliver(landing)
        return not landing.unscored

    def _recover(self, landing: Landing) -> None:
        """Compute in halves what failed as a whole, down to the pair that fails alone."""
        self._note_failure(landing)
        if len(landing.pairs) == 1:
            self._judge(landing.pairs[0], landing.failure or ArithmeticError("its logit is no finite number"))
            return
        pairs = landing.unscored
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
        if not self._gave_out(landing):
            self._recover(landing)

    def _note_failure(self, landing: Landing) -> None:
        if landing.failure is None or not is_out_of_memory(landing.failure):
            return
        with self._lock:
            self._tally.out_of_memory += 1
            self._budget = self._budget.after_out_of_memory(landing.cost)
            logger.warning("out of memory at %d tokens; batches of %d for a while", landing.cost, self._budget.now)
        try:
            self._engine.release_memory()
        except BaseException:  # a device that is gone is found out by the next batch
            logger.exception("the engine gave no memory back")

    def _count(self, landing: Landing) -> None:
        with self._lock:
            tally = self._tally
            tally.busy_s += landing.ended - landing.began
            for ticket in {ticket for shared in landing.pairs for ticket, _ in shared.waiters}:
                ticket.note_batch(landing.began, landing.ended)
            if landing.failure is not None:
                return
            tally.batches += 1
            tally.pairs += len(landing.pairs)
            tally.tokens += sum(shared.length for shared in landing.pairs)
            tally.padded_tokens += landing.cost
            tally.last_progress = landing.ended
            self._budget = self._budget.after_success()

    def _deliver(self, landing: Landing) -> None:
        with self._lock:
            touched = set()
            for shared, logit in landing.scored:
                self._forget(shared)
                for ticket, _ in shared.waiters[:1]:
                    ticket.tokens += shared.length
                for ticket, index in shared.waiters:
                    ticket.deliver(index, logit)
                    touched.add(ticket)
            ended = [ticket for ticket in touched if ticket.done_pairs == ticket.pairs]
            for ticket in ended:
                self._release(ticket, None)
        for ticket in ended:
            ticket.announce()

    def _judge(self, shared: SharedPair, error: BaseException) -> None:
        """Fail a pair that failed alone, unless it is the device that fails."""
        with self._flights.unpredicted():
            try:
                self._engine.warm_up()
            except BaseException as second:
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
