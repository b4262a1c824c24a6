"""What memory do a producer and a worker take, and does it grow with the jobs?

    python benchmarks/memory.py [--imports 7] [--rounds 6] [--jobs 20] [--stub-jobs 1500] [--quick]

- A producer: seconds and resident memory of a fresh Python that runs ``import rerankq``, beside one that imports
  nothing; the median of several.
- A worker with the bundled model, float32: resident memory when it is ready, and after every round of jobs of 50
  sentences (SelQA).
- A worker with the stub engine, and the client that feeds it: resident memory after every round of many small jobs.
  What grows here grows with the jobs, whatever the model; told as bytes per job between the end of the first third of
  the rounds, when all that is kept has been filled, and the last.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from gear.plot import curves
from gear.report import keep, machine, show, verdict
from gear.texts import DATA, need, questions
from gear.workers import deployment, forget_settings

from rerankq import Client, Ranking, RerankJob
from rerankq.local.processes import SupervisedProcess

MIB = 2**20
PATIENCE_S = 900
FRESH = """
import time; began, cpu = time.perf_counter(), time.process_time()
{work}
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
pages = int(open("/proc/self/statm").read().split()[1])
import resource; print(seconds, cpu, pages * resource.getpagesize())
"""


def fresh(work: str) -> tuple[float, float, float]:
    """Run a line in a fresh Python; answers its seconds, its CPU seconds, and resident memory after it in MiB."""
    ran = subprocess.run([sys.executable, "-c", FRESH.format(work=work)], check=True, capture_output=True, text=True)
    seconds, cpu, resident = map(float, ran.stdout.split())
    return seconds, cpu, resident / MIB


def importing(times: int) -> dict[str, float]:
    fresh("import rerankq")  # the first writes byte code, and reads from the disk
    imports, bare = [fresh("import rerankq") for _ in range(times)], [fresh("pass") for _ in range(times)]
    return {
        "seconds": round(statistics.median(seconds for seconds, _, _ in imports), 3),
        "cpu_seconds": round(statistics.median(cpu for _, cpu, _ in imports), 3),
        "resident_mib": round(statistics.median(resident for _, _, resident in imports), 1),
        "python_alone_mib": round(statistics.median(resident for _, _, resident in bare), 1),
    }


def resident_mib(part: SupervisedProcess) -> float:
    """Return the resident memory of a worker, the guard's child, in bytes."""
    (child,) = psutil.Process(part.pid).children()
    return round(child.memory_info().rss / MIB, 1)


def own_mib() -> float:
    return round(psutil.Process(os.getpid()).memory_info().rss / MIB, 1)


def rank_all(client: Client, jobs: Sequence[RerankJob]) -> list[str]:
    """Rank and forget; answers what went wrong."""
    ids = client.submit_many(jobs)
    faults = [
        f"{one}: {ending}"
        for one, ending in client.as_completed(ids, timeout=PATIENCE_S)
        if not isinstance(ending, Ranking)
    ]
    client.forget(*ids)
    return faults


def growth(before: float, after: float, jobs: int) -> float:
    """Bytes per job."""
    return round((after - before) * MIB / jobs, 1)


def with_model(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    asked = questions(args.data, "selqa", count=args.jobs * args.rounds, depth=20)
    faults: list[str] = []
    with deployment(dtype="float32") as (client, (part,)):
        ready = resident_mib(part)
        after = []
        for number in range(args.rounds):
            some = asked[number * args.jobs : (number + 1) * args.jobs]
            faults += rank_all(client, [one.job(priority="bulk") for one in some])
            after.append(resident_mib(part))
            print(f"worker with the model: {after[-1]} MiB after {(number + 1) * args.jobs} jobs", flush=True)
    return {"ready_mib": ready, "after_rounds_mib": after, "jobs_per_round": args.jobs}, faults


def small_job(number: int) -> RerankJob:
    chunks = [f"chunk {chunk} of job {number}" for chunk in range(5)]
    return RerankJob(query=f"question {number}", chunks=chunks, priority="bulk", fusion="model")


def with_stub(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    faults: list[str] = []
    rounds = max(6, args.rounds)
    workers, clients = [], []
    with deployment(model="stub:0") as (client, (part,)):
        ready = resident_mib(part)
        for number in range(rounds):
            first = number * args.stub_jobs
            faults += rank_all(client, [small_job(one) for one in range(first, first + args.stub_jobs)])
            workers.append(resident_mib(part))
            clients.append(own_mib())
            print(f"stub worker: {workers[-1]} MiB, client: {clients[-1]} MiB", flush=True)
    filled = rounds // 3 - 1
    jobs = (rounds - 1 - filled) * args.stub_jobs
    return {
        "ready_mib": ready,
        "worker_after_rounds_mib": workers,
        "client_after_rounds_mib": clients,
        "jobs_per_round": args.stub_jobs,
        "worker_bytes_per_job": growth(workers[filled], workers[-1], jobs),
        "client_bytes_per_job": growth(clients[filled], clients[-1], jobs),
    }, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--imports", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=20, help="a round, with the model")
    parser.add_argument("--stub-jobs", type=int, default=1500, help="a round, with the stub")
    parser.add_argument("--quick", action="store_true", help="3 imports, 2 rounds of 5 jobs, 200 for the stub")
    args = parser.parse_args()
    if args.quick:
        args.imports, args.rounds, args.jobs, args.stub_jobs = 3, 2, 5, 200
    need(args.data, "selqa")
    here = machine()
    forget_settings()
    answer: dict[str, Any] = {"import_rerankq": importing(args.imports)}
    print(answer["import_rerankq"], flush=True)
    answer["worker"], wrong = with_model(args)
    answer["stub"], more = with_stub(args)
    show(answer)
    lines = {
        "worker": list(enumerate(answer["stub"]["worker_after_rounds_mib"], 1)),
        "client": list(enumerate(answer["stub"]["client_after_rounds_mib"], 1)),
    }
    plot = curves("Resident memory over rounds of small jobs, stub engine", lines, across="rounds", up="MiB")
    keep("memory", answer, here, quick=args.quick, plot=plot)
    return verdict(wrong + more)


if __name__ == "__main__":
    raise SystemExit(main())
