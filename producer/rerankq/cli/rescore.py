"""Re-score a first-stage run: a job per query, rankings into a new run, its quality where judgements are given."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import catalogue
from ..contract import Ranking, RerankJob
from ..errors import JobRejected, RerankqError
from ..settings import Settings
from . import metrics
from .collection import Collection, FirstStage
from .flow import Desk, Flow, nothing
from .inputs import InputFault
from .journal import Answer, Journal
from .stack import desk

FIRST_STAGE = "first stage"
MODEL_ALONE = "model alone"

NDCG_DEPTH = 10


@dataclass(frozen=True)
class Plan:
    """What to re-score, and how."""

    queries: str
    corpus: str
    run: str
    output: Path
    depth: int = 100
    fusion: str = "default"
    qrels: str | None = None
    model: str | None = None

    @property
    def part(self) -> Path:
        """Where the work done so far is kept until the output is whole."""
        return self.output.with_name(self.output.name + ".part")


@dataclass(frozen=True)
class Report:
    """What came of it. ``pairs`` and times are of this start of the program; ``resumed`` queries were done before.

    ``skipped_lines`` counts, by file, invalid lines that nothing needed.
    """

    output: str
    model: str
    weights: str
    fusion: str
    queries: int
    resumed: int
    pairs: int
    cached_pairs: int
    truncated_pairs: int
    seconds: float
    failed: dict[str, str]
    ndcg: dict[str, float | None] = field(default_factory=dict)
    judged_queries: int = 0
    skipped_lines: dict[str, int] = field(default_factory=dict)

    @property
    def pairs_per_s(self) -> float:
        """Pairs ranked a second, the cached ones among them."""
        return self.pairs / self.seconds if self.seconds > 0 else 0.0


class Bar(Protocol):
    """Shows a person how far the work is."""

    def say(self, what: str) -> None: ...  # noqa: D102
    def begin(self, pairs: int) -> None: ...  # noqa: D102
    def advance(self, pairs: int) -> None: ...  # noqa: D102


def check(plan: Plan, settings: Settings) -> None:
    """Find the mistakes that need no file to be read.

    Raises:
        InputFault: naming the option.
    """
    if not 1 <= plan.depth <= settings.max_chunks:
        raise InputFault(f"--depth: expected 1 to {settings.max_chunks} (RERANKQ_MAX_CHUNKS), found {plan.depth}")
    try:
        catalogue.resolve(plan.fusion, settings.conf_dir)
    except JobRejected as error:
        raise InputFault(f"--{error}") from None
    for option, path in (("queries", plan.queries), ("corpus", plan.corpus), ("run", plan.run), ("qrels", plan.qrels)):
        # Read more than once, so that a stopped run can tell whether they are still the same.
        if path is not None and not Path(path).is_file():
            raise InputFault(f"--{option}: {path} is not a file")
    if not plan.output.parent.is_dir():
        raise InputFault(f"--output: {plan.output.parent} is not a folder")


def header(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Everything that changes the output: a journal that was begun with another header is another piece of work."""
    return {
        "journal": "rerankq rescore 1",
        "queries": digest(plan.queries),
        "corpus": digest(plan.corpus),
        "run": digest(plan.run),
        "depth": plan.depth,
        "fusion": catalogue.resolve(plan.fusion, settings.conf_dir).model_dump(),
        "model": plan.model or settings.model,
    }


def digest(path: str) -> str:
    """Hash a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def jobs(
    collection: Collection, journal: Journal, *, fusion: str, model: str | None
) -> Iterator[tuple[str, RerankJob]]:
    """Yield a job per query that is not done yet, one at a time: texts are read as they are needed."""
    # Ids of our own: equal queries stay apart, and what we forget or cancel is nobody else's.
    ours = f"rescore-{secrets.token_hex(8)}"
    for place, query in enumerate(collection.counts()):
        if query not in journal.queries:
            yield query, job_of(collection.first_stage(query), f"{ours}-{place}", fusion=fusion, model=model)


def job_of(first: FirstStage, job_id: str, *, fusion: str, model: str | None) -> RerankJob:
    """Make a job of a query's first stage."""
    return RerankJob(
        id=job_id,
        query=first.query.text,
        chunks=first.chunks,
        fusion=fusion,
        model=model,
        priority="bulk",
    )


def answer_of(query: str, ranking: Ranking) -> Answer:
    """Keep of a ranking what the output and the measures need."""
    usage = ranking.usage
    return Answer(
        query=query,
        rows=[(chunk.id, chunk.score, chunk.model_logit) for chunk in ranking.chunks],
        weights=ranking.model.fingerprint,
        pairs=usage.pairs,
        cached_pairs=usage.cached_pairs,
        truncated_pairs=usage.truncated_pairs,
    )


@dataclass
class Tally:
    """What a start of the program has done."""

    pairs: int = 0
    cached_pairs: int = 0
    truncated_pairs: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, answer: Answer) -> None:
        """Count a query's answer."""
        self.pairs += answer.pairs
        self.cached_pairs += answer.cached_pairs
        self.truncated_pairs += answer.truncated_pairs


def score(
    collection: Collection,
    journal: Journal,
    desk: Desk,
    *,
    fusion: str,
    model: str | None,
    tend: Callable[[], None] = nothing,
    advance: Callable[[int], None] = lambda _: None,
) -> Tally:
    """Rank what is missing into the journal.

    Args:
        collection: the first stage.
        journal: the work done so far.
        desk: the client.
        fusion: the profile's name.
        model: the model to name in jobs; None = the deployment's own.
        tend: called now and then.
        advance: hears of every query that ended, by its number of pairs.
    """
    counts = collection.counts()
    tally = Tally()
    started = time.monotonic()
    outcomes = Flow[str](desk, tend=tend, ours=True).outcomes(jobs(collection, journal, fusion=fusion, model=model))
    # Not left to the garbage collector: closing cancels what is still queued.
    with closing(outcomes):  # type: ignore[type-var]  # it is a generator
        for query, outcome in outcomes:
            if isinstance(outcome, RerankqError):
                tally.failed[query] = f"{type(outcome).__name__}: {outcome}"
            else:
                answer = answer_of(query, outcome)
                journal.append(answer)
                tally.add(answer)
            advance(counts[query])
    tally.seconds = time.monotonic() - started
    return tally


def write_run(path: Path, collection: Collection, journal: Journal) -> None:
    """Write the run, queries in the first stage's order; the file appears whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for query in collection.counts():
            if query in journal.queries:
                for rank, (chunk, value, _) in enumerate(journal.answer(query).rows, start=1):
                    file.write(f"{query} Q0 {chunk} {rank} {value!r} rerankq\n")
    unfinished.replace(path)


def measure(collection: Collection, journal: Journal, *, fusion: str) -> tuple[dict[str, float | None], int]:
    """nDCG@10 of the first stage, the model alone and the fusion, over the ranked queries that have judgements.

    As BEIR and trec_eval do, queries without judgements are not averaged. The first stage is the run cut at the depth;
    all three are means over the same queries. None where the model scored nothing. Also answers how many queries.
    """
    # By place, not by name: nothing stops a profile from being called "model alone".
    values: tuple[list[float], list[float], list[float]] = ([], [], [])
    grades = collection.grades
    judged = [query for query in collection.counts() if query in grades and query in journal.queries]
    for query in judged:
        rows = journal.answer(query).rows
        logits = {name: logit for name, _, logit in rows if logit is not None}
        orders = (collection.scores(query), logits, {name: value for name, value, _ in rows})
        for kept, scores in zip(values, orders, strict=True):
            if scores or not rows:
                kept.append(metrics.ndcg(metrics.trec_order(scores), grades[query], depth=NDCG_DEPTH))
    # A mean over fewer queries than its neighbours' could not be compared with them.
    means = [metrics.mean(kept) if len(kept) == len(judged) else None for kept in values]
    return dict(zip((FIRST_STAGE, MODEL_ALONE, f"fusion {fusion}"), means, strict=True)), len(judged)


def rescore(
    plan: Plan,
    settings: Settings,
    bar: Bar,
    *,
    restart: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Re-score a run from files to a file. What an earlier start did before it was stopped is not done again.

    ``tell`` hears what a person should know that is no fault.

    Raises:
        InputFault: if an option or a file is wrong; nothing was begun.
        RerankqError: if the work cannot go on; what is done is kept.
    """
    check(plan, settings)
    bar.say("reading")
    with (
        Collection.read(
            queries=plan.queries, corpus=plan.corpus, run=plan.run, depth=plan.depth, qrels=plan.qrels
        ) as collection,
        Journal.open(plan.part, header(plan, settings), restart=restart) as journal,
    ):
        skipped = {source: found for source, found in collection.skipped.items() if found.lines}
        for source, found in skipped.items():
            tell(f"{source}: {found}")
        resumed = len(journal.queries)
        tally = _finish(plan, settings, collection, journal, bar)
        write_run(plan.output, collection, journal)
        ndcg, judged = measure(collection, journal, fusion=plan.fusion) if plan.qrels else ({}, 0)
        if not tally.failed:
            journal.remove()
        return Report(
            output=str(plan.output),
            model=plan.model or settings.model,
            weights=journal.weights or "",
            fusion=plan.fusion,
            queries=len(collection.counts()),
            resumed=resumed,
            pairs=tally.pairs,
            cached_pairs=tally.cached_pairs,
            truncated_pairs=tally.truncated_pairs,
            seconds=tally.seconds,
            failed=tally.failed,
            ndcg=ndcg,
            judged_queries=judged,
            skipped_lines={source: found.lines for source, found in skipped.items()},
        )


def _finish(plan: Plan, settings: Settings, collection: Collection, journal: Journal, bar: Bar) -> Tally:
    missing = {query: pairs for query, pairs in collection.counts().items() if query not in journal.queries}
    if not missing:
        return Tally()
    bar.say("connecting" if settings.broker_url else "loading the model")
    with desk(settings, plan.model, bar.say) as (client, model, tend):
        bar.begin(sum(missing.values()))
        return score(collection, journal, client, fusion=plan.fusion, model=model, tend=tend, advance=bar.advance)
