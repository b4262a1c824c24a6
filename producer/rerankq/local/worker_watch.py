"""Whoever waits for jobs is told when there is no worker to do them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from .. import catalogue
from ..errors import RerankqError
from ..ledger.registry import WorkerInfo

IDS_SAID = 3


def unserved(
    models: Iterable[str | None], workers: Sequence[WorkerInfo], conf_dir: Path | None = None
) -> tuple[str, ...]:
    """Name what no live worker serves: ``""`` where none takes jobs at all, else of *models* (None = the default).

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
    """Tells once when workers are missing, and once when they are there again.

    Args:
        workers: asks for the live ones.
        tell: hears what a person should know.
        conf_dir: where the catalogue of models is.
    """

    def __init__(
        self, workers: Callable[[], Sequence[WorkerInfo]], tell: Callable[[str], None], conf_dir: Path | None = None
    ) -> None:
        self._workers = workers
        self._tell = tell
        self._conf_dir = conf_dir
        self._missing: tuple[str, ...] = ()

    def look(self, models: Iterable[str | None] = (), job_ids: Sequence[str] = ()) -> None:
        """Look for workers that serve *models*, for which *job_ids* wait."""
        with suppress(RerankqError):  # a ledger that does not answer is said by whoever waits
            missing = unserved(models, self._workers(), self._conf_dir)
            if missing and missing != self._missing:
                self._tell(" ".join(_sentences(missing, job_ids)))
            elif self._missing and not missing:
                self._tell("a worker is there now")
            self._missing = missing


def _sentences(missing: tuple[str, ...], job_ids: Sequence[str]) -> Iterator[str]:
    yield f"no worker {'is alive' if missing == ('',) else 'serves ' + ' and '.join(missing)};"
    more = f" and {len(job_ids) - IDS_SAID} more" if len(job_ids) > IDS_SAID else ""
    named = ", ".join(job_ids[:IDS_SAID]) + more
    yield f"waiting for job{'s' if len(job_ids) > 1 else ''} {named}" if job_ids else "jobs are waiting"
    yield "(rerankq worker starts one)"
