"""How fast is a job whose pairs are all known, against computing them, and what does it cost whom?

    python benchmarks/cached.py [--collection scifact] [--jobs 20] [--chunks 50] [--copies 20] [--rounds 5] [--quick]

Bulk jobs through one worker. First their pairs are computed (timed once); then jobs over the same pairs are submitted
again and again under new ids, in turns with fusion "model" and "default". Two clocks: from the producer's first submit
to its last ranking, and from the worker's first claim to its last completion by the ledger's clock. Beside them the
seconds of a core that worker, Redis and producer (one client that submits, waits and reads) spent on a pair: where the
three share fewer cores than they could fill, the clocks show what the machine gives, and one second over the worker's
cost what a worker gives that has a core to itself. Afterwards the worker must have computed nothing more, and the
logits must be those that were computed. Reads /proc: Linux only.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import redis
from gear.checks import logits_of
from gear.report import keep, machine, show, spread, verdict
from gear.texts import DATA, need, questions
from gear.workers import deployment, engine_figures

from rerankq import Client, Ranking, RerankJob

PATIENCE_S = 1800
FUSIONS = ("model", "default")


class Round(NamedTuple):
    """Jobs ranked: by whose clock in how many seconds, and what each process spent, in seconds of a core."""

    rankings: list[Ranking]
    seconds: dict[str, float]
    spent: dict[str, float]


def processes(client: Client) -> dict[str, int]:
    """Name the three processes that share the work."""
    (worker,) = client.workers()
    with redis.Redis.from_url(client.settings.ledger) as ledger:
        server = ledger.info("server")["process_id"]
    # A worker's id is host:process:token.
    return {"worker": int(worker.id.split(":")[-2]), "redis": server, "producer": os.getpid()}


def core_seconds(pid: int) -> float:
    """Seconds of a core that a process has spent, by the kernel's ticks of usually 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ranked(client: Client, jobs: Sequence[RerankJob]) -> Round:
    """Rank jobs, and measure."""
    who = processes(client)
    before = {name: core_seconds(pid) for name, pid in who.items()}
    began = time.perf_counter()
    ids = client.submit_many(jobs)
    endings = dict(client.as_completed(ids, timeout=PATIENCE_S))
    producer_s = time.perf_counter() - began
    spent = {name: core_seconds(pid) - before[name] for name, pid in who.items()}
    times = [client.status(one) for one in ids]
    worker_s = max(one.ended_at or 0 for one in times) - min(one.started_at or 0 for one in times)
    client.forget(*ids)
    rankings = []
    for one in ids:
        ending = endings[one]
        if isinstance(ending, Exception):
            raise ending
        rankings.append(ending)
    return Round(rankings, {"producer": producer_s, "worker": worker_s}, spent)


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
    wrong: list[str] = []
    rounds: dict[str, list[Round]] = {name: [] for name in FUSIONS}
    with deployment(dtype=args.dtype) as (client, _):
        computing = ranked(client, [one.job(priority="bulk", fusion="model") for one in asked])
        computed_pace = args.jobs * args.chunks / computing.seconds["worker"]
        print(f"{args.jobs * args.chunks} pairs computed: {computed_pace:.1f} pairs/s", flush=True)
        (before,) = engine_figures(client.settings).values()
        # The first round of each warms what workers keep, such as the analysis of chunks, and is not counted.
        for number in range(args.rounds + 1):
            for fusion in FUSIONS:
                jobs = [
                    one.job(id=f"{fusion}-{number}-{copy}-{n}", priority="bulk", fusion=fusion)
                    for copy in range(args.copies)
                    for n, one in enumerate(asked)
                ]
                one_round = ranked(client, jobs)
                wrong += faults(one_round.rankings, computing.rankings)
                rounds[fusion] += [one_round._replace(rankings=[])] if number else []
        (after,) = engine_figures(client.settings).values()
    if after["pairs"] != before["pairs"]:
        wrong.append(f"{after['pairs'] - before['pairs']} pairs were computed again")
    pairs = args.jobs * args.copies * args.chunks
    rates = {
        name: {clock: spread([pairs / one.seconds[clock] for one in ran], 0) for clock in ran[0].seconds}
        for name, ran in rounds.items()
    }
    costs = {
        name: {who: spread([one.spent[who] / pairs * 1e6 for one in ran], 1) for who in ran[0].spent}
        for name, ran in rounds.items()
    }
    return {
        "computed_pairs_per_second": round(computed_pace, 1),
        "known_pairs_per_second": rates,
        "microseconds_of_a_core_per_known_pair": costs,
        "known_pairs_per_second_of_a_workers_core": {
            name: round(1e6 / cost["worker"]["median"]) for name, cost in costs.items()
        },
        "ratios": {
            f"known ÷ computed, {name}, {clock}'s clock": round(figure["median"] / computed_pace, 1)
            for name, clocks in rates.items()
            for clock, figure in clocks.items()
        },
    }, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--collection", default="scifact", choices=["scifact", "selqa"])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--chunks", type=int, default=50)
    parser.add_argument("--copies", type=int, default=20, help="jobs over the same pairs, a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="3 jobs of 20 chunks, 2 rounds")
    args = parser.parse_args()
    if args.quick:
        args.jobs, args.chunks, args.rounds = 3, 20, 2
    need(args.data, args.collection)
    here = machine()
    answer, wrong = measure(args)
    show(answer)
    asked = {name: getattr(args, name) for name in ("collection", "jobs", "chunks", "copies", "rounds", "dtype")}
    keep("cached" if args.collection == "scifact" else f"cached.{args.collection}", asked | answer, here,
         quick=args.quick)  # fmt: skip
    return verdict(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
