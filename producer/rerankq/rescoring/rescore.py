"""Re-score a first-stage run: a job per query, rankings into a new run, nDCG if there are judgements."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import catalogue
from ..contract import Ranking, RerankJob, Signal
from ..errors import JobRejected, RerankqError
from ..settings import Settings
from ..stream import JobStream, OpenClient
from . import inputs, metrics, output
from .collection import Collection, FirstStage
from .inputs import InputFault
from .journal import KIND, Answer, Journal, has_answers
from .output import Output

FIRST_STAGE = "first stage"
MODEL_ALONE = "model alone"

NDCG_DEPTH = 10

# Opens a client when it is entered; local.stack.open_client, with its arguments, is one.
OpenedClient = Callable[[], AbstractContextManager[OpenClient]]


@dataclass(frozen=True)
class Plan:
    """What to re-score, and how: the options of the command.

    ``depth`` documents per query; the run's first ``limit`` queries; ``restart`` discards earlier progress; ``force``
    overwrites an output that exists.
    """

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
        """The input files, by their options."""
        return {"queries": self.queries, "corpus": self.corpus, "run": self.run, "qrels": self.qrels}


@dataclass(frozen=True)
class Report:
    """The result. ``pairs`` and ``seconds`` are of this run of the program; ``resumed`` queries were done before.

    ``model`` and ``weights`` are the model's name and fingerprint. ``missing`` counts, by signal, the queries of which
    no chunk has a signal that the fusion weighs. ``skipped_lines`` counts, by file, invalid lines that were not
    needed.
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
        """Pairs ranked per second, cached ones included."""
        return self.pairs / self.seconds if self.seconds > 0 else 0.0


class Progress(Protocol):
    """Shows progress: ``describe`` the step, ``notify`` of what a person must see, count pairs."""

    def describe(self, step: str) -> None: ...  # noqa: D102
    def notify(self, message: str) -> None: ...  # noqa: D102
    def start(self, pairs: int | None, done: int = 0) -> None: ...  # noqa: D102
    def advance(self, pairs: int) -> None: ...  # noqa: D102


def check(plan: Plan, settings: Settings) -> Output:
    """Check the options before any file is read; return the output.

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
        # Read more than once: a resumed re-scoring checks that the files are the same.
        if path is not None and not Path(path).is_file():
            raise InputFault(f"--{option}: {path} is not a file{_why_not(path)}")
    return output.resolve(plan.output, plan.inputs)


def _why_not(path: str) -> str:
    if path == inputs.STDIN or (Path(path).exists() and not Path(path).is_dir()):
        return "; it is read more than once, which a pipe or a device cannot be"
    return " but a folder" if Path(path).is_dir() else ""


def header(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Return everything that changes the output: a journal with another header cannot be resumed."""
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
    """Yield a job for each query that is not done; texts are read when they are needed."""
    # Random ids: equal queries stay apart, and we forget and cancel no job of others.
    prefix = f"rescore-{secrets.token_hex(8)}"
    for number, query in enumerate(collection.counts()):
        if query not in journal.queries:
            yield query, job_of(collection.first_stage(query), f"{prefix}-{number}", fusion=fusion, model=model)


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
    """Keep what output, metrics and report need of a ranking made with these *weights* of signals."""
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
    """Return the weighted signals that the job asked for and no chunk has."""
    return tuple(
        signal
        for signal, weight in weights.items()
        if weight > 0 and ranking.chunks and all(signal in chunk.missing for chunk in ranking.chunks)
    )


@dataclass
class Tally:
    """Counts of this run of the program."""

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
    connected: OpenClient,
    *,
    fusion: str,
    weights: Mapping[Signal, float],
    advance: Callable[[int], None] = lambda _: None,
) -> Tally:
    """Rank the queries that the journal does not have.

    Args:
        collection: the first stage.
        journal: the answers so far.
        connected: the client, and the model to name in jobs.
        fusion: the profile's name.
        weights: the weights of its signals.
        advance: called with the number of pairs of each query that ended.
    """
    counts = collection.counts()
    tally = Tally()
    started = time.monotonic()
    outcomes = JobStream[str](connected.client, supervise=connected.supervise, owned=True).outcomes(
        jobs(collection, journal, fusion=fusion, model=connected.model)
    )
    # Not left to the garbage collector: closing cancels the jobs that are still queued.
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
    """Yield the lines of the run, queries in the order of the first stage."""
    for query in collection.counts():
        if query in journal.queries:
            yield from output.run_lines(query, [(chunk, score) for chunk, score, _ in journal.answer(query).rows])


def measure(collection: Collection, journal: Journal, *, fusion: str) -> tuple[dict[str, float | None], int]:
    """Compute nDCG@10 of the first stage, the model alone and the fusion; also return the number of queries.

    All three are means over the ranked queries that have judgements, as BEIR and trec_eval do; the first stage is the
    run cut at the depth. None if the model scored nothing for one of these queries.
    """
    # By position, not by name: a profile may be named "model alone".
    values: tuple[list[float], list[float], list[float]] = ([], [], [])
    grades = collection.grades
    judged = [query for query in collection.counts() if query in grades and query in journal.queries]
    for query in judged:
        rows = journal.answer(query).rows
        logits = {name: logit for name, _, logit in rows if logit is not None}
        # The run's scores are written so that every reader sorts it in this order.
        ranked = [name for name, _, _ in rows]
        orders = (metrics.trec_order(collection.scores(query)), metrics.trec_order(logits), ranked)
        for kept, order in zip(values, orders, strict=True):
            if order or not rows:
                kept.append(metrics.ndcg(order, grades[query], depth=NDCG_DEPTH))
    # A mean over fewer queries than its neighbours' could not be compared with them.
    means = [metrics.mean(kept) if len(kept) == len(judged) else None for kept in values]
    return dict(zip((FIRST_STAGE, MODEL_ALONE, f"fusion {fusion}"), means, strict=True)), len(judged)


def rescore(plan: Plan, target: Output, settings: Settings, progress: Progress, client: OpenedClient) -> Report:
    """Re-score a run from files to *target*, as :func:`check` returned it; resume if it was interrupted.

    *client* is opened only if there are queries to rank.

    Raises:
        InputFault: if an option or a file is wrong; nothing was started.
        RerankqError: if the work cannot continue; the progress is kept.
    """
    progress.describe("reading")
    work = header(plan, settings)
    journal_path = target.journal(hashlib.blake2b(repr((plan.output, work)).encode(), digest_size=8).hexdigest())
    if target.exists and not plan.force and (plan.restart or not has_answers(journal_path, work)):
        raise InputFault(f"--output: {plan.output} exists; add --force to overwrite it")
    with (
        Journal.open(journal_path, work, restart=plan.restart) as journal,
        _read(plan, progress.notify) as collection,
        target.opened(progress.notify) as write,
        _progress_kept(journal, progress.notify),
    ):
        resumed = len(journal.queries)
        tally = _rank(plan, collection, journal, progress, settings=settings, client=client)
        write(run_of(collection, journal))
        report = _report(plan, collection, journal, tally, resumed)
        if not tally.failed:
            journal.remove()
        return report


def _read(plan: Plan, notify: Callable[[str], None]) -> Collection:
    collection = Collection.read(
        queries=plan.queries, corpus=plan.corpus, run=plan.run, qrels=plan.qrels, depth=plan.depth, limit=plan.limit
    )
    for source, skipped in collection.skipped.items():
        if skipped.lines:
            notify(f"{source}: {skipped}")
    if plan.qrels and not collection.grades:
        notify(f"{plan.qrels}: has no judgement for any query of the run")
    return collection


@contextmanager
def _progress_kept(journal: Journal, notify: Callable[[str], None]) -> Iterator[None]:
    """On an interruption, say where the progress is kept."""
    try:
        yield
    except (KeyboardInterrupt, RerankqError):
        if journal.queries:
            notify(f"stopped; the progress is kept in {journal.path}, and the same command resumes")
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


def _rank(
    plan: Plan,
    collection: Collection,
    journal: Journal,
    progress: Progress,
    *,
    settings: Settings,
    client: OpenedClient,
) -> Tally:
    counts = collection.counts()
    done = sum(pairs for query, pairs in counts.items() if query in journal.queries)
    if done == sum(counts.values()):
        return Tally()
    progress.describe("connecting" if settings.broker_url else "loading the model")
    with client() as connected:
        progress.start(sum(counts.values()), done)
        return score(
            collection,
            journal,
            connected,
            fusion=plan.fusion,
            weights=catalogue.resolve(plan.fusion, settings.conf_dir).weights,
            advance=progress.advance,
        )
