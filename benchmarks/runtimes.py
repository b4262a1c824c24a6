"""Which runtime and precision is fastest on this CPU, and what does less precision cost in nDCG@10?

    python benchmarks/runtimes.py [--chunks 8] [--rounds 6] [--judged 24] [--depth 20] [--compiled] [--quick]

The bundled model through torch (unpadded batches and padded ones) and OpenVINO, in every precision that each has, over
the SciFact abstracts that BM25 found for claims, tokenised beforehand. Each way has a process of its own with the
environment that workers have, but for two that keep glibc's own habits ("plain malloc"). They take turns in every
round, over pairs that none has seen; a ratio is the median of those of the rounds, to torch in float32. All float32
logits are compared. Then the precisions rank judged claims. --compiled adds torch.compile, which takes minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from gear.model_process import ModelProcess, Pairs
from gear.plot import bars
from gear.report import keep, machine, show, spread, verdict
from gear.texts import DATA, Judged, judged, need

from rerankq.rescoring.metrics import mean, ndcg, trec_order
from rerankq_worker.engine import Engine, allocator_environment, load
from rerankq_worker.engine.scheduling.batching import plan_all


class Way(NamedTuple):
    runtime: str
    dtype: str
    padded: bool | None = None
    kept: bool = True  # memory, by the allocator
    compiled: bool = False


BASE, FASTEST_EXACT = "torch float32", "openvino float32"
WAYS = {
    BASE: Way("torch", "float32"),
    "torch float32, padded": Way("torch", "float32", padded=True),
    "torch float32, plain malloc": Way("torch", "float32", kept=False),
    "torch bfloat16": Way("torch", "bfloat16"),
    FASTEST_EXACT: Way("openvino", "float32"),
    "openvino bfloat16": Way("openvino", "bfloat16"),
    "openvino bfloat16, plain malloc": Way("openvino", "bfloat16", kept=False),
    "openvino int8": Way("openvino", "int8"),
}
COMPILED = {
    "torch float32, compiled": Way("torch", "float32", padded=True, compiled=True),
    "torch bfloat16, compiled": Way("torch", "bfloat16", padded=True, compiled=True),
}
REDUCED = ("openvino bfloat16", "openvino int8")
TOLERANCE = 1e-4

_engine: Engine


def load_model(way: Way) -> None:
    global _engine  # noqa: PLW0603
    _engine = load("bundled", "cpu", way.dtype, runtime=way.runtime, padded=way.padded)
    if way.compiled:
        import torch  # noqa: PLC0415 - seconds, paid only when a model is loaded

        across: Any = vars(_engine)["_run"]
        across.backbone = torch.compile(across.backbone, dynamic=True)


def score(pairs: Pairs) -> tuple[list[float], int, float]:
    """Score pairs of one query; answers logits, real tokens, and the seconds of the forward passes alone."""
    tokenised = _engine.tokenise(pairs[0][0], [chunk for _, chunk in pairs])
    lengths = [pair.length for pair in tokenised]
    logits = [0.0] * len(pairs)
    began = time.perf_counter()
    for batch in plan_all(lengths, _engine.max_batch_tokens, padded=_engine.padded):
        answers = _engine.forward([tokenised[position] for position in batch]).tolist()
        for position, logit in zip(batch.tolist(), answers, strict=True):
            logits[position] = logit
    return logits, sum(lengths), time.perf_counter() - began


def rate(
    processes: Mapping[str, ModelProcess], asked: Sequence[Judged], start_s: Mapping[str, float]
) -> dict[str, Any]:
    """Let all take turns; answers what each did in a second, and the greatest distance of float32 logits."""
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    tokens, pairs, distance = [], [], 0.0
    first_s = {name: process.ask(score, asked[0].question.pairs)[2] for name, process in processes.items()}
    for number, one in enumerate(asked[1:]):
        logits = {}
        for name in list(processes) if number % 2 else list(processes)[::-1]:
            logits[name], real, took = processes[name].ask(score, one.question.pairs)
            seconds[name].append(took)
        tokens.append(real)
        pairs.append(len(one.names))
        exact = [logits[name] for name in processes if "float32" in name]
        distance = max([distance, *(abs(a - b) for other in exact for a, b in zip(other, exact[0], strict=True))])
    return {
        "greatest_distance_of_float32_logits": distance,
        "ways": {
            name: {
                "tokens_per_second": spread([real / took for real, took in zip(tokens, times, strict=True)], 0),
                "pairs_per_second": spread([many / took for many, took in zip(pairs, times, strict=True)]),
                f"times_{BASE}": spread([base / took for base, took in zip(seconds[BASE], times, strict=True)]),
                "load_s": round(start_s[name], 1),
                "first_pass_s": round(first_s[name], 2),
            }
            for name, times in seconds.items()
        },
    }


def quality(processes: Mapping[str, ModelProcess], asked: Sequence[Judged]) -> dict[str, Any]:
    """Rank judged questions in every precision."""
    found = {}
    for name in (FASTEST_EXACT, *REDUCED):
        scores = [dict(zip(one.names, processes[name].ask(score, one.question.pairs)[0], strict=True)) for one in asked]
        found[name] = [ndcg(trec_order(mine), one.grades) for mine, one in zip(scores, asked, strict=True)]
        print(f"nDCG@10 {name}: {mean(found[name]):.4f}", flush=True)
    exact = found[FASTEST_EXACT]
    return {
        name: {
            "ndcg@10": round(mean(values) or 0, 4),
            "less_than_float32": round((mean(exact) or 0) - (mean(values) or 0), 4),
            "questions_that_changed": sum(a != b for a, b in zip(values, exact, strict=True)),
        }
        for name, values in found.items()
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    ways = WAYS | (COMPILED if args.compiled else {})
    start_s = {}
    with ExitStack() as running:
        processes = {}
        for name, way in ways.items():
            began = time.perf_counter()
            environment = allocator_environment() if way.kept else {}
            processes[name] = running.enter_context(ModelProcess(load_model, way, environment=environment))
            start_s[name] = time.perf_counter() - began
        timed = judged(args.data, "scifact", count=args.rounds + 1, depth=args.chunks)
        answer = rate(processes, timed, start_s)
        show({name: figures[f"times_{BASE}"] for name, figures in answer["ways"].items()})
        ranked = judged(args.data, "scifact", count=args.judged, depth=args.depth)
        return answer | {"quality": quality(processes, ranked)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--chunks", type=int, default=8, help="a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--judged", type=int, default=24, help="claims ranked in every precision")
    parser.add_argument("--depth", type=int, default=20, help="chunks ranked for each")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 4 chunks, 2 judged claims of 12")
    args = parser.parse_args()
    if args.quick:
        args.chunks, args.rounds, args.judged, args.depth = 4, 2, 2, 12
    need(args.data, "scifact")
    here = machine()
    answer = measure(args)
    distance = answer["greatest_distance_of_float32_logits"]
    wrong = [f"float32 logits differ by {distance:.2g}"] if distance > TOLERANCE else []
    show(answer["quality"])
    drawn = {name: figures[f"times_{BASE}"]["median"] for name, figures in answer["ways"].items()}
    plot = bars("Forward passes on this CPU", drawn, unit=f"times {BASE}")
    asked = {name: getattr(args, name) for name in ("chunks", "rounds", "judged", "depth")}
    keep("runtimes", asked | answer, here, quick=args.quick, plot=plot)
    return verdict(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
