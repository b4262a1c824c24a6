"""Where a worker's scores come from: an engine on its own device, or another server. The worker asks no more of it."""

from __future__ import annotations

import time
from typing import Any, Protocol

from rerankq import catalogue
from rerankq.errors import SettingsInvalid
from rerankq.ledger.lease_policy import LeasePolicy
from rerankq.settings import Settings, secret

from . import engine
from .cache import ScoreCache
from .engine import Batcher, BatcherStats
from .scoring import LocalScorer, Scorer


class Backend(Protocol):
    """Gives a worker its scorer, and says whether that can work. Safe to share between threads."""

    @property
    def scorer(self) -> Scorer:
        """What scores the worker's jobs."""

    @property
    def can_work(self) -> bool:
        """Whether it can score at all; if not, the worker sends no heartbeat."""

    def hangs(self, policy: LeasePolicy) -> bool:
        """Tell whether what is under way is never coming back: the worker's leases are then left to lapse."""

    def description(self) -> dict[str, Any]:
        """Say what the registry of workers shows: fingerprint, device, speed."""

    def figures(self) -> dict[str, Any]:
        """Say what it is and did, for ``celery inspect stats`` and Flower."""

    def close(self, timeout_s: float) -> None:
        """Stop; whoever waits for scores gets EngineClosed, and its job is handed back."""


def load_backend(model: str, settings: Settings, scores: ScoreCache) -> Backend:
    """Load a model, or make ready to ask the server that the catalogue names for ``remote:NAME``.

    Raises:
        EngineError: if the model cannot be loaded.
        SettingsInvalid: if the catalogue has no such server, or its key or its packages are missing.
    """
    if not model.startswith(catalogue.REMOTE):
        return LocalBackend(model, settings, scores)
    card = catalogue.remote(model, settings.conf_dir)
    try:
        # httpx is in an extra of its own.
        from .remote import RemoteBackend  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SettingsInvalid(f"{model} needs {error.name}: pip install 'rerankq[remote]'") from None
    return RemoteBackend(model, card, scores, api_key=secret(card.api_key_env) if card.api_key_env else "")


class LocalBackend:
    """One model on this machine's device, and the thread that feeds it."""

    def __init__(self, model: str, settings: Settings, scores: ScoreCache) -> None:
        self.engine = engine.load(
            model,
            settings.device,
            settings.dtype,
            max_batch_tokens=settings.max_batch_tokens,
            runtime=settings.runtime,
        )
        self.batcher = Batcher(self.engine, seconds_per_token=engine.seconds_per_token(self.engine))
        self.scorer = LocalScorer(self.engine, self.batcher, scores)

    @property
    def can_work(self) -> bool:
        """Whether the engine's thread lives."""
        return self.batcher.stats().alive

    def hangs(self, policy: LeasePolicy) -> bool:
        """Tell whether a batch takes far longer than its tokens predict."""
        stats = self.batcher.stats()
        running = None if stats.batch_started is None else time.monotonic() - stats.batch_started
        return policy.hangs(running, stats.batch_predicted_s or 0.0)

    def description(self) -> dict[str, Any]:
        """Say what the registry shows of the engine."""
        stats = self.batcher.stats()
        return {
            "fingerprint": self.engine.fingerprint,
            "device": f"{self.engine.device} ({self.engine.dtype})",
            "pairs_per_s": round(stats.pairs / max(1.0, stats.busy_s), 1) if stats.busy_s else 0,
            "last_progress_s": _since_progress(stats),
            "max_length": self.engine.max_length,
            "takes_instruction": self.engine.takes_instruction,
        }

    def figures(self) -> dict[str, Any]:
        """Say what the engine is and did."""
        stats = self.batcher.stats()
        return {
            "device": self.engine.device,
            "dtype": self.engine.dtype,
            "batches": stats.batches,
            "pairs": stats.pairs,
            "joined_pairs": stats.joined_pairs,
            "failed_pairs": stats.failed_pairs,
            "tokens": stats.tokens,
            "padded_tokens": stats.padded_tokens,
            "pairs_per_batch": round(stats.pairs / stats.batches, 1) if stats.batches else 0,
            "padding": round(stats.padding, 4),
            "out_of_memory": stats.out_of_memory,
            "busy_s": round(stats.busy_s, 1),
            "last_progress_s": _since_progress(stats),
            "waiting_pairs": stats.waiting_pairs,
        }

    def close(self, timeout_s: float) -> None:
        """Let the device go."""
        self.batcher.close(drain=False, timeout=timeout_s)


def _since_progress(stats: BatcherStats) -> float:
    return round(time.monotonic() - stats.last_progress, 1)
