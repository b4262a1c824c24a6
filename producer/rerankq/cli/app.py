"""The commands: each reads its options, calls what decides, and prints. Exit status 0 done, 1 failed, 2 wrong input."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .. import Client, Ranking, RerankqError, SettingsInvalid, __version__
from ..local import stack as stacks
from ..local import worker_command as celery_worker
from ..local.embedded import free_port
from ..local.worker_watch import WorkerWatch
from ..rescoring import rescore as rescoring
from ..rescoring.inputs import InputFault
from ..settings import Settings
from ..stream import JobStream
from ..urls import masked
from . import dead, doctor, show
from . import demo as demonstration
from . import submit as submitting
from .options import FAILED, WRONG, JobId, Json, Model, Timeout, connected, settings_with


class Stopped(KeyboardInterrupt):
    """Raised by SIGINT, SIGTERM and SIGHUP: whatever cleans up after Ctrl-C cleans up after each of them."""

    def __init__(self, number: int) -> None:
        super().__init__()
        # By custom.
        self.status = 128 + number


class SpeakingGroup(TyperGroup):
    """Commands whose errors are one sentence and an exit status, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _stopping_signals_raise():
            try:
                return super().invoke(ctx)
            except (InputFault, SettingsInvalid) as error:
                _end(str(error), WRONG)
            except RerankqError as error:
                _end(str(error), FAILED)
            except Stopped as stop:
                raise typer.Exit(stop.status) from None
            except BrokenPipeError:
                raise  # ends quietly, with status 1
            except OSError as error:
                _end(str(error), FAILED)
            finally:
                # Here, where a closed pipe can still be met.
                sys.stdout.flush()


app = typer.Typer(
    cls=SpeakingGroup,
    no_args_is_help=True,
    add_completion=False,
    # A traceback with every local variable would print passwords and people's texts.
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Asynchronous batch reranking. Begin with: rerankq demo",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Asynchronous batch reranking. Begin with: rerankq demo."""


@app.command()
def demo(as_json: Json = False) -> None:
    """Show what reranking does: a Redis and a worker of its own, a few questions, their order before and after."""
    settings = settings_with(model="bundled", default_model="", models=[])
    with show.PairBar() as bar:
        bar.say("starting Redis and a worker")
        done = demonstration.run(settings)
    if as_json:
        show.print_json(demonstration.as_record(done))
    else:
        show.show_demo(done)


@app.command()
def up(
    model: Model = None,
    flower_port: Annotated[int, typer.Option(min=1, max=65_535, help="Flower's port; taken = a free one.")] = 5555,
    as_json: Json = False,
) -> None:
    """Run Redis, a worker and Flower on this machine until Ctrl-C. With RERANKQ_BROKER_URL set that Redis is used."""
    port = free_port(flower_port) if stacks.flower_is_installed() else None
    flower = f"http://127.0.0.1:{port}" if port else None
    with (
        stacks.Stack(settings_with(model=model), flower_port=port, quiet=False, tell=show.say) as stack,
        Client(stack.settings) as client,
    ):
        if not as_json:
            show.show_stack(stack, flower)
        stack.wait_until_ready(client)
        if as_json:
            url = stack.settings.broker if stack.embedded else masked(stack.settings.broker)
            show.print_json(
                {"broker_url": url, "embedded": stack.embedded, "model": stack.settings.model, "flower": flower}
            )
        else:
            print("\nReady. Ctrl-C stops everything.", flush=True)
        while True:
            stack.supervise()
            time.sleep(0.5)


@app.command()
def worker(
    model: Model = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Jobs in flight. Default: RERANKQ_CONCURRENCY.")
    ] = None,
    name: Annotated[str, typer.Option(help="The worker's name on this machine; two workers need two.")] = "rerankq",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Celery's banner, and a line per job.")] = False,
) -> None:
    """Run a worker: celery -A rerankq_worker.tasks worker, with the right options and environment."""
    settings = connected(model=model, concurrency=concurrency)
    environment = celery_worker.tuned(os.environ) | celery_worker.environment(settings)
    command = celery_worker.command(name=name, verbose=verbose)
    # Replaced, not wrapped: signals and the exit status are the worker's own.
    os.execve(command[0], command, environment)  # noqa: S606 - our own program


@app.command()
def submit(
    jobs: Annotated[str, typer.Argument(metavar="JOBS.jsonl", help="A RerankJob a line; - is standard input.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait, and print rankings instead of ids.")] = False,
) -> None:
    """Submit jobs. Prints their ids in order, or (--wait) their rankings as JSON lines in order of completion.

    A file is checked first: if a line is no job, nothing is submitted. From standard input, jobs are submitted as they
    come and lines that are none are passed over. Either way such lines are named and the exit status is 2.
    A job that fails has, with --wait, a JSON line with "line", "error_type" and "error"; the exit status is 1. Stopped
    while waiting, it names the jobs that go on without it: "rerankq result ID" waits for one.
    """
    settings = connected()
    reader = submitting.Reader(jobs, show.say, max_bytes=_longest_line(settings))
    pairs = None
    if submitting.can_be_read_twice(jobs):
        pairs = reader.check()
        if reader.faults:
            raise InputFault(f"{jobs}: nothing was submitted; lines that are no jobs: {reader.faults}")
        if not pairs:
            show.note(f"{jobs}: holds no job")
    with Client(settings) as client:
        failed = _print_rankings(client, reader, pairs) if wait else _print_ids(JobStream(client), reader)
    if reader.faults:
        raise typer.Exit(WRONG)
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def result(job: JobId, timeout: Timeout = None) -> None:
    """Wait for a job's ranking and print it as a line of JSON."""
    with Client(connected()) as client:
        watch = WorkerWatch(client.workers, show.note)
        try:
            ranking = submitting.wait_for(client, job, timeout, lambda: watch.look(job_ids=[job]))
        except KeyboardInterrupt:
            show.note(f"stopped waiting; job {job} goes on")
            raise
        show.print_json(ranking.model_dump(mode="json"))


@app.command()
def status(job: JobId, as_json: Json = False) -> None:
    """Say where a job stands. An unknown job: exit status 1."""
    with Client(connected()) as client:
        found = client.status(job)
    if as_json:
        show.print_json(found.model_dump(mode="json"))
    else:
        show.show_status(found, time.time())
    if found.state == "unknown":
        raise typer.Exit(FAILED)


@app.command()
def cancel(job: JobId, as_json: Json = False) -> None:
    """Cancel a job for everyone who submitted the same content, and print its state. Had it ended: exit status 1."""
    with Client(connected()) as client:
        state = client.cancel(job)
    if as_json:
        show.print_json({"job_id": job, "state": state})
    else:
        print(state)
    if state != "cancelled":
        raise typer.Exit(FAILED)


@app.command()
def rescore(  # noqa: PLR0917 - typer reads them as options
    queries: Annotated[str, typer.Option(help='JSON lines with "_id" and "text".')],
    corpus: Annotated[str, typer.Option(help='JSON lines with "_id", "title" and "text".')],
    run: Annotated[str, typer.Option(help="The first stage: TREC's six columns.")],
    output: Annotated[
        str, typer.Option(help="The re-scored run; - is standard output. While at work OUTPUT.part is beside it.")
    ],
    depth: Annotated[int, typer.Option(help="Documents per query: the run's first, by its scores.")] = 100,
    limit: Annotated[int | None, typer.Option(min=1, max=10**9, help="Only so many queries: the run's first.")] = None,
    fusion: Annotated[str, typer.Option(help="A profile of fusion.toml.")] = "default",
    qrels: Annotated[
        str | None, typer.Option(help="Judgements (query-id, corpus-id, score), to measure nDCG@10.")
    ] = None,
    model: Model = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again, whatever was done before.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an output that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Re-score a first-stage run offline. Files may be compressed with gzip, bzip2 or xz.

    Without RERANKQ_BROKER_URL it brings a Redis and a worker of its own for as long as it runs. Stopped midway, the
    same command goes on where it stood. nDCG@10 is measured as trec_eval does, over the queries that have judgements.
    Queries that failed are left out and named, and the exit status is 1; the same command tries them again. Invalid
    lines of queries and documents that the run does not name are skipped and counted.
    """
    plan = rescoring.Plan(queries, corpus, run, output, depth, fusion, qrels, model, limit, restart, force)
    settings = settings_with()
    goal = rescoring.check(plan, settings)
    with show.PairBar() as bar:
        report = rescoring.rescore(plan, goal, settings, bar)
    beside = sys.stderr if goal.is_stdout else sys.stdout
    if as_json:
        show.print_json({**asdict(report), "pairs_per_s": report.pairs_per_s}, beside)
    else:
        show.show_report(report, beside)
    if report.failed:
        show.show_failed(report.failed)
        raise typer.Exit(FAILED)


# Here, so that the help begins where a person begins.
app.command()(doctor.doctor)
app.add_typer(dead.app, name="dead")


def _print_ids(flow: JobStream[str], reader: submitting.Reader) -> int:
    failed = 0
    try:
        for place, answer in submitting.ids(flow, reader.jobs()):
            if isinstance(answer, str):
                print(answer, flush=True)
            else:
                failed += 1
                show.say(f"rerankq: {place}: {answer}")
    except RerankqError as error:
        # Accepted is accepted: whoever submitted them must be able to ask for them.
        for job_id in error.accepted:
            print(job_id, flush=True)
        raise
    return failed


def _print_rankings(client: Client, reader: submitting.Reader, pairs: int | None) -> int:
    failed = 0
    watch = WorkerWatch(client.workers, show.note, client.settings.conf_dir)
    flow: JobStream[tuple[str, int]] = JobStream(client)
    flow.supervise = lambda: watch.look(set(flow.under_way.values()), list(flow.under_way))
    outcomes = flow.outcomes(((place, len(job.chunks)), job) for place, job in reader.jobs())
    with show.PairBar() as bar, closing(outcomes):  # type: ignore[type-var]  # it is a generator
        bar.begin(pairs)
        try:
            for (place, size), outcome in outcomes:
                with bar.aside():
                    show.print_json(submitting.as_record(place, outcome))
                failed += not isinstance(outcome, Ranking)
                bar.advance(size)
        except (KeyboardInterrupt, RerankqError) as stop:
            _tell_what_goes_on([*flow.under_way, *getattr(stop, "accepted", ())])
            raise
    return failed


def _tell_what_goes_on(job_ids: list[str]) -> None:
    if job_ids:
        count = f"{len(job_ids)} jobs go" if len(job_ids) > 1 else "1 job goes"
        show.note(f"stopped waiting; {count} on (rerankq result ID, or rerankq cancel ID):")
        show.say("\n".join(job_ids))


def _longest_line(settings: Settings) -> int:
    # JSON may write a character of three bytes in six, and a job's limit is counted without such escapes.
    return 4 * settings.max_job_bytes


def _end(text: str, status: int) -> NoReturn:
    show.note(text)
    raise typer.Exit(status) from None


@contextmanager
def _stopping_signals_raise() -> Iterator[None]:
    def stop(number: int, _: object) -> NoReturn:
        raise Stopped(number)

    # A script starts its background jobs with SIGINT ignored, yet whoever sends one means us; workers and Redis obey it
    # there too. SIGHUP stays ignored: that is what nohup is for.
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = [(number, signal.signal(number, stop)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


if sys.platform == "win32":  # pragma: no cover
    raise ImportError("the command line needs a Unix: file locks, process groups and signals")
