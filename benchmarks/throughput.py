"""How many pairs per second do bulk jobs get, beside the usual ways to score the same pairs?

    python benchmarks/throughput.py [--jobs 2] [--chunks 50] [--rounds 3] [--dtype float32] [--runtime auto]
                                    [--infinity ENV] [--quick]

Claims with the SciFact abstracts that BM25 found for them. Each way in a process of its own, taking turns in every
round over jobs that none has seen:

- rerankq: bulk jobs through an embedded Redis and one worker, our defaults, no score known;
- the usual task: a Celery worker whose task calls CrossEncoder.predict per job (usual_way.py);
- one predict: a single call of CrossEncoder.predict over the pairs of all jobs, no queue;
- the engine: ours, called directly over the pairs of all jobs, no queue;
- infinity: infinity_emb over HTTP, where --infinity names a virtual environment that has it, all jobs asked at once.

Every round compares all logits and orders. --dtype and --runtime are ours alone (other dtypes are not judged); the
usual ways run in float32, through torch.
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
from gear.infinity import infinity, program_of, version_of
from gear.model_process import Logits, ModelProcess, engine_process, predict, predict_process, score
from gear.plot import bars
from gear.report import keep, machine, show, spread
from gear.texts import DATA, Question, need, questions
from gear.workers import deployment, engine_figures, kept_running, python_path, until

from rerankq import Client, Ranking
from rerankq.local.embedded import EmbeddedRedis
from rerankq.local.processes import SupervisedProcess

OURS, TASK, PREDICT, ENGINE = "rerankq", "the usual task", "one predict", "the engine"
INFINITY = "infinity over HTTP"
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
        part = running.enter_context(kept_running(SupervisedProcess(TASK, command, environment, quiet=True)))
        until(lambda: bool(app.control.inspect(timeout=0.5).ping()), [part], seconds=180)

        def way(asked: Sequence[Question]) -> Logits:
            sent = [rerank.delay(one.query, [text for _, text in one.pairs]) for one in asked]
            return [result.get(timeout=PATIENCE_S) for result in sent]

        yield way


def without_queue(process: ModelProcess, work: Callable[[Sequence[list[tuple[str, str]]]], Logits]) -> Way:
    return lambda asked: process.ask(work, [one.pairs for one in asked])


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


@contextmanager
def all_ways(args: argparse.Namespace, rankings: list[Ranking]) -> Iterator[tuple[dict[str, Way], Client]]:
    """Start them all; what ours ranked last is left in *rankings*."""

    def ours(some: Sequence[Question]) -> Logits:
        rankings[:] = through_rerankq(client, some)
        return [logits_of(ranking) for ranking in rankings]

    with ExitStack() as running:
        client, _ = running.enter_context(deployment(dtype=args.dtype, RERANKQ_RUNTIME=args.runtime))
        ways: dict[str, Way] = {
            OURS: ours,
            TASK: running.enter_context(usual_task(args.usual_pool)),
            PREDICT: without_queue(running.enter_context(predict_process()), predict),
            ENGINE: without_queue(running.enter_context(engine_process(args.dtype, runtime=args.runtime)), score),
        }
        if args.infinity:
            ways[INFINITY] = running.enter_context(infinity(args.infinity))
        yield ways, client


def in_turns(ways: dict[str, Way], number: int, some: Sequence[Question]) -> tuple[dict[str, Logits], dict[str, float]]:
    """Let each way score the same jobs; answers the logits and the seconds of each."""
    answers, seconds = {}, {}
    # The first of one round is the last of the next: drift of the machine affects all alike.
    first = number % len(ways)
    for name in [*list(ways)[first:], *list(ways)[:first]]:
        began = time.perf_counter()
        answers[name] = ways[name](some)
        seconds[name] = time.perf_counter() - began
    return answers, seconds


def measure(args: argparse.Namespace) -> dict[str, object]:
    asked = questions(args.data, "scifact", count=args.jobs * args.rounds + 1, depth=args.chunks)
    # One batch and a bit: what runs for the first time is not counted.
    warm, asked = [Question(asked[0].query, asked[0].chunks[:10])], asked[1:]
    rankings: list[Ranking] = []
    rate: dict[str, list[float]] = {}
    tokens: list[float] = []
    distances = []
    with all_ways(args, rankings) as (ways, client):
        for way in ways.values():
            way(warm)
        for number in range(args.rounds):
            answers, seconds = in_turns(ways, number, asked[number * args.jobs : (number + 1) * args.jobs])
            for name in ways:
                rate.setdefault(name, []).append(args.jobs * args.chunks / seconds[name])
            tokens += [ranking.usage.tokens / ranking.usage.pairs for ranking in rankings]
            if args.dtype == "float32":
                distances.append(agree(answers, rankings))
            said = ", ".join(f"{name} {rate[name][-1]:.1f}" for name in ways)
            print(f"round {number + 1} of {args.rounds}, pairs/s: {said}", flush=True)
        (worker,) = engine_figures(client.settings).values()
    medians = {name: statistics.median(values) for name, values in rate.items()}
    others = [name for name in rate if name != OURS]
    return {
        "engine": worker,
        "pairs_per_second": {name: spread(values) for name, values in rate.items()},
        "tokens_per_pair": round(statistics.mean(tokens), 1),
        "ratios": {f"rerankq ÷ {name}": round(medians[OURS] / medians[name], 3) for name in others},
        "ratios_by_round": {
            f"rerankq ÷ {name}": [round(one / other, 3) for one, other in zip(rate[OURS], rate[name], strict=True)]
            for name in others
        },
        "greatest_distance_of_logits": max(distances, default=None),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--jobs", type=int, default=2, help="a round")
    parser.add_argument("--chunks", type=int, default=50, help="a job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16"], help="ours")
    parser.add_argument("--runtime", default="auto", choices=["auto", "torch", "openvino"], help="ours")
    parser.add_argument("--usual-pool", default="solo", choices=["solo", "threads", "prefork"])
    parser.add_argument("--infinity", type=Path, help="a virtual environment with infinity_emb[server,torch] in it")
    parser.add_argument("--quick", action="store_true", help="3 jobs of 10 chunks, 2 rounds")
    args = parser.parse_args()
    if args.quick:
        args.jobs, args.chunks, args.rounds = 3, 10, 2
    need(args.data, "scifact")
    here = machine()
    asked = {name: getattr(args, name) for name in ("jobs", "chunks", "rounds", "dtype", "runtime", "usual_pool")}
    if args.infinity:
        program_of(args.infinity)
        asked["infinity"] = version_of(args.infinity)
    try:
        answer = measure(args)
    except Disagreement as error:
        print(f"WRONG: {error}")
        return 1
    show(answer["ratios"])  # type: ignore[arg-type]
    if answer["greatest_distance_of_logits"] is not None:
        print(f"logits of all ways within {answer['greatest_distance_of_logits']:.1e}")
    medians = {name: figure["median"] for name, figure in answer["pairs_per_second"].items()}  # type: ignore[attr-defined]
    title = f"Pairs scored per second, {args.chunks} SciFact abstracts a job (ours: {args.dtype}, others: float32)"
    # Plain float32 with the runtime that a worker takes unasked has the plain name.
    named = [args.dtype] * (args.dtype != "float32") + [args.runtime] * (args.runtime != "auto")
    name = ".".join(["throughput", *named])
    keep(name, asked | answer, here, quick=args.quick, plot=bars(title, medians, unit="pairs/s"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
