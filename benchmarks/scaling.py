"""Do worker processes add up: from 1 to 8 with an engine that only sleeps?

    python benchmarks/scaling.py [--batch-s 0.25] [--jobs 96] [--workers 1 2 4 8] [--quick]

Every worker has the stub engine, which sleeps for its padded tokens as a device would compute: a stated time for each
full batch. The sleep is chosen so that eight devices, not the cores that all of them, Redis and the producer share
here, are the limit; ``cores_busy`` says how much of them everything
on the machine used. Each worker count gets jobs in proportion, is
warmed by jobs that are not counted, and is judged by the ledger's clock from the first claim to the last completion.
The limit of one worker is the engine's own: pairs per second ÷ (tokens of a batch ÷ sleep).
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import psutil
from gear.plot import curves
from gear.report import keep, machine, show, verdict
from gear.workers import deployment, engine_figures

from rerankq import Client, Ranking, RerankJob

BATCH_TOKENS, CHUNK_WORDS, CHUNKS = 4096, 60, 32
PATIENCE_S = 600


def job(name: str, number: int) -> RerankJob:
    """A job with chunks of one length: padding plays no part in this question."""
    chunks = [" ".join(f"{name}{number}-{chunk}-{word}" for word in range(CHUNK_WORDS)) for chunk in range(CHUNKS)]
    return RerankJob(
        id=f"{name}-{number}",
        query=f"question {number}",
        chunks=chunks,
        fusion="model",
        priority="bulk",
        cache="bypass",
    )


def ranked(client: Client, jobs: list[RerankJob]) -> tuple[list[str], float]:
    """Rank jobs; answers what failed, and the seconds from the first claim to the last completion."""
    ids = client.submit_many(jobs)
    faults = [
        f"{one}: {ending}"
        for one, ending in client.as_completed(ids, timeout=PATIENCE_S)
        if not isinstance(ending, Ranking)
    ]
    times = [client.status(one) for one in ids]
    client.forget(*ids)
    return faults, max(one.ended_at or 0 for one in times) - min(one.started_at or math.inf for one in times)


def measure_workers(workers: int, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Pairs per second of so many workers, and how much of each one's device was used."""
    model = f"stub:{args.batch_s / BATCH_TOKENS:.3e}"
    with deployment(workers=workers, model=model, RERANKQ_CONCURRENCY="8") as (client, _):
        faults, _ = ranked(client, [job("warm", number) for number in range(4 * workers)])
        before = engine_figures(client.settings)
        psutil.cpu_percent(None)
        more, seconds = ranked(client, [job("job", number) for number in range(args.jobs * workers)])
        cores = psutil.cpu_percent(None)
        after = engine_figures(client.settings)
    busy = [after[name]["busy_s"] - before[name]["busy_s"] for name in after]
    pairs = args.jobs * workers * CHUNKS
    return {
        "pairs_per_second": round(pairs / seconds, 1),
        "seconds": round(seconds, 2),
        "device_busy": round(sum(busy) / workers / seconds, 3),
        "cores_busy": round(cores / 100, 3),
    }, faults + more


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch-s", type=float, default=0.25, help="seconds that a full batch of the stub takes")
    parser.add_argument("--jobs", type=int, default=96, help="per worker")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--quick", action="store_true", help="1 and 2 workers, 8 jobs each")
    args = parser.parse_args()
    if args.quick:
        args.workers, args.jobs = [1, 2], 8
    here = machine()
    found: dict[int, dict[str, Any]] = {}
    wrong: list[str] = []
    for workers in args.workers:
        found[workers], faults = measure_workers(workers, args)
        wrong += faults
        print(f"{workers} workers: {found[workers]}", flush=True)
    one, rates = args.workers[0], {workers: figure["pairs_per_second"] for workers, figure in found.items()}
    answer = {
        "batch_s": args.batch_s,
        "batch_tokens": BATCH_TOKENS,
        "jobs_per_worker": args.jobs,
        "chunks_per_job": CHUNKS,
        "by_workers": found,
        "ratios": {
            f"{workers} workers ÷ linear": round(rate / (rates[one] * workers / one), 3)
            for workers, rate in rates.items()
        },
    }
    show(answer)
    lines = {"measured": list(rates.items()), "linear": [(n, rates[one] * n / one) for n in rates]}
    plot = curves("Worker processes with a sleeping engine", lines, across="workers", up="pairs/s")
    keep("scaling", answer, here, quick=args.quick, plot=plot)
    return verdict(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
