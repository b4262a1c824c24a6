"""By how much do logits differ between precisions and runtimes, and with what is beside a pair?

    python benchmarks/tolerances.py [--queries 4] [--chunks 24] [--quick]

The bundled model through every runtime and precision, over SciFact abstracts. ``from_float32`` is the greatest
distance of a pair's logit from that of torch in float32, alone; ``from_alone`` the greatest of a pair among others, in
batches of mixed lengths and random order, from the same engine's alone. ``tests/worker/differential.py`` does the
same for tiny models of every family.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from gear.report import keep, machine, show, verdict
from gear.texts import DATA, judged, need
from numpy.typing import NDArray

from rerankq_worker.engine import load

WAYS = (
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch", "float16"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
)
#: What docs/reliability.md states.
STATED = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02, "int8": 0.4}
_ROUNDS = 3


def distances(pairs: list[tuple[str, str]], exact: NDArray[np.float64], runtime: str, dtype: str) -> dict[str, Any]:
    """Score each pair alone, then among others; answers the greatest distances, and the logits alone."""
    engine: Any = load("bundled", "cpu", dtype, runtime=runtime)
    tokenised = [engine.tokenise(query, [chunk])[0] for query, chunk in pairs]
    alone = np.array([engine.forward([pair]).item() for pair in tokenised])
    dice, beside = np.random.default_rng(0), 0.0
    for _ in range(_ROUNDS):
        order = dice.permutation(len(pairs))
        for batch in np.array_split(order, max(1, len(pairs) // 8)):
            logits = engine.forward([tokenised[at] for at in batch])
            beside = max(beside, float(np.abs(logits - alone[batch]).max()))
    return {
        "computed_in": engine.dtype,
        "from_float32": float(f"{np.abs(alone - exact).max():.2g}") if exact.size else 0.0,
        "from_alone": float(f"{beside:.2g}"),
        "logits": alone,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=24, help="for each query")
    parser.add_argument("--quick", action="store_true", help="1 query of 6 chunks")
    args = parser.parse_args()
    if args.quick:
        args.queries, args.chunks = 1, 6
    need(args.data, "scifact")
    pairs = [
        pair
        for one in judged(args.data, "scifact", count=args.queries, depth=args.chunks)
        for pair in one.question.pairs
    ]
    here, found, exact = machine(), {}, np.empty(0)
    for runtime, dtype in WAYS:
        answer = distances(pairs, exact, runtime, dtype)
        logits = answer.pop("logits")
        exact = exact if exact.size else logits
        found[f"{runtime} {dtype}"] = answer
    show(found)
    spread = round(float(np.ptp(exact)), 2)
    wrong = [
        f"{name}: {answer['from_float32']} from float32, {answer['from_alone']} from alone"
        for name, answer in found.items()
        if max(answer["from_float32"], answer["from_alone"]) > STATED[answer["computed_in"]]
    ]
    keep("tolerances", {"pairs": len(pairs), "spread_of_logits": spread, "ways": found}, here, quick=args.quick)
    return verdict(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
