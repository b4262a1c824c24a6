"""A worker with a stub device that computes asynchronously, as a GPU does: ``celery -A gear.stub_device worker``.

What the device did is asked for by Celery's own remote control, ``inspect device``.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from celery.worker.control import inspect_command

import rerankq_worker.engine as engine
from rerankq_worker.engine import AsynchronousStubEngine, LogitsFuture, TokenisedPair

VARIABLE = "STUB_DEVICE"
# Hashing so much lets go of the lock (from 2 KB) and takes a few microseconds, as the launch of a kernel.
_KERNEL = bytes(4096)


class StubDeviceEngine(AsynchronousStubEngine):
    """A batch is launched by so many calls that let go of the interpreter's lock, as operators of torch do."""

    def __init__(self, *, pairs_per_second: float, batch_s: float, tokens_per_pair: int, calls: int) -> None:
        super().__init__(
            seconds_per_token=1 / (pairs_per_second * tokens_per_pair),
            max_batch_tokens=max(1, round(pairs_per_second * batch_s)) * tokens_per_pair,
            padded=False,
        )
        self.tokens_per_pair = tokens_per_pair
        self.calls = calls
        self.launch_s = self.gap_s = 0.0
        self.batches = self.pairs = self.tokenised = 0
        self._work_since = 0.0
        self._lock = threading.Lock()

    def tokenise(self, query: str, chunks: Sequence[str], **options: Any) -> list[TokenisedPair]:
        """Record since when there is work: a job launches its pairs as soon as it has them."""
        pairs = super().tokenise(query, chunks, **options)
        with self._lock:
            if self.tokenised == self.pairs:
                self._work_since = time.monotonic()
            self.tokenised += len(pairs)
        return pairs

    def launch(self, batch: Sequence[TokenisedPair]) -> LogitsFuture:
        """Launch the batch, call by call."""
        began, free_at = time.monotonic(), self._free_at
        for _ in range(self.calls):
            blake2b(_KERNEL)
        logits = super().launch(batch)
        now = time.monotonic()
        with self._lock:
            self.launch_s += now - began
            self.gap_s += max(0.0, now - max(free_at, self._work_since))
            self.batches += 1
            self.pairs += len(batch)
        return logits

    def figures(self) -> dict[str, float]:
        """Return what the device did so far."""
        return {
            "at": time.monotonic(), "idle_s": self.idle_s, "gap_s": self.gap_s, "launch_s": self.launch_s,
            "batches": self.batches, "pairs": self.pairs,
        }  # fmt: skip


def as_variable(*, pairs_per_second: float, batch_s: float, tokens_per_pair: int, calls: int) -> str:
    """Write a device into the one variable that the worker reads."""
    return f"{pairs_per_second} {batch_s} {tokens_per_pair} {calls}"


def of_variable(words: str) -> StubDeviceEngine:
    """Read a device out of it.

    >>> of_variable(as_variable(pairs_per_second=1000, batch_s=0.01, tokens_per_pair=12, calls=1)).max_batch_tokens
    120
    """
    pairs_per_second, batch_s, tokens_per_pair, calls = words.split()
    return StubDeviceEngine(
        pairs_per_second=float(pairs_per_second),
        batch_s=float(batch_s),
        tokens_per_pair=int(tokens_per_pair),
        calls=int(calls),
    )


@inspect_command()  # type: ignore[untyped-decorator]
def device(_: Any) -> dict[str, float]:
    """Return what the device did so far."""
    return stub.figures()


if VARIABLE in os.environ:
    stub = of_variable(os.environ[VARIABLE])
    if "STUB_SWITCH_S" in os.environ:
        sys.setswitchinterval(float(os.environ["STUB_SWITCH_S"]))
    engine.load = lambda *_, **__: stub  # before the tasks module starts a worker with it

    from rerankq_worker.tasks import app

    __all__ = ["app"]
