"""Rotary embeddings whose frequencies depend on the longest pair of a batch: longrope and dynamic NTK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class LongPositions:
    """The rotary embeddings of a model that choose their frequencies by the longest position they are given.

    Some keep the choice for later batches: ``reset`` restores their state from when the model was loaded.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parts = [part for part in model.modules() if _follows_the_longest(getattr(part, "rope_type", ""))]
        self._states = [(dict(vars(part)), _copied(part._buffers)) for part in self._parts]

    def change_within(self, max_length: int) -> bool:
        """Tell whether the frequencies may differ between pairs of up to ``max_length`` tokens."""
        return any(max_length > _same_up_to(part) for part in self._parts)

    def reset(self) -> None:
        """Restore the state from before the first batch."""
        for part, (attributes, buffers) in zip(self._parts, self._states, strict=True):
            vars(part).update(attributes)
            part._buffers.clear()
            part._buffers.update(_copied(buffers))


def _copied(buffers: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    # One kind writes its choice into the buffer in place.
    return {name: None if kept is None else kept.clone() for name, kept in buffers.items()}


def _follows_the_longest(rope_type: Any) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds)


def _same_up_to(part: Any) -> int:
    """Return the length in tokens up to which all pairs get the same frequencies."""
    config = part.config
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    originals = [one.get("original_max_position_embeddings") for one in nested]
    known = [config.max_position_embeddings, getattr(part, "original_max_seq_len", None), *originals]
    return min(int(length) for length in known if length)
