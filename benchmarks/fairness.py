"""Does a small job wait for a large one beside it, and what does sharing the device in turns cost?

    python benchmarks/fairness.py [--pairs 600] [--rounds 15] [--jobs 256] [--quick]

The worker's batcher before a device that works by itself at a small model's rate on a CPU (it sleeps, and takes as long
for a quarter of its budget as for less), padded and unpadded. Every scene is played twice, in turns as the batcher
does it and in order of arrival, which is how it was done before:

- a job of 2 pairs beside one of 600, interactive and bulk, and the same with one ten times as large;
- a job of 50 pairs of one tenant beside twenty of 300 pairs of another;
- 32 jobs in flight all the time, from 5 to 200 pairs: tokens computed ÷ real ones, and real tokens per second.

Inside it is checked that every pair gets its own logit.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from gear.plot import bars
from gear.report import keep, machine, show, verdict

from rerankq_worker.engine import AsynchronousStubEngine, Batcher, StubEngine, Ticket, TokenisedPair
from rerankq_worker.engine.scheduling.batching import cost, fill_of
from rerankq_worker.engine.scheduling.waiting_pairs import WaitingPairs, Window

BUDGET = 2048
# Seconds a token: 25 pairs of 327 tokens a second, times four to be done sooner.
PACE_S = 1 / (25 * 327 * 4)
IN_FLIGHT = 32
PATIENCE_S = 600
ORDERS = ("arrival", "turns")


class Device(AsynchronousStubEngine):
    """Takes as long for a quarter of the budget as for less."""

    def __init__(self, *, padded: bool) -> None:
        super().__init__(seconds_per_token=PACE_S, max_batch_tokens=BUDGET, padded=padded)

    def _seconds(self, batch: Sequence[TokenisedPair]) -> float:
        lengths = [pair.length for pair in batch]
        return PACE_S * max(cost(lengths, padded=self.padded), fill_of(BUDGET))


class InOrderOfArrival(WaitingPairs[Any]):
    """Serves pairs in order of arrival, without fair queueing."""

    def window(self, size: int) -> Window:
        indices = np.flatnonzero(self._occupied[: len(self._pairs)])[: 2 * size]
        queues = [pair.queues[0] for index in indices.tolist() if (pair := self._pairs[index])]
        priorities = np.array([queue.priority for queue in queues], dtype=np.int8)
        distinct = list(dict.fromkeys(queues))
        at = {queue: position for position, queue in enumerate(distinct)}
        jobs = np.array([at[queue] for queue in queues], dtype=np.intp)
        starts = indices.astype(np.float64)
        return Window(indices, self._lengths[indices], priorities, self._arrived[indices], starts, jobs, distinct)


@contextmanager
def batcher(order: str, *, padded: bool) -> Iterator[tuple[Device, Batcher]]:
    device = Device(padded=padded)
    with Batcher(device) as made:
        if order == "arrival":
            made._waiting = InOrderOfArrival()
        yield device, made


class Jobs:
    """Jobs of pairs of a paragraph's lengths; no pair is like another."""

    def __init__(self, seed: int) -> None:
        self._dice = np.random.default_rng(seed)
        self._numbers = itertools.count()
        self.wrong: list[str] = []

    def pairs(self, count: int) -> list[TokenisedPair]:
        lengths = np.clip(self._dice.lognormal(np.log(160) - 0.32, 0.8, count), 10, 512).astype(int).tolist()
        made = []
        for length in lengths:
            ids = np.zeros(length, dtype=np.int32)
            ids[0] = next(self._numbers)
            made.append(TokenisedPair(ids, 0, truncated=False))
        return made

    def check(self, device: Device, pairs: Sequence[TokenisedPair], ticket: Ticket) -> None:
        right = StubEngine(seconds_per_token=0, padded=device.padded).forward(pairs)
        if not np.array_equal(ticket.result(PATIENCE_S), right):
            self.wrong.append(f"wrong logits among {len(pairs)} pairs")


def beside(jobs: Jobs, order: str, *, padded: bool, size: int, kinds: tuple[str, str], rounds: int) -> list[float]:
    """Ask small jobs while a large one is on the device; milliseconds to the end of each."""
    small, large = kinds
    taken: list[float] = []
    with batcher(order, padded=padded) as (device, made):
        while len(taken) < rounds:
            long = made.submit(jobs.pairs(size), priority=large)
            for _ in range(5):
                time.sleep(0.1)
                pairs, began = jobs.pairs(2), time.perf_counter()
                ticket = made.submit(pairs, priority=small)
                jobs.check(device, pairs, ticket)
                if long.done:
                    break
                taken.append((time.perf_counter() - began) * 1000)
            long.cancel()
            if order == "arrival" and len(taken) == 0:
                # Each waited for the end of the large one: that is the answer.
                taken = [(time.perf_counter() - began) * 1000]
                break
    return taken


def two_tenants(jobs: Jobs, order: str, *, padded: bool) -> float:
    """Seconds to the end of a tenant's only job beside another's twenty."""
    with batcher(order, padded=padded) as (device, made):
        many = [made.submit(jobs.pairs(300), priority="bulk", tenant="many") for _ in range(20)]
        time.sleep(0.1)
        pairs, began = jobs.pairs(50), time.perf_counter()
        jobs.check(device, pairs, made.submit(pairs, priority="bulk", tenant="one"))
        seconds = time.perf_counter() - began
        for ticket in many:
            ticket.cancel()
    return seconds


def steady(jobs: Jobs, order: str, *, padded: bool, count: int) -> dict[str, float]:
    """Keep 32 jobs in flight until so many are done."""
    dice = np.random.default_rng(7)
    with batcher(order, padded=padded) as (_, made):
        began, under_way = time.perf_counter(), []
        for _ in range(count):
            under_way.append(made.submit(jobs.pairs(round(5 * 40 ** dice.random())), priority="bulk"))
            if len(under_way) == IN_FLIGHT:
                while not any(ticket.done for ticket in under_way):
                    time.sleep(0.002)
                under_way = [ticket for ticket in under_way if not ticket.done]
        for ticket in under_way:
            ticket.result(PATIENCE_S)
        seconds, stats = time.perf_counter() - began, made.stats()
    return {
        "tokens_computed ÷ real_tokens": round(stats.padding, 4),
        "real_tokens_per_device_second": round(stats.tokens / stats.busy_s),
        "real_tokens_per_second": round(stats.tokens / seconds),
        "batches": stats.batches,
    }


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    jobs = Jobs(seed=1)
    answer: dict[str, Any] = {}
    for padded in (True, False):
        layout = "padded" if padded else "unpadded"
        scenes: dict[str, Any] = {}
        for kinds in (("interactive", "interactive"), ("interactive", "bulk"), ("bulk", "bulk")):
            for size in (args.pairs, 10 * args.pairs):
                for order in ORDERS if size == args.pairs else ("turns",):
                    taken = beside(jobs, order, padded=padded, size=size, kinds=kinds, rounds=args.rounds)
                    scenes[f"2 {kinds[0]} pairs beside {size} {kinds[1]} ones, in {order}, ms"] = {
                        "median": round(statistics.median(taken), 1),
                        "greatest": round(max(taken), 1),
                    }
        for order in ORDERS:
            scenes[f"50 pairs beside another tenant's 6000, in {order}, s"] = round(
                two_tenants(jobs, order, padded=padded), 2
            )
        load = {order: steady(jobs, order, padded=padded, count=args.jobs) for order in ORDERS}
        rate = "real_tokens_per_device_second"
        scenes["32 jobs in flight"] = load
        scenes["tokens per second of the device, in turns ÷ in order of arrival"] = round(
            load["turns"][rate] / load["arrival"][rate], 4
        )
        answer[layout] = scenes
        print(layout, "done", flush=True)
    return answer, jobs.wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=600, help="of the large job")
    parser.add_argument("--rounds", type=int, default=15, help="small jobs in each scene")
    parser.add_argument("--jobs", type=int, default=256, help="under steady load")
    parser.add_argument("--quick", action="store_true", help="200 pairs, 3 rounds, 40 jobs")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.rounds, args.jobs = 200, 3, 40
    here = machine()
    answer, wrong = measure(args)
    for layout, scenes in answer.items():
        print(layout)
        show(scenes)
    drawn = {
        f"{layout}, in {order}": answer[layout][
            f"2 interactive pairs beside {args.pairs} interactive ones, in {order}, ms"
        ]["median"]
        for layout in answer
        for order in ORDERS
    }
    plot = bars(f"2 pairs beside {args.pairs} of another job: milliseconds", drawn, unit="ms")
    asked = {name: getattr(args, name) for name in ("pairs", "rounds", "jobs")}
    keep("fairness", asked | answer, here, quick=args.quick, plot=plot)
    return verdict(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
