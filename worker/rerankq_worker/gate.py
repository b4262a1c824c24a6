"""Who may be on the device: many jobs together, or one suspect alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """A readers-writer lock in which whoever wants to be alone goes before newcomers.

    So a suspect waits only for the jobs that are already in, and a row of suspects goes one at a time.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._alone = False
        self._want_alone = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Share the device."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._want_alone)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the device to oneself."""
        with self._changed:
            self._want_alone += 1
            try:
                self._changed.wait_for(lambda: not self._alone and not self._together)
            finally:
                self._want_alone -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()
