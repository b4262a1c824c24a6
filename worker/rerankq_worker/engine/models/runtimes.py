"""Which runtime computes a model, and in which precision: a pure choice by what the machine has.

A new runtime is a row of ``RUNTIMES`` and its requirements in ``_missing``; its pass is a module beside
``openvino_pass``, made in ``pass_selection`` and selected in ``CrossEncoderEngine``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType

from ..errors import EngineError

#: The precisions that each runtime computes in, the faster runtime first. Measured on an AMD EPYC with AVX-512 BF16
#: (benchmarks/runtimes.py, 22 M parameters): OpenVINO is 1.8 times as fast as torch in float32, 2.9 times in bfloat16;
#: int8 is hardly faster than bfloat16 there. nDCG@10 of 100 SciFact claims, 20 chunks each: float32 0.642, bfloat16
#: 0.642 (one claim ranked otherwise), int8 0.643 (nine).
RUNTIMES = MappingProxyType(
    {
        "openvino": frozenset({"float32", "bfloat16", "int8"}),
        "torch": frozenset({"float32", "bfloat16", "float16"}),
    }
)
DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, slots=True)
class Environment:
    """The kind of device ("cpu", "cuda"), whether bfloat16 is faster on it, and whether OpenVINO is installed."""

    device: str
    fast_bfloat16: bool
    openvino: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """A runtime and the precision it is to compute in."""

    runtime: str
    dtype: str


def choose(runtime: str, dtype: str, environment: Environment) -> Choice:
    """Return what was asked for; for ``auto``, the fastest that this machine has.

    >>> choose("auto", "auto", Environment("cpu", fast_bfloat16=True, openvino=True))
    Choice(runtime='openvino', dtype='bfloat16')
    >>> choose("auto", "float16", Environment("cpu", fast_bfloat16=True, openvino=True))
    Choice(runtime='torch', dtype='float16')

    Raises ValueError for an unknown name, and EngineError for what this machine cannot do, saying what is missing.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}")
    if runtime not in ("auto", *RUNTIMES):
        raise ValueError(f"runtime must be one of auto, {', '.join(RUNTIMES)}, not {runtime!r}")
    if dtype == "auto":
        dtype = "bfloat16" if environment.fast_bfloat16 else "float32"
    able = [name for name, dtypes in RUNTIMES.items() if dtype in dtypes and runtime in ("auto", name)]
    if not able:
        raise ValueError(f"runtime {runtime!r} does not support {dtype}")
    for name in able:
        if not (missing := _missing(name, environment)):
            return Choice(name, dtype)
    raise EngineError(f"{dtype} on the device {environment.device!r} needs the runtime {able[0]!r}: {missing}")


def precision_of(choice: Choice, device: str, instructions: str) -> str:
    """Name the precision for the fingerprint: float32 logits agree everywhere, others depend on what computed them.

    >>> precision_of(Choice("torch", "float32"), "cuda", ""), precision_of(Choice("openvino", "float32"), "cpu", "amx")
    ('float32', 'float32')
    >>> precision_of(Choice("torch", "bfloat16"), "cpu", "amx_bf16")
    'bfloat16 torch cpu amx_bf16'
    """
    if choice.dtype == "float32":
        return choice.dtype
    return f"{choice.dtype} {choice.runtime} {device} {instructions if device == 'cpu' else ''}".strip()


def openvino_installed() -> bool:
    """Tell whether OpenVINO can be imported, without importing it."""
    return find_spec("openvino") is not None


def _missing(runtime: str, environment: Environment) -> str:
    if runtime == "openvino" and environment.device != "cpu":
        return "it runs on the CPU only"
    if runtime == "openvino" and not environment.openvino:
        return "pip install 'rerankq[openvino]'"
    return ""
