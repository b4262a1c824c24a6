"""Re-score a first-stage run: a job per query, rankings into a new run, its quality where judgements are given."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import catalogue
from ..contract import Ranking, RerankJob, Signal
from ..errors import JobRejected, RerankqError
from ..local.stack import open_client
from ..settings import Settings
from ..stream import JobClient, JobStream, nothing
from . import inputs, metrics, output
from .collection import Collection, FirstStage
from .inputs import InputFault
from .journal import KIND, Answer, Journal, is_begun
from .output import Output

FIRST_STAGE = "first stage"
MODEL_ALONE = "model alone"

NDCG_DEPTH = 10


@dataclass(frozen=True)
class Plan:
    """What to re-score, and how. ``limit`` queries, the run's first; ``force`` overwrites an output that exists."""

    queries: str
    corpus: str
    run: str
    output: str
    depth: int = 100
    fusion: str = "default"
    qrels: str | None = None
    model: str | None = None
    limit: int | None = None
    restart: bool = False
    force: bool = False

    @property
    def inputs(self) -> dict[str, str | None]:
        """The files to read, by their options."""
        return {"queries": self.queries, "corpus": self.corpus, "run": self.run, "qrels": self.qrels}


@dataclass(frozen=True)
class Report:
    """What came of it. ``pairs`` and times are of this start of the program; ``resumed`` queries were done before.

    ``model`` and ``weights`` are the name and the fingerprint of the model that scored. ``missing`` counts, by signal,
    the queries of which no chunk has a signal that the fusion weighs. ``skipped_lines``
    counts, by file, invalid lines that nothing needed.
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
    missing: dict[str, int] = field(default_factory=dict)
    skipped_lines: dict[str, int] = field(default_factory=dict)

    @property
    def pairs_per_s(self) -> float:
        """Pairs ranked a second, the cached ones among them."""
        return self.pairs / self.seconds if self.seconds > 0 else 0.0


class Bar(Protocol):
    """Shows a person how far the work is (``say`` what is done now), and tells what must not go by unseen."""

    def say(self, what: str) -> None: ...  # noqa: D102
    def tell(self, what: str) -> None: ...  # noqa: D102
    def begin(self, pairs: int | None, done: int = 0) -> None: ...  # noqa: D102
    def advance(self, pairs: int) -> None: ...  # noqa: D102


def check(plan: Plan, settings: Settings) -> Output:
    """Find the mistakes that need no file to be read; answer where the run goes.

    Raises:
        InputFault: naming the option.
    """
    if not 1 <= plan.depth <= settings.max_chunks:
        raise InputFault(f"--depth: expected 1 to {settings.max_chunks} (RERANKQ_MAX_CHUNKS), found {plan.depth}")
    try:
        catalogue.resolve(plan.fusion, settings.conf_dir)
    except JobRejected as error:
        raise InputFault(f"--{error}") from None
    for option, path in plan.inputs.items():
        # Read more than once, so that a stopped run can tell whether they are still the same.
        if path is not None and not Path(path).is_file():
            raise InputFault(f"--{option}: {path} is not a file{_why_not(path)}")
    return output.decide(plan.output, plan.inputs)


def _why_not(path: str) -> str:
    if path == inputs.STDIN or (Path(path).exists() and not Path(path).is_dir()):
        return "; it is read more than once, which a pipe or a device cannot be"
    return " but a folder" if Path(path).is_dir() else ""


def header(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Everything that changes the output: a journal that was begun with another header is another piece of work."""
    return {
        "journal": f"{KIND} 2",
        "queries": digest(plan.queries),
        "corpus": digest(plan.corpus),
        "run": digest(plan.run),
        "depth": plan.depth,
        "limit": plan.limit,
        "fusion": catalogue.resolve(plan.fusion, settings.conf_dir).model_dump(),
        "model": plan.model or settings.model,
    }


def digest(path: str) -> str:
    """Hash a file's bytes.

    Raises:
        InputFault: if it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise InputFault(f"{path}: cannot be read: {error.strerror}") from None


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


def answer_of(query: str, ranking: Ranking, weights: Mapping[Signal, float]) -> Answer:
    """Keep of a ranking, made with these *weights* of signals, what the output, the measures and the report need."""
    usage = ranking.usage
    return Answer(
        query=query,
        rows=[(chunk.id, chunk.score, chunk.model_logit) for chunk in ranking.chunks],
        model=ranking.model.name,
        weights=ranking.model.fingerprint,
        pairs=usage.pairs,
        cached_pairs=usage.cached_pairs,
        truncated_pairs=usage.truncated_pairs,
        missing=signals_nowhere(ranking, weights),
    )


def signals_nowhere(ranking: Ranking, weights: Mapping[Signal, float]) -> tuple[str, ...]:
    """Name the signals that the fusion weighs, the job asked for, and no chunk has (tags are asked for by its own)."""
    return tuple(
        signal
        for signal, weight in weights.items()
        if weight > 0 and ranking.chunks and all(signal in chunk.missing for chunk in ranking.chunks)
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
    open_client: JobClient,
    *,
    fusion: str,
    weights: Mapping[Signal, float],
    model: str | None,
    supervise: Callable[[], None] = nothing,
    advance: Callable[[int], None] = lambda _: None,
) -> Tally:
    """Rank what is missing into the journal.

    Args:
        collection: the first stage.
        journal: the work done so far.
        desk: the client.
        fusion: the profile's name.
        weights: of its signals.
        model: the model to name in jobs; None = the deployment's own.
        tend: called now and then.
        advance: hears of every query that ended, by its number of pairs.
    """
    counts = collection.counts()
    tally = Tally()
    started = time.monotonic()
    outcomes = JobStream[str](open_client, supervise=supervise, ours=True).outcomes(
        jobs(collection, journal, fusion=fusion, model=model)
    )
    # Not left to the garbage collector: closing cancels what is still queued.
    with closing(outcomes):  # type: ignore[type-var]  # it is a generator
        for query, outcome in outcomes:
            if isinstance(outcome, RerankqError):
                tally.failed[query] = f"{type(outcome).__name__}: {outcome}"
            else:
                answer = answer_of(query, outcome, weights)
                journal.append(answer)
                tally.add(answer)
            advance(counts[query])
    tally.seconds = time.monotonic() - started
    return tally


def run_of(collection: Collection, journal: Journal) -> Iterator[str]:
    """Write the lines of the run, queries in the first stage's order."""
    for query in collection.counts():
        if query in journal.queries:
            yield from output.run_lines(query, [(chunk, score) for chunk, score, _ in journal.answer(query).rows])


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
        # The run's scores are written so that whoever reads it finds the ranking's own order.
        ranked = [name for name, _, _ in rows]
        orders = (metrics.trec_order(collection.scores(query)), metrics.trec_order(logits), ranked)
        for kept, order in zip(values, orders, strict=True):
            if order or not rows:
                kept.append(metrics.ndcg(order, grades[query], depth=NDCG_DEPTH))
    # A mean over fewer queries than its neighbours' could not be compared with them.
    means = [metrics.mean(kept) if len(kept) == len(judged) else None for kept in values]
    return dict(zip((FIRST_STAGE, MODEL_ALONE, f"fusion {fusion}"), means, strict=True)), len(judged)


def rescore(plan: Plan, goal: Output, settings: Settings, bar: Bar) -> Report:
    """Re-score a run from files to where :func:`check` said. What an earlier start did is not done again.

    Raises:
        InputFault: if an option or a file is wrong; nothing was begun.
        RerankqError: if the work cannot go on; what is done is kept.
    """
    bar.say("reading")
    work = header(plan, settings)
    journal_at = goal.journal(hashlib.blake2b(repr((plan.output, work)).encode(), digest_size=8).hexdigest())
    if goal.exists and not plan.force and (plan.restart or not is_begun(journal_at, work)):
        raise InputFault(f"--output: {plan.output} exists; add --force to overwrite it")
    with (
        Journal.open(journal_at, work, restart=plan.restart) as journal,
        _read(plan, bar.tell) as collection,
        goal.opened(bar.tell) as write,
        _kept(journal, bar.tell),
    ):
        resumed = len(journal.queries)
        tally = _finish(plan, settings, collection, journal, bar)
        write(run_of(collection, journal))
        report = _report(plan, collection, journal, tally, resumed)
        if not tally.failed:
            journal.remove()
        return report


def _read(plan: Plan, tell: Callable[[str], None]) -> Collection:
    collection = Collection.read(
        queries=plan.queries, corpus=plan.corpus, run=plan.run, qrels=plan.qrels, depth=plan.depth, limit=plan.limit
    )
    for source, skipped in collection.skipped.items():
        if skipped.lines:
            tell(f"{source}: {skipped}")
    if plan.qrels and not collection.grades:
        tell(f"{plan.qrels}: none of the run's queries is judged there")
    return collection


@contextmanager
def _kept(journal: Journal, tell: Callable[[str], None]) -> Iterator[None]:
    """Where the work is stopped, say where what is done is kept."""
    try:
        yield
    except (KeyboardInterrupt, RerankqError):
        if journal.queries:
            tell(f"stopped; what is done is kept in {journal.path}, and the same command goes on from there")
        raise


def _report(plan: Plan, collection: Collection, journal: Journal, tally: Tally, resumed: int) -> Report:
    ndcg, judged = measure(collection, journal, fusion=plan.fusion) if plan.qrels else ({}, 0)
    model, weights = journal.model
    return Report(
        output=plan.output,
        model=model,
        weights=weights,
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
        missing=dict(Counter(signal for query in journal.queries for signal in journal.answer(query).missing)),
        skipped_lines={source: found.lines for source, found in collection.skipped.items() if found.lines},
    )


def _finish(plan: Plan, settings: Settings, collection: Collection, journal: Journal, bar: Bar) -> Tally:
    counts = collection.counts()
    done = sum(pairs for query, pairs in counts.items() if query in journal.queries)
    if done == sum(counts.values()):
        return Tally()
    bar.say("connecting" if settings.broker_url else "loading the model")
    with open_client(settings, plan.model, bar.tell) as (client, model, supervise):
        bar.begin(sum(counts.values()), done)
        return score(
            collection,
            journal,
            client,
            fusion=plan.fusion,
            weights=catalogue.resolve(plan.fusion, settings.conf_dir).weights,
            model=model,
            supervise=supervise,
            advance=bar.advance,
        )
