"""What this process may use of the machine, read from the operating system."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CPUINFO = Path("/proc/cpuinfo")
_SHORT_NUMBERS = frozenset(
    {"amx_bf16", "amx_fp16", "amx_int8", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni"}
)


def available_cores() -> int:
    """Count the cores that this process may run on: its affinity, cut by the container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, quota_cores(_read(_QUOTA), otherwise=allowed)))


def quota_cores(cpu_max: str, *, otherwise: int) -> int:
    """Read whole cores out of a control group's ``cpu.max``: "quota period" in microseconds.

    >>> quota_cores("250000 100000", otherwise=64), quota_cores("max 100000", otherwise=64)
    (3, 64)
    """
    quota, _, period = cpu_max.strip().partition(" ")
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return otherwise
    return math.ceil(int(quota) / int(period))


def multiplies_bfloat16() -> bool:
    """Tell whether this CPU has instructions that multiply bfloat16 matrices faster than float32 ones."""
    return names_bfloat16(_read(_CPUINFO))


def names_bfloat16(cpuinfo: str) -> bool:
    r"""Find a flag of them in the text of ``/proc/cpuinfo``: vectors (AVX-512) or tiles (AMX).

    >>> names_bfloat16("flags\t: fpu avx512f avx512_bf16"), names_bfloat16("flags\t: fpu avx512f avx512_vnni")
    (True, False)
    """
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_flags(cpuinfo))


def short_number_instructions(cpuinfo: str | None = None) -> str:
    r"""Name this CPU's instructions that multiply shorter numbers than float32: each rounds in its own way.

    >>> short_number_instructions("flags\t: fpu avx512f avx512_vnni avx512_bf16")
    'avx512_bf16+avx512_vnni'
    """
    return "+".join(sorted(_SHORT_NUMBERS.intersection(_flags(_read(_CPUINFO) if cpuinfo is None else cpuinfo))))


def _flags(cpuinfo: str) -> list[str]:
    return next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "").split()


def allocator_environment() -> dict[str, str]:
    """Give the variables that make glibc keep the memory of one batch for the next; set them before the process starts.

    glibc returns large blocks to the system after every forward pass and faults them in again, zeroed, in the next.
    Both thresholds are in bytes: blocks up to the first come from the heap, and up to the second of it stays ours. What
    stays is kept by each heap apart, and by default there are eight for every core: with two, the memory of a worker
    levels off (160 MiB with the stub; without, it was at 262 and rising after half an hour), at no cost to the engine.
    """
    return {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30), "MALLOC_ARENA_MAX": "2"}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
