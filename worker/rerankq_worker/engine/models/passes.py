"""One batch through a model: padded to its longest pair, or unpadded, as one sequence of tokens."""

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


class Pass(Protocol):
    """A forward pass: called with a batch, it returns raw logits, shape ``(len(batch),)``, on the device.

    The device may not have computed them yet. ``padded`` says whether it pads the pairs of a batch to equal length.
    """

    padded: bool

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch that is not empty."""


@dataclass(frozen=True, slots=True)
class InputFormat:
    """What a model's input tensors look like: the padding's id, whether there are token type ids, the padding's side.

    The side is for the model's own forward pass; passes with a known architecture pad on the right.
    """

    device: torch.device
    pad: int
    token_types: bool
    pads_left: bool = False


class WholeModelPass:
    """The model's own forward pass, padded as sentence-transformers pads: for models of unknown architecture."""

    padded = True

    def __init__(self, model: Any, inputs: InputFormat) -> None:
        self._model = model
        self._inputs = inputs

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch."""
        inputs = pad_batch(batch, self._inputs, left=self._inputs.pads_left)
        logits: torch.Tensor = self._model(inputs)["scores"]
        return logits.reshape(len(batch)).float()


class EqualLengthPass:
    """The model's own forward pass, once per length of pair in the batch: nothing is padded.

    ``before_each()`` is called before each of them.
    """

    padded = False

    def __init__(self, whole: WholeModelPass, before_each: Callable[[], None]) -> None:
        self._whole = whole
        self._before_each = before_each

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch, in one forward pass per length."""
        by_length: dict[int, list[int]] = {}
        for at, pair in enumerate(batch):
            by_length.setdefault(pair.length, []).append(at)
        parts = []
        for positions in by_length.values():
            self._before_each()
            parts.append(self._whole([batch[at] for at in positions]))
        order = torch.tensor([at for positions in by_length.values() for at in positions])
        logits = torch.cat(parts)
        return torch.empty_like(logits).index_copy_(0, order.to(logits.device), logits)


class PaddedPass:
    """The backbone, padded on the right; then the pooled states through the model's own head."""

    padded = True

    def __init__(self, model: Any, architecture: Architecture, inputs: InputFormat) -> None:
        self._model = model
        self.backbone = getattr(model, architecture.backbone)
        self._architecture = architecture
        self._inputs = inputs

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch."""
        return self.head(self.states(pad_batch(batch, self._inputs)))

    def states(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the backbone and pool its output: shape (pairs, hidden)."""
        options = {"use_cache": False} if self._architecture.causal else {}
        states = self.backbone(**inputs, **options).last_hidden_state
        return self._pool(states, inputs["input_ids"], inputs["attention_mask"])

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Score pooled states: raw logits, shape (pairs,)."""
        return self._architecture.head(self._model, states).reshape(len(states)).float()

    def _pool(self, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pooling, ignored_id = self._architecture.pooling, self._architecture.ignored_id
        if pooling == "cls":
            return states[:, 0]
        if pooling == "mean":
            return (states * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        counted = mask if ignored_id is None else mask * (ids != ignored_id)
        last = (counted * torch.arange(ids.shape[1], device=ids.device)).amax(1)
        return states.take_along_dim(last[:, None, None], 1)[:, 0]


class UnpaddedPass:
    """The backbone over one sequence of all pairs' tokens: no padding from the embeddings to the head.

    The model cannot be used otherwise while this pass is: its attention needs the ``unpadded`` batch as a keyword.
    """

    padded = False

    def __init__(self, model: Any, architecture: Architecture, inputs: InputFormat) -> None:
        _register_attention()
        model.set_attn_implementation(UNPADDED)
        self._model = model
        self._backbone = getattr(model, architecture.backbone)
        self._architecture = architecture
        self._inputs = inputs

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch."""
        lengths = np.array([pair.length for pair in batch], dtype=np.int64)
        ends = np.cumsum(lengths)
        unpadded = self._unpadded(lengths, ends)
        ids = np.concatenate([pair.ids for pair in batch], dtype=np.int64)
        inputs = {"input_ids": ids, "position_ids": self._positions(ids, lengths, ends)}
        if self._inputs.token_types:
            inputs["token_type_ids"] = _types(batch, lengths, ends)
        options = {"use_cache": False} if self._architecture.causal else {}
        tensors = {name: to_device(values[None], self._inputs.device) for name, values in inputs.items()}
        states = self._backbone(**tensors, **options, unpadded=unpadded).last_hidden_state[0]
        pooled = self._pool(states, unpadded, batch)
        return self._architecture.head(self._model, pooled).reshape(len(batch)).float()

    def _unpadded(self, lengths: Integers, ends: Integers) -> UnpaddedBatch:
        cu_seqlens = to_device(np.concatenate(([0], ends)).astype(np.int32), self._inputs.device)
        runs = runs_of(lengths.tolist()) if self._inputs.device.type != "cuda" else ()
        return UnpaddedBatch(cu_seqlens[:-1].long(), cu_seqlens, int(lengths.max()), runs)

    def _positions(self, ids: Integers, lengths: Integers, ends: Integers) -> Integers:
        """Count from the start of each pair."""
        counted = np.arange(ids.size)
        if not self._architecture.padding_has_no_position:
            return counted - np.repeat(ends - lengths, lengths) + self._architecture.position_offset
        real = ids != self._inputs.pad
        before = np.concatenate(([0], np.cumsum(real)))
        nth = before[:-1] - np.repeat(before[ends - lengths], lengths)
        return np.where(real, nth + self._architecture.position_offset, self._inputs.pad)

    def _pool(self, states: torch.Tensor, unpadded: UnpaddedBatch, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        if len(states) == len(unpadded.starts):
            # A reduced last layer returns the first tokens only; in a pair of one token that is also the last.
            return states
        if self._architecture.pooling == "cls":
            return states[unpadded.starts]
        if self._architecture.pooling == "last":
            last = np.array([_last_position(pair, self._architecture.ignored_id) for pair in batch], dtype=np.int64)
            return states[unpadded.starts + to_device(last, self._inputs.device)]
        lengths = unpadded.cu_seqlens.diff()
        return torch.segment_reduce(states.float(), "mean", lengths=lengths.long()).to(states.dtype)


def _register_attention() -> None:
    """Make the unpadded attention known to transformers; again and again changes nothing."""
    AttentionInterface.register(UNPADDED, attend_for_transformers)
    # The unpadded batch says what attends to what; a mask of tokens by tokens would cost more than the model.
    AttentionMaskInterface.register(UNPADDED, lambda *_, **__: None)


def pad_batch(batch: Sequence[TokenisedPair], inputs: InputFormat, *, left: bool = False) -> dict[str, torch.Tensor]:
    """Make the input tensors of a padded batch, shape (pairs, longest), with the padding on the right or the left.

    Padding on the left gives the positions explicitly: many decoders would count the padding before a pair, and rotary
    embeddings would round differently.
    """
    lengths = np.array([pair.length for pair in batch])
    # Counted from the start of each pair, whose tokens are in the columns from 0 up to its length.
    columns = np.arange(lengths.max()) - (lengths.max() - lengths[:, None] if left else 0)
    real = (columns >= 0) & (columns < lengths[:, None])
    ids = np.full(real.shape, inputs.pad, dtype=np.int64)
    ids[real] = np.concatenate([pair.ids for pair in batch])
    arrays = {"input_ids": ids, "attention_mask": real.astype(np.int64)}
    if left:
        arrays["position_ids"] = np.where(real, columns, 0)
    if inputs.token_types:
        second = columns >= np.array([pair.second_from for pair in batch])[:, None]
        arrays["token_type_ids"] = (second & real).astype(np.int64)
    return {name: to_device(values, inputs.device) for name, values in arrays.items()}


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device; to CUDA asynchronously, from pinned memory."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _last_position(pair: TokenisedPair, ignored_id: int | None) -> int:
    if ignored_id is None or pair.ids[-1] != ignored_id:
        return pair.length - 1
    counted = np.flatnonzero(pair.ids != ignored_id)
    return int(counted[-1]) if counted.size else 0


def _types(batch: Sequence[TokenisedPair], lengths: Integers, ends: Integers) -> Integers:
    second = np.repeat(ends - lengths + np.array([pair.second_from for pair in batch]), lengths)
    return (np.arange(ends[-1]) >= second).astype(np.int64)
