"""One batch through OpenVINO: the backbone of a torch model, converted in memory for this CPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import Unconvertible
from ..protocol import TokenisedPair
from .passes import Inputs, PaddedPass, padded

if TYPE_CHECKING:
    import openvino

#: How the CPU plugin is told to compute. In int8 it is the weights that are, and the activations as they come.
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
#: What no computation gives: a number that is none, with a sign of ours in its unused bits.
_UNTOUCHED = np.uint32(0x7FDEAD51)
#: Activations are quantised in groups of so many neighbours of a token, so that no token depends on another.
_GROUP = 128


class OpenVinoPass:
    """Through the backbone compiled by OpenVINO, padded on the right, then through the model's own head in float32.

    Takes over the weights of ``across``, a pass in float32 that computes no more afterwards. Raises Unconvertible.
    """

    padded = True

    def __init__(self, across: PaddedPass, inputs: Inputs, *, dtype: str, threads: int) -> None:
        openvino = _openvino()
        states = _States(across, with_types=inputs.with_types)
        # The other ways forbid by minus infinity, and a padding that may look at nothing but padding becomes NaN.
        across.backbone.set_attn_implementation("eager")
        try:
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")  # tracing warns of every decision that depends on a shape
                graph = openvino.convert_model(states.eval(), example_input=_example(inputs))
            if dtype == "int8":
                quantise_weights(graph)
            options = {
                "INFERENCE_PRECISION_HINT": _HINTS[dtype],
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                # Pinned, the threads of every worker of a machine would share the same first cores.
                "ENABLE_CPU_PINNING": False,
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP if dtype == "int8" else 0,
            }
            compiled = openvino.Core().compile_model(graph, "CPU", options)
            self._request = compiled.create_infer_request()
        except Exception as error:
            raise Unconvertible(f"OpenVINO does not convert it: {_first_line(error)}") from error
        #: The precision it computes in: a CPU that does not multiply bfloat16 is given float32 instead.
        self.dtype = _computed_in(compiled, dtype)
        self._across = across
        self._inputs = inputs
        _forget_weights(across.backbone)

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch; raises MemoryError where there was none for it."""
        inputs = [values.numpy() for values in padded(batch, self._inputs).values()]
        given = self._request.infer(inputs, share_inputs=True, share_outputs=True)[0]
        states = given.copy()
        # Without memory for its inputs OpenVINO may raise nothing, and give once more what it gave before.
        bits = given.view(np.uint32)
        nothing = bool((bits == _UNTOUCHED).any())
        bits[:] = _UNTOUCHED
        if nothing or len(states) != len(batch):
            # A batch of this size may get nothing again until one of another size was computed. A new request is no way
            # out: to let go of this one ends the process.
            raise MemoryError(f"OpenVINO computed nothing for {len(batch)} pairs")
        return self._across.head(torch.from_numpy(states))


class _States(torch.nn.Module):
    """What is converted: from token ids to the states that the head reads."""

    def __init__(self, across: PaddedPass, *, with_types: bool) -> None:
        super().__init__()
        self.backbone = across.backbone  # a submodule, so that its weights are found
        self._across = across
        self._names = ("input_ids", "attention_mask", "token_type_ids")[: 2 + with_types]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._across.states(dict(zip(self._names, inputs, strict=True)))


def quantise_weights(graph: openvino.Model) -> None:
    """Write the weights of every matrix product as int8 with a scale per row; raises ValueError where there is none."""
    from openvino import opset13 as ops  # noqa: PLC0415 - an extra: only whoever converts a model needs it

    products = [node for node in graph.get_ops() if _has_weights(node)]
    if not products:
        raise ValueError("no matrix product has weights of its own")
    for node in products:
        weights = node.input_value(1).get_node().data.astype(np.float32)
        across = 1 if node.get_attributes()["transpose_b"] else 0
        scale = np.abs(weights).max(axis=across, keepdims=True) / 127
        scale[scale == 0] = 1
        whole = ops.constant(np.round(weights / scale).astype(np.int8))
        node.input(1).replace_source_output(ops.multiply(ops.convert(whole, "f32"), ops.constant(scale)).output(0))


def _has_weights(node: Any) -> bool:
    if node.get_type_name() != "MatMul":
        return False
    source = node.input_value(1).get_node()
    return bool(source.get_type_name() == "Constant" and len(source.get_output_shape(0)) == 2)


def _computed_in(compiled: openvino.CompiledModel, dtype: str) -> str:
    given = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return "float32" if dtype == "bfloat16" and given in ("f32", "float32") else dtype


def _forget_weights(backbone: torch.nn.Module) -> None:
    """Let go of what OpenVINO has by now; a pooler belongs to the head, which stays."""
    for name, part in backbone.named_children():
        if name != "pooler":
            part.to("meta")


def _openvino() -> Any:
    # OpenVINO reports its use to its makers unless this package of theirs is absent; with None in its place it is.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino  # noqa: PLC0415

    return openvino


def _example(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Give a batch to trace the model with: two pairs, the second one padded."""
    ids = torch.full((2, 7), 0 if inputs.pad else 1)  # the padding's id may be the last that the model knows
    mask = torch.ones(2, 7, dtype=torch.int64)
    ids[1, 5:], mask[1, 5:] = inputs.pad, 0
    return (ids, mask, torch.zeros_like(ids))[: 2 + inputs.with_types]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))
