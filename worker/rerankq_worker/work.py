"""A job while it is worked on: how far it is, and a way to stop it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rerankq.errors import JobCancelled


class Part(Protocol):
    """Pairs of a job that are being scored: a batcher's ticket, or a call to another server."""

    done_pairs: int

    def cancel(self) -> None:
        """Stop as soon as it can; harmless when it has ended."""


class Activity(Protocol):
    """Where it is written down whether a job is at work: its thread does something, or it is on the device."""

    @property
    def on_device(self) -> bool: ...  # noqa: D102
    @property
    def at_work(self) -> bool: ...  # noqa: D102
    def set_working(self, working: bool) -> None: ...  # noqa: D102
    def set_on_device(self, on_device: bool) -> None: ...  # noqa: D102


class NotRecorded:
    """Writes nothing down: the job counts as at work."""

    on_device = at_work = True

    def set_working(self, working: bool) -> None:
        """Do nothing."""

    def set_on_device(self, on_device: bool) -> None:
        """Do nothing."""


class Work:
    """A job while it is worked on. Safe to share between threads: whoever renews its lease reads it and stops it.

    *activity* is told when the job is at work and when it only waits.
    """

    def __init__(self, activity: Activity | None = None) -> None:
        self.activity: Activity = activity or NotRecorded()
        self._lock = threading.Lock()
        self._known = 0
        self._parts: list[Part] = []
        self._cancelled = False

    @property
    def pairs_done(self) -> int:
        """Pairs scored so far, those from the cache included."""
        return self._known + sum(part.done_pairs for part in self._parts)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let the job's thread wait: meanwhile it is at work only while its pairs are on the device."""
        self.activity.set_working(False)
        try:
            yield
        finally:
            self.activity.set_working(True)

    def cancel(self) -> None:
        """Stop before the next micro-batch."""
        with self._lock:
            self._cancelled = True
            for part in self._parts:
                part.cancel()

    def raise_if_cancelled(self) -> None:
        """Raise where a thread that works on the job can stop.

        Raises:
            JobCancelled: if it was cancelled.
        """
        if self._cancelled:
            raise JobCancelled("cancelled while running")

    def add_known(self, pairs: int) -> None:
        """Count pairs whose scores were known.

        Raises:
            JobCancelled: if it was cancelled.
        """
        with self._lock:
            self._known += pairs
        self.raise_if_cancelled()

    def follow(self, part: Part) -> None:
        """Count the pairs of a part from now on, and stop it with the job.

        Raises:
            JobCancelled: if the job was cancelled before; the part is then stopped.
        """
        with self._lock:
            self._parts.append(part)
            if self._cancelled:
                part.cancel()
        self.raise_if_cancelled()
