"""Workers as ``rerankq worker`` starts them, started again when they die, and what they and the ledger say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rerankq import Client
from rerankq.broker.celery_app import make_app
from rerankq.local import worker_command
from rerankq.local.embedded import EmbeddedRedis
from rerankq.local.processes import SupervisedProcess
from rerankq.local.stack import settings_for
from rerankq.settings import Settings

TASKS = "rerankq_worker.tasks"
# The worker of the tests of crashes, "poisonable": its process dies of a chunk that reads "poison", its engine fails on
# one that reads "broken".
POISONABLE = Path(__file__).resolve().parents[2] / "tests" / "integration"


def forget_settings() -> None:
    """Drop what the caller's shell sets of rerankq: a benchmark measures what it says, wherever it runs."""
    for name in [name for name in os.environ if name.startswith("RERANKQ_")]:
        del os.environ[name]


def python_path(folder: Path) -> str:
    """Put a folder before what Python's path holds already."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@contextmanager
def deployment(
    *, workers: int = 1, model: str = "bundled", dtype: str = "float32", app: str = TASKS, **environment: str
) -> Iterator[tuple[Client, list[SupervisedProcess]]]:
    """Run an embedded Redis with workers of a model, and a client, for as long as a ``with`` block.

    ``environment`` reaches the workers. They are ready when the block begins.
    """
    forget_settings()
    with ExitStack() as running:
        redis = running.enter_context(EmbeddedRedis())
        settings = settings_for(redis.url, Settings(_env_file=None, model=model))
        client = running.enter_context(Client(settings))
        parts = [
            running.enter_context(kept_running(worker_part(settings, f"w{n}", dtype=dtype, app=app, **environment)))
            for n in range(workers)
        ]
        until(lambda: len(client.workers()) >= workers, parts, seconds=180)
        yield client, parts


@contextmanager
def kept_running(part: SupervisedProcess) -> Iterator[SupervisedProcess]:
    """Start a part, and stop it at the end."""
    part.start(time.monotonic())
    try:
        yield part
    finally:
        part.ask_to_stop()
        part.wait()


def until(
    holds: Callable[[], bool], parts: Sequence[SupervisedProcess], *, seconds: float, mortal: bool = False
) -> None:
    """Wait for a condition that other processes make true; *mortal* parts that die are started again.

    Raises:
        RuntimeError: if it did not come true in time, or a part died that should not.
    """
    ends = time.monotonic() + seconds
    while not holds():
        for part in parts:
            death = part.supervise(time.monotonic())
            if death and not mortal:
                raise RuntimeError(f"{death}\n{part.last_output()}")
        if time.monotonic() > ends:
            words = "\n".join(f"{part.name}: {part.last_output()}" for part in parts)
            raise RuntimeError(f"did not come true within {seconds} s; the workers said:\n{words}")
        time.sleep(0.02)


def engine_figures(settings: Settings) -> dict[str, dict[str, Any]]:
    """Ask the workers, by Celery's own remote control, how their engines do."""
    app = make_app(settings)
    try:
        said = app.control.inspect(timeout=5).stats() or {}
    finally:
        app.close()
    return {name: stats["engine"] for name, stats in said.items()}


def worker_part(
    settings: Settings, name: str, *, dtype: str = "float32", app: str = TASKS, **environment: str
) -> SupervisedProcess:
    """Make a worker of a deployment, not started yet."""
    command = [app if word == TASKS else word for word in worker_command.command(name=name)]
    variables = {
        **worker_command.tuned(os.environ),
        **worker_command.environment(settings),
        "RERANKQ_DTYPE": dtype,
        **environment,
    }
    return SupervisedProcess(name, command, variables, quiet=True)
