"""What does a job cost the ledger and the queue when 1 000 to 1 000 000 wait?

    python benchmarks/depth.py [--depths 1000 10000 100000 1000000] [--probes 2000] [--worker-s 5] [--quick]

An own Redis without persistence, minimal jobs of one pair, one tenant. At every depth: jobs are submitted, taken off
the backlog, claimed, completed and forgotten, and the ledger is swept, by the calls that clients and workers make, 100
a round trip. Two clocks: the caller's, and the server's CPU time (``INFO cpu``), which a busy machine hardly changes.
Medians of a few probings. Then one worker with a stub engine that takes no time ranks from the backlog for a while: its
jobs per second, through Celery's doorbells, and its CPU time. Memory of Redis per waiting job is measured as well.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, TypeVar

import psutil
from gear.plot import curves
from gear.report import keep, machine, show
from gear.workers import forget_settings, kept_running, until, worker_part

from rerankq.client.routing import Route
from rerankq.client.submission import prepare
from rerankq.contract import ModelName, RankedChunk, Ranking, RerankJob
from rerankq.ledger import Call, Claim, NewJob, calls, connect
from rerankq.ledger.limits import LedgerLimits
from rerankq.ledger.runner import Ledger
from rerankq.local.embedded import EmbeddedRedis
from rerankq.local.stack import settings_for
from rerankq.settings import Settings

AT_ONCE = 100
MODEL, QUEUES = "stub:0", ["rerankq.bulk"]
JOB = RerankJob(query="how deep is the sea?", chunks=["Its mean depth is about 3700 metres."], priority="bulk")
# Far above what a minimal job takes (measured: 2.0 KB); a depth that does not fit is left out.
BYTES_PER_JOB = 4_000
SWEEPS = 50
WHOLE, SWEEP = "a whole job", "a sweep"
PROBINGS = 5
CLOCKS = {"caller_us": "the caller's clock", "server_us": "the server's CPU"}
Answer = TypeVar("Answer")


class Backlog:
    """A ledger, and as many waiting jobs in it as wanted."""

    def __init__(self, settings: Settings) -> None:
        # The window is full: as for every job that joins a backlog, and no doorbell is sent that no worker receives.
        self.limits = LedgerLimits.of(settings)._replace(doorbell_window=0)
        self.ledger = Ledger(connect(settings.ledger))
        self.redis = self.ledger.redis
        self._entry = prepare(JOB, Route(MODEL, "", ""), settings)
        self._numbers = count()

    def entries(self, jobs: int) -> list[NewJob]:
        return [self._entry._replace(id=f"job-{next(self._numbers)}") for _ in range(jobs)]

    def ask(self, wanted: Iterable[Call[Answer]]) -> list[Answer]:
        """Ask calls, so many a round trip; raises what was refused."""
        answers: list[Answer] = []
        for some in _in_parts(wanted):
            for answer in self.ledger.ask_all(some):
                if isinstance(answer, Exception):
                    raise answer
                answers.append(answer)
        return answers

    def waiting(self) -> int:
        return self.ledger.overview(self.limits.lease_policy).pairs_waiting

    def fill(self, depth: int) -> None:
        self.ask(calls.submit(new_job, self.limits) for new_job in self.entries(depth - self.waiting()))

    def cpu_s(self) -> float:
        used = self.redis.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    def memory(self) -> int:
        return int(self.redis.info("memory")["used_memory"])


def _in_parts(wanted: Iterable[Call[Answer]]) -> Iterator[Sequence[Call[Answer]]]:
    rest = iter(wanted)
    while some := list(islice(rest, AT_ONCE)):
        yield some


def timed(backlog: Backlog, work: Callable[[], Sequence[Answer]]) -> tuple[Sequence[Answer], dict[str, float]]:
    """Do some work; answers what it gives, and microseconds per answer: the caller's, and the server's CPU time."""
    cpu, began = backlog.cpu_s(), time.perf_counter()
    answers = work()
    seconds, cpu = time.perf_counter() - began, backlog.cpu_s() - cpu
    return answers, {"caller_us": seconds / len(answers) * 1e6, "server_us": cpu / len(answers) * 1e6}


def ranking_of(job_id: str) -> Ranking:
    chunk = RankedChunk(id="0", index=0, rank=1, score=1.0, model_logit=1.0)
    return Ranking(job_id=job_id, model=ModelName(name=MODEL, fingerprint="f"), chunks=[chunk])


def sent(backlog: Backlog, jobs: int) -> list[str]:
    """Take jobs off the backlog as sweepers do: a window at a time, oldest first."""
    ids: list[str] = []
    while len(ids) < jobs:
        most = min(256, jobs - len(ids))
        doorbells = backlog.ledger.ask(
            calls.refill_window(QUEUES, backlog.limits._replace(doorbell_window=10**9), most=most)
        )
        if not doorbells:
            raise RuntimeError(f"the backlog gave {len(ids)} jobs, not {jobs}")
        ids += [doorbell.id for doorbell in doorbells]
    return ids


def probe(backlog: Backlog, probes: int) -> dict[str, dict[str, float]]:
    """Put so many jobs through all that happens to a job; microseconds per job and step, by both clocks."""
    limits, ask = backlog.limits, backlog.ask
    steps: dict[str, dict[str, float]] = {}
    entries = backlog.entries(probes)
    _, steps["submit"] = timed(backlog, lambda: ask(calls.submit(new_job, limits) for new_job in entries))
    ids, steps["refill the window"] = timed(backlog, lambda: sent(backlog, probes))
    claims, steps["claim"] = timed(backlog, lambda: ask(calls.claim(one, "bench", limits) for one in ids))
    held = [claim for claim in claims if isinstance(claim, Claim)]
    if len(held) != len(ids):
        raise RuntimeError(f"{len(ids) - len(held)} jobs of the backlog could not be claimed")
    ends = [calls.complete(one.id, one.fence, ranking_of(one.id), limits) for one in held]
    _, steps["complete"] = timed(backlog, lambda: ask(ends))
    _, steps["forget"] = timed(backlog, lambda: ask(calls.forget(one.id, limits) for one in held))
    sweep = calls.sweep("bench", limits)
    _, steps[SWEEP] = timed(backlog, lambda: [backlog.ledger.ask(sweep) for _ in range(SWEEPS)])
    return steps


def probed(backlog: Backlog, probes: int) -> dict[str, dict[str, float]]:
    """Probe a few times; medians."""
    found = [probe(backlog, probes // PROBINGS) for _ in range(PROBINGS)]
    steps = {
        step: {clock: round(statistics.median(one[step][clock] for one in found), 1) for clock in costs}
        for step, costs in found[0].items()
    }
    whole = {clock: round(sum(costs[clock] for step, costs in steps.items() if step != SWEEP), 1) for clock in CLOCKS}
    return {WHOLE: whole, **steps}


def worker_pace(backlog: Backlog, settings: Settings, seconds: float) -> dict[str, float]:
    """Jobs per second that one worker ranks from the backlog, once it is under way, and its CPU time for each."""
    before = backlog.waiting()
    with kept_running(worker_part(settings, "w0")) as part:
        until(lambda: backlog.waiting() < before - 50, [part], seconds=60)
        (process,) = psutil.Process(part.pid).children()
        began, at_first, cpu = time.perf_counter(), backlog.waiting(), _cpu_s(process)
        # So long, or until little is left: an empty queue measures nothing.
        while (passed := time.perf_counter() - began) < seconds and backlog.waiting() > at_first / 2:
            time.sleep(0.05)
        jobs = at_first - backlog.waiting()
        return {"jobs_per_second": round(jobs / passed, 1), "cpu_us": round((_cpu_s(process) - cpu) / jobs * 1e6)}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(depths: Sequence[int], probes: int, worker_s: float) -> dict[int, dict[str, Any]]:
    forget_settings()
    found: dict[int, dict[str, Any]] = {}
    with EmbeddedRedis() as redis:
        settings = settings_for(redis.url, Settings(_env_file=None, model=MODEL))
        backlog = Backlog(settings)
        empty = backlog.memory()
        probe(backlog, 200)
        for depth in depths:
            free = psutil.virtual_memory().available
            if depth * BYTES_PER_JOB > free:
                print(f"left out: {depth} jobs would need more than the {free >> 20} MiB of memory that are free")
                continue
            backlog.fill(depth)
            memory = (backlog.memory() - empty) / backlog.waiting()
            found[depth] = {"bytes_per_job": round(memory), "steps": probed(backlog, probes)}
            if worker_s:
                found[depth]["worker"] = worker_pace(backlog, settings, worker_s)
            print(f"{depth} waiting: {found[depth]}", flush=True)
    return found


def ratios(found: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Each step's cost at the greatest depth ÷ that at the least: 1 is flat."""
    least, most = min(found), max(found)
    steps = {
        f"{step}, {CLOCKS[clock]}": found[most]["steps"][step][clock] / cost
        for step, costs in found[least]["steps"].items()
        for clock, cost in costs.items()
    }
    workers = [found[depth].get("worker") for depth in (least, most)]
    whole = {}
    if all(workers):
        whole["a worker, its CPU time"] = workers[1]["cpu_us"] / workers[0]["cpu_us"]
        whole["a worker, time per job"] = workers[0]["jobs_per_second"] / workers[1]["jobs_per_second"]
    return {f"{name}: at {most} ÷ at {least}": round(ratio, 2) for name, ratio in (steps | whole).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--probes", type=int, default=2000, help="jobs put through every step, at each depth")
    parser.add_argument("--worker-s", type=float, default=5, help="seconds for the worker at each depth; 0 = none")
    parser.add_argument("--quick", action="store_true", help="1 000 and 10 000, 300 probes, 2 s")
    args = parser.parse_args()
    if args.quick:
        args.depths, args.probes, args.worker_s = [1_000, 10_000], 300, 2
    here = machine()
    found = measure(sorted(args.depths), args.probes, args.worker_s)
    if not found:
        return 2
    answer = {"probes": args.probes, "by_depth": found, "ratios": ratios(found)}
    show(answer["ratios"])
    lines = {
        step: [(n, one["steps"][step]["server_us"]) for n, one in found.items()] for step in found[min(found)]["steps"]
    }
    plot = curves("The ledger's cost of a job: CPU time of the server", lines, across="jobs waiting", up="µs")
    keep("depth", answer, here, quick=args.quick, plot=plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
