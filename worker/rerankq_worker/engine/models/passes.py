"""One batch through a model: padded to its longest pair, or flattened into one row without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface

from ..protocol import TokenisedPair
from .architectures import Architecture
from .attention import UNPADDED, UnpaddedBatch, attend_for_transformers, runs_of

Integers = NDArray[np.int64]

AttentionInterface.register(UNPADDED, attend_for_transformers)
# What may attend to what is in the layout; a mask of tokens by tokens would cost more than the model.
AttentionMaskInterface.register(UNPADDED, lambda *_, **__: None)


class Pass(Protocol):
    """A way through a model.

    Called with a batch, it answers raw logits, shape ``(len(batch),)``, on the device, which may still be at work.
    """

    padded: bool

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch that is not empty."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """How batches are written for a model: the padding's id, whether its second segment is marked, the padding's side.

    The side is for the model's own forward pass; where the parts are known apart they are padded on the right.
    """

    device: torch.device
    pad: int
    with_types: bool
    pads_left: bool = False


class WholeModel:
    """Through the model's own forward pass, padded as sentence-transformers pads: where nothing more is known."""

    padded = True

    def __init__(self, model: Any, inputs: Inputs) -> None:
        self._model = model
        self._inputs = inputs

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch."""
        inputs = padded(batch, self._inputs, left=self._inputs.pads_left)
        logits: torch.Tensor = self._model(inputs)["scores"]
        return logits.reshape(len(batch)).float()


class OneLengthAtATime:
    """Through the model's own forward pass, the pairs of each length by themselves: nothing is padded.

    ``before_each()`` is called before each of them.
    """

    padded = False

    def __init__(self, whole: WholeModel, before_each: Callable[[], None]) -> None:
        self._whole = whole
        self._before_each = before_each

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch, as many times as it has lengths."""
        places: dict[int, list[int]] = {}
        for at, pair in enumerate(batch):
            places.setdefault(pair.length, []).append(at)
        parts = []
        for alike in places.values():
            self._before_each()
            parts.append(self._whole([batch[at] for at in alike]))
        order = torch.tensor([at for alike in places.values() for at in alike])
        logits = torch.cat(parts)
        return torch.empty_like(logits).index_copy_(0, order.to(logits.device), logits)


class PaddedPass:
    """Through the backbone, padded on the right, then the place that is read through the model's own head."""

    padded = True

    def __init__(self, model: Any, architecture: Architecture, inputs: Inputs) -> None:
        self._model = model
        self.backbone = getattr(model, architecture.backbone)
        self._form = architecture
        self._inputs = inputs

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch."""
        return self.head(self.states(padded(batch, self._inputs)))

    def states(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the backbone: the states that the head reads, shape (pairs, hidden)."""
        options = {"use_cache": False} if self._form.causal else {}
        states = self.backbone(**inputs, **options).last_hidden_state
        return self._read(states, inputs["input_ids"], inputs["attention_mask"])

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Score the states: raw logits, shape (pairs,)."""
        return self._form.head(self._model, states).reshape(len(states)).float()

    def _read(self, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self._form.place == "first":
            return states[:, 0]
        if self._form.place == "mean":
            return (states * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        read = mask if self._form.unread_id is None else mask * (ids != self._form.unread_id)
        last = (read * torch.arange(ids.shape[1], device=ids.device)).amax(1)
        return states.take_along_dim(last[:, None, None], 1)[:, 0]


class UnpaddedPass:
    """Through the backbone in one row of tokens: no padding from the embedding to the head.

    The model belongs to this pass from then on: its attention reads the layout that comes with each batch.
    """

    padded = False

    def __init__(self, model: Any, architecture: Architecture, inputs: Inputs) -> None:
        model.set_attn_implementation(UNPADDED)
        self._model = model
        self._backbone = getattr(model, architecture.backbone)
        self._form = architecture
        self._inputs = inputs

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch."""
        lengths = np.array([pair.length for pair in batch], dtype=np.int64)
        ends = np.cumsum(lengths)
        layout = self._layout(lengths, ends)
        ids = np.concatenate([pair.ids for pair in batch], dtype=np.int64)
        inputs = {"input_ids": ids, "position_ids": self._positions(ids, lengths, ends)}
        if self._inputs.with_types:
            inputs["token_type_ids"] = _types(batch, lengths, ends)
        options = {"use_cache": False} if self._form.causal else {}
        row = {name: sent(values[None], self._inputs.device) for name, values in inputs.items()}
        states = self._backbone(**row, **options, layout=layout).last_hidden_state[0]
        read = self._read(states, layout, batch)
        return self._form.head(self._model, read).reshape(len(batch)).float()

    def _layout(self, lengths: Integers, ends: Integers) -> UnpaddedBatch:
        cu_seqlens = sent(np.concatenate(([0], ends)).astype(np.int32), self._inputs.device)
        runs = runs_of(lengths.tolist()) if self._inputs.device.type != "cuda" else ()
        return UnpaddedBatch(cu_seqlens[:-1].long(), cu_seqlens, int(lengths.max()), runs)

    def _positions(self, ids: Integers, lengths: Integers, ends: Integers) -> Integers:
        """Count from the start of each pair."""
        counted = np.arange(ids.size)
        if not self._form.skips_padding_ids:
            return counted - np.repeat(ends - lengths, lengths) + self._form.position_offset
        real = ids != self._inputs.pad
        before = np.concatenate(([0], np.cumsum(real)))
        nth = before[:-1] - np.repeat(before[ends - lengths], lengths)
        return np.where(real, nth + self._form.position_offset, self._inputs.pad)

    def _read(self, states: torch.Tensor, layout: UnpaddedBatch, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        if len(states) == len(layout.first):
            # A shortened last layer gives the first tokens alone; pairs of one token each are their own first and last.
            return states
        if self._form.place == "first":
            return states[layout.first]
        if self._form.place == "last":
            last = np.array([_last_read(pair, self._form.unread_id) for pair in batch], dtype=np.int64)
            return states[layout.first + sent(last, self._inputs.device)]
        lengths = layout.cu_seqlens.diff()
        return torch.segment_reduce(states.float(), "mean", lengths=lengths.long()).to(states.dtype)


def padded(batch: Sequence[TokenisedPair], how: Inputs, *, left: bool = False) -> dict[str, torch.Tensor]:
    """Write a batch as tensors of shape (pairs, longest), filled up on the right.

    On the left positions are told: many decoders count the padding before a pair, and rotary ones round otherwise.
    """
    lengths = np.array([pair.length for pair in batch])
    # Counted from the start of each pair: its tokens are those from 0 up to its length.
    columns = np.arange(lengths.max()) - (lengths.max() - lengths[:, None] if left else 0)
    real = (columns >= 0) & (columns < lengths[:, None])
    ids = np.full(real.shape, how.pad, dtype=np.int64)
    ids[real] = np.concatenate([pair.ids for pair in batch])
    inputs = {"input_ids": ids, "attention_mask": real.astype(np.int64)}
    if left:
        inputs["position_ids"] = np.where(real, columns, 0)
    if how.with_types:
        second = columns >= np.array([pair.second_from for pair in batch])[:, None]
        inputs["token_type_ids"] = (second & real).astype(np.int64)
    return {name: sent(values, how.device) for name, values in inputs.items()}


def sent(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Send an array to the device; a CUDA device fetches it by itself, from memory that stays in its place."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _last_read(pair: TokenisedPair, unread_id: int | None) -> int:
    if unread_id is None or pair.ids[-1] != unread_id:
        return pair.length - 1
    read = np.flatnonzero(pair.ids != unread_id)
    return int(read[-1]) if read.size else 0


def _types(batch: Sequence[TokenisedPair], lengths: Integers, ends: Integers) -> Integers:
    second = np.repeat(ends - lengths + np.array([pair.second_from for pair in batch]), lengths)
    return (np.arange(ends[-1]) >= second).astype(np.int64)
