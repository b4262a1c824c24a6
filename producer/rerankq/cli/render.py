"""Output for a person: tables on standard output, messages and progress on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..contract import JobStatus
from ..local.demo import Comparison, Demo, move_of, rank_of_answer
from ..local.stack import Stack, flower_environment
from ..rescoring.rescore import Report
from ..urls import masked


def print_json(value: Any, file: TextIO | None = None) -> None:
    """Print one line of JSON and flush it: a reader may be waiting. Default: to standard output."""
    text = json.dumps(value, ensure_ascii=False)
    out = file or sys.stdout
    try:
        text.encode(out.encoding if out else "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text, file=out, flush=True)


def print_line(text: str) -> None:
    """Print what is no result, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_message(text: str) -> None:
    """Print a message of the command, each line with its name, on standard error."""
    print_line("\n".join(f"rerankq: {line}" for line in text.splitlines()))


class PairRate(ProgressColumn):
    """Pairs, or what else is counted, a second."""

    def __init__(self, unit: str = "pairs") -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Write the rate."""
        rate = task.finished_speed or task.speed
        return Text(f"{rate:,.0f} {self._unit}/s" if rate else "")


class PairProgress:
    """A progress bar of pairs, or of another unit, on standard error; nothing if that is not a terminal."""

    def __init__(self, unit: str = "pairs") -> None:
        self._unit = unit
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            PairRate(unit),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
            # Standard output is for results alone.
            redirect_stdout=False,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the bar while a result is printed, if both go to a terminal."""
        if not sys.stdout.isatty():
            yield
            return
        self._progress.stop()
        yield
        self._progress.start()

    def describe(self, step: str) -> None:
        """Show what is being done now."""
        self._progress.update(self._task, description=step)

    def notify(self, message: str) -> None:
        """Print a message that stays, terminal or not."""
        print_message(message)

    def start(self, pairs: int | None, done: int = 0) -> None:
        """Start counting at *done*, up to *pairs*; None = unknown."""
        self._progress.reset(self._task, total=pairs, completed=done, description=self._unit)

    def advance(self, pairs: int) -> None:
        """Count *pairs* more."""
        self._progress.advance(self._task, pairs)


def print_report(report: Report, file: TextIO | None = None) -> None:
    """Print the report of a re-scoring, on standard output by default."""
    console = Console(file=file, highlight=False, soft_wrap=True)
    if report.ndcg:
        table = Table("order", "nDCG@10", box=None, pad_edge=False)
        table.columns[1].justify = "right"
        for name, value in report.ndcg.items():
            table.add_row(Text(name), "–" if value is None else f"{value:.4f}")
        console.print(table)
        console.print(f"over {report.judged_queries} judged queries of {report.queries}")
    for sentence in report_sentences(report):
        # As Text: in a plain string rich would read brackets as markup.
        console.print(Text(sentence))


def report_sentences(report: Report) -> Iterator[str]:
    """Say what was written, at what cost, and by which model."""
    yield (
        f"{report.queries - len(report.failed)} queries in {report.output}"
        + (f", {report.resumed} of them from an earlier start" if report.resumed else "")
        + f": {report.pairs:,} pairs, {report.cached_pairs:,} cached, {report.truncated_pairs:,} truncated, "
        f"{report.seconds:.1f} s, {report.pairs_per_s:,.0f} pairs/s"
    )
    if report.model:
        yield f"scored by {report.model} (weights {report.weights}), fusion {report.fusion}"
    if report.missing:
        named = ", ".join(
            signal if queries == report.queries else f"{signal} (in {queries} queries)"
            for signal, queries in report.missing.items()
        )
        yield f"weighted signals that no chunk has, which add nothing to the score: {named}"
    for source, lines in report.skipped_lines.items():
        yield f"invalid lines skipped in {source}: {lines}"


def print_failed(failed: Mapping[str, str], *, most: int = 10) -> None:
    """Print which queries failed, and why, the first *most* of them."""
    for query, reason in list(failed.items())[:most]:
        print_message(f"query {query}: {reason}")
    if len(failed) > most:
        print_message(f"… and {len(failed) - most} more")


def print_status(status: JobStatus, now: float) -> None:
    """Print a job's state, progress and times."""
    if status.state == "unknown":
        print("unknown: never submitted, forgotten, or past its time to live")
        return
    print(f"{status.state}  {status.pairs_done} of {status.pairs_total} pairs, attempts: {status.attempts}")
    for what, when in (("submitted", status.submitted_at), ("started", status.started_at), ("ended", status.ended_at)):
        if when is not None:
            print(f"{what} {max(0.0, now - when):,.1f} s ago")
    if status.error:
        print(status.error)


def print_stack(stack: Stack, flower: str | None, gateway: str | None) -> None:
    """Print how the parts of a stack are reached."""
    url = stack.settings.broker
    read_only = flower_environment(os.environ)["FLOWER_READ_ONLY"] == "true"
    control = " (read-only; set FLOWER_BASIC_AUTH=user:password to revoke jobs)" if read_only else ""
    # Never the password of a Redis that is not ours.
    print(f"Redis    {url} (embedded: removed when this ends)" if stack.embedded else f"Redis    {masked(url)} (yours)")
    print(f"worker   {stack.settings.model}")
    print(f"gateway  {gateway or 'not installed: pip install rerankq[gateway]'}")
    print(f"Flower   {f'{flower}{control}' if flower else 'not installed: pip install flower'}")
    if gateway:
        body = '{"query": "why tides?", "documents": ["Bread rises.", "The moon pulls the sea."]}'
        print(f"\nOver HTTP:\n  curl {gateway}/v2/rerank -H 'Content-Type: application/json' -d '{body}'")
    if stack.embedded:
        print(f"\nIn another terminal:\n  export RERANKQ_BROKER_URL='{url}'", flush=True)


FANCY = {"up": "↑", "down": "↓", "same": "=", "answer": "✔ ", "to": "→"}
PLAIN = {"up": "^", "down": "v", "same": "=", "answer": "* ", "to": "->"}


def print_demo(demo: Demo, *, top: int = 3) -> None:
    """Print the chunks before and after reranking, side by side."""
    console = Console(highlight=False)
    marks = FANCY if console.encoding.startswith("utf") else PLAIN
    console.print(
        f"[bold]{demo.chunks} chunks of text, {len(demo.comparisons)} questions.[/] "
        "Keyword search finds the right words; the reranker reads each chunk with the question.\n"
        f"[bold green]{marks['answer']}[/]= the chunk that answers",
    )
    for comparison in demo.comparisons:
        console.print(_comparison(comparison, marks, top))
    console.print(
        f"\n[bold]The answer comes first: {demo.first_before} of {len(demo.comparisons)} before {marks['to']} "
        f"{demo.first_after} of {len(demo.comparisons)} after.[/]"
    )
    console.print(_costs(demo), soft_wrap=True)


def _comparison(comparison: Comparison, marks: Mapping[str, str], top: int) -> Table:
    before, after = rank_of_answer(comparison)
    title = Text(f"\n{comparison.query}  ", style="bold").append(
        f"answer: {before} {marks['to']} {after}", style="green"
    )
    table = Table(box=None, expand=True, title=title, title_justify="left", pad_edge=False)
    table.add_column("", style="dim")
    table.add_column("before: keyword order", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("after: reranked", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("", justify="right")
    for name in ("fused", "model", "token"):
        table.add_column(name, justify="right")
    for place in range(min(top, len(comparison.after))):
        chunk = comparison.after[place]
        table.add_row(
            str(place + 1),
            _chunk(comparison, comparison.before[place], marks),
            _chunk(comparison, chunk.id, marks),
            _move(move_of(comparison, chunk), marks),
            f"{chunk.score:.2f}",
            *(f"{chunk.scores[name]:.2f}" if name in chunk.scores else "–" for name in ("model", "token")),
        )
    return table


def _chunk(comparison: Comparison, name: str, marks: Mapping[str, str]) -> Text:
    text = comparison.texts[name]
    return Text(marks["answer"] + text, style="bold green") if name == comparison.answer else Text(text)


def _move(places: int, marks: Mapping[str, str]) -> Text:
    if places == 0:
        return Text(marks["same"], style="dim")
    way = "up" if places > 0 else "down"
    return Text(f"{marks[way]}{abs(places)}", style="green" if way == "up" else "red")


def _costs(demo: Demo) -> str:
    sentences: Sequence[str] = [
        f"{demo.jobs} jobs, {demo.pairs} pairs, {demo.cached_pairs} cached: {demo.seconds:.2f} s",
        f"the same jobs with another fusion: {demo.again_cached_pairs} of {demo.again_pairs} pairs from the score "
        f"cache, {demo.again_seconds:.2f} s",
        f"the worker was ready after {demo.ready_s:.1f} s",
    ]
    return "; ".join(sentences) + "."
