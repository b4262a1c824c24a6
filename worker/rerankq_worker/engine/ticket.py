"""A promise of logits, and the pairs that several promises may share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np

from .errors import EngineError, TicketCancelled
from .protocol import Logits, TokenisedPair
from .waiting import BULK, NOWHERE

logger = logging.getLogger(__name__)


class Ticket:
    """A promise of logits for the pairs of one submission.

    The methods below the line are the batcher's, called while it holds its lock.
    """

    def __init__(
        self, count: int, priority: int, lock: threading.Lock, withdraw: Callable[[Ticket, EngineError], None]
    ) -> None:
        self.pairs = count
        self.done_pairs = 0
        self.priority = priority
        self.shared: list[SharedPair] = []
        self._withdraw = withdraw
        self._changed = threading.Condition(lock)
        self._logits = np.full(count, np.nan, dtype=np.float32)
        self._error: EngineError | None = None
        self._done = False
        self._watchers = 0
        self._callbacks: list[Callable[[Ticket], None]] = []

    @property
    def done(self) -> bool:
        """Whether it ended: with all its logits, with an error, or cancelled."""
        return self._done

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

    def wait_for_progress(self, seen: int, timeout: float | None = None) -> int:
        """Wait until more than ``seen`` pairs are done, or it ended, or ``timeout`` seconds passed.

        Returns how many pairs are done.
        """
        with self._changed:
            self._watchers += 1
            try:
                self._changed.wait_for(lambda: self._done or self.done_pairs > seen, timeout)
            finally:
                self._watchers -= 1
            return self.done_pairs

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

    def end(self, error: EngineError | None = None) -> None:
        """Close the promise; ``announce`` is due once the lock is released."""
        self._done = True
        self._error = error
        self.shared = []
        self.notify()

    def notify(self) -> None:
        """Wake whoever can go on: most wait for the end, and woken before it they would only hold up the rest."""
        if self._done or self._watchers:
            self._changed.notify_all()

    def announce(self) -> None:
        """Call back whoever asked to be called; without the lock."""
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            _call(callback, self)


class SharedPair:
    """A pair on its way to the device, with every ticket that waits for its logit."""

    __slots__ = ("key", "length", "pair", "place", "waiters")

    def __init__(self, pair: TokenisedPair, key: bytes | None) -> None:
        self.pair = pair
        self.key = key
        self.length = pair.length
        self.place = NOWHERE
        self.waiters: list[tuple[Ticket, int]] = []

    @property
    def priority(self) -> int:
        """The highest of those who wait for it."""
        return max((ticket.priority for ticket, _ in self.waiters), default=BULK)

    def forsake(self, ticket: Ticket) -> None:
        """Take a ticket off those who wait."""
        self.waiters = [waiter for waiter in self.waiters if waiter[0] is not ticket]


def _call(callback: Callable[[Ticket], None], ticket: Ticket) -> None:
    try:
        callback(ticket)
    except Exception:
        # Whose callback it is cannot be asked, and the next ticket's owner must not suffer.
        logger.exception("a callback of a finished ticket failed")
