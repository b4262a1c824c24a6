"""Does a ranking depend on the company it is scored in, and how full are the batches that many producers make?

    python benchmarks/together.py [--jobs 400] [--producers 8] [--dtype float32] [--quick]

Eight producers, a process each, start at once and submit 400 jobs of 5 to 200 chunks between them, interactive and
bulk: questions with the sentences that BM25 found for them (SelQA), some abstracts (SciFact) and articles of Chinese
law (STARD) among them. One worker. Every ranking is then compared with the one that its job gets alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

from gear.checks import TIE, differs, farthest, logits_of
from gear.model_process import batch_tokens, engine_process, score_alone
from gear.report import keep, machine, share, spread
from gear.texts import DATA, Question, chunks, need, questions
from gear.workers import deployment, engine_figures

from rerankq import Client, Ranking, RerankJob
from rerankq.settings import Settings

FEWEST, MOST = 5, 200
# Long texts among short ones: the share of chunks that comes from another collection.
STRANGERS = 0.03
PATIENCE_S = 3600


def mixed_questions(data: Path, count: int, dice: random.Random) -> list[Question]:
    """Questions with 5 to 200 chunks, as many small as large jobs on a logarithmic scale, strangers among them."""
    asked = questions(data, "selqa", count=count, depth=FEWEST)
    sentences = chunks(data, "selqa")
    strangers = chunks(data, "scifact") + chunks(data, "stard-zh")
    mixed = []
    for one in asked:
        size = round(FEWEST * (MOST / FEWEST) ** dice.random())
        found = [*one.chunks[:size], *dice.sample(sentences, max(0, size - len(one.chunks)))]
        texts = tuple(dice.choice(strangers) if dice.random() < STRANGERS else chunk for chunk in found)
        mixed.append(Question(one.query, texts))
    return mixed


def jobs_of(asked: Sequence[Question], dice: random.Random) -> list[RerankJob]:
    return [
        one.job(id=f"job-{n}", fusion="model", priority=dice.choice(["interactive", "bulk"]))
        for n, one in enumerate(asked)
    ]


_start: Barrier


def _line_up(start: Any) -> None:
    global _start  # noqa: PLW0603
    _start = start


def produce(settings: Settings, jobs: list[RerankJob], seed: int) -> list[tuple[Ranking | Exception, float]]:
    """One producer: submit in bursts, read as they end. Answers each ending with the seconds since its submission."""
    dice = random.Random(seed)
    with Client(settings) as client:
        _start.wait(60)
        submitted: dict[str, float] = {}
        rest = list(jobs)
        while rest:
            burst = [rest.pop() for _ in range(min(len(rest), dice.choice([1, 1, 2, 5, 20])))]
            submitted |= dict.fromkeys(client.submit_many(burst), time.monotonic())
        endings = client.as_completed(submitted, timeout=PATIENCE_S)
        return [(ending, time.monotonic() - submitted[one]) for one, ending in endings]


def all_at_once(
    settings: Settings, jobs: list[RerankJob], producers: int
) -> tuple[list[tuple[Ranking | Exception, float]], float]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(producers, spawn, _line_up, (spawn.Barrier(producers + 1),)) as pool:
        barrier = pool._initargs[0]
        running = [pool.submit(produce, settings, jobs[n::producers], n) for n in range(producers)]
        barrier.wait(60)
        began = time.monotonic()
        return [ending for one in running for ending in one.result()], time.monotonic() - began


def fullness(figures: dict[str, Any], rankings: Sequence[Ranking], budget: int) -> dict[str, float]:
    """How full the batches were, of the worker's own figures and the tokens that the rankings say."""
    real = sum(ranking.usage.tokens for ranking in rankings)
    padded, batches = real * figures["padding"], figures["batches"]
    return {
        "batches": batches,
        "pairs_per_batch": round(figures["pairs"] / batches, 1),
        "real_tokens_per_batch": round(real / batches, 1),
        "padded_tokens_per_batch": round(padded / batches, 1),
        "padded_tokens_per_batch ÷ budget": round(padded / batches / budget, 3),
        "tokens_computed ÷ real_tokens": figures["padding"],
        "device_busy_s": figures["busy_s"],
    }


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    dice = random.Random(args.seed)
    asked = mixed_questions(args.data, args.jobs, dice)
    jobs = jobs_of(asked, dice)
    print(f"{len(jobs)} jobs, {sum(len(job.chunks) for job in jobs)} pairs, {args.producers} producers", flush=True)
    with deployment(dtype=args.dtype) as (client, _):
        endings, seconds = all_at_once(client.settings, jobs, args.producers)
        (figures,) = engine_figures(client.settings).values()
    rankings = {ranking.job_id: ranking for ranking, _ in endings if isinstance(ranking, Ranking)}
    wrong = [f"{ending}" for ending, _ in endings if isinstance(ending, Exception)]
    wrong += [f"{job.id} has no ranking" for job in jobs if job.id not in rankings]
    print(f"{len(rankings)} rankings in {seconds:.1f} s; now each job alone", flush=True)
    with engine_process(args.dtype) as process:
        alone = process.ask(score_alone, [one.pairs for one in asked])
        budget = process.ask(batch_tokens)
    answers = [(rankings[job.id], logits) for job, logits in zip(jobs, alone, strict=True) if job.id in rankings]
    if args.dtype == "float32":
        wrong += [f"{one.job_id}: {fault}" for one, logits in answers if (fault := differs(one, logits, tie=TIE))]
    waits = {"interactive": [], "bulk": []}  # type: dict[str, list[float]]
    priority = {job.id: job.priority for job in jobs}
    for ending, waited in endings:
        if isinstance(ending, Ranking):
            waits[priority[ending.job_id]].append(waited)
    return {
        "rankings": len(rankings),
        "rankings_as_alone": len(jobs) - len(wrong),
        "tie": TIE,
        "greatest_distance_of_logits": max(farthest(logits_of(one), logits) for one, logits in answers),
        "pairs": sum(one.usage.pairs for one, _ in answers),
        "seconds": round(seconds, 1),
        "jobs_per_second": round(len(jobs) / seconds, 2),
        "pairs_per_second": round(sum(one.usage.pairs for one, _ in answers) / seconds, 1),
        "batch_budget": budget,
        "batches": fullness(figures, [one for one, _ in answers], budget),
        "chunks_per_job": spread([len(job.chunks) for job in jobs]),
        "tokens_per_pair": spread([one.usage.tokens / one.usage.pairs for one, _ in answers], 1),
        "seconds_to_ranking": {
            name: {"median": round(share(times, 0.5), 2), "p95": round(share(times, 0.95), 2)}
            for name, times in waits.items()
            if times
        },
    }, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--producers", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="24 jobs")
    args = parser.parse_args()
    if args.quick:
        args.jobs = 24
    need(args.data, "selqa", "scifact", "stard-zh")
    here = machine()
    answer, wrong = measure(args)
    for name, value in answer.items():
        print(f"{name.replace('_', ' ')}: {value}")
    for fault in wrong[:20]:
        print(f"WRONG: {fault}")
    keep("together", {"jobs": args.jobs, "producers": args.producers, "dtype": args.dtype, **answer}, here,
         quick=args.quick)  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
