"""A worker with other weights under the same name: `celery -A renewed worker`. Only for tests of renewed fleets."""

from typing import Any

import rerankq_worker.engine as engine

load = engine.load


def load_renewed(*args: Any, **kwargs: Any) -> Any:
    loaded = load(*args, **kwargs)
    loaded.fingerprint = "renewed"
    return loaded


engine.load = load_renewed  # before the tasks module starts a worker with it

from rerankq_worker.tasks import app  # noqa: E402

__all__ = ["app"]
