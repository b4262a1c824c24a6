"""Warns whoever waits for jobs when no worker serves them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from .. import catalogue
from ..errors import RerankqError
from ..ledger.registry import WorkerInfo

IDS_NAMED = 3


def unserved(
    models: Iterable[str | None], workers: Sequence[WorkerInfo], conf_dir: Path | None = None
) -> tuple[str, ...]:
    """Return those of *models* that no live worker serves (None = the default model); ``("",)`` if no worker runs.

    >>> unserved([None], [])
    ('',)
    """
    taking = [worker for worker in workers if worker.queues]
    if not taking:
        return ("",)
    names = {name for worker in taking for name in (worker.model, *worker.aliases)}
    return tuple(
        sorted(
            "the default model" if model is None else model
            for model in set(models)
            if not (
                any(not worker.suffix for worker in taking)
                if model is None
                else catalogue.canonical(model, conf_dir) in names
            )
        )
    )


class WorkerWatch:
    """Notifies once when workers are missing, and once when they are back.

    Args:
        workers: returns the live ones.
        notify: called with a message.
        conf_dir: the folder of the model catalogue.
    """

    def __init__(
        self, workers: Callable[[], Sequence[WorkerInfo]], notify: Callable[[str], None], conf_dir: Path | None = None
    ) -> None:
        self._workers = workers
        self._notify = notify
        self._conf_dir = conf_dir
        self._missing: tuple[str, ...] = ()

    def check(self, models: Iterable[str | None] = (), job_ids: Sequence[str] = ()) -> None:
        """Check that workers serve *models*, for which *job_ids* wait."""
        with suppress(RerankqError):  # the waiting call reports a ledger that does not answer
            missing = unserved(models, self._workers(), self._conf_dir)
            if missing and missing != self._missing:
                self._notify(" ".join(_sentences(missing, job_ids)))
            elif self._missing and not missing:
                self._notify("a worker is running now")
            self._missing = missing


def _sentences(missing: tuple[str, ...], job_ids: Sequence[str]) -> Iterator[str]:
    yield f"no worker {'is running' if missing == ('',) else 'serves ' + ' and '.join(missing)};"
    more = f" and {len(job_ids) - IDS_NAMED} more" if len(job_ids) > IDS_NAMED else ""
    named = ", ".join(job_ids[:IDS_NAMED]) + more
    yield f"waiting for job{'s' if len(job_ids) > 1 else ''} {named}" if job_ids else "jobs are waiting"
    yield "(start one with: rerankq worker)"
