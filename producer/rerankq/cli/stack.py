"""Redis, a worker and Flower on this machine: started, watched, started again when they die, and stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from typing import IO, NamedTuple, Self

from .. import Client
from ..embedded import EmbeddedRedis
from ..errors import BrokerUnavailable, RerankqError
from ..settings import Settings
from ..urls import with_database
from . import celery_worker, leash
from .worker_watch import WorkerWatch

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


class Part:
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
            [sys.executable, "-I", "-S", leash.__file__, str(GRACE_S), *self._command],
            stdin=subprocess.PIPE,
            # A part's words are no output of ours.
            stdout=self._log or STDERR,
            stderr=self._log or STDERR,
            env={**os.environ, **self._environment},
            # Ctrl-C goes to the terminal's whole group; parts are stopped by us, in order.
            start_new_session=True,
        )

    def tend(self, now: float) -> Death | None:
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
        # A leash that ended by itself took its program with it; one that runs or was killed has not.
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


class Stack:
    """The parts, for as long as a ``with`` block. One thread: who holds it calls :meth:`tend` now and then.

    Args:
        settings: without a ``broker_url`` an embedded Redis is brought.
        embedded: bring one in any case.
        flower_port: where Flower listens on the loopback; None = no Flower.
        quiet: keep what the parts say to ourselves unless one cannot be started.
        tell: hears of deaths.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        embedded: bool = False,
        flower_port: int | None = None,
        quiet: bool = True,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.embedded = embedded or not settings.broker_url
        self._flower_port = flower_port
        self._quiet = quiet
        self._tell = tell
        self._parts: list[Part] = []
        self._was_ready = False
        self._open = ExitStack()
        self._redis: EmbeddedRedis | None = None

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            if self.embedded:
                self._redis = opening.enter_context(EmbeddedRedis())
                self.settings = settings_for(self._redis.url, self.settings)
            opening.callback(self.stop)
            self._add("worker", celery_worker.command(name="rerankq"))
            if self._flower_port is not None:
                self._add("Flower", flower_command(self._flower_port), flower_environment(os.environ))
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def stop(self) -> None:
        """Stop all parts, together; a second Ctrl-C kills them at once."""
        try:
            for part in self._parts:
                part.ask_to_stop()
            for part in self._parts:
                part.wait()
        finally:
            for part in self._parts:
                part.close()

    def tend(self) -> None:
        """Look after the parts: start again what died.

        Raises:
            StackFailed: if the worker died before it was ever ready.
            BrokerUnavailable: if the embedded Redis is gone, and with it all jobs.
        """
        if self._redis is not None and not self._redis.alive:
            raise BrokerUnavailable("the embedded Redis has ended")
        for part in self._parts:
            death = part.tend(time.monotonic())
            if death is None:
                continue
            if part.name == "worker" and not self._was_ready:
                raise StackFailed(f"the worker could not be started (status {death.status})\n{part.said()}".strip())
            self._tell(str(death))

    def wait_until_ready(self, client: Client, *, look_s: float = 0.1) -> None:
        """Wait until a worker has loaded its model and registered; a first start may download it.

        Raises:
            StackFailed: if it dies before that.
        """
        while not any(worker.queues for worker in client.workers()):
            self.tend()
            time.sleep(look_s)
        self._was_ready = True

    def _add(self, name: str, command: Sequence[str], more: Mapping[str, str] | None = None) -> None:
        environment = {**celery_worker.tuned(os.environ), **celery_worker.environment(self.settings), **(more or {})}
        part = Part(name, command, environment, quiet=self._quiet)
        self._parts.append(part)
        part.start(time.monotonic())


def settings_for(url: str, settings: Settings) -> Settings:
    """Put all three roles on one Redis."""
    return settings.model_copy(
        update={"broker_url": url, "ledger_url": with_database(url, 1), "cache_url": with_database(url, 2)}
    )


# By the environment, since older Flowers refuse options that they do not know.
FLOWER_ENVIRONMENT = {
    "FLOWER_READ_ONLY": "true",
    "FLOWER_UNAUTHENTICATED_API": "false",
    # As in conf/flower.py, which an installed package does not have; the queue's and the worker's names are left out.
    "FLOWER_TASKS_COLUMNS": "uuid,args,state,result,exception,received,runtime",
}


def flower_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Write Flower's settings: without a password of its own it shows and does not control.

    On the loopback anybody's page in a browser can reach it.

    >>> flower_environment({"FLOWER_BASIC_AUTH": "me:secret"})["FLOWER_READ_ONLY"]
    'false'
    """
    if not environment.get("FLOWER_BASIC_AUTH"):
        return FLOWER_ENVIRONMENT
    return {**FLOWER_ENVIRONMENT, "FLOWER_READ_ONLY": environment.get("FLOWER_READ_ONLY") or "false"}


def flower_command(port: int) -> list[str]:
    """Write the program and arguments that run Flower on the loopback."""
    return [
        sys.executable,
        "-m",
        "celery",
        "-q",
        *("-A", "rerankq.broker", "flower", "--address=127.0.0.1", f"--port={port}"),
        # Its defaults keep 100 000 tasks and every worker that ever was.
        *("--max-tasks=20000", "--purge-offline-workers=300", "--logging=error"),
    ]


def flower_is_installed() -> bool:
    """Whether Flower can be run here."""
    return find_spec("flower") is not None


@contextmanager
def desk(
    settings: Settings, model: str | None, tell: Callable[[str], None]
) -> Iterator[tuple[Client, str | None, Callable[[], None]]]:
    """Open a client of the deployment that the settings name, or of a stack of one's own where they name none.

    Yields the client, the model to name in jobs (None = the deployment's own) and what to call now and then.
    """
    if settings.broker_url:
        with Client(settings) as client:
            watch = WorkerWatch(client.workers, tell, settings.conf_dir)
            yield client, model, lambda: watch.look({model})
        return
    own = settings.model_copy(update={"model": model or settings.model, "default_model": ""})
    with Stack(own, tell=tell) as stack, Client(stack.settings) as client:
        stack.wait_until_ready(client)
        yield client, None, stack.tend
