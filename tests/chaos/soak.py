"""Do memory, threads, connections and open files stay flat while jobs go through, minute after minute?

    python tests/chaos/soak.py [--minutes 30] [--jobs 40] [--json]

A Redis, a worker with the stub engine and a producer, as in chaos.py but undisturbed; the same mix of jobs every
second. Rankings and scores live for a minute (RERANKQ_RESULT_TTL_S, RERANKQ_CACHE_TTL_S), so that what Redis holds can
be flat. Flat is what grew, from the median of its second quarter to that of its last, by no more than 5 % or a few
units (scene/flatness.py); the first quarter is warm-up, which takes some minutes: until then the worker's memory of
texts fills. The worker has few slots, because its connections rise to two for each slot, as jobs happen to coincide:
with 32 that takes longer than the run, and hides a leak. Exit status 1 if something was not flat.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import redis
from scene.flatness import SLACKS, course  # first: it puts gear on the path

from gear.report import keep, machine  # isort: skip
from gear.workers import forget_settings  # isort: skip
from scene.actors import RedisServer, Worker, leftovers, program_of
from scene.watching import Watch

from rerankq.local.processes import SupervisedProcess

STEADY = str(Path(__file__).with_name("scene") / "steady.py")
MIB = 1 << 20


def figures(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        return {
            "rss_mib": round(process.memory_info().rss / MIB, 2),
            "threads": process.num_threads(),
            "fds": process.num_fds(),
            "connections": len(process.net_connections()),
        }


def kept_by(server: RedisServer) -> dict[str, float]:
    with redis.Redis(port=server.port) as connection:
        told: Any = connection.info()
    return {
        "memory_mib": round(told["used_memory"] / MIB, 2),
        "connections": told["connected_clients"],
        "keys": sum(keys["keys"] for name, keys in told.items() if name.startswith("db")),
    }


def soak(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    environment = {
        "RERANKQ_MODEL": "stub:2e-6",
        "RERANKQ_CONCURRENCY": str(args.concurrency),
        "RERANKQ_RESULT_TTL_S": "60",
        "RERANKQ_CACHE_TTL_S": "60",
    }
    with ExitStack() as running:
        server = RedisServer(folder, fsync="everysec")
        running.callback(server.close)
        worker = Worker("w0", server.url, environment)
        running.callback(worker.close)
        watch = Watch(server.url)
        running.callback(watch.close)
        ends = time.monotonic() + 120
        while not watch.is_registered(worker.token):
            if time.monotonic() > ends:
                raise RuntimeError(f"the worker did not start:\n{worker.last_output()}")
            time.sleep(0.05)
        urls = environment | {"RERANKQ_BROKER_URL": server.url}
        producer = SupervisedProcess("producer", [sys.executable, STEADY, str(args.jobs)], urls, quiet=True)
        producer.start(time.monotonic())
        running.callback(producer.close)
        time.sleep(2)  # for the producer to be a program of its own
        taken: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        began, processor = time.monotonic(), worker.process()
        step_s = 60 * args.minutes / args.samples
        for at in range(args.samples):
            time.sleep(max(0.0, began + (at + 1) * step_s - time.monotonic()))
            if worker.supervise() or producer.supervise(time.monotonic()):
                raise RuntimeError(f"a part died:\n{worker.last_output()}\n{producer.said(40)}")
            sampled = {
                "worker": figures(processor),
                "client": figures(program_of(producer)),
                "redis": figures(server.process()) | kept_by(server),
            }
            for name, told in sampled.items():
                for figure, value in told.items():
                    taken[name][figure].append(value)
            if at % 10 == 9:
                tell(f"{(time.monotonic() - began) / 60:5.1f} min  {sampled}")
        scripts = scripts_run(server)
    judged = {
        name: {figure: course(values, slack=SLACKS.get(figure, 0.0))._asdict() for figure, values in told.items()}
        for name, told in taken.items()
    }
    return {
        "minutes": args.minutes,
        "jobs_a_second": args.jobs,
        "slots": args.concurrency,
        "scripts_run": scripts,
        "figures": judged,
    }


def scripts_run(server: RedisServer) -> int:
    """Count the scripts that Redis ran: that work was done at all."""
    with redis.Redis(port=server.port) as connection:
        told: Any = connection.info("commandstats")
    return int(told["cmdstat_evalsha"]["calls"])


def not_flat(answer: dict[str, Any]) -> list[str]:
    # Keys come and go by the minute: they explain memory, and are not judged.
    return [
        f"{name} {figure}"
        for name, told in answer["figures"].items()
        for figure, judged in told.items()
        if figure in SLACKS and not judged["flat"]
    ]


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--jobs", type=int, default=40, help="jobs a second")
    parser.add_argument("--concurrency", type=int, default=8, help="slots of the worker: its pools fill up to them")
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--json", action="store_true", help="print the report as JSON and keep no file")
    args = parser.parse_args()
    forget_settings()
    here, before = machine(), {one.pid for one in psutil.Process().children(recursive=True)}
    folder = Path(tempfile.mkdtemp(prefix="rerankq-soak-"))
    try:
        answer = soak(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    answer |= {"not_flat": not_flat(answer), "processes_left_behind": leftovers(before)}
    if args.json:
        print(json.dumps(answer))
    else:
        show(answer)
        keep("soak", answer, here, quick=args.minutes < 30)
    return 1 if answer["not_flat"] or answer["processes_left_behind"] else 0


def show(answer: dict[str, Any]) -> None:
    for name, told in answer["figures"].items():
        for figure, judged in told.items():
            verdict = "flat" if judged["flat"] else "GROWS"
            print(f"{name:7} {figure:12} {judged['early']:10.1f} -> {judged['late']:10.1f}  {verdict}")
    print(f"not flat: {', '.join(answer['not_flat']) or 'nothing'}")


if __name__ == "__main__":
    raise SystemExit(main())
