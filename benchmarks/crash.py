"""Do all rankings arrive, and rightly, when workers are killed, paused and poisoned under them?

    python benchmarks/crash.py [--jobs 200] [--chunks 40] [--lease 8] [--quick]

Two workers with the bundled model in float32 rank questions with the sentences that BM25 found for them (SelQA). In the
middle one is killed with SIGKILL and started again; the other is stopped with SIGSTOP until all its leases have expired
and one of its jobs has gone to its neighbour, then continued, so that its late answers must be refused; then a job is
added that kills whichever worker reads it. A supervisor starts again what dies. Every ranking is compared with the one
that its job gets alone; the poison must end dead.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import redis
from gear.checks import TIE, differs
from gear.model_process import engine_process, score_alone
from gear.report import keep, machine
from gear.texts import DATA, need, questions
from gear.workers import POISONABLE, deployment, python_path, until

from rerankq import Client, JobDead, Ranking, RerankJob
from rerankq.ledger import keys
from rerankq.local.processes import SupervisedProcess

POISON = RerankJob(id="poison", query="what kills?", chunks=["poison", "harmless"], fusion="model")
# Shares of the jobs that have ended when something happens to a worker.
KILL_AT, PAUSE_AT = 0.1, 0.3
PATIENCE_S = 1800.0


class Trace(NamedTuple):
    """What the ledger holds of a job."""

    state: str
    owner: str
    claims: int
    started: float


class Scene:
    """The workers, what the ledger says of the jobs, and the outcomes that a producer receives."""

    def __init__(self, client: Client, parts: list[SupervisedProcess], ids: list[str]) -> None:
        self.client = client
        self.parts = parts
        self.ids = ids
        self.endings: dict[str, Ranking | Exception] = {}
        self.ledger = redis.Redis.from_url(client.settings.ledger, decode_responses=True)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def traces(self, ids: Sequence[str] | None = None) -> dict[str, Trace]:
        wanted = self.ids if ids is None else ids
        pipe = self.ledger.pipeline(transaction=False)
        for one in wanted:
            pipe.hmget(keys.JOB(one), "state", "owner", "claims", "started")
        return {
            one: Trace(state or "", owner or "", int(claims or 0), float(started or 0))
            for one, (state, owner, claims, started) in zip(wanted, pipe.execute(), strict=True)
        }

    def held_by(self, worker: str) -> list[str]:
        return [one for one, trace in self.traces().items() if trace.state == "running" and worker in trace.owner]

    def is_up(self, part: SupervisedProcess) -> bool:
        """Whether a worker has loaded its model and said so."""
        name = name_of(part)
        return bool(name) and any(name in worker.id for worker in self.client.workers())

    def clock(self) -> float:
        """Read the ledger's clock, in seconds."""
        seconds, micros = self.ledger.time()
        return float(seconds) + float(micros) / 1e6

    def until(self, holds: Callable[[], bool]) -> None:
        until(holds, self.parts, seconds=PATIENCE_S, mortal=True)

    def until_share(self, ended: float) -> None:
        self.until(lambda: len(self.endings) >= ended * len(self.ids))

    def amid_the_work(self, holds: Callable[[], bool]) -> None:
        """Wait for what can only come true while there is work."""
        self.until(lambda: holds() or len(self.endings) == len(self.ids))
        if not holds():
            raise RuntimeError("all jobs had ended by then: ask for more, or longer ones")

    def _listen(self) -> None:
        for one, ending in self.client.as_completed(self.ids, timeout=PATIENCE_S):
            self.endings[one] = ending


def name_of(part: SupervisedProcess) -> str:
    """Return the unique part of a worker's name: its process id, that of the guard's child.

    Empty while the worker is down.
    """
    children = psutil.Process(part.pid).children() if part.pid else []
    return f":{children[0].pid}:" if children else ""


def send(part: SupervisedProcess, number: int) -> None:
    if part.pid is None:
        raise RuntimeError(f"{part.name} is down")
    os.killpg(part.pid, number)


def kill_one(scene: Scene, part: SupervisedProcess) -> dict[str, Any]:
    """SIGKILL in the middle of its jobs, and start again."""
    worker = name_of(part)
    scene.amid_the_work(lambda: len(scene.held_by(worker)) > 1)
    before = scene.traces()
    send(part, signal.SIGKILL)
    killed_at = scene.clock()
    orphans = [one for one, trace in scene.traces().items() if trace.state == "running" and worker in trace.owner]
    print(f"killed {part.name} with {len(orphans)} jobs running", flush=True)

    def again() -> list[float]:
        traces = scene.traces(orphans)
        return [trace.started for one, trace in traces.items() if trace.claims > before[one].claims]

    scene.until(lambda: bool(again()))
    first = min(again()) - killed_at
    print(f"the first of them runs again after {first:.1f} s", flush=True)
    return {
        "jobs_running_when_killed": len(orphans),
        "seconds_until_the_first_runs_again": round(first, 2),
    }


def pause_one(scene: Scene, part: SupervisedProcess) -> dict[str, Any]:
    """SIGSTOP past its leases, until another worker has claimed one of its jobs, then continue."""
    scene.amid_the_work(lambda: all(scene.is_up(one) for one in scene.parts))
    worker = name_of(part)
    scene.amid_the_work(lambda: len(scene.held_by(worker)) > 1)
    send(part, signal.SIGSTOP)
    held = scene.traces(scene.held_by(worker))
    began = time.monotonic()
    print(f"paused {part.name} with {len(held)} jobs running", flush=True)
    scene.until(lambda: not scene.held_by(worker))
    scene.until(lambda: any(trace.claims > held[one].claims for one, trace in scene.traces(list(held)).items()))
    seconds = time.monotonic() - began
    taken = [one for one, trace in scene.traces(list(held)).items() if trace.claims > held[one].claims]
    send(part, signal.SIGCONT)
    print(f"continued it after {seconds:.1f} s; {len(taken)} of its jobs were taken by then", flush=True)
    return {
        "jobs_running_when_paused": len(held),
        "seconds_paused": round(seconds, 2),
        "of_them_claimed_by_another_meanwhile": len(taken),
    }


def poison_one(scene: Scene) -> dict[str, Any]:
    """Add the job that kills, and start again what it kills until it is set aside."""
    unfinished = len(scene.ids) - len(scene.endings)
    print(f"poisoned, with {unfinished} jobs unfinished", flush=True)
    began = time.monotonic()
    scene.client.submit(POISON)
    scene.until(lambda: scene.client.status("poison").state == "dead")
    seconds = time.monotonic() - began
    print(f"set aside after {seconds:.1f} s", flush=True)
    try:
        scene.client.result("poison", timeout=1)
    except JobDead as error:
        said = str(error)
    return {
        "jobs_unfinished_when_submitted": unfinished,
        "seconds_until_dead": round(seconds, 2),
        "claims": scene.client.status("poison").attempts,
        "error": said,
    }


def workers_own(args: argparse.Namespace) -> dict[str, str]:
    return {
        "PYTHONPATH": python_path(POISONABLE),
        "RERANKQ_LEASE_S": str(args.lease),
        "RERANKQ_CONCURRENCY": str(args.concurrency),
    }


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    asked = questions(args.data, "selqa", count=args.jobs, depth=args.chunks)
    jobs = [
        one.job(id=f"job-{n}", fusion="model", priority="bulk" if n % 3 else "interactive")
        for n, one in enumerate(asked)
    ]
    with engine_process() as process:
        alone = dict(
            zip([job.id or "" for job in jobs], process.ask(score_alone, [one.pairs for one in asked]), strict=True)
        )
    print(f"{len(jobs)} jobs of {args.chunks} chunks, each scored alone; now through two workers", flush=True)
    with deployment(workers=2, app="poisonable", **workers_own(args)) as (client, parts):
        began = time.monotonic()
        scene = Scene(client, parts, client.submit_many(jobs))
        scene.until_share(KILL_AT)
        answer: dict[str, Any] = {"killed": kill_one(scene, parts[0])}
        scene.until_share(PAUSE_AT)
        answer["paused"] = pause_one(scene, parts[1])
        answer["poison"] = poison_one(scene)
        scene.until_share(1.0)
        seconds = time.monotonic() - began
        claims = {one: trace.claims for one, trace in scene.traces().items()}
    rankings = {one: ending for one, ending in scene.endings.items() if isinstance(ending, Ranking)}
    wrong = [f"{one}: {ending!r}" for one, ending in scene.endings.items() if isinstance(ending, Exception)]
    wrong += [f"{one}: {fault}" for one, ranking in rankings.items() if (fault := differs(ranking, alone[one]))]
    if not answer["poison"]["jobs_unfinished_when_submitted"]:
        wrong.append("the poison had no neighbours: ask for more jobs")
    return {
        "rankings": len(rankings),
        "rankings_as_alone": len(jobs) - len(wrong),
        "tie": TIE,
        "seconds": round(seconds, 1),
        "jobs_claimed_more_than_once": sum(count > 1 for count in claims.values()),
        "most_claims_of_a_job": max(claims.values()),
        **answer,
    }, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--lease", type=float, default=8, help="seconds without a sign of life, RERANKQ_LEASE_S")
    parser.add_argument("--concurrency", type=int, default=32, help="jobs in flight per worker")
    parser.add_argument("--quick", action="store_true", help="100 jobs of 20 chunks, 8 in flight, leases of 2 s")
    args = parser.parse_args()
    if args.quick:
        args.jobs, args.chunks, args.concurrency, args.lease = 100, 20, 8, 2.0
    need(args.data, "selqa")
    here = machine()
    answer, wrong = measure(args)
    for name, value in answer.items():
        print(f"{name.replace('_', ' ')}: {value}")
    for fault in wrong[:20]:
        print(f"WRONG: {fault}")
    asked = {"jobs": args.jobs, "chunks": args.chunks, "concurrency": args.concurrency, "lease_s": args.lease}
    keep("crash", asked | answer, here, quick=args.quick)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
