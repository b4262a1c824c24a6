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
from .passes import InputFormat, PaddedPass, pad_batch

if TYPE_CHECKING:
    import openvino

#: The CPU plugin's hint of inference precision. In int8 the weights are quantised beforehand, activations dynamically.
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
#: A value that no computation produces: a NaN with a mark in its payload bits.
_UNTOUCHED = np.uint32(0x7FDEAD51)
#: Size of the groups in which activations are quantised, within a token, so that no token depends on another.
_GROUP = 128


class OpenVinoPass:
    """The backbone compiled by OpenVINO, padded on the right; then the model's own head in float32.

    Takes over the weights of ``padded_pass``, which is in float32 and cannot be used afterwards. Raises Unconvertible.
    """

    padded = True

    def __init__(self, padded_pass: PaddedPass, inputs: InputFormat, *, dtype: str, threads: int) -> None:
        openvino = _openvino()
        states = _States(padded_pass, token_types=inputs.token_types)
        # Other implementations mask with minus infinity: rows of padding, which attend to padding only, become NaN.
        padded_pass.backbone.set_attn_implementation("eager")
        try:
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")  # tracing warns of every branch that depends on a shape
                graph = openvino.convert_model(_traced(states.eval(), inputs))
            if dtype == "int8":
                quantise_weights(graph)
            options = {
                "INFERENCE_PRECISION_HINT": _HINTS[dtype],
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                # With pinning, the threads of all workers of a machine would share the same first cores.
                "ENABLE_CPU_PINNING": False,
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP if dtype == "int8" else 0,
            }
            compiled = openvino.Core().compile_model(graph, "CPU", options)
            self._request = compiled.create_infer_request()
        except Exception as error:
            raise Unconvertible(f"OpenVINO cannot convert it: {_first_line(error)}") from error
        #: The precision it computes in: float32 where the CPU does not multiply bfloat16.
        self.dtype = _precision_of(compiled, dtype)
        self._padded_pass = padded_pass
        self._inputs = inputs
        _free_weights(padded_pass.backbone)

    def __call__(self, batch: Sequence[TokenisedPair]) -> torch.Tensor:
        """Run one batch; raises MemoryError where OpenVINO had no memory for it."""
        inputs = [values.numpy() for values in pad_batch(batch, self._inputs).values()]
        given = self._request.infer(inputs, share_inputs=True, share_outputs=True)[0]
        states = given.copy()
        # Without memory for its inputs OpenVINO may raise nothing and leave the output of the batch before.
        bits = given.view(np.uint32)
        untouched = bool((bits == _UNTOUCHED).any())
        bits[:] = _UNTOUCHED
        if untouched or len(states) != len(batch):
            # The same may happen to batches of this size until one of another size was computed. A new request does not
            # help: deleting this one ends the process.
            raise MemoryError(f"OpenVINO computed nothing for {len(batch)} pairs")
        return self._padded_pass.head(torch.from_numpy(states))


class _States(torch.nn.Module):
    """The part that is converted: from token ids to pooled states."""

    def __init__(self, padded_pass: PaddedPass, *, token_types: bool) -> None:
        super().__init__()
        self.backbone = padded_pass.backbone  # as a submodule, so that its weights are found
        self._padded_pass = padded_pass
        self._names = ("input_ids", "attention_mask", "token_type_ids")[: 2 + token_types]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._padded_pass.states(dict(zip(self._names, inputs, strict=True)))


def _traced(states: _States, inputs: InputFormat) -> Any:
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # noqa: PLC0415 - an optional extra

    # Torch would trace twice more and compare: a quarter of the conversion's time, and the probe holds every logit.
    return TorchScriptPythonDecoder(states, example_input=_example(inputs), trace_kwargs={"check_trace": False})


def quantise_weights(graph: openvino.Model) -> None:
    """Quantise the weights of all matrix products to int8 with a scale per output; raises ValueError for none."""
    from openvino import opset13 as ops  # noqa: PLC0415 - an optional extra

    products = [node for node in graph.get_ops() if _has_weights(node)]
    if not products:
        raise ValueError("no matrix product has constant weights")
    for node in products:
        weights = node.input_value(1).get_node().data.astype(np.float32)
        axis = 1 if node.get_attributes()["transpose_b"] else 0
        scale = np.abs(weights).max(axis=axis, keepdims=True) / 127
        scale[scale == 0] = 1
        quantised = ops.constant(np.round(weights / scale).astype(np.int8))
        node.input(1).replace_source_output(ops.multiply(ops.convert(quantised, "f32"), ops.constant(scale)).output(0))


def _has_weights(node: Any) -> bool:
    if node.get_type_name() != "MatMul":
        return False
    source = node.input_value(1).get_node()
    return bool(source.get_type_name() == "Constant" and len(source.get_output_shape(0)) == 2)


def _precision_of(compiled: openvino.CompiledModel, dtype: str) -> str:
    given = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return "float32" if dtype == "bfloat16" and given in ("f32", "float32") else dtype


def _free_weights(backbone: torch.nn.Module) -> None:
    """Free the weights that OpenVINO has copied; a pooler belongs to the head, which is kept."""
    for name, part in backbone.named_children():
        if name != "pooler":
            part.to("meta")


def _openvino() -> Any:
    # OpenVINO sends usage statistics unless this package cannot be imported; None in its place has that effect.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino  # noqa: PLC0415

    return openvino


def _example(inputs: InputFormat) -> tuple[torch.Tensor, ...]:
    """Return a batch to trace the model with: two pairs, the second one padded."""
    ids = torch.full((2, 7), 0 if inputs.pad else 1)  # the padding's id may be the last of the vocabulary
    mask = torch.ones(2, 7, dtype=torch.int64)
    ids[1, 5:], mask[1, 5:] = inputs.pad, 0
    return (ids, mask, torch.zeros_like(ids))[: 2 + inputs.token_types]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))
