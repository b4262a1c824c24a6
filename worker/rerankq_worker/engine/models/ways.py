"""The fastest way through a model that a probe finds right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sentence_transformers.cross_encoder.modules.logit_score import LogitScore

from ..errors import ModelUnusable, Unconvertible, in_one_line
from .architectures import Architecture, architecture_of
from .first_token import lengthen, reduce_to_cls
from .long_positions import LongPositions
from .openvino_pass import OpenVinoPass
from .passes import Inputs, OneLengthAtATime, PaddedPass, Pass, UnpaddedPass, WholeModel
from .probing import Probe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model whose way is sought, how batches are written for it, and what every way is held against."""

    name: str
    model: Any
    inputs: Inputs
    positions: LongPositions
    max_length: int
    probe: Probe

    @property
    def body(self) -> Any:
        """The transformers model."""
        return self.model[0].auto_model

    @property
    def architecture(self) -> Architecture | None:
        """What is known of the model's parts; None where only the whole is right."""
        says = self.model[-1] if isinstance(self.model[-1], LogitScore) else None
        # Whatever else follows the transformer (pooling, a layer of its own) is known to the whole model alone.
        if len(self.model) != (2 if says is not None else 1) or self.one_length_only:
            return None
        return architecture_of(self.body, (says.true_token_id, says.false_token_id) if says is not None else None)

    @property
    def one_length_only(self) -> bool:
        """Whether the longest pair of a batch changes what the others get."""
        return self.positions.change_within(self.max_length)


def torch_way(subject: Subject, *, unpadded: bool) -> Pass:
    """Find the fastest way through torch that is right; raises ModelUnusable where none is, saying what differs."""
    attention = subject.body.config._attn_implementation
    wrong: list[str] = []
    for kind, way_of in _torch_ways(subject, unpadded=unpadded):
        try:
            way = way_of()
            why = subject.probe.disagreement(way)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next way is open
            why = f"it raises {in_one_line(error)}"
        if not why:
            if wrong:
                logger.warning("model %s runs %s: %s", subject.name, kind, "; ".join(wrong))
            return way
        wrong.append(f"{kind}, {why}")
        subject.body.set_attn_implementation(attention)
        if (architecture := subject.architecture) is not None:
            lengthen(getattr(subject.body, architecture.backbone))
    raise ModelUnusable(f"model {subject.name!r} scores pairs otherwise together than alone: {'; '.join(wrong)}")


def openvino_way(subject: Subject, *, dtype: str, threads: int) -> OpenVinoPass:
    """Take the way that OpenVINO compiles, once it has shown that it is right; raises Unconvertible."""
    architecture = subject.architecture
    if architecture is None:
        raise Unconvertible("its parts are not known apart")
    compiled = OpenVinoPass(_padded(subject, architecture), subject.inputs, dtype=dtype, threads=threads)
    if why := subject.probe.disagreement(compiled):
        raise Unconvertible(why)
    return compiled


def _torch_ways(subject: Subject, *, unpadded: bool) -> Iterator[tuple[str, Callable[[], Pass]]]:
    """List the ways from the fastest to the one that pads nothing and shortens nothing."""
    architecture = subject.architecture
    if architecture is not None:
        if unpadded:
            yield "unpadded", partial(_unpadded, subject, architecture)
        yield "padded", partial(_padded, subject, architecture)
    if not subject.one_length_only:
        side = subject.inputs.pads_left
        yield "padded whole", partial(_whole, subject, pads_left=side)
        yield "padded whole on the other side", partial(_whole, subject, pads_left=not side)
    yield "one length at a time", partial(_one_length, subject)


def _padded(subject: Subject, architecture: Architecture) -> PaddedPass:
    _shorten(subject, architecture)
    return PaddedPass(subject.body, architecture, subject.inputs)


def _unpadded(subject: Subject, architecture: Architecture) -> UnpaddedPass:
    _shorten(subject, architecture)
    return UnpaddedPass(subject.body, architecture, subject.inputs)


def _whole(subject: Subject, *, pads_left: bool) -> WholeModel:
    return WholeModel(subject.model, replace(subject.inputs, pads_left=pads_left))


def _one_length(subject: Subject) -> OneLengthAtATime:
    return OneLengthAtATime(WholeModel(subject.model, subject.inputs), subject.positions.forget)


def _shorten(subject: Subject, architecture: Architecture) -> None:
    if architecture.place == "first":
        reduce_to_cls(getattr(subject.body, architecture.backbone))
