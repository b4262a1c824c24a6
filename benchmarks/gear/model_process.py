"""Models without a queue, to compare with, each in a process of its own as users run them."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from rerankq_worker.engine import Batcher, Engine, allocator_environment, load

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "minilm-l6-rerank"

Pairs = list[tuple[str, str]]
Logits = list[list[float]]
Answer = TypeVar("Answer")


class ModelProcess:
    """A process with the model that *load_model* loads in it, for as long as a ``with`` block."""

    def __init__(
        self, load_model: Callable[..., None], *args: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        # Spawned, not forked: glibc reads its variables when a program starts.
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with _variables(environment or {}):
            self._loaded = self._pool.submit(load_model, *args)

    def __enter__(self) -> Self:
        self._loaded.result()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def ask(self, work: Callable[..., Answer], *args: Any) -> Answer:
        """Run *work* in the process, and wait for its answer."""
        return self._pool.submit(work, *args).result()


def engine_process(
    dtype: str = "float32", *, model: str = "bundled", device: str = "cpu", runtime: str = "auto"
) -> ModelProcess:
    """Start a process with a model in our engine, under the allocator that our workers have."""
    return ModelProcess(_load_engine, model, device, dtype, runtime, environment=allocator_environment())


def score(jobs: Sequence[Pairs]) -> Logits:
    """Score many jobs with the engine directly, batches formed across them all."""
    return _cut(_scored([pair for pairs in jobs for pair in pairs]), jobs)


def score_alone(jobs: Sequence[Pairs]) -> Logits:
    """Score each job by itself with the engine directly."""
    return [_scored(pairs) for pairs in jobs]


def score_tokenised(jobs: Sequence[Pairs]) -> tuple[Logits, float]:
    """Score many jobs through a batcher, tokenised beforehand; answers the seconds of the scoring alone, too."""
    tokenised = [_engine.tokenise(pairs[0][0], [chunk for _, chunk in pairs]) for pairs in jobs]
    with Batcher(_engine) as batcher:
        began = time.perf_counter()
        tickets = [batcher.submit(pairs, priority="bulk") for pairs in tokenised]
        logits = [ticket.result().tolist() for ticket in tickets]
        return logits, time.perf_counter() - began


def batch_tokens() -> int:
    """Return the engine's budget, in padded tokens per batch."""
    return _engine.max_batch_tokens


def predict_process() -> ModelProcess:
    """Start a process with the bundled model in a plain ``CrossEncoder``, as its documentation shows it."""
    return ModelProcess(_load_predict, str(BUNDLED))


def predict(jobs: Sequence[Pairs]) -> Logits:
    """Score many jobs in one call of ``CrossEncoder.predict``, raw logits."""
    return _cut(_cross_encoder.predict([pair for pairs in jobs for pair in pairs]).tolist(), jobs)


def cross_encoder(folder: str) -> Any:
    """Load a model the usual way, in float32, and run it once; it gives raw logits."""
    import torch  # noqa: PLC0415 - seconds, paid only when a model is loaded
    from sentence_transformers import CrossEncoder  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    model = CrossEncoder(folder, device="cpu", activation_fn=torch.nn.Identity(), model_kwargs={"dtype": torch.float32})
    model.predict([("warm up", "one chunk"), ("warm up", "and a longer one")])
    return model


# What is loaded; each in its own process.
_engine: Engine
_engine_thread: ThreadPoolExecutor
_cross_encoder: Any


def _load_engine(model: str, device: str, dtype: str, runtime: str) -> None:
    global _engine, _engine_thread  # noqa: PLW0603
    _engine = load(model, device, dtype, runtime=runtime)
    _engine_thread = ThreadPoolExecutor(1)


def _load_predict(folder: str) -> None:
    global _cross_encoder  # noqa: PLW0603
    _cross_encoder = cross_encoder(folder)


def _scored(pairs: Pairs) -> list[float]:
    # On a thread of its own, loaded on another, as in a worker: OpenMP spins less for the second team of threads in a
    # process, which on a busy machine doubles the rate.
    logits: list[float] = _engine_thread.submit(_engine.score, pairs).result().tolist()
    return logits


def _cut(logits: list[float], jobs: Sequence[Pairs]) -> Logits:
    rest = iter(logits)
    return [[next(rest) for _ in pairs] for pairs in jobs]


@contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
