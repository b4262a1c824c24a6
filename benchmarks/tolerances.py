"""By how much do logits differ between precisions and runtimes, and with what is beside a pair?

    python benchmarks/tolerances.py [--chunks 8] [--tokens 128] [--quick]

The bundled model over abstracts of one SciFact claim, and a tiny model of two families over texts of many scripts,
through every runtime and precision that this CPU computes in. ``from_float32`` is the greatest distance of a pair's
logit from that of torch in float32, alone; ``from_alone`` the greatest of a pair among others, in two random orders,
from the same engine's alone. ``tests/worker/differential.py`` goes through all families and hard texts, for as long as
it is told.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gear.report import keep, machine, show, verdict
from gear.texts import DATA, judged, need
from numpy.typing import NDArray

from rerankq_worker.engine import ModelUnusable, load
from rerankq_worker.engine.errors import Unconvertible
from rerankq_worker.engine.models.cores import multiplies_bfloat16

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "worker"))
import tiny_checkpoints

#: Runtimes and precisions, the exact one first.
WAYS = (
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch", "float16"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
)
#: An encoder, and a decoder that says yes or no, whose logits are large.
FAMILIES = ("bert", "gemma says")
#: What docs/reliability.md states, per unit of a model's greatest logit and at least of one.
STATED = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02, "int8": 0.2}
_ORDERS = 2

Pairs = Sequence[tuple[str, str]]
Logits = NDArray[np.float64]


def ways() -> list[tuple[str, str]]:
    """List the ways of this CPU: one that does not multiply bfloat16 is given float32 by OpenVINO."""
    return [way for way in WAYS if way != ("openvino", "bfloat16") or multiplies_bfloat16()]


def logits_of(model: str, way: tuple[str, str], pairs: Pairs, tokens: int | None) -> tuple[Logits, float]:
    """Score each pair alone, then among others; answers the logits alone, and the greatest distance from them."""
    runtime, dtype = way
    engine: Any = load(model, "cpu", dtype, runtime=runtime, max_length=tokens)
    tokenised = [engine.tokenise(query, [chunk])[0] for query, chunk in pairs]
    alone = np.array([engine.forward([pair]).item() for pair in tokenised])
    dice, beside = np.random.default_rng(0), 0.0
    for _ in range(_ORDERS):
        order = dice.permutation(len(pairs))
        beside = max(beside, float(np.abs(engine.forward([tokenised[at] for at in order]) - alone[order]).max()))
    return alone, beside


def measured(name: str, model: str, pairs: Pairs, tokens: int | None) -> dict[str, Any]:
    """Send pairs through a model every way."""
    found: dict[str, Any] = {}
    exact = np.empty(0)
    for way in ways():
        try:
            alone, beside = logits_of(model, way, pairs, tokens)
        except ModelUnusable as error:
            if not isinstance(error.__cause__, Unconvertible):
                raise
            found[" ".join(way)] = {"refused": str(error.__cause__)}
            continue
        exact = exact if exact.size else alone
        distance = float(np.abs(alone - exact).max())
        found[" ".join(way)] = {"from_float32": float(f"{distance:.2g}"), "from_alone": float(f"{beside:.2g}")}
        print(f"{name}, {' '.join(way)}: {found[' '.join(way)]}", flush=True)
    largest, spread = float(np.abs(exact).max()), float(np.ptp(exact))
    return {"pairs": len(pairs), "largest_logit": round(largest, 2), "spread": round(spread, 2), "ways": found}


def beyond(models: dict[str, Any]) -> list[str]:
    """Say which ways differ by more than what is stated."""
    return [
        f"{name}, {way}: {figures}"
        for name, one in models.items()
        for way, figures in one["ways"].items()
        if max(figures.get("from_float32", 0), figures.get("from_alone", 0))
        > STATED[way.split()[1]] * max(1, one["largest_logit"])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a pair of the bundled model, at most")
    parser.add_argument("--quick", action="store_true", help="4 chunks, one tiny model")
    args = parser.parse_args()
    need(args.data, "scifact")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # libraries warn about what a tiny checkpoint lacks
    here = machine()
    chunks, families = (4, FAMILIES[:1]) if args.quick else (args.chunks, FAMILIES)
    [claim] = judged(args.data, "scifact", count=1, depth=chunks)
    models = {"bundled": measured("bundled", "bundled", claim.question.pairs, args.tokens)}
    texts = [(tiny_checkpoints.QUERY, text) for text in (*tiny_checkpoints.TEXTS, "", "a", "word " * 60)]
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            models[family] = measured(family, str(tiny_checkpoints.write(family, Path(folder))), texts, None)
    keep("tolerances", {"tokens": args.tokens, "stated": STATED, "models": models}, here, quick=args.quick)
    show({name: f"{one['pairs']} pairs, largest logit {one['largest_logit']}" for name, one in models.items()})
    return verdict(beyond(models))


if __name__ == "__main__":
    raise SystemExit(main())
