"""The batches on the device: launched one ahead, landed in order. What the engine's thread does with the engine."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from ..protocol import Engine, Flight
from .batch_time import BatchTimeModel
from .ticket import SharedPair


@dataclass(frozen=True, slots=True)
class Landing:
    """How a batch ended: with one logit per pair, or with what went wrong.

    ``began`` and ``ended`` are the device's times, on the batcher's clock.
    """

    pairs: list[SharedPair]
    cost: int
    began: float
    ended: float
    logits: list[float]
    failure: BaseException | None

    @property
    def scored(self) -> list[tuple[SharedPair, float]]:
        """The pairs with a logit that is a number, and the logit."""
        return [(pair, logit) for pair, logit in zip(self.pairs, self.logits, strict=False) if math.isfinite(logit)]

    @property
    def unscored(self) -> list[SharedPair]:
        """The pairs without: all where the batch failed, else those whose logit is no finite number."""
        if self.failure is not None:
            return self.pairs
        return [pair for pair, logit in zip(self.pairs, self.logits, strict=True) if not math.isfinite(logit)]


@dataclass(slots=True)
class _Launched:
    pairs: list[SharedPair]
    cost: int
    began: float
    flight: Flight | None = None


class InFlightBatches:
    """Launches batches, lands them in the same order, and learns how long they take.

    For one thread; only ``oldest`` may be read from others.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float], seconds_per_token: float = 0.0) -> None:
        self._seconds_per_token = seconds_per_token
        self._engine = engine
        self._clock = clock
        self._out: deque[_Launched] = deque()
        self.pace = BatchTimeModel()
        #: When the device began with the oldest batch, and how long it should take; None while nothing is in flight.
        self.oldest: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._out)

    @property
    def all_done(self) -> bool:
        """Whether nothing is left to wait for: so it always is with an engine that computes at once."""
        return not self._out or _done(self._out[-1])

    def free_in(self) -> float:
        """Predict the seconds until the device has done all that is in flight; 0 while nothing was measured."""
        if self.all_done:
            return 0.0
        ends = self._out[0].began + self.pace.predict(sum(one.cost for one in self._out))
        return max(0.0, ends - self._clock())

    def launch(self, pairs: list[SharedPair], cost: int) -> None:
        """Start a batch; what goes wrong is told when it lands."""
        one = _Launched(pairs, cost, began=self._clock())
        self._out.append(one)
        # Before the launch: an engine that computes at once may hang in it.
        self._look()
        try:
            one.flight = self._engine.launch([shared.pair for shared in pairs])
        except BaseException as error:  # noqa: BLE001 - whatever it is, the neighbours go on and the waiters hear of it
            one.flight = _Crashed(error)

    def land(self) -> Landing:
        """Wait for the oldest batch."""
        one, logits, failure = self._out[0], [], None
        try:
            logits = _checked(one)
        except BaseException as error:  # noqa: BLE001 - as above
            failure = error
            # The traceback's frames hold the batch's tensors, and what is tried next needs their memory.
            failure.__traceback__ = None
        now = self._clock()
        self._out.popleft()
        if self._out:
            # A device does one batch after the other: what was launched ahead begins now.
            self._out[0].began = now
        self._look()
        if failure is None:
            self.pace = self.pace.after(one.cost, now - one.began)
        return Landing(one.pairs, one.cost, one.began, now, logits, failure)

    @contextmanager
    def unpredicted(self) -> Iterator[None]:
        """Let the engine do something else meanwhile: a device that is gone may never answer that either."""
        self.oldest = (self._clock(), 0.0)
        try:
            yield
        finally:
            self._look()

    def _look(self) -> None:
        self.oldest = (self._out[0].began, self._predict(self._out[0].cost)) if self._out else None

    def _predict(self, cost: int) -> float:
        # The first batch by what was measured beforehand: it may rightly take minutes.
        return self.pace.predict(cost) or cost * self._seconds_per_token


class _Crashed:
    """The flight of a batch that never took off."""

    done = True

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def logits(self) -> NoReturn:
        raise self._error


def _done(one: _Launched) -> bool:
    try:
        return one.flight is not None and one.flight.done
    except BaseException:  # noqa: BLE001 - nothing to wait for: what is wrong is told when it lands
        return True


def _checked(one: _Launched) -> list[float]:
    assert one.flight is not None  # noqa: S101 - launch() leaves none without
    logits = np.asarray(one.flight.logits(), dtype=np.float32)
    if logits.shape != (len(one.pairs),):
        raise RuntimeError(f"{len(one.pairs)} pairs went in, and logits of shape {logits.shape} came out")
    values: list[float] = logits.tolist()
    return values
