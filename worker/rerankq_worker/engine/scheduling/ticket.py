"""A promise of logits, and the pairs that several promises may share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np

from ..errors import EngineError, TicketCancelled
from ..protocol import Logits, TokenisedPair
from .waiting_pairs import NOWHERE, Line

logger = logging.getLogger(__name__)


class Ticket:
    """A promise of logits for the pairs of one submission.

    ``tokens`` are those of the pairs computed for it so far; of a pair that several tickets wait for, one alone counts
    them. ``device_s`` are the seconds that batches with its pairs were on the device since it was submitted.

    The methods below the line are the batcher's, called while it holds its lock.
    """

    def __init__(
        self, count: int, line: Line, now: float, lock: threading.Lock, withdraw: Callable[[Ticket, EngineError], None]
    ) -> None:
        self.pairs = count
        self.done_pairs = 0
        self.tokens = 0
        self.device_s = 0.0
        self.line = line
        self.shared: list[SharedPair] = []
        self._submitted = self._ended = now
        self._withdraw = withdraw
        self._changed = threading.Condition(lock)
        self._logits = np.full(count, np.nan, dtype=np.float32)
        self._error: EngineError | None = None
        self._done = False
        self._callbacks: list[Callable[[Ticket], None]] = []

    @property
    def done(self) -> bool:
        """Whether it ended: with all its logits, with an error, or cancelled."""
        return self._done

    @property
    def waited_s(self) -> float:
        """Seconds of its time in which the device did something else than its pairs, once it ended."""
        return max(0.0, self._ended - self._submitted - self.device_s)

    def result(self, timeout: float | None = None) -> Logits:
        """Wait for the logits: float32, shape ``(pairs,)``, in the order submitted.

        Raises PairFailed, EngineDied, EngineClosed or TicketCancelled as it ended, and TimeoutError after ``timeout``
        seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"after {timeout} s {self.done_pairs} of {self.pairs} pairs are done")
            if self._error is not None:
                raise self._error
            return self._logits

    def add_done_callback(self, callback: Callable[[Ticket], None]) -> None:
        """Call ``callback(ticket)`` when it ends, from whichever thread ends it; at once if it already did.

        The device may be waiting meanwhile: be quick.
        """
        with self._changed:
            if not self._done:
                self._callbacks.append(callback)
                return
        _call(callback, self)

    def cancel(self) -> None:
        """Withdraw: no further micro-batch computes these pairs, unless another ticket waits for them too."""
        self._withdraw(self, TicketCancelled("these pairs were withdrawn"))

    # -- the batcher's, with its lock held ---------------------------------------------------------------------------

    def deliver(self, index: int, logit: float) -> None:
        """Write down one logit."""
        self._logits[index] = logit
        self.done_pairs += 1

    def note_batch(self, began: float, ended: float) -> None:
        """Count a batch with pairs of it, of which some of the time may have been before it came."""
        self.device_s += max(0.0, ended - max(began, self._submitted))

    def end(self, now: float, error: EngineError | None = None) -> None:
        """Close the promise; ``announce`` is due once the lock is released."""
        self._done = True
        self._ended = now
        self._error = error
        self.shared = []
        self._changed.notify_all()

    def announce(self) -> None:
        """Call back whoever asked to be called; without the lock."""
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            _call(callback, self)


class SharedPair:
    """A pair on its way to the device, with every ticket that waits for its logit."""

    __slots__ = ("key", "length", "lines", "pair", "place", "waiters")

    def __init__(self, pair: TokenisedPair, length: int, key: bytes | None) -> None:
        self.pair = pair
        self.key = key
        self.length = length
        self.place = NOWHERE
        self.lines: list[Line] = []
        self.waiters: list[tuple[Ticket, int]] = []

    def forsake(self, ticket: Ticket) -> None:
        """Take a ticket off those who wait."""
        self.waiters = [waiter for waiter in self.waiters if waiter[0] is not ticket]


def _call(callback: Callable[[Ticket], None], ticket: Ticket) -> None:
    try:
        callback(ticket)
    except BaseException:
        # Whose callback it is cannot be asked, and the next ticket's owner must not suffer, be it a SystemExit.
        logger.exception("a callback of a finished ticket failed")
