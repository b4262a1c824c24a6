"""Which device a model runs on, and what it is good at."""

from __future__ import annotations

import torch

from .cores import multiplies_bfloat16
from .errors import EngineError


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
