"""Which runtime computes a model, and in which precision: a pure choice from what the machine has."""

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
    """What decides: the kind of device ("cpu", "cuda"), whether it multiplies bfloat16 faster, what is installed."""

    device: str
    fast_bfloat16: bool
    openvino: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """A runtime and the precision it is to compute in."""

    runtime: str
    dtype: str


def choose(runtime: str, dtype: str, facts: Environment) -> Choice:
    """Take what was asked for; where that is ``auto``, the fastest that this machine has.

    >>> choose("auto", "auto", Facts("cpu", fast_bfloat16=True, openvino=True))
    Choice(runtime='openvino', dtype='bfloat16')
    >>> choose("auto", "float16", Facts("cpu", fast_bfloat16=True, openvino=True))
    Choice(runtime='torch', dtype='float16')

    Raises ValueError for a name that is none, and EngineError for what this machine cannot do, saying what it lacks.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    if runtime not in ("auto", *RUNTIMES):
        raise ValueError(f"runtime {runtime!r} is none of auto, {', '.join(RUNTIMES)}")
    if dtype == "auto":
        dtype = "bfloat16" if facts.fast_bfloat16 else "float32"
    able = [name for name, dtypes in RUNTIMES.items() if dtype in dtypes and runtime in ("auto", name)]
    if not able:
        raise ValueError(f"runtime {runtime!r} does not compute in {dtype}")
    for name in able:
        if not (lacking := _lacking(name, facts)):
            return Choice(name, dtype)
    raise EngineError(f"{dtype} on the device {facts.device!r} needs the runtime {able[0]!r}: {lacking}")


def precision_of(choice: Choice, device: str, instructions: str) -> str:
    """Name what logits may share a cache with: float32 is the same everywhere, less is rounded by each in its own way.

    >>> precision_of(Choice("torch", "float32"), "cuda", ""), precision_of(Choice("openvino", "float32"), "cpu", "amx")
    ('float32', 'float32')
    >>> precision_of(Choice("torch", "bfloat16"), "cpu", "amx_bf16")
    'bfloat16 torch cpu amx_bf16'
    """
    if choice.dtype == "float32":
        return choice.dtype
    return f"{choice.dtype} {choice.runtime} {device} {instructions if device == 'cpu' else ''}".strip()


def openvino_installed() -> bool:
    """Tell whether OpenVINO can be imported, without doing so."""
    return find_spec("openvino") is not None


def _lacking(runtime: str, facts: Environment) -> str:
    if runtime == "openvino" and facts.device != "cpu":
        return "it computes on the CPU alone"
    if runtime == "openvino" and not facts.openvino:
        return "pip install 'rerankq[openvino]'"
    return ""
