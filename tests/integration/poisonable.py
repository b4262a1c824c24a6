"""A worker whose engine dies of certain chunks: `celery -A poisonable worker`. Only for tests of crashes."""

import os
import signal
from collections.abc import Sequence
from typing import Any

import rerankq_worker.engine as engine

POISON = "poison"
BROKEN = "broken"
load = engine.load


def load_poisonable(*args: Any, **kwargs: Any) -> Any:
    loaded = load(*args, **kwargs)
    tokenise = loaded.tokenise

    def tokenise_or_die(query: str, chunks: Sequence[str], **options: Any) -> Any:
        if any(chunk == POISON for chunk in chunks):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(chunk == BROKEN for chunk in chunks):
            msg = "this pair cannot be scored"
            raise ValueError(msg)
        return tokenise(query, chunks, **options)

    loaded.tokenise = tokenise_or_die
    return loaded


engine.load = load_poisonable  # before the tasks module starts a worker with it

from rerankq_worker.tasks import app  # noqa: E402

__all__ = ["app"]
