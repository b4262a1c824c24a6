"""Attention over pairs that are concatenated into one sequence, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

#: The name under which this attention is registered with transformers.
UNPADDED = "rerankq_unpadded"


@dataclass(frozen=True, slots=True, eq=False)
class UnpaddedBatch:
    """The positions of a batch's pairs in one sequence of tokens.

    ``starts`` are the positions of their first tokens, int64, shape (pairs,); ``cu_seqlens`` are these and the end,
    int32, shape (pairs + 1,); both are on the device. ``max_seqlen`` is the length of the longest pair. ``runs`` are
    (start, pairs, tokens of each) of neighbours of equal length; they are empty on CUDA, which does not need them.
    """

    starts: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    runs: tuple[tuple[int, int, int], ...]


def runs_of(lengths: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Group neighbours of equal length: (start, pairs, tokens of each).

    >>> runs_of([3, 3, 5])
    ((0, 2, 3), (6, 1, 5))
    """
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in lengths:
        if runs and runs[-1][2] == length:
            first, pairs, _ = runs[-1]
            runs[-1] = first, pairs + 1, length
        else:
            runs.append((start, 1, length))
        start += length
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class AttentionSpan:
    """What a token attends to: ``window`` tokens of its own pair on each side, itself included, or all of it (None).

    ``causal`` excludes later tokens. With ``cls_only`` there is one query per pair, its first token. ``scaling``
    multiplies the products of queries and keys; None stands for 1 / √dimensions.
    """

    scaling: float | None
    causal: bool = False
    window: int | None = None
    cls_only: bool = False


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, unpadded: UnpaddedBatch, span: AttentionSpan
) -> torch.Tensor:
    """Compute attention within each pair.

    Takes tensors of shape (1, heads, tokens, dimensions), with fewer heads of keys and values in grouped-query
    attention; returns (1, tokens, heads, dimensions).
    """
    return (_on_cuda if query.is_cuda else _run_by_run)(query, key, value, unpadded, span)


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
    unpadded: UnpaddedBatch,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with the signature of a transformers attention function; ``unpadded`` is a keyword of ours."""
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    return attend(query, key, value, unpadded, AttentionSpan(scaling, causal=causal, window=sliding_window)), None


def _run_by_run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, unpadded: UnpaddedBatch, span: AttentionSpan
) -> torch.Tensor:
    """Compute runs of pairs of equal length, one call each: no pair is padded."""
    parts = []
    query_start = 0
    for start, pairs, length in unpadded.runs:
        rows = 1 if span.cls_only else length
        mask = _mask(length, rows, span, query.device)
        part = scaled_dot_product_attention(
            _run(query, query_start, pairs, rows),
            _run(key, start, pairs, length),
            _run(value, start, pairs, length),
            attn_mask=mask,
            is_causal=span.causal and mask is None,
            scale=span.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(part.transpose(1, 2).flatten(0, 1))
        query_start += pairs * rows
    return torch.cat(parts)[None]


def _run(states: torch.Tensor, start: int, pairs: int, length: int) -> torch.Tensor:
    """Slice one run out of (1, heads, tokens, dimensions), as (pairs, heads, length, dimensions)."""
    _, heads, _, dimensions = states.shape
    run = states[0, :, start : start + pairs * length]
    return run.reshape(heads, pairs, length, dimensions).transpose(0, 1)


def _mask(length: int, rows: int, span: AttentionSpan, device: torch.device) -> torch.Tensor | None:
    if span.window is None or length <= span.window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:rows, None] - positions
    near = distance.abs() < span.window
    return near & (distance >= 0) if span.causal else near


def _on_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, unpadded: UnpaddedBatch, span: AttentionSpan
) -> torch.Tensor:
    """Compute the whole batch in one call of torch's kernel for sequences of different lengths."""
    # The kernel exists on CUDA only.
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    side = -1 if span.window is None else span.window - 1
    one_each = torch.arange(len(unpadded.cu_seqlens), dtype=torch.int32, device=query.device)
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        one_each if span.cls_only else unpadded.cu_seqlens,
        unpadded.cu_seqlens,
        1 if span.cls_only else unpadded.max_seqlen,
        unpadded.max_seqlen,
        scale=span.scaling,
        window_size=(side, 0 if span.causal else side),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast("torch.Tensor", out)[None]
