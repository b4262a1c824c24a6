"""How many jobs a second can one producer submit in bulk, and where does its time go?

    python benchmarks/submitting.py [--jobs 8000] [--kilobytes 20] [--chunks 20] [--rounds 3] [--quick]

``Client.submit_many`` of jobs of about 20 KB of JSON, in three forms in turns: as ``RerankJob`` made beforehand, as
mappings, and as JSON text (both are checked on the way). An own Redis on the same machine, no worker. The parts of it
are then timed alone, one after the other in this process, in microseconds per job: making the model, its payload, its
hash, and the ledger's calls, Redis included. Inside it is checked that the ledger holds what was submitted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

from gear.plot import bars
from gear.report import keep, machine, show, spread, verdict
from gear.workers import forget_settings

from rerankq import Client, RerankJob
from rerankq.client.routing import Route
from rerankq.client.submission import prepare
from rerankq.contract import parse_job
from rerankq.identity import digest, payload_of
from rerankq.ledger import calls, connect, keys
from rerankq.ledger.limits import LedgerLimits
from rerankq.ledger.runner import Ledger
from rerankq.local.embedded import EmbeddedRedis
from rerankq.local.stack import settings_for
from rerankq.settings import Settings

WORDS = (
    "the",
    "tide",
    "rises",
    "and",
    "falls",
    "twice",
    "a",
    "day",
    "because",
    "moon",
    "sun",
    "pull",
    "water",
    "coast",
)
AT_ONCE = 200


def mappings(jobs: int, chunks: int, size: int, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Jobs as callers write them, of about *size* bytes each, no two alike."""
    dice = random.Random(1)
    words = size // chunks // 5

    def chunk(number: int) -> dict[str, Any]:
        text = " ".join(dice.choices(WORDS, k=words))
        return {"id": f"chunk-{number}", "text": text, "vector_score": dice.random()}

    # Chunks are made once: making text is no part of the question.
    ready = [chunk(number) for number in range(50 * chunks)]
    return [
        {"query": f"question {number}", "chunks": dice.sample(ready, chunks), "priority": "bulk"}
        for number, _ in zip(numbers, range(jobs), strict=False)
    ]


def input_forms(jobs: Sequence[dict[str, Any]]) -> dict[str, Callable[[], list[Any]]]:
    models = [RerankJob(**job) for job in jobs]
    texts = [model.model_dump_json(exclude_defaults=True) for model in models]
    return {"RerankJob": lambda: models, "mapping": lambda: list(jobs), "JSON": lambda: texts}


def submitted(client: Client, ledger: Ledger, jobs: list[Any]) -> tuple[float, float, int]:
    """Submit into an empty ledger; answers seconds, this process's CPU seconds, and how many jobs the ledger holds."""
    ledger.redis.flushall()
    began, cpu = time.perf_counter(), time.process_time()
    client.submit_many(jobs)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return seconds, cpu, sum(1 for _ in ledger.redis.scan_iter(keys.JOB("*"), count=10_000))


def micros(work: Callable[[], object], jobs: int) -> float:
    began = time.perf_counter()
    work()
    return round((time.perf_counter() - began) / jobs * 1e6, 1)


def parts(jobs: Sequence[dict[str, Any]], settings: Settings, ledger: Ledger) -> dict[str, float]:
    """Microseconds per job of each part of a submission, one after the other."""
    models = [parse_job(job) for job in jobs]
    texts = [model.model_dump_json(exclude_defaults=True) for model in models]
    payloads = [payload_of(model) for model in models]
    route, limits = Route("bundled", "", ""), LedgerLimits.of(settings)
    entries = [prepare(model, route, settings) for model in models]
    ledger.redis.flushall()

    def asked() -> None:
        wanted = [calls.submit(new_job, limits) for new_job in entries]
        for at in range(0, len(wanted), AT_ONCE):
            ledger.ask_all(wanted[at : at + AT_ONCE])

    found = {
        "check a mapping": micros(lambda: [parse_job(job) for job in jobs], len(jobs)),
        "check JSON text": micros(lambda: [parse_job(text) for text in texts], len(jobs)),
        "enter (all below but the ledger)": micros(
            lambda: [prepare(one, route, settings) for one in models], len(jobs)
        ),
        "write the payload": micros(lambda: [payload_of(model) for model in models], len(jobs)),
        "hash the payload": micros(lambda: [digest(payload) for payload in payloads], len(jobs)),
    }
    ledger.redis.config_resetstat()
    found["ask the ledger, Redis included"] = micros(asked, len(jobs))
    server = ledger.redis.info("commandstats")["cmdstat_evalsha"]["usec"]
    return found | {"of it inside Redis": round(server / len(jobs), 1)}


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    forget_settings()
    numbers = count()
    rates: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}
    wrong: list[str] = []
    with EmbeddedRedis() as redis:
        settings = settings_for(redis.url, Settings(_env_file=None, model="bundled"))
        ledger = Ledger(connect(settings.ledger))
        with Client(settings) as client:
            client.submit_many(mappings(AT_ONCE, args.chunks, 1000 * args.kilobytes, numbers))
            for _ in range(args.rounds):
                some = mappings(args.jobs, args.chunks, 1000 * args.kilobytes, numbers)
                for form, make in input_forms(some).items():
                    jobs = make()
                    seconds, cpu, held = submitted(client, ledger, jobs)
                    rates.setdefault(form, []).append(len(jobs) / seconds)
                    cpus.setdefault(form, []).append(cpu / len(jobs) * 1e6)
                    if held != len(jobs):
                        wrong.append(f"the ledger holds {held} of {len(jobs)} jobs submitted as {form}")
        some = mappings(args.jobs // 4, args.chunks, 1000 * args.kilobytes, numbers)
        found = parts(some, settings, ledger)
        size = statistics.mean(len(payload_of(parse_job(job))) for job in some)
    return {
        "payload_bytes": round(size),
        "jobs_per_second": {form: spread(values, 0) for form, values in rates.items()},
        # Near the truth on a busy machine too: what this process computed, all its threads, waiting left out.
        "cpu_microseconds_per_job": {form: spread(values, 0) for form, values in cpus.items()},
        "microseconds_per_job": found,
    }, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=8000, help="a round and form")
    parser.add_argument("--kilobytes", type=int, default=20, help="of text in a job")
    parser.add_argument("--chunks", type=int, default=20, help="a job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="500 jobs, 1 round")
    args = parser.parse_args()
    if args.quick:
        args.jobs, args.rounds = 500, 1
    here = machine()
    answer, wrong = measure(args)
    show(answer)
    asked = {name: getattr(args, name) for name in ("jobs", "kilobytes", "chunks", "rounds")}
    drawn = {form: figure["median"] for form, figure in answer["jobs_per_second"].items()}
    plot = bars(f"Jobs of {args.kilobytes} KB submitted per second by one process", drawn, unit="jobs/s")
    keep("submitting", asked | answer, here, quick=args.quick, plot=plot)
    return verdict(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
