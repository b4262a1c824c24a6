"""How near does the forward pass come to what this CPU can compute, and what does padding cost?

    python benchmarks/forward.py [--jobs 1] [--chunks 50] [--rounds 3] [--dtypes float32 bfloat16] [--quick]

Jobs of SciFact abstracts, tokenised beforehand, through the worker's own batcher on the bundled model: torch padded and
unpadded, and the engine that a worker takes by default, in turns, each in a process of its own with the environment
that workers have. Measured for each: pairs and tokens per second, tokens computed ÷ real tokens, operations per second
(``gear/work.py`` counts them; only what is computed) against the same machine's matrix products in the same dtype. All
logits are compared with the padded float32 ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gear.model_process import BUNDLED, ModelProcess, Pairs
from gear.plot import bars
from gear.report import keep, machine, show, spread, verdict
from gear.texts import DATA, need, questions
from gear.work import matrix_ceiling, operations, shape_of

from rerankq_worker.engine import Batcher, allocator_environment, load

WAYS = ("padded", "unpadded", "default")
# Of logits, from the padded float32 ones, by dtype.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}


def load_model(way: str, dtype: str) -> None:
    global _engine, _shape  # noqa: PLW0603
    from transformers import AutoConfig  # noqa: PLC0415 - seconds, paid only when a model is loaded

    asked = {} if way == "default" else {"padded": way == "padded"}
    _engine = load("bundled", "cpu", dtype, **asked)
    # The engine computes the first token alone in its last layer, whichever way the batches are laid.
    _shape = shape_of(AutoConfig.from_pretrained(BUNDLED), shortened=True)


def run(jobs: Sequence[Pairs]) -> tuple[list[float], dict[str, float]]:
    """Put all jobs through the batcher at once; answers the logits and what was computed in how many seconds."""
    tickets = [_engine.tokenise(pairs[0][0], [chunk for _, chunk in pairs]) for pairs in jobs]
    with Batcher(_engine) as batcher:
        began = time.perf_counter()
        running = [batcher.submit(pairs, priority="bulk") for pairs in tickets]
        logits = [logit for ticket in running for logit in ticket.result().tolist()]
        seconds = time.perf_counter() - began
        stats = batcher.stats()
    done = operations(_shape, [pair.length for pairs in tickets for pair in pairs])
    return logits, {
        "seconds": seconds,
        "pairs": stats.pairs,
        "tokens": stats.tokens,
        "padding": stats.padding,
        "operations": done * stats.padding,
    }


def ceiling(dtype: str, seconds: float) -> float:
    return max(matrix_ceiling("cpu", dtype, [1024, 2048], seconds=seconds).values())


def about() -> str:
    return f"{_engine.runtime}, {'padded' if _engine.padded else 'unpadded'}, {_engine.dtype}"


_engine: Any
_shape: Any


def measure_dtype(dtype: str, jobs: Sequence[Pairs], args: argparse.Namespace, known: list[float]) -> dict[str, Any]:
    """All ways in turns; *known* are the logits to compare with, filled by the first of them."""
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    distances: list[float] = []
    with ExitStack() as open_processes:
        processes = {
            way: open_processes.enter_context(ModelProcess(load_model, way, dtype, environment=allocator_environment()))
            for way in WAYS
        }
        engines = {way: process.ask(about) for way, process in processes.items()}
        # The same products before and after: the machine may have been slower for a while.
        ceilings = [processes["padded"].ask(ceiling, dtype, args.ceiling_s)]
        for number in range(args.rounds + 1):
            for way in WAYS if number % 2 else WAYS[::-1]:
                logits, done = processes[way].ask(run, jobs[:1] if number == 0 else jobs)
                if number == 0:
                    continue  # a first run, to warm it
                known[:] = known or logits
                distances.append(max(abs(one - other) for one, other in zip(logits, known, strict=True)))
                for name in ("pairs", "tokens", "operations"):
                    found[way].setdefault(name, []).append(done[name] / done["seconds"])
                found[way].setdefault("padding", []).append(done["padding"])
        ceilings.append(processes["padded"].ask(ceiling, dtype, args.ceiling_s))
    most = max(ceilings)
    return {
        "matrix_gflops": round(most / 1e9, 1),
        "greatest_distance_of_logits": max(distances),
        "ways": {
            way: {
                "engine": engines[way],
                "pairs_per_second": spread(values["pairs"]),
                "tokens_per_second": spread(values["tokens"], 0),
                "padding": round(statistics.median(values["padding"]), 4),
                "gflops": round(statistics.median(values["operations"]) / 1e9, 1),
                "share_of_matrix_product": round(statistics.median(values["operations"]) / most, 3),
            }
            for way, values in found.items()
        },
    }


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    asked = questions(args.data, "scifact", count=args.jobs, depth=args.chunks)
    answer: dict[str, Any] = {}
    known: list[float] = []
    wrong = []
    for dtype in args.dtypes:
        answer[dtype] = measure_dtype(dtype, [one.pairs for one in asked], args, known)
        distance = answer[dtype]["greatest_distance_of_logits"]
        if distance > TOLERANCE[dtype]:
            wrong.append(f"{dtype}: logits differ by {distance:.2g}")
        print(f"{dtype}: {answer[dtype]}", flush=True)
    return answer, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=50, help="a job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--ceiling-s", type=float, default=2.0, help="seconds for each matrix product")
    parser.add_argument("--quick", action="store_true", help="2 jobs of 10 chunks, 1 round")
    args = parser.parse_args()
    if args.quick:
        args.jobs, args.chunks, args.rounds, args.ceiling_s = 2, 10, 1, 0.3
    # The first dtype's logits are what the others are compared with.
    args.dtypes.sort(key=["float32", "bfloat16"].index)
    need(args.data, "scifact")
    here = machine()
    answer, wrong = measure(args)
    ratios = {
        f"{dtype}: unpadded ÷ padded": round(
            ways["unpadded"]["pairs_per_second"]["median"] / ways["padded"]["pairs_per_second"]["median"], 3
        )
        for dtype, ways in ((dtype, answer[dtype]["ways"]) for dtype in args.dtypes)
    }
    show(ratios)
    drawn = {
        f"{dtype}, {way}": figure["pairs_per_second"]["median"]
        for dtype in args.dtypes
        for way, figure in answer[dtype]["ways"].items()
    }
    plot = bars(f"Forward passes: pairs per second, {args.chunks} SciFact abstracts a job", drawn, unit="pairs/s")
    asked = {name: getattr(args, name) for name in ("jobs", "chunks", "rounds")}
    keep("forward", asked | answer | {"ratios": ratios}, here, quick=args.quick, plot=plot)
    return verdict(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
