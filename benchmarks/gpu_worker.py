"""On a GPU: does a worker, end to end, keep the device as busy as the engine alone does?

    python benchmarks/gpu_worker.py [--shape bge-base] [--jobs 100] [--chunks 100] [--rounds 3]
    python benchmarks/gpu_worker.py --device cpu --tiny      # tries the code where there is no GPU

Bulk jobs through an embedded Redis and one worker in bfloat16, in turns with the same pairs through the same engine
and batcher in a process of its own, tokenised beforehand: no queue, no ledger, no cache, no fusion. The model has the
shape of a well-known reranker, random weights, and a tokeniser whose words are one token each; texts have lengths as
real ones have. Needs rerankq with its worker's packages. Inside it is checked that both ways give the same logits.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gear.checks import farthest, logits_of
from gear.model_process import engine_process, score_tokenised
from gear.plot import bars
from gear.random_models import LONGEST, QUERY_TOKENS, SHAPES, real_lengths, text_of, write_checkpoint
from gear.report import keep, machine, show, spread, verdict
from gear.texts import Question
from gear.workers import deployment, engine_figures

from rerankq import Chunk, Client, Ranking

WORKER, ENGINE = "worker, end to end", "engine alone"
# In bf16, over batches of other shapes.
TOLERANCE = 0.25
PATIENCE_S = 600


def questions_of(count: int, chunks: int, seed: int) -> list[Question]:
    dice = np.random.default_rng(seed)
    lengths = iter(dice.permutation(real_lengths(count * chunks, LONGEST)).tolist())
    return [
        Question(
            text_of(QUERY_TOKENS, dice),
            tuple(Chunk(text=text_of(next(lengths) - QUERY_TOKENS - 4, dice)) for _ in range(chunks)),
        )
        for _ in range(count)
    ]


def through_worker(client: Client, asked: list[Question]) -> tuple[list[list[float]], float]:
    began = time.perf_counter()
    ids = client.submit_many(one.job(priority="bulk", fusion="model", cache="bypass") for one in asked)
    ended = dict(client.as_completed(ids, timeout=PATIENCE_S))
    seconds = time.perf_counter() - began
    client.forget(*ids)
    rankings = [ended[one] for one in ids]
    for ranking in rankings:
        if not isinstance(ranking, Ranking):
            raise ranking
    return [logits_of(ranking) for ranking in rankings], seconds


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    write_checkpoint(args.shape, folder, args.device, tiny=args.tiny)
    rates: dict[str, list[float]] = {WORKER: [], ENGINE: []}
    distances = []
    environment = {"RERANKQ_DEVICE": args.device}
    with (
        deployment(model=str(folder), dtype="bfloat16", **environment) as (client, _),
        engine_process("bfloat16", model=str(folder), device=args.device) as process,
    ):
        for number in range(args.rounds + 1):
            asked = questions_of(args.jobs, args.chunks, number)
            logits, seconds = through_worker(client, asked)
            alone, alone_s = process.ask(score_tokenised, [one.pairs for one in asked])
            distances.append(max(farthest(one, other) for one, other in zip(logits, alone, strict=True)))
            if number:  # the first round warms both
                rates[WORKER].append(args.jobs * args.chunks / seconds)
                rates[ENGINE].append(args.jobs * args.chunks / alone_s)
                print(f"round {number}: {rates[WORKER][-1]:.0f} and {rates[ENGINE][-1]:.0f} pairs/s", flush=True)
        (worker,) = engine_figures(client.settings).values()
    wrong = [f"logits differ by {max(distances):.2g}"] if max(distances) > TOLERANCE else []
    medians = {way: statistics.median(values) for way, values in rates.items()}
    return {
        "engine": worker,
        "pairs_per_second": {way: spread(values) for way, values in rates.items()},
        "logits_from_least_to_greatest": round(max(map(max, alone)) - min(map(min, alone)), 3),
        "greatest_distance_of_logits": max(distances),
        "ratios": {f"{WORKER} ÷ {ENGINE}": round(medians[WORKER] / medians[ENGINE], 3)},
    }, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="bge-base", choices=list(SHAPES))
    parser.add_argument("--jobs", type=int, default=100, help="a round")
    parser.add_argument("--chunks", type=int, default=100, help="a job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--tiny", action="store_true", help="a small model and few pairs: tries the code; the figures mean nothing"
    )
    parser.add_argument("--quick", action="store_true", help="on a CPU, tiny")
    args = parser.parse_args()
    if args.quick:
        args.device, args.tiny = "cpu", True
    if args.tiny:
        args.jobs, args.chunks, args.rounds = 4, 10, 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no GPU: needs one that computes bfloat16; --device cpu --tiny tries the code")
        return 0
    here = machine()
    if args.device == "cuda":
        here |= {"gpu": torch.cuda.get_device_name(0)}
    with tempfile.TemporaryDirectory() as folder:
        answer, wrong = measure(args, Path(folder) / args.shape)
    show(answer)
    medians = {way: figure["median"] for way, figure in answer["pairs_per_second"].items()}
    plot = bars(f"Pairs per second in bf16, shape of {args.shape}", medians, unit="pairs/s")
    asked = {name: getattr(args, name) for name in ("shape", "jobs", "chunks", "rounds", "device")}
    keep("gpu_worker", asked | answer, here, quick=args.tiny or args.device == "cpu", plot=plot)
    return verdict(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
