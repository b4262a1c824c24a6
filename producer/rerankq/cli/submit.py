"""``rerankq submit``: jobs from lines of JSON. A file is checked whole before any is submitted, a pipe not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from ..client.blocking import Client
from ..contract import Ranking, RerankJob
from ..errors import RerankqError
from ..local.worker_watch import WorkerWatch
from ..rescoring import inputs
from ..rescoring.inputs import InputFault
from ..settings import Settings
from ..stream import JobStream
from . import render
from .options import FAILED, WRONG, connected

# More than these are counted, not printed.
FAULTS_PRINTED = 20


def submit(
    jobs: Annotated[str, typer.Argument(metavar="JOBS.jsonl", help="A RerankJob per line; - is standard input.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait, and print rankings instead of ids.")] = False,
) -> None:
    """Submit jobs. Prints their ids in order, or (--wait) their rankings as JSON lines in order of completion.

    A file is checked first: if a line is invalid, nothing is submitted. From standard input, jobs are submitted as they
    come. Invalid lines are skipped. Either way they are named, and the exit status is 2.
    A job that fails has, with --wait, a JSON line with "line", "error_type" and "error"; the exit status is 1. If it is
    interrupted while waiting, it names the jobs that continue: "rerankq result ID" waits for one.
    """
    settings = connected()
    reader = JobReader(jobs, render.print_line, max_bytes=_longest_line(settings))
    pairs = None
    if can_be_read_twice(jobs):
        pairs = reader.check()
        if reader.faults:
            raise InputFault(f"{jobs}: nothing was submitted; invalid lines: {reader.faults}")
        if not pairs:
            render.print_message(f"{jobs}: no jobs found")
    with Client(settings) as client:
        failed = _print_rankings(client, reader, pairs) if wait else _print_ids(JobStream(client), reader)
    if reader.faults:
        raise typer.Exit(WRONG)
    if failed:
        raise typer.Exit(FAILED)


class JobReader:
    """Reads jobs; invalid lines are reported and skipped. ``faults`` counts them."""

    def __init__(self, source: str, notify: Callable[[str], None], *, max_bytes: int = inputs.MAX_LINE_BYTES) -> None:
        self.source = source
        self.faults = 0
        self._notify = notify
        self._max_bytes = max_bytes

    def jobs(self) -> Iterator[tuple[str, RerankJob]]:
        """Yield each job with its file and line."""
        for line in inputs.lines(self.source, max_bytes=self._max_bytes):
            try:
                job = inputs.job_of(line)
            except InputFault as fault:
                self._count(fault)
            else:
                yield line.place, job

    def check(self) -> int:
        """Read all lines and keep nothing; answer how many pairs there are."""
        return sum(len(job.chunks) for _, job in self.jobs())

    def _count(self, fault: InputFault) -> None:
        self.faults += 1
        if self.faults <= FAULTS_PRINTED:
            self._notify(str(fault))
        elif self.faults == FAULTS_PRINTED + 1:
            self._notify(f"{self.source}: more invalid lines")


def can_be_read_twice(source: str) -> bool:
    """Whether a source is a file, not a pipe."""
    return source != inputs.STDIN and Path(source).is_file()


def as_record(place: str, outcome: Ranking | RerankqError) -> dict[str, Any]:
    """Return a ranking as JSON takes it; for an error ``{"line", "error_type", "error"}``."""
    if isinstance(outcome, Ranking):
        return outcome.model_dump(mode="json")
    return {"line": place, "error_type": type(outcome).__name__, "error": str(outcome)}


def _print_ids(stream: JobStream[str], reader: JobReader) -> int:
    failed = 0
    try:
        for place, answer in stream.ids(reader.jobs()):
            if isinstance(answer, str):
                print(answer, flush=True)
            else:
                failed += 1
                render.print_message(f"{place}: {answer}")
    except RerankqError as error:
        # Accepted is accepted: whoever submitted them must be able to ask for them.
        for job_id in error.accepted:
            print(job_id, flush=True)
        raise
    return failed


def _print_rankings(client: Client, reader: JobReader, pairs: int | None) -> int:
    failed = 0
    watch = WorkerWatch(client.workers, render.print_message, client.settings.conf_dir)
    stream: JobStream[tuple[str, int]] = JobStream(client)
    stream.supervise = lambda: watch.check(set(stream.in_flight.values()), list(stream.in_flight))
    outcomes = stream.outcomes(((place, len(job.chunks)), job) for place, job in reader.jobs())
    with render.PairProgress() as progress, closing(outcomes):  # type: ignore[type-var]  # it is a generator
        progress.start(pairs)
        try:
            for (place, size), outcome in outcomes:
                with progress.paused():
                    render.print_json(as_record(place, outcome))
                failed += not isinstance(outcome, Ranking)
                progress.advance(size)
        except (KeyboardInterrupt, RerankqError) as stop:
            _name_jobs_that_continue([*stream.in_flight, *getattr(stop, "accepted", ())])
            raise
    return failed


def _name_jobs_that_continue(job_ids: list[str]) -> None:
    if job_ids:
        count = f"{len(job_ids)} jobs continue" if len(job_ids) > 1 else "1 job continues"
        render.print_message(f"stopped waiting; {count} (rerankq result ID, or rerankq cancel ID):")
        render.print_line("\n".join(job_ids))


def _longest_line(settings: Settings) -> int:
    # JSON may write a character of three bytes in six, and a job's limit is counted without such escapes.
    return 4 * settings.max_job_bytes
