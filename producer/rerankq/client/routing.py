"""Routing: which model ranks a job, on which queue. Pure functions of the registry's entries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..contract import Priority
from ..errors import ModelUnknown
from ..identity import digest
from ..ledger.registry import WorkerInfo


class Route(NamedTuple):
    """A job's model, the weights (fingerprints) of the living workers that serve it, and the suffix of its queues.

    ``takes_instruction`` says whether one of these workers takes an instruction.
    """

    model: str
    weights: tuple[str, ...]
    suffix: str
    takes_instruction: bool = False


def queue_name(priority: Priority, suffix: str) -> str:
    """Name a queue.

    >>> queue_name("bulk", ".BAAI-bge-reranker-large-606d8130f6a6f318")
    'rerankq.bulk.BAAI-bge-reranker-large-606d8130f6a6f318'
    """
    return f"rerankq.{priority}{suffix}"


def suffix_of(model: str, default_model: str) -> str:
    """Name the suffix of a model's queues; empty for the deployment's default.

    A readable part and a hash of the whole name, so that two models never share a queue, however alike they are named.

    >>> suffix_of("BAAI/bge-reranker-large", "bundled")
    '.BAAI-bge-reranker-large-606d8130f6a6f318'
    >>> suffix_of("bundled", "bundled")
    ''
    """
    if model == default_model:
        return ""
    # A name from the environment may hold bytes that are not UTF-8, as Python writes them.
    whole = model.encode("utf-8", "surrogatepass")
    return f".{_readable(model)[:40]}-{digest(whole)[:16]}"


def former_queues(model: str, default_model: str) -> dict[str, str]:
    """Map queues that were a model's own under another default, or in an earlier version, to what they are now.

    >>> former_queues("org/m", "org/m")["rerankq.bulk.org-m"]
    'rerankq.bulk'
    """
    own = suffix_of(model, default_model)
    suffixes = {suffix_of(model, ""), _earlier_suffix_of(model)} - {own}
    priorities: tuple[Priority, Priority] = ("interactive", "bulk")
    return {queue_name(one, suffix): queue_name(one, own) for suffix in suffixes for one in priorities}


def _earlier_suffix_of(model: str) -> str:
    """Name the suffix of the first version: not one-to-one, so jobs found there may be of another model."""
    safe = _readable(model).strip("-")
    if len(safe) > 80 or not _last_part(model).isascii():
        safe = f"{safe[:70]}-{digest(_last_part(model))[:8]}".lstrip("-")
    return f".{safe}"


def _last_part(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "~")) else model


def _readable(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", _last_part(model))


def resolve_route(
    model: str | None, workers: Iterable[WorkerInfo], *, listed: Sequence[str], default: str, live_s: float
) -> Route:
    """Find the model and the queues of a job that names *model* (None = the deployment's default).

    Raises:
        ModelUnknown: if no worker with a sign of life in the last *live_s* seconds serves it and it is not *listed*;
            or if it is the short name of two folders whose weights differ.
    """
    # Newest sign of life first, then by weights, so that answers do not depend on the order of the registry.
    known = sorted(workers, key=lambda worker: (worker.age_s > live_s, worker.fingerprint, worker.model, worker.suffix))
    live = [worker for worker in known if worker.age_s <= live_s]
    if model is None:
        # The entry of a worker that is gone still says which model will rank the job.
        serving = [worker for worker in known if not worker.suffix and worker.queues]
        alive = [worker for worker in live if not worker.suffix and worker.queues]
        return Route(serving[0].model if serving else default, _weights(alive), "", _takes_instruction(alive))
    serving = [worker for worker in live if worker.model == model] or [w for w in live if model in w.aliases]
    if serving:
        named = sorted({worker.model for worker in serving})
        if len(named) > 1 and len(_weights(serving)) > 1:
            raise ModelUnknown(f"model: {model!r} may be any of {', '.join(named)}: name one of them")
        first = serving[0]
        same = [one for one in serving if one.model == first.model]
        return Route(first.model, _weights(same), first.suffix, _takes_instruction(same))
    if model in listed:
        return Route(model, (), suffix_of(model, default))
    served = sorted({worker.model for worker in live} | set(listed))
    raise ModelUnknown(f"model: no worker serves {model!r}; served here: {', '.join(served) or 'none'}")


def _takes_instruction(workers: Iterable[WorkerInfo]) -> bool:
    return any(worker.takes_instruction for worker in workers)


def _weights(workers: Iterable[WorkerInfo]) -> tuple[str, ...]:
    return tuple(sorted({worker.fingerprint for worker in workers}))
