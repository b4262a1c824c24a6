"""The engine's forward passes over one model, timed side by side with that of ``CrossEncoder.predict``.

Needs torch, transformers and numpy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from rerankq_worker.engine.models.architectures import architecture_of
from rerankq_worker.engine.models.attention import AttentionSpan, UnpaddedBatch, attend, runs_of
from rerankq_worker.engine.models.cls_layer import reduce_to_cls
from rerankq_worker.engine.models.passes import InputFormat, PaddedPass, UnpaddedPass, pad_batch
from rerankq_worker.engine.protocol import TokenisedPair
from rerankq_worker.engine.scheduling.batching import plan_all

from .work import operations, shape_of

UNPADDED, PADDED, PREDICT = "unpadded", "padded", "predict"
PREDICT_BATCH = 32
# Largest difference of one attention output from float32's: bf16 has 8 bits.
ATTENTION_TOLERANCE = 0.03

Run = Callable[[Sequence[TokenisedPair]], torch.Tensor]


class Passes:
    """One model and three forward passes, which share the weights; one is selected at a time."""

    def __init__(self, model: Any, device: str) -> None:
        self.model = model
        self.token_types = type(model).__name__.startswith("Bert")
        self._inputs = InputFormat(
            torch.device(device), pad=model.config.pad_token_id or 0, token_types=self.token_types
        )
        self._architecture = architecture_of(model)
        backbone = getattr(model, self._architecture.backbone)
        self._layers = getattr(getattr(backbone, "encoder", None), "layer", None)
        self._last = self._layers[-1] if self._layers is not None else None
        self.reduces = reduce_to_cls(model, self._architecture)
        self._reduced = self._layers[-1] if self._layers is not None else None

    def select(self, name: str) -> Run:
        """Prepare the model for one pass."""
        self.model.set_attn_implementation("sdpa")
        if self._layers is not None:
            self._layers[-1] = self._last if name == PREDICT else self._reduced
        if name == PREDICT:
            return lambda batch: self.model(**pad_batch(batch, self._inputs)).logits.reshape(len(batch)).float()
        made = UnpaddedPass if name == UNPADDED else PaddedPass
        return made(self.model, self._architecture, self._inputs)


def batches_of(name: str, lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Form the batches of a pass: the engine's planner within a budget of tokens, or 32 at a time, longest first."""
    if name == PREDICT:
        longest_first = sorted(range(len(lengths)), key=lambda at: -lengths[at])
        return [longest_first[at : at + PREDICT_BATCH] for at in range(0, len(lengths), PREDICT_BATCH)]
    return [list(map(int, batch)) for batch in plan_all(lengths, budget, padded=name == PADDED)]


def score(run: Run, pairs: Sequence[TokenisedPair], batches: Sequence[Sequence[int]]) -> list[float]:
    """Launch all batches, then fetch: the device never waits for a copy. Answers logits in the pairs' order."""
    with torch.inference_mode():
        logits = torch.cat([run([pairs[at] for at in batch]) for batch in batches]).cpu().tolist()
    by_position = dict(zip([at for batch in batches for at in batch], logits, strict=True))
    return [by_position[at] for at in range(len(pairs))]


def timed(passes: Passes, name: str, pairs: Sequence[TokenisedPair], budget: int, *, seconds: float) -> dict[str, Any]:
    """Score all pairs again and again for so many seconds, after once that is not counted."""
    lengths = [pair.length for pair in pairs]
    batches = batches_of(name, lengths, budget)
    run = passes.select(name)
    logits = score(run, pairs, batches)
    began, seconds_each = time.perf_counter(), []
    while not seconds_each or time.perf_counter() - began < seconds:
        once = time.perf_counter()
        score(run, pairs, batches)
        seconds_each.append(time.perf_counter() - once)
    computed = lengths if name == UNPADDED else [max(lengths[at] for at in one) for one in batches for _ in one]
    shape = shape_of(passes.model.config, shortened=passes.reduces and name != PREDICT)
    median = statistics.median(seconds_each)
    return {
        "budget": None if name == PREDICT else budget,
        "pairs_per_second": round(len(pairs) / median, 1),
        "tokens_per_second": round(sum(lengths) / median),
        "padding": round(sum(computed) / sum(lengths), 4),
        "operations_per_second": operations(shape, computed) / median,
        "logits": logits,
    }


def best_budget(
    passes: Passes, name: str, pairs: Sequence[TokenisedPair], budgets: Sequence[int], *, seconds: float
) -> dict[str, Any]:
    """Time a pass with every budget that fits into memory; returns the fastest, with the throughput of all."""
    found = list(_fitting(budgets, lambda budget: timed(passes, name, pairs, budget, seconds=seconds)))
    throughput = {one["budget"]: one["pairs_per_second"] for one in found}
    return max(found, key=lambda one: one["pairs_per_second"]) | {"pairs_per_second_by_budget": throughput}


def _fitting(budgets: Sequence[int], work: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for budget in sorted(budgets):
        try:
            yield work(budget)
        except torch.cuda.OutOfMemoryError:
            # Larger ones do not fit either.
            torch.cuda.empty_cache()
            return


def check_attention(device: str) -> dict[str, Any]:
    """Compare the engine's attention over sequences of many lengths with ordinary attention in float32, one by one."""
    torch.manual_seed(3)
    lengths = [1, 17, 64, 130, 512, 333]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    states = [torch.randn(1, 12, int(ends[-1]), 64, device=device, dtype=torch.bfloat16) for _ in range(3)]
    cu_seqlens = ends.to(device, torch.int32)
    unpadded = UnpaddedBatch(cu_seqlens[:-1].long(), cu_seqlens, max(lengths), runs_of(lengths))
    spans = {
        "all": AttentionSpan(None),
        "causal": AttentionSpan(None, causal=True),
        "window of 65": AttentionSpan(None, window=65),
        "first token": AttentionSpan(None, cls_only=True),
    }
    found = {}
    for name, span in spans.items():
        query = states[0][:, :, unpadded.starts] if span.cls_only else states[0]
        out = attend(query, states[1], states[2], unpadded, span).float()
        found[name] = round((out - _one_by_one(states, ends.tolist(), span)).abs().max().item(), 5)
    return {"greatest_difference": found, "agrees": all(one <= ATTENTION_TOLERANCE for one in found.values())}


def _one_by_one(states: Sequence[torch.Tensor], ends: Sequence[int], span: AttentionSpan) -> torch.Tensor:
    parts = []
    for start, end in pairwise(ends):
        query, key, value = (one[:, :, start:end].float() for one in states)
        positions = torch.arange(end - start, device=query.device)
        distance = positions[:, None] - positions
        seen = torch.ones_like(distance, dtype=torch.bool)
        if span.causal:
            seen &= distance >= 0
        if span.window is not None:
            seen &= distance.abs() < span.window
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        parts.append(out[:, :, :1] if span.cls_only else out)
    return torch.cat(parts, 2).transpose(1, 2)
