"""How many pairs per second do bulk jobs get, beside the usual ways to score the same pairs?

    python benchmarks/throughput.py [--jobs 12] [--chunks 50] [--rounds 5] [--dtype float32] [--quick]

Claims with the SciFact abstracts that BM25 found for them. Four ways, each in a process of its own, taking turns in
every round over jobs that none has seen:

- rerankq: bulk jobs through an embedded Redis and one worker, our defaults, no score known;
- the usual task: a Celery worker whose task calls CrossEncoder.predict per job (usual_way.py);
- one predict: a single call of CrossEncoder.predict over the pairs of all jobs, no queue;
- the engine: ours, called directly over the pairs of all jobs, no queue.

Every round compares all logits and orders. --dtype is ours alone; the usual ways run in float32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gear.checks import farthest, in_order, logits_of, order_of
from gear.report import keep, machine, spread
from gear.rooms import Logits, Room, engine_room, predict, predict_room, score
from gear.texts import DATA, Question, need, questions
from gear.workers import deployment, kept_running, python_path, until

from rerankq import Client, Ranking
from rerankq.cli.stack import Part
from rerankq.embedded import EmbeddedRedis

OURS, TASK, PREDICT, ENGINE = "rerankq", "the usual task", "one predict", "the engine"
# Two libraries' float32 over batches of other shapes; what reduced precision may differ by is not judged here.
TOLERANCE = 1e-4
PATIENCE_S = 1800

Way = Callable[[Sequence[Question]], Logits]


class Disagreement(Exception):
    """Raised when two ways give different scores."""


def through_rerankq(client: Client, asked: Sequence[Question]) -> list[Ranking]:
    ids = client.submit_many(one.job(priority="bulk", fusion="model", cache="bypass") for one in asked)
    ended = dict(client.as_completed(ids, timeout=PATIENCE_S))
    client.forget(*ids)
    return [ranking_of(ended[one]) for one in ids]


def ranking_of(ending: Ranking | Exception) -> Ranking:
    if isinstance(ending, Exception):
        raise ending
    return ending


@contextmanager
def usual_task(pool: str) -> Iterator[Way]:
    with ExitStack() as running:
        url = running.enter_context(EmbeddedRedis()).url
        os.environ["USUAL_WAY_URL"] = url
        from usual_way import app, rerank  # noqa: PLC0415 - it reads its URL when it is imported

        # One model, on all cores: torch's own threads fill them, so more processes would only fight.
        size = {"solo": 1, "prefork": 1, "threads": 2}[pool]
        command = [sys.executable, "-m", "celery", "-q", "-A", "usual_way", "worker", "-l", "WARNING"]
        command += ["-P", pool, "-c", str(size), "--without-gossip", "--without-mingle"]
        environment = {"USUAL_WAY_URL": url, "PYTHONPATH": python_path(Path(__file__).parent)}
        part = running.enter_context(kept_running(Part(TASK, command, environment, quiet=True)))
        until(lambda: bool(app.control.inspect(timeout=0.5).ping()), [part], seconds=180)

        def way(asked: Sequence[Question]) -> Logits:
            sent = [rerank.delay(one.query, [text for _, text in one.pairs]) for one in asked]
            return [result.get(timeout=PATIENCE_S) for result in sent]

        yield way


def without_queue(room: Room, work: Callable[[Sequence[list[tuple[str, str]]]], Logits]) -> Way:
    return lambda asked: room.ask(work, [one.pairs for one in asked])


def agree(answers: dict[str, Logits], rankings: list[Ranking]) -> float:
    """Give the greatest distance of any logit from the usual task's.

    Raises:
        Disagreement: if it is beyond the tolerance, or a ranking is in another order.
    """
    known = answers[TASK]
    distance = max(
        farthest(logits, alone) for answer in answers.values() for logits, alone in zip(answer, known, strict=True)
    )
    if distance > TOLERANCE:
        raise Disagreement(f"logits differ by {distance:.2e}")
    # Both sides of a pair of chunks may be off by the tolerance.
    if not all(in_order(order_of(one), alone, tie=2 * TOLERANCE) for one, alone in zip(rankings, known, strict=True)):
        raise Disagreement("a ranking is in another order")
    return distance


def measure(args: argparse.Namespace) -> dict[str, object]:
    asked = questions(args.data, "scifact", count=args.jobs * args.rounds + 2, depth=args.chunks)
    warm, asked = asked[:2], asked[2:]
    rankings: list[Ranking] = []

    def ours(some: Sequence[Question]) -> Logits:
        rankings[:] = through_rerankq(client, some)
        return [logits_of(ranking) for ranking in rankings]

    pace: dict[str, list[float]] = {}
    tokens: list[float] = []
    distances = []
    with ExitStack() as running:
        client, _ = running.enter_context(deployment(dtype=args.dtype))
        ways: dict[str, Way] = {
            OURS: ours,
            TASK: running.enter_context(usual_task(args.usual_pool)),
            PREDICT: without_queue(running.enter_context(predict_room()), predict),
            ENGINE: without_queue(running.enter_context(engine_room(args.dtype)), score),
        }
        for way in ways.values():
            way(warm)
        for number in range(args.rounds):
            some = asked[number * args.jobs : (number + 1) * args.jobs]
            answers = {}
            # Whoever goes first in one round goes last in the next: drift of the machine hits all alike.
            for name in [*list(ways)[number % len(ways) :], *list(ways)[: number % len(ways)]]:
                began = time.perf_counter()
                answers[name] = ways[name](some)
                pace.setdefault(name, []).append(args.jobs * args.chunks / (time.perf_counter() - began))
            tokens += [ranking.usage.tokens / ranking.usage.pairs for ranking in rankings]
            if args.dtype == "float32":
                distances.append(agree(answers, rankings))
            said = ", ".join(f"{name} {pace[name][-1]:.1f}" for name in ways)
            print(f"round {number + 1} of {args.rounds}, pairs/s: {said}", flush=True)
    medians = {name: statistics.median(values) for name, values in pace.items()}
    return {
        "pairs_per_second": {name: spread(values) for name, values in pace.items()},
        "tokens_per_pair": round(statistics.mean(tokens), 1),
        "ratios": {f"rerankq ÷ {name}": round(medians[OURS] / medians[name], 3) for name in (TASK, PREDICT, ENGINE)},
        "ratios_by_round": {
            f"rerankq ÷ {name}": [round(one / other, 3) for one, other in zip(pace[OURS], pace[name], strict=True)]
            for name in (TASK, PREDICT, ENGINE)
        },
        "greatest_distance_of_logits": max(distances, default=None),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--jobs", type=int, default=12, help="a round")
    parser.add_argument("--chunks", type=int, default=50, help="a job")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16"], help="ours")
    parser.add_argument("--usual-pool", default="solo", choices=["solo", "threads", "prefork"])
    parser.add_argument("--quick", action="store_true", help="3 jobs of 10 chunks, 2 rounds")
    args = parser.parse_args()
    if args.quick:
        args.jobs, args.chunks, args.rounds = 3, 10, 2
    need(args.data, "scifact")
    here = machine()
    asked = {name: getattr(args, name) for name in ("jobs", "chunks", "rounds", "dtype", "usual_pool")}
    try:
        answer = measure(args)
    except Disagreement as error:
        print(f"WRONG: {error}")
        return 1
    for name, ratio in answer["ratios"].items():  # type: ignore[attr-defined]
        print(f"{name}: {ratio}")
    if answer["greatest_distance_of_logits"] is not None:
        print(f"logits of all four ways within {answer['greatest_distance_of_logits']:.1e}")
    keep(
        "throughput" if args.dtype == "float32" else f"throughput.{args.dtype}", asked | answer, here, quick=args.quick
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
