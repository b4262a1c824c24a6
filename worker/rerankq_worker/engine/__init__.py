"""One cross-encoder on one device, and the thread that feeds it.

Importing this loads no torch; loading a model other than the stub does.
"""

from __future__ import annotations

import logging
from typing import Any

from .errors import (
    EngineClosed,
    EngineDied,
    EngineError,
    LimitTooSmall,
    ModelUnusable,
    PairFailed,
    TicketCancelled,
    Unconvertible,
)
from .models.calibration import BUDGETS, PATIENCE_S, levelling_point, measure, seconds_per_token
from .models.checkpoint import find_checkpoint
from .models.cores import allocator_environment, available_cores
from .protocol import QUERY_MAX_TOKENS, Engine, Logits, LogitsFuture, PairLimits, TokenisedPair, finished
from .scheduling.batcher import Batcher
from .scheduling.tally import BatcherStats
from .scheduling.ticket import Ticket
from .stub import AsynchronousStubEngine, StubEngine, parse_stub
from .tokenising.token_id_cache import text_hash

__all__ = [
    "QUERY_MAX_TOKENS",
    "AsynchronousStubEngine",
    "Batcher",
    "BatcherStats",
    "Engine",
    "EngineClosed",
    "EngineDied",
    "EngineError",
    "LimitTooSmall",
    "Logits",
    "LogitsFuture",
    "ModelUnusable",
    "PairFailed",
    "PairLimits",
    "StubEngine",
    "Ticket",
    "TicketCancelled",
    "TokenisedPair",
    "allocator_environment",
    "available_cores",
    "finished",
    "load",
    "seconds_per_token",
    "text_hash",
]

logger = logging.getLogger(__name__)


def load(
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    *,
    max_length: int | None = None,
    max_batch_tokens: int | str = "default",
    threads: int | None = None,
    runtime: str = "auto",
    padded: bool | None = None,
) -> Engine:
    """Load a model and run it once, so that the first job pays no start-up cost.

    ``model`` is ``stub`` or ``stub:SECONDS_PER_TOKEN``, ``bundled``, a local folder, or a name on the Hugging Face
    hub: any sentence-transformers ``CrossEncoder`` checkpoint with one label and weights in safetensors. ``dtype`` is
    ``float32``, ``bfloat16``, ``float16``, ``int8``, or ``auto``: bfloat16 where the device multiplies it faster (CUDA,
    CPUs with AMX or AVX-512 BF16), else float32. ``runtime`` is ``torch``, ``openvino`` (on CPUs), or ``auto``: the
    faster of those that are installed and run the model. ``max_length`` is in tokens and may lower the model's own;
    ``max_batch_tokens`` is the token budget of a batch, padding included: a number; ``default``, a fixed number for the
    kind of device; or ``auto``: batches are timed for some seconds to find where tokens per second level off.
    ``padded`` tells torch whether to pad the pairs of a batch to equal length (default: only where the model cannot run
    unpadded).
    ``threads`` (default: every core available) counts on a CPU alone, for the whole process. On Linux a CPU engine
    gains from ``allocator_environment()``, which only a parent process can set.

    Raises ModelUnusable, saying what was tried, EngineError for a device that is not there, and ValueError.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, not {max_length}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    budget = None if max_batch_tokens in ("auto", "default") else _batch_tokens(max_batch_tokens)
    engine = (
        _load_stub(model, max_length, budget)
        if model.partition(":")[0] == "stub"
        else _load_cross_encoder(
            model,
            budget,
            device=device,
            dtype=dtype,
            max_length=max_length,
            threads=threads,
            runtime=runtime,
            padded=padded,
        )
    )
    engine.warm_up()
    if max_batch_tokens == "auto":
        _calibrate(engine)
    return engine


def _calibrate(engine: Engine) -> None:
    kind = engine.device.partition(":")[0]
    if kind not in BUDGETS:
        return
    throughput = measure(engine, BUDGETS[kind], patience_s=PATIENCE_S[kind])
    engine.max_batch_tokens = levelling_point(throughput)
    listed = ", ".join(f"{budget}: {tokens_per_second:.0f}" for budget, tokens_per_second in throughput.items())
    logger.info("batch budget %d tokens; tokens per second by budget: %s", engine.max_batch_tokens, listed)


def _load_stub(model: str, max_length: int | None, budget: int | None) -> Engine:
    return StubEngine(
        name=model,
        seconds_per_token=parse_stub(model),
        max_length=max_length or 512,
        max_batch_tokens=budget or 4096,
    )


def _load_cross_encoder(model: str, budget: int | None, *, runtime: str, **options: Any) -> Engine:
    folder = find_checkpoint(model)
    # Torch takes seconds to import and a gigabyte of address space: only whoever loads a model pays.
    from .cross_encoder import CrossEncoderEngine  # noqa: PLC0415

    try:
        return CrossEncoderEngine(folder, name=model, max_batch_tokens=budget, runtime=runtime, **options)
    except Unconvertible as error:
        if runtime != "auto":
            raise ModelUnusable(f"model {model!r} does not run on {runtime}: {error}") from error
        logger.warning("model %s runs on torch, which is slower here than OpenVINO: %s", model, error)
    return CrossEncoderEngine(folder, name=model, max_batch_tokens=budget, runtime="torch", **options)


def _batch_tokens(asked: int | str) -> int:
    if isinstance(asked, str) and not asked.isdecimal():
        raise ValueError(f"max_batch_tokens must be a number of tokens, 'auto' or 'default', not {asked!r}")
    if int(asked) < 1:
        raise ValueError(f"max_batch_tokens must be at least 1, not {asked}")
    return int(asked)
