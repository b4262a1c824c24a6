"""The command that runs a worker: plain Celery with the right options and environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec

from ..rescoring.inputs import InputFault
from ..settings import Settings

HOW_TO_GET_A_WORKER = "a worker needs more than this machine has installed: pip install 'rerankq[worker]'"


def command(*, name: str, verbose: bool = False) -> list[str]:
    """Write the program and its arguments; pool, concurrency, queues and events come from the app's own configuration.

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
        # A stable name: metrics and Flower tell a worker by it across restarts.
        *("-n", f"{name}@%h"),
        *("-l", "INFO" if verbose else "WARNING"),
        # Workers have nothing to say to each other: the ledger is what they share.
        "--without-gossip",
        "--without-mingle",
    ]


def environment(settings: Settings) -> dict[str, str]:
    """Write variables that make another process read this one's settings of URLs, models and concurrency.

    Raises:
        BrokerUnavailable: if no broker is set.
    """
    return {
        "RERANKQ_BROKER_URL": settings.broker,
        "RERANKQ_LEDGER_URL": settings.ledger,
        "RERANKQ_CACHE_URL": settings.cache,
        "RERANKQ_MODEL": settings.model,
        # Never empty: what is empty counts as not set, and another value may stand in a file.
        "RERANKQ_DEFAULT_MODEL": settings.default_model or settings.model,
        "RERANKQ_CONCURRENCY": str(settings.concurrency),
    }


def tuned(environment: Mapping[str, str]) -> dict[str, str]:
    """Add what the allocator and the tokenisers read at start-up only; what is set already stays.

    Raises:
        InputFault: if the worker's packages are not installed.
    """
    if find_spec("rerankq_worker") is None or find_spec("numpy") is None:
        raise InputFault(HOW_TO_GET_A_WORKER)
    # Here, not at the top: everything else of the command line runs without the worker's packages.
    from rerankq_worker.engine import allocator_environment  # noqa: PLC0415

    # Job threads tokenise side by side; tokenisers that fork threads of their own as well fight over the cores.
    return {**allocator_environment(), "TOKENIZERS_PARALLELISM": "false", **environment}
