"""A future for the logits of one submission, and the pairs that several of them may share."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from ..errors import EngineError, TicketCancelled
from ..protocol import Logits, TokenisedPair
from .waiting_pairs import NOT_WAITING, JobQueue


class Ticket:
    """A future for the logits of one submission.

    ``tokens`` counts the tokens computed for it so far; the tokens of a pair that several tickets share count for the
    first of them only. ``device_s`` is the time, in seconds, that batches with its pairs were on the device since it
    was submitted.

    The methods in the last section are the batcher's, called while it holds its lock.
    """

    def __init__(
        self,
        count: int,
        queue: JobQueue,
        now: float,
        lock: threading.Lock,
        withdraw: Callable[[Ticket, EngineError], None],
        *,
        note_on_device: Callable[[bool], None] | None = None,
    ) -> None:
        self.pairs = count
        self.done_pairs = 0
        self.tokens = 0
        self.device_s = 0.0
        self.queue = queue
        self.shared: list[SharedPair] = []
        self._submitted = self._ended = now
        self._withdraw = withdraw
        self._note_on_device = note_on_device
        self._pairs_on_device = 0
        self._changed = threading.Condition(lock)
        self._logits = np.full(count, np.nan, dtype=np.float32)
        self._error: EngineError | None = None
        self._done = False

    @property
    def done(self) -> bool:
        """Whether it has ended: with all its logits, with an error, or cancelled."""
        return self._done

    @property
    def elapsed_s(self) -> float:
        """Seconds from its submission to its end; 0 before its end."""
        return self._ended - self._submitted

    @property
    def waited_s(self) -> float:
        """Seconds of ``elapsed_s`` in which none of its pairs were on the device."""
        return max(0.0, self.elapsed_s - self.device_s)

    def result(self, timeout: float | None = None) -> Logits:
        """Wait for the logits: float32, shape ``(pairs,)``, in the order submitted.

        Raises PairFailed, EngineDied, EngineClosed or TicketCancelled where it ended so, and TimeoutError after
        ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"{self.done_pairs} of {self.pairs} pairs were scored within {timeout} s")
            if self._error is not None:
                raise self._error
            return self._logits

    def cancel(self) -> None:
        """Cancel: no later micro-batch computes these pairs, unless another ticket shares them."""
        self._withdraw(self, TicketCancelled("these pairs were cancelled"))

    # -- for the batcher, with its lock held -------------------------------------------------------------------------

    def enter_device(self) -> None:
        """Count a pair that goes to the device, or that is there for another ticket already."""
        self._pairs_on_device += 1
        if self._pairs_on_device == 1 and self._note_on_device is not None:
            self._note_on_device(True)

    def leave_device(self) -> None:
        """Count a pair that the device is done with."""
        self._pairs_on_device -= 1
        if not self._pairs_on_device and self._note_on_device is not None:
            self._note_on_device(False)

    def deliver(self, index: int, logit: float) -> None:
        """Store one logit."""
        self._logits[index] = logit
        self.done_pairs += 1

    def note_batch(self, began: float, ended: float) -> None:
        """Count the time of a batch with pairs of this ticket, from the ticket's submission at the earliest."""
        self.device_s += max(0.0, ended - max(began, self._submitted))

    def end(self, now: float, error: EngineError | None = None) -> None:
        """End it, with an error or with what was delivered, and wake whoever waits for the result."""
        self._done = True
        self._ended = now
        self._error = error
        self.shared = []
        self._changed.notify_all()


class SharedPair:
    """A pair to be computed, with every ticket that waits for its logit."""

    __slots__ = ("index", "key", "length", "on_device", "pair", "queues", "waiters")

    def __init__(self, pair: TokenisedPair, length: int, key: bytes | None) -> None:
        self.pair = pair
        self.key = key
        self.length = length
        self.index = NOT_WAITING
        self.on_device = False
        self.queues: list[JobQueue] = []
        self.waiters: list[tuple[Ticket, int]] = []

    def enter_device(self) -> None:
        """Tell its tickets that it goes to the device: before it does, since it may end the process there."""
        self.on_device = True
        for ticket, _ in self.waiters:
            ticket.enter_device()

    def remove_waiter(self, ticket: Ticket) -> None:
        """Remove a ticket from those that wait for this pair."""
        self.waiters = [waiter for waiter in self.waiters if waiter[0] is not ticket]
