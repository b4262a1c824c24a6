"""What does HTTP add to a job, with a thousand requests waiting; and does anybody lose when many ask at once?

    python benchmarks/gateway_load.py [--waiting 1000] [--calls 400] [--callers 200] [--pairs 50] [--quick]

Engines that sleep; one gateway process. First its memory, alone and while *waiting* calls wait for a slow worker.
Beside these, one small call after another over HTTP and as many through ``AsyncClient``, in turns, to a fast worker:
what HTTP adds is the difference of their times, at the median and at the 99th percentile.

Then *callers* ask at the same moment, five documents each, a worker that does *pairs* pairs a second, without a time
limit of their own. Every one of them must be answered, with each document once. Reads /proc: Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import redis.asyncio
from gear.report import keep, machine, share, show, verdict
from gear.workers import forget_settings, kept_running, until, worker_part

from rerankq import AsyncClient, Client
from rerankq.local.embedded import EmbeddedRedis, free_port
from rerankq.local.processes import SupervisedProcess
from rerankq.local.stack import gateway_command, settings_for
from rerankq.local.worker_command import environment
from rerankq.settings import Settings

QUERY = "why do tides rise"
# Of a query and a document here, as the engine that sleeps counts them.
TOKENS = 5
# Half a second for a call of one document.
STUCK = "stub:0.05"
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def documents(number: int, count: int) -> list[str]:
    """Documents that no other call has, of three words each."""
    return [f"call{number} document{at} moon" for at in range(count)]


def resident_mib(pid: int) -> float:
    """Memory of a process and of those that it started: the guard that watches it is one of them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20 + sum(resident_mib(int(child)) for child in children)


async def until_in_ledger(settings: Settings, count: int) -> None:
    """Wait until the ledger has as many jobs."""
    async with redis.asyncio.Redis.from_url(settings.ledger) as ledger:
        ends = time.monotonic() + 120
        while sum([1 async for _ in ledger.scan_iter("rerankq:job:*", count=1000)]) < count:
            if time.monotonic() > ends:
                raise RuntimeError("not all calls became jobs")
            await asyncio.sleep(0.5)


async def what_http_adds(settings: Settings, args: argparse.Namespace, pid: int) -> dict[str, Any]:
    url = f"http://127.0.0.1:{settings.port}"
    async with (
        AsyncClient(settings) as client,
        httpx.AsyncClient(base_url=url, timeout=None, limits=LIMITS) as crowd,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        alone_mib = resident_mib(pid)
        body = {"query": QUERY, "model": STUCK, "documents": ["x"]}
        waiting = [
            asyncio.create_task(crowd.post("/v2/rerank", json={**body, "documents": [f"x{n}"]}))
            for n in range(args.waiting)
        ]
        try:
            await until_in_ledger(settings, args.waiting)
            waiting_mib = resident_mib(pid)
            times: dict[str, list[float]] = {"http": [], "client": []}
            for number in range(args.calls):
                for way in ("http", "client"):
                    texts = documents(number, 2 if way == "http" else 3)[-2:]
                    began = time.perf_counter()
                    if way == "http":
                        (await http.post("/v2/rerank", json={"query": QUERY, "documents": texts})).raise_for_status()
                    else:
                        await client.rerank(QUERY, [f"{text} " for text in texts], fusion="model")
                    times[way].append((time.perf_counter() - began) * 1000)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
    adds = {
        name: round(share(times["http"], at) - share(times["client"], at), 2)
        for name, at in (("p50", 0.5), ("p99", 0.99))
    }
    return {
        "gateway_mib_alone": round(alone_mib),
        "gateway_mib_with_calls_waiting": round(waiting_mib),
        "http_ms": {name: round(share(times["http"], at), 2) for name, at in (("p50", 0.5), ("p99", 0.99))},
        "client_ms": {name: round(share(times["client"], at), 2) for name, at in (("p50", 0.5), ("p99", 0.99))},
        "http_adds_ms": adds,
    }


async def all_at_once(settings: Settings, args: argparse.Namespace, model: str) -> dict[str, Any]:
    url = f"http://127.0.0.1:{settings.port}"
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=LIMITS) as http:
        began = time.perf_counter()
        answers = await asyncio.gather(
            *(
                http.post("/v2/rerank", json={"query": QUERY, "model": model, "documents": documents(n, 5)})
                for n in range(args.callers)
            )
        )
        seconds = time.perf_counter() - began
    statuses = Counter(answer.status_code for answer in answers)
    whole = sum(
        sorted(result["index"] for result in answer.json()["results"]) == list(range(5))
        for answer in answers
        if answer.status_code == 200
    )
    return {"statuses": dict(statuses), "whole_answers": whole, "pairs_per_s": round(args.callers * 5 / seconds, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--pairs", type=float, default=50, help="a second, of the worker that all ask at once")
    parser.add_argument("--quick", action="store_true", help="50 waiting, 20 calls, 20 callers")
    args = parser.parse_args()
    if args.quick:
        args.waiting, args.calls, args.callers = 50, 20, 20
    here = machine()
    forget_settings()
    slow = f"stub:{1 / args.pairs / TOKENS:g}"
    with EmbeddedRedis() as server:
        settings = settings_for(server.url, Settings(_env_file=None, model="stub", port=free_port(0)))
        parts = [
            SupervisedProcess("gateway", gateway_command(settings), environment(settings), quiet=True),
            worker_part(settings, "fast"),
            worker_part(settings.model_copy(update={"model": STUCK, "default_model": "stub"}), "stuck"),
            worker_part(settings.model_copy(update={"model": slow, "default_model": "stub"}), "slow"),
        ]
        with kept_running(parts[0]), kept_running(parts[1]), kept_running(parts[2]), kept_running(parts[3]):
            with Client(settings) as client:
                until(lambda: len(client.workers()) == 3 and answers(settings.port), parts, seconds=120)
            pid = parts[0].pid
            assert pid is not None
            answer = asyncio.run(what_http_adds(settings, args, pid))
            answer |= asyncio.run(all_at_once(settings, args, slow))
    show(answer)
    wrong = [] if answer["whole_answers"] == args.callers else ["not every caller got each document once"]
    keep("gateway_load", vars(args) | answer, here, quick=args.quick)
    return verdict(wrong)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/openapi.json").is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
