"""Redis, a worker, the gateway and Flower on this machine: supervised, restarted when they die, stopped together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Self

from ..client.blocking import Client
from ..errors import BrokerUnavailable
from ..settings import Settings
from ..stream import OpenClient
from ..urls import with_database
from . import worker_command
from .embedded import EmbeddedRedis
from .processes import StackFailed, SupervisedProcess
from .worker_watch import WorkerWatch


class Stack:
    """The processes, for as long as a ``with`` block. Its owner calls :meth:`supervise` periodically, in one thread.

    Args:
        settings: without a ``broker_url`` an embedded Redis is started.
        embedded: start one in any case.
        gateway: run the gateway too, at the settings' port.
        flower_port: where Flower listens on the loopback; None = no Flower.
        quiet: show the processes' output only if one cannot be started.
        notify: called with a message when a process dies.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        embedded: bool = False,
        gateway: bool = False,
        flower_port: int | None = None,
        quiet: bool = True,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.embedded = embedded or not settings.broker_url
        self._gateway = gateway
        self._flower_port = flower_port
        self._quiet = quiet
        self._notify = notify
        self._processes: list[SupervisedProcess] = []
        self._was_ready = False
        self._open = ExitStack()
        self._redis: EmbeddedRedis | None = None

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            if self.embedded:
                self._redis = opening.enter_context(EmbeddedRedis())
                self.settings = settings_for(self._redis.url, self.settings)
            opening.callback(self.stop)
            self._add("worker", worker_command.command(name="rerankq"))
            if self._gateway:
                self._add("gateway", gateway_command(self.settings))
            if self._flower_port is not None:
                self._add("Flower", flower_command(self._flower_port), flower_environment(os.environ))
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def stop(self) -> None:
        """Stop all processes together; a second Ctrl-C kills them at once."""
        try:
            for process in self._processes:
                process.ask_to_stop()
            for process in self._processes:
                process.wait()
        finally:
            for process in self._processes:
                process.close()

    def supervise(self) -> None:
        """Restart the processes that died.

        Raises:
            StackFailed: if the worker died before it was ever ready.
            BrokerUnavailable: if the embedded Redis has ended, and all jobs with it.
        """
        if self._redis is not None and not self._redis.alive:
            raise BrokerUnavailable("the embedded Redis has ended")
        for process in self._processes:
            death = process.supervise(time.monotonic())
            if death is None:
                continue
            if process.name == "worker" and not self._was_ready:
                raise StackFailed(
                    f"the worker could not be started (status {death.status})\n{process.last_output()}".strip()
                )
            self._notify(str(death))

    def wait_until_ready(self, client: Client, *, poll_s: float = 0.1) -> None:
        """Wait until a worker has loaded its model and registered; a first start may download it.

        Raises:
            StackFailed: if the worker dies before that.
        """
        while not any(worker.queues for worker in client.workers()):
            self.supervise()
            time.sleep(poll_s)
        self._was_ready = True

    def _add(self, name: str, command: Sequence[str], more: Mapping[str, str] | None = None) -> None:
        environment = {**worker_command.tuned(os.environ), **worker_command.environment(self.settings), **(more or {})}
        process = SupervisedProcess(name, command, environment, quiet=self._quiet)
        self._processes.append(process)
        process.start(time.monotonic())


def settings_for(url: str, settings: Settings) -> Settings:
    """Put all three roles on one Redis, each in a database of its own."""
    return settings.model_copy(
        update={"broker_url": url, "ledger_url": with_database(url, 1), "cache_url": with_database(url, 2)}
    )


# As variables: older versions of Flower refuse options that they do not know.
FLOWER_ENVIRONMENT = {
    "FLOWER_READ_ONLY": "true",
    "FLOWER_UNAUTHENTICATED_API": "false",
    # As in conf/flower.py, which an installed package does not have; the queue's and the worker's names are left out.
    "FLOWER_TASKS_COLUMNS": "uuid,args,state,result,exception,received,runtime",
}


def flower_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return Flower's settings; without a password it is read-only.

    Any page in a browser of this machine can reach the loopback.

    >>> flower_environment({"FLOWER_BASIC_AUTH": "me:secret"})["FLOWER_READ_ONLY"]
    'false'
    """
    if not environment.get("FLOWER_BASIC_AUTH"):
        return FLOWER_ENVIRONMENT
    return {**FLOWER_ENVIRONMENT, "FLOWER_READ_ONLY": environment.get("FLOWER_READ_ONLY") or "false"}


def flower_command(port: int) -> list[str]:
    """Return the command that runs Flower on the loopback."""
    return [
        sys.executable,
        "-m",
        "celery",
        "-q",
        *("-A", "rerankq.broker", "flower", "--address=127.0.0.1", f"--port={port}"),
        # Its defaults keep 100 000 tasks and every worker that ever was.
        *("--max-tasks=20000", "--purge-offline-workers=300", "--logging=error"),
    ]


def gateway_command(settings: Settings) -> list[str]:
    """Return the command that runs the gateway on the loopback."""
    return [sys.executable, "-m", "rerankq.cli", "gateway", "--host", "127.0.0.1", "--port", str(settings.port)]


def gateway_is_installed() -> bool:
    """Whether the gateway can be run here."""
    return find_spec("fastapi") is not None and find_spec("uvicorn") is not None


def flower_is_installed() -> bool:
    """Whether Flower can be run here."""
    return find_spec("flower") is not None


@contextmanager
def open_client(settings: Settings, model: str | None, notify: Callable[[str], None]) -> Iterator[OpenClient]:
    """Open a client of the deployment that the settings name, or, if they name none, of a stack started for it."""
    if settings.broker_url:
        with Client(settings) as client:
            watch = WorkerWatch(client.workers, notify, settings.conf_dir)
            yield OpenClient(client, model, lambda: watch.check({model}))
        return
    own = settings.model_copy(update={"model": model or settings.model, "default_model": ""})
    with Stack(own, notify=notify) as stack, Client(stack.settings) as client:
        stack.wait_until_ready(client)
        yield OpenClient(client, None, stack.supervise)
