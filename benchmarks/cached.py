"""How fast is a job whose pairs are all known, against computing them?

    python benchmarks/cached.py [--collection scifact] [--jobs 40] [--chunks 50] [--copies 10] [--rounds 5] [--quick]

Bulk jobs through one worker. First their pairs are computed (timed once); then jobs over the same pairs are submitted
again and again under new ids, in turns with fusion "model" and "default". Two clocks: from the producer's first submit
to its last ranking, and from the worker's first claim to its last completion by the ledger's clock. Afterwards the
worker must have computed nothing more, and the logits must be those that were computed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gear.checks import logits_of
from gear.report import keep, machine, spread
from gear.texts import DATA, need, questions
from gear.workers import deployment, engine_figures

from rerankq import Client, Ranking, RerankJob

PATIENCE_S = 1800
FUSIONS = ("model", "default")


def ranked(client: Client, jobs: Sequence[RerankJob]) -> tuple[list[Ranking], float, float]:
    """Rank jobs; answers the rankings, the producer's seconds and the worker's seconds."""
    began = time.perf_counter()
    ids = client.submit_many(jobs)
    endings = dict(client.as_completed(ids, timeout=PATIENCE_S))
    producer_s = time.perf_counter() - began
    times = [client.status(one) for one in ids]
    worker_s = max(one.ended_at or 0 for one in times) - min(one.started_at or 0 for one in times)
    client.forget(*ids)
    rankings = []
    for one in ids:
        ending = endings[one]
        if isinstance(ending, Exception):
            raise ending
        rankings.append(ending)
    return rankings, producer_s, worker_s


def faults(rankings: Sequence[Ranking], computed: Sequence[Ranking]) -> list[str]:
    known = [logits_of(ranking) for ranking in computed]
    wrong = []
    for number, ranking in enumerate(rankings):
        if ranking.usage.cached_pairs != ranking.usage.pairs:
            wrong.append(f"{ranking.job_id}: {ranking.usage.cached_pairs} of {ranking.usage.pairs} pairs were known")
        # To the bit: a score is remembered, not made again.
        if logits_of(ranking) != known[number % len(known)]:
            wrong.append(f"{ranking.job_id}: other logits than were computed")
    return wrong


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    asked = questions(args.data, args.collection, count=args.jobs, depth=args.chunks)
    pairs = args.jobs * args.chunks
    wrong: list[str] = []
    with deployment(dtype=args.dtype) as (client, _):
        computed, _, computing_s = ranked(client, [one.job(priority="bulk", fusion="model") for one in asked])
        print(f"{pairs} pairs computed in {computing_s:.1f} s: {pairs / computing_s:.1f} pairs/s", flush=True)
        (before,) = engine_figures(client.settings).values()
        paces: dict[str, dict[str, list[float]]] = {name: {"producer": [], "worker": []} for name in FUSIONS}
        # The first round of each warms what workers keep, such as the analysis of chunks, and is not counted.
        for number in range(args.rounds + 1):
            for fusion in FUSIONS:
                jobs = [
                    one.job(id=f"{fusion}-{number}-{copy}-{n}", priority="bulk", fusion=fusion)
                    for copy in range(args.copies)
                    for n, one in enumerate(asked)
                ]
                rankings, producer_s, worker_s = ranked(client, jobs)
                wrong += faults(rankings, computed)
                if number:
                    paces[fusion]["producer"].append(len(jobs) * args.chunks / producer_s)
                    paces[fusion]["worker"].append(len(jobs) * args.chunks / worker_s)
        (after,) = engine_figures(client.settings).values()
    if after["pairs"] != before["pairs"]:
        wrong.append(f"{after['pairs'] - before['pairs']} pairs were computed again")
    figures = {name: {clock: spread(values, 0) for clock, values in clocks.items()} for name, clocks in paces.items()}
    return {
        "computed_pairs_per_second": round(pairs / computing_s, 1),
        "known_pairs_per_second": figures,
        "ratios": {
            f"known ÷ computed, {name}, {clock}'s clock": round(figure["median"] / (pairs / computing_s), 1)
            for name, clocks in figures.items()
            for clock, figure in clocks.items()
        },
    }, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--collection", default="scifact", choices=["scifact", "selqa"])
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--chunks", type=int, default=50)
    parser.add_argument("--copies", type=int, default=10, help="jobs over the same pairs, a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="3 jobs of 20 chunks, 2 rounds")
    args = parser.parse_args()
    if args.quick:
        args.jobs, args.chunks, args.rounds = 3, 20, 2
    need(args.data, args.collection)
    here = machine()
    answer, wrong = measure(args)
    for name, value in {**answer["known_pairs_per_second"], **answer["ratios"]}.items():
        print(f"{name}: {value}")
    for fault in wrong[:20]:
        print(f"WRONG: {fault}")
    asked = {name: getattr(args, name) for name in ("collection", "jobs", "chunks", "copies", "rounds", "dtype")}
    keep("cached" if args.collection == "scifact" else f"cached.{args.collection}", asked | answer, here,
         quick=args.quick)  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
