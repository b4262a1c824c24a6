"""Which device a model runs on, its fast precisions and its free memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..errors import EngineError
from .cores import multiplies_bfloat16

#: Share of the free memory that a batch may take: longer pairs than those measured take more, and other programs may
#: use the device.
_FREE_SHARE = 0.5


def choose_device(device: str) -> torch.device:
    """Return the named device; for ``auto`` CUDA if present, else the CPU. Raises EngineError for a missing device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise EngineError(f"device {device!r} cannot be used: {error}") from error
    return chosen


def multiplies_bfloat16_faster(device: torch.device) -> bool:
    """Tell whether the device computes bfloat16 markedly faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and multiplies_bfloat16()


def tokens_that_fit(device: torch.device, tokens: int, run: Callable[[], object]) -> float:
    """Estimate the tokens that fit into a CUDA device's free memory, if *run* computes *tokens*; infinite elsewhere."""
    if device.type != "cuda":
        return math.inf
    run()  # libraries allocate their own memory in the first batch
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    taken = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return _FREE_SHARE * free / max(1.0, taken / tokens)
