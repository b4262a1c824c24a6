"""Which runtime a model gets by itself, and what is said when there is none."""

import pytest

from rerankq_worker.engine import EngineError
from rerankq_worker.engine.models.runtimes import DTYPES, RUNTIMES, Choice, Environment, choose, precision_of

FULL = Environment("cpu", fast_bfloat16=True, openvino=True)
OLD = Environment("cpu", fast_bfloat16=False, openvino=True)
BARE = Environment("cpu", fast_bfloat16=True, openvino=False)
GPU = Environment("cuda", fast_bfloat16=True, openvino=True)
APPLE = Environment("mps", fast_bfloat16=False, openvino=True)


@pytest.mark.parametrize(
    ("environment", "asked", "chosen"),
    [
        (FULL, ("auto", "auto"), ("openvino", "bfloat16")),
        (OLD, ("auto", "auto"), ("openvino", "float32")),
        (BARE, ("auto", "auto"), ("torch", "bfloat16")),
        (GPU, ("auto", "auto"), ("torch", "bfloat16")),
        (APPLE, ("auto", "auto"), ("torch", "float32")),
        (GPU, ("auto", "float16"), ("torch", "float16")),
        (FULL, ("auto", "float16"), ("torch", "float16")),
        (FULL, ("auto", "int8"), ("openvino", "int8")),
        (FULL, ("torch", "auto"), ("torch", "bfloat16")),
        (OLD, ("torch", "bfloat16"), ("torch", "bfloat16")),
        (OLD, ("openvino", "bfloat16"), ("openvino", "bfloat16")),
    ],
)
def test_the_fastest_installed_runtime_is_chosen_unless_another_is_asked_for(environment, asked, chosen):
    assert choose(*asked, environment) == Choice(*chosen)


def test_scores_of_one_gpu_are_shared_whatever_the_cpu_beside_it():
    reduced = Choice("torch", "bfloat16")
    assert precision_of(reduced, "cuda", "amx_bf16") == precision_of(reduced, "cuda", "")
    assert precision_of(reduced, "cpu", "amx_bf16") != precision_of(reduced, "cpu", "")


@pytest.mark.parametrize("environment", [FULL, OLD, BARE, GPU, APPLE])
@pytest.mark.parametrize("runtime", ["auto", *RUNTIMES])
@pytest.mark.parametrize("dtype", ["auto", *DTYPES])
def test_a_choice_is_the_requested_one_or_an_error(environment, runtime, dtype):
    try:
        chosen = choose(runtime, dtype, environment)
    except (EngineError, ValueError):
        return
    assert runtime in ("auto", chosen.runtime)
    assert dtype in ("auto", chosen.dtype)
    assert chosen.dtype in RUNTIMES[chosen.runtime]
    assert chosen.runtime == "torch" or (environment.openvino and environment.device == "cpu")


@pytest.mark.parametrize(
    ("environment", "asked", "complaint"),
    [
        (FULL, ("onnx", "auto"), "runtime must be one of auto, openvino, torch, not 'onnx'"),
        (FULL, ("auto", "int4"), "dtype must be one of auto, float32"),
        (FULL, ("openvino", "float16"), "'openvino' does not support float16"),
        (FULL, ("torch", "int8"), "'torch' does not support int8"),
        (BARE, ("openvino", "auto"), r"needs the runtime 'openvino': pip install 'rerankq\[openvino\]'"),
        (BARE, ("auto", "int8"), r"int8 on the device 'cpu' needs the runtime 'openvino': pip install"),
        (GPU, ("openvino", "auto"), "it runs on the CPU only"),
    ],
)
def test_an_impossible_choice_is_an_error_that_names_the_reason(environment, asked, complaint):
    with pytest.raises((EngineError, ValueError), match=complaint):
        choose(*asked, environment)
