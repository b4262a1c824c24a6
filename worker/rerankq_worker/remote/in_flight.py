"""Pairs that a job has asked for: an equal pair of another job waits for the same reply."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable
from concurrent.futures import Future
from typing import NamedTuple, TypeAlias

#: The logit of a pair that is asked for; cancelled if the job that asked for it did not get it.
Awaited: TypeAlias = Future[float]


class Claim(NamedTuple):
    """Pairs by name: those that a job is to ask for itself, and those that others ask for."""

    own: dict[Hashable, Awaited]
    others: dict[Hashable, Awaited]


class PairsInFlight:
    """Who asks for which pair now. Safe to share between threads.

    A job claims its pairs, asks for those that nobody asks for yet, settles them one by one, and releases the claim;
    only then does it wait for those of others, so that no two jobs wait for each other.

    >>> pairs = PairsInFlight()
    >>> first, second = pairs.claim(["a", "b"]), pairs.claim(["a", "b", "c"])
    >>> list(first.own), list(second.own), list(second.others)
    (['a', 'b'], ['c'], ['a', 'b'])
    >>> pairs.settle(first, "a", 0.5)
    >>> pairs.release(first)
    >>> second.others["a"].result(), second.others["b"].cancelled(), list(pairs.claim(["a", "b", "c"]).own)
    (0.5, True, ['a', 'b'])
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[Hashable, Awaited] = {}

    def claim(self, names: Iterable[Hashable]) -> Claim:
        """Claim those of the pairs that no other job asks for."""
        claim = Claim({}, {})
        with self._lock:
            for name in names:
                if name in self._asked:
                    claim.others[name] = self._asked[name]
                else:
                    claim.own[name] = self._asked[name] = Future()
        return claim

    def settle(self, claim: Claim, name: Hashable, logit: float) -> None:
        """Tell those that wait for a claimed pair its logit."""
        with self._lock:
            del self._asked[name]
        claim.own.pop(name).set_result(logit)

    def release(self, claim: Claim) -> None:
        """Give up what was claimed and is not settled: whoever waits for it asks for it himself."""
        with self._lock:
            for name in claim.own:
                del self._asked[name]
        for asked in claim.own.values():
            asked.cancel()
        claim.own.clear()
