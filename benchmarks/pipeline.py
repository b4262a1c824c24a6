"""How much of the device's time is idle between batches, with many jobs in flight?

    python benchmarks/pipeline.py [--pairs-per-second 2000 5000] [--seconds 10] [--out FILE] [--quick]

A stub device that works by itself takes batches of 8 ms, at the rate of a GPU. Bulk jobs of 50 chunks of 1 KB go
through one worker as users start it, 32 in flight, over Redis; beside it the same engine driven by one loop that plans
and launches, without jobs. A launch is 150 calls that let go of the interpreter's lock, about as many as the operators
of a model of six layers, or one call, as a captured graph. Idle is the device's time between its batches, from the
moment when all jobs were submitted until nine in ten are done; a gap is that part of it in which pairs waited, the rest
is for want of pairs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gear.report import machine
from gear.stub_device import StubDeviceEngine, as_variable
from gear.workers import deployment, python_path

from rerankq import Client, RerankJob
from rerankq.broker.celery_app import make_app
from rerankq_worker.engine.scheduling.batching import plan_all

BATCH_S = 0.008
CHUNKS = 50
# Eight words a chunk, however long: tokens cost the stub no more than those of chunks whose ids are known.
WORDS, CHUNK_BYTES = 8, 1000
TOKENS_PER_PAIR = 1 + WORDS + 3
PATIENCE_S = 120


def jobs_of(count: int) -> Iterator[RerankJob]:
    word = "x" * (CHUNK_BYTES // WORDS - 1)
    for number in range(count):
        chunks = [f"{number}.{at} " + " ".join([word] * (WORDS - 1)) for at in range(CHUNKS)]
        yield RerankJob(query=f"q{number}", chunks=chunks, priority="bulk", fusion="model", cache="bypass")


def alone(device: dict[str, Any], pairs: int) -> dict[str, float]:
    """Drive the engine by one loop: plan, launch, one ahead, land."""
    engine = StubDeviceEngine(**device)
    waiting = engine.tokenise("q", [" ".join(["x"] * WORDS)] * pairs)
    began, before = time.monotonic(), None
    for batch in plan_all([pair.length for pair in waiting], engine.max_batch_tokens, padded=False):
        logits = engine.launch([waiting[position] for position in batch])
        if before is not None:
            before.result()
        before = logits
    if before is not None:
        before.result()
    return figures({"at": began, "idle_s": 0, "gap_s": 0, "launch_s": 0, "batches": 0, "pairs": 0}, engine.figures())


def through_a_worker(device: dict[str, Any], jobs: int, environment: dict[str, str]) -> dict[str, float]:
    folder = Path(__file__).resolve().parent
    with deployment(
        app="gear.stub_device", STUB_DEVICE=as_variable(**device), PYTHONPATH=python_path(folder), **environment
    ) as (client, _):
        ids = client.submit_many(jobs_of(jobs))
        before = ask(client)
        rest = iter(client.as_completed(ids, timeout=PATIENCE_S))
        for _ in range(round(0.9 * jobs)):
            _, ending = next(rest)
            if isinstance(ending, Exception):
                raise ending
        return figures(before, ask(client))


def ask(client: Client) -> dict[str, float]:
    app = make_app(client.settings)
    try:
        (answer,) = app.control.inspect(timeout=20, limit=1)._request("device").values()
        return dict(answer)
    finally:
        app.close()


def figures(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    done = {name: after[name] - before[name] for name in before}
    return {
        "pairs_per_second": round(done["pairs"] / done["at"], 1),
        "idle_share": round(done["idle_s"] / done["at"], 4),
        "gap_share": round(done["gap_s"] / done["at"], 4),
        "pairs_per_batch": round(done["pairs"] / done["batches"], 1),
        "launch_ms": round(done["launch_s"] / done["batches"] * 1000, 3),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for calls in args.calls:
        for rate in args.pairs_per_second:
            device = {"pairs_per_second": rate, "batch_s": BATCH_S, "tokens_per_pair": TOKENS_PER_PAIR, "calls": calls}
            jobs = round(rate * args.seconds / CHUNKS)
            by_itself = alone(device, jobs * CHUNKS)
            worker = through_a_worker(device, jobs, dict(pair.split("=") for pair in args.environment))
            ratio = round(worker["pairs_per_second"] / by_itself["pairs_per_second"], 3)
            rows.append({"device": device, "alone": by_itself, "worker": worker, "worker ÷ alone": ratio})
            print(f"{rate} pairs/s, {calls} calls a launch:\n  alone  {by_itself}\n  worker {worker}\n  {ratio}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs-per-second", type=int, nargs="+", default=[2000, 5000])
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 150], help="a launch lets go of the lock so often")
    parser.add_argument("--seconds", type=float, default=10, help="of the device's work, each")
    parser.add_argument("--environment", nargs="*", default=[], metavar="NAME=VALUE", help="the worker's, beside ours")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="2 seconds, the slower device")
    args = parser.parse_args(arguments)
    if args.quick:
        args.seconds, args.pairs_per_second = 2, args.pairs_per_second[:1]
    here = machine()
    rows = measure(args)
    if args.out:
        answer = {"machine": here, "batch_s": BATCH_S, "chunks": CHUNKS, "chunk_bytes": CHUNK_BYTES, "rows": rows}
        args.out.write_text(json.dumps(answer, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
