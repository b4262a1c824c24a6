"""The usual way to rerank behind a queue: a Celery task that calls ``CrossEncoder.predict`` for its job.

The rival of throughput.py, which starts it: ``celery -A usual_way worker``, the model loaded and warmed before the
first task, texts in the message, scores in Celery's result backend. ``USUAL_WAY_URL`` is a Redis.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, signals
from gear.model_process import BUNDLED, cross_encoder

URL = os.environ.get("USUAL_WAY_URL")
app = Celery("usual_way", broker=URL, backend=URL, set_as_current=False)
app.conf.update(task_default_queue="usual_way", broker_connection_retry_on_startup=True)

_model: Any = None


# worker_init loads it where tasks run in the process itself, worker_process_init in each child of a prefork pool.
@signals.worker_init.connect  # type: ignore[untyped-decorator]  # Celery ships no types
@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def load(sender: Any = None, **_: Any) -> None:
    global _model  # noqa: PLW0603
    forks = sender is not None and sender.pool_cls.__module__.endswith("prefork")
    if _model is None and not forks:
        _model = cross_encoder(str(BUNDLED))


@app.task(name="usual_way.rerank")  # type: ignore[untyped-decorator]
def rerank(query: str, chunks: list[str]) -> list[float]:
    scores: list[float] = _model.predict([(query, chunk) for chunk in chunks]).tolist()
    return scores


if __name__ == "__main__":
    print("nothing to run here: throughput.py starts a worker of this")
