"""The batches on the device: launched one ahead, finished in order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..protocol import Engine, Logits, LogitsFuture
from .batch_time import BatchTimeModel
from .ticket import SharedPair


@dataclass(frozen=True, slots=True)
class FinishedBatch:
    """The outcome of a batch: one logit per pair, or the error that it raised.

    ``cost`` is in tokens. ``began`` and ``ended`` are the device's times, in seconds on the batcher's clock.
    """

    pairs: list[SharedPair]
    cost: int
    began: float
    ended: float
    logits: list[float]
    error: BaseException | None

    @property
    def scored(self) -> list[tuple[SharedPair, float]]:
        """The pairs that have a finite logit, with the logit."""
        return [(pair, logit) for pair, logit in zip(self.pairs, self.logits, strict=False) if math.isfinite(logit)]

    @property
    def unscored(self) -> list[SharedPair]:
        """The pairs without a finite logit; all of them where the batch raised an error."""
        if self.error is not None:
            return self.pairs
        return [pair for pair, logit in zip(self.pairs, self.logits, strict=True) if not math.isfinite(logit)]


@dataclass(slots=True)
class _LaunchedBatch:
    pairs: list[SharedPair]
    cost: int
    began: float
    future: LogitsFuture | None = None


class InFlightBatches:
    """Launches batches, finishes them in the same order, and learns how long they take.

    For one thread; only ``oldest`` may be read from others.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float], seconds_per_token: float = 0.0) -> None:
        self._seconds_per_token = seconds_per_token
        self._engine = engine
        self._clock = clock
        self._launched: deque[_LaunchedBatch] = deque()
        self.time_model = BatchTimeModel()
        #: When the device began the oldest batch, and its predicted seconds; None while nothing is in flight.
        self.oldest: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._launched)

    @property
    def all_done(self) -> bool:
        """Whether the device has finished every batch in flight; always true where ``launch`` blocks."""
        return not self._launched or _is_done(self._launched[-1])

    def free_in(self) -> float:
        """Predict the seconds until the device has finished all that is in flight; 0 while nothing was measured."""
        if self.all_done:
            return 0.0
        ends = self._launched[0].began + self.time_model.predict(sum(batch.cost for batch in self._launched))
        return max(0.0, ends - self._clock())

    def launch(self, pairs: list[SharedPair], cost: int) -> None:
        """Start a batch; an error that this raises is reported by ``finish_oldest``."""
        batch = _LaunchedBatch(pairs, cost, began=self._clock())
        self._launched.append(batch)
        # Before the launch, so that a launch that hangs is seen by whoever reads ``oldest``.
        self._update_oldest()
        try:
            batch.future = self._engine.launch([shared.pair for shared in pairs])
        except BaseException as error:  # noqa: BLE001 - the other batches continue, and this one's tickets are told
            failed: Future[Logits] = Future()
            failed.set_exception(error)
            batch.future = failed

    def finish_oldest(self) -> FinishedBatch:
        """Wait for the oldest batch."""
        batch, logits, error = self._launched[0], [], None
        try:
            logits = _logits_of(batch)
        except BaseException as raised:  # noqa: BLE001 - as above
            error = raised
            # The traceback's frames hold the batch's tensors, and the retry needs their memory.
            error.__traceback__ = None
        now = self._clock()
        self._launched.popleft()
        if self._launched:
            # A device runs one batch after the other: the one launched ahead begins now.
            self._launched[0].began = now
        self._update_oldest()
        if error is None:
            self.time_model = self.time_model.after(batch.cost, now - batch.began)
        return FinishedBatch(batch.pairs, batch.cost, batch.began, now, logits, error)

    @contextmanager
    def unpredicted(self) -> Iterator[None]:
        """Report other work of the engine as a batch without a prediction: a broken device may hang in it too."""
        self.oldest = (self._clock(), 0.0)
        try:
            yield
        finally:
            self._update_oldest()

    def _update_oldest(self) -> None:
        oldest = self._launched[0] if self._launched else None
        self.oldest = (oldest.began, self._predict(oldest.cost)) if oldest else None

    def _predict(self, cost: int) -> float:
        # The first batch by the time per token that was measured beforehand: it may legitimately take minutes.
        return self.time_model.predict(cost) or cost * self._seconds_per_token


def _is_done(batch: _LaunchedBatch) -> bool:
    try:
        return batch.future is not None and batch.future.done()
    except BaseException:  # noqa: BLE001 - finish_oldest() will raise it, without a wait
        return True


def _logits_of(batch: _LaunchedBatch) -> list[float]:
    assert batch.future is not None  # noqa: S101 - launch() sets it in every case
    logits = np.asarray(batch.future.result(), dtype=np.float32)
    if logits.shape != (len(batch.pairs),):
        raise RuntimeError(f"the engine returned logits of shape {logits.shape} for {len(batch.pairs)} pairs")
    values: list[float] = logits.tolist()
    return values
