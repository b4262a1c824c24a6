"""Which device a model runs on, and what it is good at."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..errors import EngineError
from .cores import multiplies_bfloat16

#: Of the free memory a batch may take this share: longer pairs than those tried take more, and others share the device.
_FREE_SHARE = 0.5


def choose_device(device: str) -> torch.device:
    """Take the named device, or a CUDA device if there is one, else the CPU; raises EngineError if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise EngineError(f"device {device!r} is not usable here: {error}") from error
    return chosen


def multiplies_bfloat16_faster(device: torch.device) -> bool:
    """Tell whether the device computes bfloat16 markedly faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and multiplies_bfloat16()


def tokens_that_fit(device: torch.device, tokens: int, run: Callable[[], object]) -> float:
    """Tell how many tokens fit into a CUDA device's free memory, where *run* computes so many; infinite elsewhere."""
    if device.type != "cuda":
        return math.inf
    run()  # libraries take their own memory once, in the first batch
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    taken = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return _FREE_SHARE * free / max(1.0, taken / tokens)
