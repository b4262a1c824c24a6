"""Where a measurement was made, and how it is kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rerankq_worker.engine import available_cores

RESULTS = Path(__file__).resolve().parents[1] / "results"
LIBRARIES = (
    "rerankq",
    "torch",
    "transformers",
    "sentence-transformers",
    "openvino",
    "celery",
    "kombu",
    "redis",
    "numpy",
)


def machine() -> dict[str, Any]:
    """Describe this machine. A load of about 0 before means that nothing else ran."""
    cpuinfo = Path("/proc/cpuinfo")
    said = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    model = re.search(r"model name\s*: (.*)", said)
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "amx_bf16": "amx_bf16" in said,
        "avx512_bf16": "avx512_bf16" in said,
        "cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def spread(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Give the median with the least and the greatest.

    >>> spread([3, 1, 2])
    {'median': 2, 'least': 1, 'greatest': 3}
    """
    figures = {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
    return {name: round(value, digits) for name, value in figures.items()}


def share(values: Sequence[float], at: float) -> float:
    """Give the value below which a share *at* of the values lies.

    >>> share(range(101), 0.95)
    95
    """
    ordered = sorted(values)
    return ordered[round(at * (len(ordered) - 1))]


def keep(
    name: str, answer: Mapping[str, Any], machine: Mapping[str, Any], *, quick: bool, plot: str | None = None
) -> None:
    """Write an answer beside the others, and its plot (SVG); a quick one never replaces a full one."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"{name}.quick" if quick else name
    path = RESULTS / f"{stem}.json"
    path.write_text(json.dumps({"machine": machine, **answer}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if plot is not None:
        (RESULTS / f"{stem}.svg").write_text(plot, encoding="utf-8")
    print(f"{machine['cpu']}, {machine['cores']} cores, load before {machine['load_before']}; written to {path}")


def show(answer: Mapping[str, Any]) -> None:
    """Print what was measured, a line each."""
    for name, value in answer.items():
        print(f"{name.replace('_', ' ')}: {value}")


def verdict(wrong: Sequence[str]) -> int:
    """Say what a check inside found wrong, the first twenty; answers the exit status."""
    for fault in wrong[:20]:
        print(f"WRONG: {fault}")
    return 1 if wrong else 0
