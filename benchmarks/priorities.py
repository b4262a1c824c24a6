"""Do priorities hold: interactive latency under a saturating bulk backlog, and bulk's share under an interactive flood?

    python benchmarks/priorities.py [--jobs 40] [--chunks 10] [--bulk-chunks 50] [--flood-s 60] [--quick]

One worker with the bundled model, float32, our defaults. Three scenes, in one run:

- idle: one small interactive job at a time (a question with the sentences that BM25 found for it, SelQA);
- backlog: the same, while bulk jobs of SciFact abstracts keep more in the queue than the worker can hold;
- flood: enough interactive jobs at a time to keep the device busy alone, bulk jobs waiting all the while. Bulk's share
  of the device's time is its tokens among all tokens, of the pairs that were scored within the scene.

Inside it is checked that no job failed.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from gear.plot import bars
from gear.report import keep, machine, share, show, verdict
from gear.texts import DATA, Question, need, questions
from gear.workers import deployment

from rerankq import Client, Ranking

WARM_UP = 5
# Bulk jobs kept unfinished: more than the worker has slots for them (30).
BACKLOG = 45
# Interactive jobs kept unfinished in the flood: more pairs than two batches hold.
FLOOD = 24
PATIENCE_S = 600


class Feed:
    """Keeps so many jobs of a kind unfinished, and records what ended when."""

    def __init__(self, client: Client, asked: Sequence[Question], priority: str, at_once: int) -> None:
        self._client = client
        self._asked = asked
        self._priority = priority
        self._at_once = at_once
        self._numbers = count()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.ended: list[tuple[float, Ranking]] = []
        self.faults: list[str] = []

    @contextmanager
    def running(self) -> Iterator[Feed]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stopped.set()
            self._thread.join()

    def tokens(self, since: float, until: float) -> int:
        """Count the tokens of the jobs that ended in that time, on ``time.monotonic``'s clock."""
        return sum(ranking.usage.tokens for ended, ranking in list(self.ended) if since <= ended < until)

    def _run(self) -> None:
        under_way = self._submit(self._at_once)
        while not self._stopped.is_set():
            for one, ending in self._client.as_completed(under_way, timeout=PATIENCE_S):
                self._note(one, ending)
                under_way.remove(one)
                break
            under_way += self._submit(self._at_once - len(under_way))
        for one in under_way:
            self._client.cancel(one)

    def _submit(self, jobs: int) -> list[str]:
        chosen = [self._asked[next(self._numbers) % len(self._asked)] for _ in range(jobs)]
        # Bypass: a question comes round again, and must be computed again.
        return self._client.submit_many(
            one.job(priority=self._priority, fusion="model", cache="bypass") for one in chosen
        )

    def _note(self, one: str, ending: Ranking | Exception) -> None:
        if isinstance(ending, Ranking):
            self.ended.append((time.monotonic(), ending))
        else:
            self.faults.append(f"{one}: {ending}")
        self._client.forget(one)


def latencies_ms(client: Client, asked: Sequence[Question]) -> list[float]:
    """Ask one small interactive job after the other; milliseconds from submit to ranking."""
    taken = []
    for one in asked:
        began = time.perf_counter()
        client.rerank(one.query, one.chunks, timeout=PATIENCE_S, fusion="model", cache="bypass")
        taken.append((time.perf_counter() - began) * 1000)
    return taken


def until(holds: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > ends:
            raise RuntimeError(f"{what} did not come within {PATIENCE_S} s")
        time.sleep(0.05)


def bulk_share(client: Client, bulk: Sequence[Question], small: Sequence[Question], seconds: float) -> dict[str, Any]:
    """Flood an interactive queue with bulk waiting behind it; how the device's tokens were shared out."""
    with (
        Feed(client, bulk, "bulk", BACKLOG).running() as slow,
        Feed(client, small, "interactive", FLOOD).running() as fast,
    ):
        until(lambda: bool(slow.ended) and bool(fast.ended), "the first endings under the flood")
        began = time.monotonic()
        until(lambda: time.monotonic() - began > seconds and len(slow.ended) > 2, "bulk's turns under the flood")
        now = time.monotonic()
        tokens = {"bulk": slow.tokens(began, now), "interactive": fast.tokens(began, now)}
        jobs = {"bulk": len(slow.ended), "interactive": len(fast.ended)}
    return {
        "seconds": round(now - began, 1),
        "tokens": tokens,
        "jobs": jobs,
        "faults": slow.faults + fast.faults,
        "bulk_share_of_tokens": round(tokens["bulk"] / max(1, sum(tokens.values())), 3),
    }


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    small = questions(args.data, "selqa", count=2 * args.jobs + WARM_UP, depth=args.chunks)
    bulk = questions(args.data, "scifact", count=BACKLOG, depth=args.bulk_chunks)
    # Short jobs: what ends within the flood is then near to what was computed within it.
    short = questions(args.data, "scifact", count=BACKLOG, depth=5)
    warm, idle, loaded = small[:WARM_UP], small[WARM_UP : WARM_UP + args.jobs], small[WARM_UP + args.jobs :]
    with deployment(dtype="float32") as (client, _):
        latencies_ms(client, warm)
        alone = latencies_ms(client, idle)
        print(f"idle: p95 {share(alone, 0.95):.0f} ms", flush=True)
        with Feed(client, bulk, "bulk", BACKLOG).running() as feed:
            until(lambda: bool(feed.ended), "the first bulk job's end")
            before = len(feed.ended)
            behind = latencies_ms(client, loaded)
            served = len(feed.ended) - before
        print(f"backlog: p95 {share(behind, 0.95):.0f} ms", flush=True)
        flood = bulk_share(client, short, small, args.flood_s)
    faults = feed.faults + flood.pop("faults")
    return {
        "idle_ms": figures(alone),
        "under_backlog_ms": figures(behind),
        "bulk_jobs_meanwhile": served,
        "ratios": {
            "p95 under a bulk backlog ÷ idle p95": round(share(behind, 0.95) / share(alone, 0.95), 2),
            "median under a bulk backlog ÷ idle median": round(share(behind, 0.5) / share(alone, 0.5), 2),
        },
        "flood": flood,
    }, faults


def figures(values: list[float]) -> dict[str, float]:
    return {name: round(share(values, at), 1) for name, at in (("median", 0.5), ("p95", 0.95), ("greatest", 1.0))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--jobs", type=int, default=40, help="interactive ones, in each of the first two scenes")
    parser.add_argument("--chunks", type=int, default=10, help="an interactive job")
    parser.add_argument("--bulk-chunks", type=int, default=50, help="a bulk job of the backlog")
    parser.add_argument("--flood-s", type=float, default=60, help="seconds of the flood, at least")
    parser.add_argument("--quick", action="store_true", help="8 jobs, bulk jobs of 10 chunks, 8 s")
    args = parser.parse_args()
    if args.quick:
        args.jobs, args.bulk_chunks, args.flood_s = 8, 10, 8
    need(args.data, "selqa", "scifact")
    here = machine()
    answer, wrong = measure(args)
    show(answer)
    asked = {name: getattr(args, name) for name in ("jobs", "chunks", "bulk_chunks", "flood_s")}
    drawn = {
        f"{scene}, {at}": answer[key][at]
        for scene, key in (("idle", "idle_ms"), ("bulk backlog", "under_backlog_ms"))
        for at in ("median", "p95")
    }
    plot = bars("An interactive job of 10 sentences: milliseconds from submit to ranking", drawn, unit="ms")
    keep("priorities", asked | answer, here, quick=args.quick, plot=plot)
    return verdict(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
