"""How long does an idle worker take for one small job, beyond the forward pass?

    python benchmarks/latency.py [--jobs 100] [--chunks 10] [--quick]

One interactive job at a time through an idle worker: a question with the sentences that BM25 found for it (SelQA). The
producer's time from submit to ranking, less what the ranking says of its inference (``timings_ms.inference``: from the
hand-over of its pairs to the engine's thread to the last logit). Every job is new; nothing is remembered.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from gear.checks import farthest, logits_of
from gear.model_process import engine_process, score_alone
from gear.report import keep, machine, share
from gear.texts import DATA, need, questions
from gear.workers import deployment

from rerankq import Ranking

WARM_UP = 10
TOLERANCE = 1e-5


def figures(values: list[float]) -> dict[str, float]:
    return {name: round(share(values, at), 2) for name, at in (("median", 0.5), ("p95", 0.95), ("greatest", 1.0))}


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    asked = questions(args.data, "selqa", count=args.jobs + WARM_UP, depth=args.chunks)
    rankings: list[Ranking] = []
    total_ms = []
    with deployment(dtype="float32") as (client, _):
        for one in asked:
            began = time.perf_counter()
            ranking = client.rerank(one.query, one.chunks, timeout=60, fusion=args.fusion, cache="bypass")
            total_ms.append((time.perf_counter() - began) * 1000)
            rankings.append(ranking)
    with engine_process() as process:
        alone = process.ask(score_alone, [one.pairs for one in asked])
    wrong = [
        f"logits of job {n} differ by {distance:.1e}"
        for n, (ranking, logits) in enumerate(zip(rankings, alone, strict=True))
        if (distance := farthest(logits_of(ranking), logits)) > TOLERANCE
    ]
    counted, total_ms = rankings[WARM_UP:], total_ms[WARM_UP:]
    inference = [ranking.timings_ms.inference for ranking in counted]
    return {
        "total_ms": figures(total_ms),
        "inference_ms": figures(inference),
        "beyond_inference_ms": figures([all_ - some for all_, some in zip(total_ms, inference, strict=True)]),
        "of_it_until_claimed_ms": figures([ranking.timings_ms.queued for ranking in counted]),
        "of_it_tokenising_ms": figures([ranking.timings_ms.tokenise for ranking in counted]),
    }, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--fusion", default="default")
    parser.add_argument("--quick", action="store_true", help="10 jobs")
    args = parser.parse_args()
    if args.quick:
        args.jobs = 10
    need(args.data, "selqa")
    here = machine()
    answer, wrong = measure(args)
    for name, value in answer.items():
        print(f"{name.replace('_', ' ')}: {value}")
    for fault in wrong[:20]:
        print(f"WRONG: {fault}")
    asked = {"jobs": args.jobs, "chunks": args.chunks, "fusion": args.fusion}
    keep("latency", asked | answer, here, quick=args.quick)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
