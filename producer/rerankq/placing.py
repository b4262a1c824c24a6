"""Where a job belongs: which model answers it, on which queue. Pure functions of what the registry says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .contract import Priority, digest
from .errors import ModelUnknown
from .ledger import WorkerInfo


class Place(NamedTuple):
    """A job's model and the suffix of its queues."""

    model: str
    weights: str
    suffix: str


def queue_name(priority: Priority, suffix: str) -> str:
    """Name a queue.

    >>> queue_name("bulk", ".BAAI-bge-reranker-large")
    'rerankq.bulk.BAAI-bge-reranker-large'
    """
    return f"rerankq.{priority}{suffix}"


def suffix_of(model: str, default_model: str) -> str:
    """Say what a model's queues append to the plain names; nothing for the deployment's default.

    >>> suffix_of("BAAI/bge-reranker-large", "bundled")
    '.BAAI-bge-reranker-large'
    >>> suffix_of("/srv/models/my reranker/", "bundled")
    '.my-reranker'
    """
    if model == default_model:
        return ""
    name = model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "~")) else model
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    if len(safe) > 80 or not name.isascii():
        # What was cut or cannot be said may be all that tells two models apart.
        safe = f"{safe[:70]}-{digest(name)[:8]}".lstrip("-")
    return f".{safe}"


def find_place(
    model: str | None, workers: Iterable[WorkerInfo], *, listed: Sequence[str], default: str, live_s: float
) -> Place:
    """Find who answers a job that names *model* (None = the deployment's default).

    Raises:
        ModelUnknown: if no worker with a sign of life in the last *live_s* seconds serves it and it is not *listed*.
    """
    # Newest sign of life first, then by weights, so that the ids of equal jobs agree while a fleet is renewed.
    known = sorted(workers, key=lambda worker: (worker.age_s > live_s, worker.fingerprint))
    if model is None:
        # A worker that is gone for the moment still tells which weights will answer.
        serving = [worker for worker in known if not worker.suffix and worker.queues]
        return Place(serving[0].model, serving[0].fingerprint, "") if serving else Place(default, "", "")
    for worker in known:
        if worker.age_s <= live_s and model in {worker.model, *worker.aliases}:
            return Place(worker.model, worker.fingerprint, worker.suffix)
    if model in listed:
        weights = next((worker.fingerprint for worker in known if worker.model == model), "")
        return Place(model, weights, suffix_of(model, default))
    served = sorted({worker.model for worker in known if worker.age_s <= live_s} | set(listed))
    raise ModelUnknown(f"model: no worker serves {model!r}; served here: {', '.join(served) or 'none'}")
