"""A process that is started again when it ends, and stopped with us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, NamedTuple

from ..errors import RerankqError
from . import process_guard

GRACE_S = 10.0
"""Seconds between asking a part to stop and killing it."""

STDERR = 2

LONG_LIFE_S = 60.0
"""A part that lived so long has earned a quick restart."""


class StackFailed(RerankqError):
    """Raised when a part of the stack cannot be started."""


def pause_s(deaths: int) -> float:
    """Seconds before a part that died so often in a row is started again.

    >>> [pause_s(deaths) for deaths in (1, 2, 3, 7, 100)]
    [1.0, 2.0, 4.0, 30.0, 30.0]
    """
    return min(30.0, 2.0 ** min(deaths - 1, 10))


class Death(NamedTuple):
    """A part has ended; it is started again after ``pause_s``."""

    name: str
    status: int
    pause_s: float

    def __str__(self) -> str:
        cause = f"signal {self.status - 128}" if self.status > 128 else f"status {self.status}"
        return f"{self.name} ended ({cause}); starting it again in {self.pause_s:.0f} s"


class SupervisedProcess:
    """A program that ends when we do, and is started again when it dies.

    Args:
        name: as a person calls it.
        command: the program and its arguments.
        environment: variables beside our own.
        quiet: keep what it says to ourselves; :meth:`said` tells its last lines.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], *, quiet: bool) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        # Unlinked from birth: nothing to clean up.
        self._log: IO[bytes] | None = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._deaths = 0
        self._start_at: float | None = None

    @property
    def pid(self) -> int | None:
        """The process group of the program, or None while it is down."""
        return self._process.pid if self._process else None

    def start(self, now: float) -> None:
        """Start it."""
        self._started_at, self._start_at = now, None
        self._process = subprocess.Popen(  # noqa: S603 - our own programs
            [sys.executable, "-I", "-S", process_guard.__file__, str(GRACE_S), "", *self._command],
            stdin=subprocess.PIPE,
            # A part's words are no output of ours.
            stdout=self._log or STDERR,
            stderr=self._log or STDERR,
            env={**os.environ, **self._environment},
            # Ctrl-C goes to the terminal's whole group; parts are stopped by us, in order.
            start_new_session=True,
        )

    def supervise(self, now: float) -> Death | None:
        """Start it again if it is time to; answer a death that was not known before."""
        if self._start_at is not None:
            if now >= self._start_at:
                self.start(now)
            return None
        if self._process is None or (status := self._process.poll()) is None:
            return None
        self.kill()
        self._deaths = 1 if now - self._started_at > LONG_LIFE_S else self._deaths + 1
        self._start_at = now + pause_s(self._deaths)
        return Death(self.name, status if status >= 0 else 128 - status, pause_s(self._deaths))

    def ask_to_stop(self) -> None:
        """Ask it to stop; it is killed GRACE_S seconds later, even if we are gone by then."""
        self._start_at = None
        if self._process and self._process.stdin:
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait until it is gone."""
        if self._process:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S + 5)
            self.kill()

    def kill(self) -> None:
        """End it now, with all that it started."""
        self._start_at = None
        process, self._process = self._process, None
        if process is None:
            return
        # A guard that ended by itself took its program with it; one that runs or was killed has not.
        if process.poll() is None or process.returncode < 0:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin:
            process.stdin.close()

    def close(self) -> None:
        """End it now, and forget what it said."""
        self.kill()
        if self._log is not None:
            self._log.close()

    def said(self, lines: int = 15) -> str:
        """Read the last lines that it said, where it is quiet."""
        if self._log is None:
            return ""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 8_192))
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-lines:])
