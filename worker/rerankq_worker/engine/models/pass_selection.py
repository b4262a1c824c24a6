"""The fastest forward pass whose logits the probe confirms."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sentence_transformers.cross_encoder.modules.logit_score import LogitScore

from ..errors import ModelUnusable, Unconvertible, in_one_line
from .architectures import Architecture, architecture_of
from .cls_layer import reduce_to_cls, restore_last_layer
from .long_positions import LongPositions
from .openvino_pass import OpenVinoPass
from .passes import EqualLengthPass, InputFormat, PaddedPass, Pass, UnpaddedPass, WholeModelPass
from .probing import Probe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A sentence-transformers model, the format of its inputs, and the probe that every pass must agree with."""

    name: str
    model: Any
    inputs: InputFormat
    positions: LongPositions
    max_length: int
    probe: Probe

    @property
    def transformer(self) -> Any:
        """The transformers model in it."""
        return self.model[0].auto_model

    @property
    def architecture(self) -> Architecture | None:
        """The architecture, where it is known and its parts may be used apart from each other; else None."""
        score = self.model[-1] if isinstance(self.model[-1], LogitScore) else None
        # Other modules after the transformer (a pooling, a dense layer) are run by the whole model only.
        if len(self.model) != (2 if score is not None else 1) or self.equal_lengths_only:
            return None
        yes_or_no = (score.true_token_id, score.false_token_id) if score is not None else None
        return architecture_of(self.transformer, yes_or_no)

    @property
    def equal_lengths_only(self) -> bool:
        """Whether the longest pair of a batch changes the logits of the others."""
        return self.positions.change_within(self.max_length)


def select_torch_pass(loaded: LoadedModel, *, unpadded: bool) -> Pass:
    """Return the fastest torch pass that the probe confirms; raises ModelUnusable where there is none, saying why."""
    attention = loaded.transformer.config._attn_implementation
    rejected: list[str] = []
    for name, make in _torch_passes(loaded, unpadded=unpadded):
        try:
            made = make()
            why = loaded.probe.disagreement(made)
        except Exception as error:  # noqa: BLE001 - whatever it raises, the next pass may work
            why = f"it raises {in_one_line(error)}"
        if not why:
            if rejected:
                logger.warning("model %s uses the pass %r; rejected: %s", loaded.name, name, "; ".join(rejected))
            return made
        rejected.append(f"{name}, {why}")
        loaded.transformer.set_attn_implementation(attention)
        if (architecture := loaded.architecture) is not None:
            restore_last_layer(loaded.transformer, architecture)
    raise ModelUnusable(
        f"no forward pass of model {loaded.name!r} gives a pair the same logit in a batch as alone: "
        f"{'; '.join(rejected)}"
    )


def make_openvino_pass(loaded: LoadedModel, *, dtype: str, threads: int) -> OpenVinoPass:
    """Compile the model with OpenVINO and probe it; raises Unconvertible."""
    architecture = loaded.architecture
    if architecture is None:
        raise Unconvertible("its architecture is not known")
    compiled = OpenVinoPass(_padded(loaded, architecture), loaded.inputs, dtype=dtype, threads=threads)
    if why := loaded.probe.disagreement(compiled):
        raise Unconvertible(why)
    return compiled


def _torch_passes(loaded: LoadedModel, *, unpadded: bool) -> Iterator[tuple[str, Callable[[], Pass]]]:
    """List the passes from the fastest to the one that assumes nothing about the model."""
    architecture = loaded.architecture
    if architecture is not None:
        if unpadded:
            yield "unpadded", partial(_unpadded, loaded, architecture)
        yield "padded", partial(_padded, loaded, architecture)
    if not loaded.equal_lengths_only:
        left = loaded.inputs.pads_left
        yield "whole model, padded", partial(_whole, loaded, pads_left=left)
        yield "whole model, padded on the other side", partial(_whole, loaded, pads_left=not left)
    yield "whole model, equal lengths", partial(_equal_lengths, loaded)


def _padded(loaded: LoadedModel, architecture: Architecture) -> PaddedPass:
    reduce_to_cls(loaded.transformer, architecture)
    return PaddedPass(loaded.transformer, architecture, loaded.inputs)


def _unpadded(loaded: LoadedModel, architecture: Architecture) -> UnpaddedPass:
    reduce_to_cls(loaded.transformer, architecture)
    return UnpaddedPass(loaded.transformer, architecture, loaded.inputs)


def _whole(loaded: LoadedModel, *, pads_left: bool) -> WholeModelPass:
    return WholeModelPass(loaded.model, replace(loaded.inputs, pads_left=pads_left))


def _equal_lengths(loaded: LoadedModel) -> EqualLengthPass:
    return EqualLengthPass(WholeModelPass(loaded.model, loaded.inputs), loaded.positions.reset)
