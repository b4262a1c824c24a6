"""Redis, a worker and Flower on this machine: started, watched, started again when they die, and stopped together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Self

from .. import Client
from ..errors import BrokerUnavailable
from ..settings import Settings
from ..urls import with_database
from . import worker_command as celery_worker
from .embedded import EmbeddedRedis
from .processes import StackFailed, SupervisedProcess
from .worker_watch import WorkerWatch


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
        self._parts: list[SupervisedProcess] = []
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

    def supervise(self) -> None:
        """Look after the parts: start again what died.

        Raises:
            StackFailed: if the worker died before it was ever ready.
            BrokerUnavailable: if the embedded Redis is gone, and with it all jobs.
        """
        if self._redis is not None and not self._redis.alive:
            raise BrokerUnavailable("the embedded Redis has ended")
        for part in self._parts:
            death = part.supervise(time.monotonic())
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
            self.supervise()
            time.sleep(look_s)
        self._was_ready = True

    def _add(self, name: str, command: Sequence[str], more: Mapping[str, str] | None = None) -> None:
        environment = {**celery_worker.tuned(os.environ), **celery_worker.environment(self.settings), **(more or {})}
        part = SupervisedProcess(name, command, environment, quiet=self._quiet)
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
def open_client(
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
        yield client, None, stack.supervise
