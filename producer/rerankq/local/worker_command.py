"""The command that runs a worker: plain Celery with the right options and environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec

from ..errors import RerankqError
from ..settings import Settings

HOW_TO_GET_A_WORKER = "the worker's packages are not installed: pip install 'rerankq[worker]'"


class WorkerNotInstalled(RerankqError):
    """Raised when a worker is to be started and its packages are not installed."""


def command(*, name: str, verbose: bool = False) -> list[str]:
    """Return the command; pool, concurrency, queues and events come from the app's own configuration.

    >>> command(name="gpu0")[1:]
    ['-m', 'celery', '-q', '-A', 'rerankq_worker.tasks', 'worker', '-n', 'gpu0@%h', '-l', 'WARNING', \
'--without-gossip', '--without-mingle']
    """
    return [
        sys.executable,
        "-m",
        "celery",
        *([] if verbose else ["-q"]),  # without the banner
        "-A",
        "rerankq_worker.tasks",
        "worker",
        # A stable name: metrics and Flower identify a worker by it across restarts.
        *("-n", f"{name}@%h"),
        *("-l", "INFO" if verbose else "WARNING"),
        # Workers share the ledger and need no messages to each other.
        "--without-gossip",
        "--without-mingle",
    ]


def environment(settings: Settings) -> dict[str, str]:
    """Return the variables by which another process gets our URLs, models and concurrency.

    Raises:
        BrokerUnavailable: if no broker is set.
    """
    return {
        "RERANKQ_BROKER_URL": settings.broker,
        "RERANKQ_LEDGER_URL": settings.ledger,
        "RERANKQ_CACHE_URL": settings.cache,
        "RERANKQ_MODEL": settings.model,
        # Never empty: an empty variable counts as not set, and a .env file may hold another value.
        "RERANKQ_DEFAULT_MODEL": settings.default_model or settings.model,
        "RERANKQ_CONCURRENCY": str(settings.concurrency),
    }


def tuned(environment: Mapping[str, str]) -> dict[str, str]:
    """Add the variables that allocator and tokenisers read at start-up; those that are set keep their value.

    Raises:
        WorkerNotInstalled: if the worker's packages are not installed.
    """
    if find_spec("rerankq_worker") is None or find_spec("numpy") is None:
        raise WorkerNotInstalled(HOW_TO_GET_A_WORKER)
    # Here, not at the top: everything else runs without the worker's packages.
    from rerankq_worker.engine import allocator_environment  # noqa: PLC0415

    # Job threads tokenise in parallel; tokenisers with threads of their own would compete for the cores.
    return {**allocator_environment(), "TOKENIZERS_PARALLELISM": "false", **environment}
