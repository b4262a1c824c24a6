"""Attention over pairs that lie one behind the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

#: The name under which transformers' models find this attention.
UNPADDED = "rerankq_flattened"


@dataclass(frozen=True, slots=True, eq=False)
class UnpaddedBatch:
    """Where the pairs of a batch lie in one row of tokens.

    ``first`` are the places of their first tokens, shape (pairs,), and ``bounds`` those and the end, int32, shape
    (pairs + 1,), both on the device. ``runs`` are (start, pairs, tokens of each) of neighbours of equal length.
    """

    first: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    runs: tuple[tuple[int, int, int], ...]


def runs_of(lengths: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Join neighbours of equal length: (start, pairs, tokens of each).

    >>> runs_of([3, 3, 5])
    ((0, 2, 3), (6, 1, 5))
    """
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in lengths:
        if runs and runs[-1][2] == length:
            begun, pairs, _ = runs[-1]
            runs[-1] = begun, pairs + 1, length
        else:
            runs.append((start, 1, length))
        start += length
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class AttentionSpan:
    """What a token attends to: of its own pair ``window`` tokens on each side, itself included, or all (None).

    ``causal`` looks back only. With ``first_only`` there is one query per pair, its first token. ``scaling`` multiplies
    the products; None is one by the root of the dimensions.
    """

    scaling: float | None
    causal: bool = False
    window: int | None = None
    first_only: bool = False


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: UnpaddedBatch, span: AttentionSpan
) -> torch.Tensor:
    """Let every pair attend to itself.

    Takes tensors of shape (1, heads, tokens, dimensions), with fewer heads of keys where several queries share them;
    gives (1, tokens, heads, dimensions).
    """
    return (_on_cuda if query.is_cuda else _run_by_run)(query, key, value, layout, span)


def attend_for_transformers(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _: torch.Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    layout: UnpaddedBatch,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' models ask for it: their own signature, and our layout among the keywords."""
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    return attend(query, key, value, layout, AttentionSpan(scaling, causal=causal, window=sliding_window)), None


def _run_by_run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: UnpaddedBatch, span: AttentionSpan
) -> torch.Tensor:
    """Take all pairs of one length at a time: no pair is padded, and equal ones share a call."""
    parts = []
    asked = 0
    for start, pairs, length in layout.runs:
        rows = 1 if span.first_only else length
        mask = _mask(length, rows, span, query.device)
        part = scaled_dot_product_attention(
            _run(query, asked, pairs, rows),
            _run(key, start, pairs, length),
            _run(value, start, pairs, length),
            attn_mask=mask,
            is_causal=span.causal and mask is None,
            scale=span.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(part.transpose(1, 2).flatten(0, 1))
        asked += pairs * rows
    return torch.cat(parts)[None]


def _run(states: torch.Tensor, start: int, pairs: int, length: int) -> torch.Tensor:
    """Cut one run out of (1, heads, tokens, dimensions), as (pairs, heads, length, dimensions)."""
    _, heads, _, dimensions = states.shape
    run = states[0, :, start : start + pairs * length]
    return run.reshape(heads, pairs, length, dimensions).transpose(0, 1)


def _mask(length: int, rows: int, span: AttentionSpan, device: torch.device) -> torch.Tensor | None:
    if span.window is None or length <= span.window:
        return None
    places = torch.arange(length, device=device)
    distance = places[:rows, None] - places
    near = distance.abs() < span.window
    return near & (distance >= 0) if span.causal else near


def _on_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: UnpaddedBatch, span: AttentionSpan
) -> torch.Tensor:
    """Take the whole batch in one call of torch's kernel for sequences of different lengths."""
    # Only CUDA has the kernel.
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    side = -1 if span.window is None else span.window - 1
    one_each = torch.arange(len(layout.cu_seqlens), dtype=torch.int32, device=query.device)
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        one_each if span.first_only else layout.cu_seqlens,
        layout.cu_seqlens,
        1 if span.first_only else layout.max_seqlen,
        layout.max_seqlen,
        scale=span.scaling,
        window_size=(side, 0 if span.causal else side),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast("torch.Tensor", out)[None]
