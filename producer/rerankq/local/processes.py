"""A process that is restarted when it ends, and stopped with its owner."""

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
"""Seconds between asking a process to stop and killing it."""

STDERR = 2

LONG_LIFE_S = 60.0
"""A process that ran this long, in seconds, is restarted as after its first death."""


class StackFailed(RerankqError):
    """Raised when a process of the stack cannot be started."""


def pause_s(deaths: int) -> float:
    """Return the seconds before a restart, after so many deaths in a row.

    >>> [pause_s(deaths) for deaths in (1, 2, 3, 7, 100)]
    [1.0, 2.0, 4.0, 30.0, 30.0]
    """
    return min(30.0, 2.0 ** min(deaths - 1, 10))


class Death(NamedTuple):
    """A process has ended; it is restarted after ``pause_s``."""

    name: str
    status: int
    pause_s: float

    def __str__(self) -> str:
        cause = f"signal {self.status - 128}" if self.status > 128 else f"status {self.status}"
        return f"{self.name} ended ({cause}); restarting in {self.pause_s:.0f} s"


class SupervisedProcess:
    """A program that ends with its owner, and is restarted when it dies.

    Args:
        name: for messages.
        command: the program and its arguments.
        environment: variables added to our own.
        quiet: keep its output; :meth:`last_output` returns the end of it.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], *, quiet: bool) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        # It has no name: nothing to clean up.
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
        """Start the program at *now*, in seconds of the caller's clock."""
        self._started_at, self._start_at = now, None
        self._process = subprocess.Popen(  # noqa: S603 - our own programs
            [sys.executable, "-I", "-S", process_guard.__file__, str(GRACE_S), "", *self._command],
            stdin=subprocess.PIPE,
            # Standard output is for our own results.
            stdout=self._log or STDERR,
            stderr=self._log or STDERR,
            env={**os.environ, **self._environment},
            # Ctrl-C goes to the terminal's whole group; we stop the processes ourselves, in order.
            start_new_session=True,
        )

    def supervise(self, now: float) -> Death | None:
        """Restart it when its pause is over; return a death that was not reported before."""
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
        """Ask it to stop; it is killed GRACE_S seconds later, even if we have ended by then."""
        self._start_at = None
        if self._process and self._process.stdin:
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait until it has ended."""
        if self._process:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S + 5)
            self.kill()

    def kill(self) -> None:
        """Kill it, with every process it started."""
        self._start_at = None
        process, self._process = self._process, None
        if process is None:
            return
        # A guard that ended by itself has stopped its program; one that runs or was killed has not.
        if process.poll() is None or process.returncode < 0:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin:
            process.stdin.close()

    def close(self) -> None:
        """Kill it, and discard its output."""
        self.kill()
        if self._log is not None:
            self._log.close()

    def last_output(self, lines: int = 15) -> str:
        """Read the last lines of its output, if it is quiet."""
        if self._log is None:
            return ""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 8_192))
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-lines:])
