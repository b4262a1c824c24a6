"""A worker that is not started, and the program that Celery would start it from."""

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

from rerankq.settings import Settings
from rerankq_worker import worker as worker_module


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    """The worker's program, imported as Celery does it; no broker is asked yet."""
    with pytest.MonkeyPatch.context() as patched:
        for name in [name for name in os.environ if name.startswith("RERANKQ_")]:
            patched.delenv(name)
        patched.setenv("RERANKQ_BROKER_URL", "redis://127.0.0.1:1/0")
        patched.setenv("RERANKQ_MODEL", "stub")
        yield importlib.import_module("rerankq_worker.tasks")


@pytest.fixture
def worker(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[worker_module.Worker]:
    """A worker that is not started: nothing happens in it but what a test does."""
    settings = Settings(broker_url=redis_url, model="stub:0", default_model="stub:0", concurrency=4, lease_s=30)
    made = worker_module.Worker(settings)
    monkeypatch.setattr(worker_module, "REPORT_AGAIN_S", 0.01)
    yield made
    assert made.leases.stop() == [], "every lease was let go of"
    made.stop()
    made.ledger.redis.close()
