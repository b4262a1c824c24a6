"""A worker in which something hangs: `celery -A hanging worker`. Only for tests of its end.

``HANGS`` says what: ``load`` (a library that loads the model), ``device`` (the first batch) or ``tokenise``.
"""

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import rerankq_worker.engine as engine

HANGS = os.environ["HANGS"]
load = engine.load


def hang(*_: Any, **__: Any) -> Any:
    # Inside a library: no signal handler of Python's runs meanwhile in this thread.
    while True:
        ctypes.CDLL(None).usleep(999_999)


def load_hanging(*args: Any, **kwargs: Any) -> Any:
    if HANGS == "load":
        for _ in range(10**9):
            ctypes.CDLL(None).sleep(3_600)
    loaded = load(*args, **kwargs)
    inner = getattr(loaded, {"device": "launch", "tokenise": "tokenise"}[HANGS])

    def hang_for(first: Any, *rest: Any, **options: Any) -> Any:
        marked = first == "hang" if isinstance(first, str) else _is_marked(first)
        return hang() if marked else inner(first, *rest, **options)

    setattr(loaded, {"device": "launch", "tokenise": "tokenise"}[HANGS], hang_for)
    return loaded


def _is_marked(batch: Sequence[Any]) -> bool:
    return any(len(pair.ids) > 300 for pair in batch)


engine.load = load_hanging  # before the tasks module starts a worker with it

from rerankq_worker.tasks import app  # noqa: E402

__all__ = ["app"]
