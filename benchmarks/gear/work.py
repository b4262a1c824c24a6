"""How much a forward pass computes, and how much a device can: floating-point operations, counted and measured.

A multiplication with its addition counts as two. Counted are the layers' matrix products and attention, over the tokens
that are computed; embeddings, norms, activations and the head are left out (under 1 % together).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """What of an encoder decides its work. ``windows`` are the tokens each layer lets a token see; None is all.

    ``gated`` feed-forwards have three products instead of two. With ``shortened``, the last layer computes one token
    of each pair, and keys and values of all.
    """

    hidden: int
    intermediate: int
    windows: tuple[int | None, ...]
    gated: bool = False
    shortened: bool = False


def shape_of(config: Any, *, shortened: bool = False) -> Shape:
    """Read the shape out of a transformers configuration: BERT, XLM-R, ModernBERT."""
    local = getattr(config, "local_attention", None)
    every = getattr(config, "global_attn_every_n_layers", 1) or 1
    kinds = getattr(config, "layer_types", None) or [
        "full_attention" if layer % every == 0 else "sliding_attention" for layer in range(config.num_hidden_layers)
    ]
    windows = tuple(local + 1 if local and kind == "sliding_attention" else None for kind in kinds)
    return Shape(config.hidden_size, config.intermediate_size, windows, gated=local is not None, shortened=shortened)


def operations(shape: Shape, lengths: Sequence[int]) -> float:
    """Count the operations for pairs of these many tokens, padding included where it is computed.

    Each layer: ``2 · tokens · (4·hidden² + products·hidden·intermediate) + 4 · hidden · Σ length · seen``.

    >>> one_layer = Shape(hidden=2, intermediate=8, windows=(None,))
    >>> operations(one_layer, [10]) == 2 * 10 * (4 * 4 + 2 * 2 * 8) + 4 * 2 * 10 * 10
    True
    """
    long = np.asarray(lengths, dtype=np.float64)
    feed_forward = (3 if shape.gated else 2) * shape.hidden * shape.intermediate
    total = 0.0
    for number, window in enumerate(shape.windows):
        if shape.shortened and number == len(shape.windows) - 1:
            total += 2 * long.sum() * 2 * shape.hidden**2
            total += 2 * len(long) * (2 * shape.hidden**2 + feed_forward) + 4 * shape.hidden * long.sum()
            continue
        seen = long if window is None else np.minimum(long, window)
        total += 2 * long.sum() * (4 * shape.hidden**2 + feed_forward) + 4 * shape.hidden * (long * seen).sum()
    return float(total)


def matrix_ceiling(device: str, dtype: str, sizes: Sequence[int], *, seconds: float) -> dict[str, float]:
    """Measure square matrix products: operations per second by size. The greatest is the device's ceiling."""
    import torch  # noqa: PLC0415 - seconds, and paid only when measuring

    found = {}
    for size in sizes:
        left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(left)
        for _ in range(3):
            torch.mm(left, right, out=out)
        settle(device)
        began, products = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < seconds:
            for _ in range(8 if device.startswith("cuda") else 1):
                torch.mm(left, right, out=out)
                products += 1
            settle(device)
        found[str(size)] = 2 * size**3 * products / passed
    return found


def settle(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        import torch  # noqa: PLC0415

        torch.cuda.synchronize()
