"""``rerankq batch``: a file of requests answered, line by line, from the command line."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import socket
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from pydantic_core import from_json

from .. import catalogue
from ..batches.journal import Journal, JournalInUse, JournalOfAnother
from ..batches.requests import DEFAULT_ENDPOINT, Defaults, Fault, route_of
from ..batches.running import BatchClient, Plan, Run, Survey, known_models, survey
from ..errors import JobRejected, RerankqError
from ..gateway.rerank_call import CallOptions
from ..identity import digest
from ..local.stack import open_client
from ..rescoring import inputs, output
from ..rescoring.inputs import InputFault
from ..rescoring.output import Output, WriteFailed
from ..settings import Settings
from . import render
from .options import FAILED, WRONG, Json, Model, settings_with

# Codes of lines that would fail again, however often they are sent.
MALFORMED = frozenset({"invalid_request", "line_too_long", "duplicate_custom_id", "JobRejected", "JobTooLarge"})
FAULTS_PRINTED = 20


def batch(  # noqa: PLR0917 - typer reads them as options
    requests: Annotated[
        str,
        typer.Argument(metavar="IN.jsonl", help='JSON lines with "custom_id", "url" and "body"; - is standard input.'),
    ],
    output_name: Annotated[
        str,
        typer.Option(
            "--output", help="The answers; - is standard output. Until it is done, progress is in OUTPUT.part."
        ),
    ],
    endpoint: Annotated[str, typer.Option(help="Path of the lines that name none.")] = DEFAULT_ENDPOINT,
    fusion: Annotated[
        str | None, typer.Option(help="A profile of fusion.toml. Default: the model's probability is the score.")
    ] = None,
    model: Model = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start again, and discard earlier progress.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an output that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Answer a file of rerank and score requests, in the form of OpenAI's batches. It may be compressed.

    If RERANKQ_BROKER_URL is not set, a Redis and a worker are started for as long as it runs. If it is interrupted, the
    same command resumes. Each line is answered by one line, in the order of the input; one that cannot be ranked says
    why, and the exit status is 1, or 2 if a line is malformed.
    """
    settings = settings_with()
    _check(endpoint, fusion, settings)
    target = output.resolve(output_name, {} if requests == inputs.STDIN else {"input": requests})
    with _on_disk(requests) as source, render.PairProgress(unit="lines") as progress:
        progress.describe("reading")
        # JSON may write a character of three bytes in six.
        longest = 4 * settings.max_job_bytes
        found = _survey(requests, source, longest)
        header = _header(source, endpoint, fusion, model or settings.model)
        with _journal(target, header, restart=restart, force=force) as (journal, path):
            plan = Plan(
                name=f"batch-{digest(socket.gethostname(), os.path.realpath(output_name), header)}",
                input=source,
                defaults=Defaults(endpoint, {}, CallOptions(fusion=fusion)),
                survey=found,
                max_line_bytes=longest,
            )
            with target.opened(progress.notify) as write, _progress_kept(path, journal, progress.notify):
                _run(plan, journal, settings, model, progress)
                write(raw.decode() for raw in journal.answers("output", "error"))
            counts, codes = journal.counts, _print_failed(requests, journal)
            path.unlink(missing_ok=True)
    report = {"output": output_name, "lines": len(journal), "ranked": counts["output"], "failed": counts["error"]}
    beside = sys.stderr if target.is_stdout else sys.stdout
    if as_json:
        render.print_json({**report, "failed_by_code": dict(codes)}, beside)
    else:
        print(f"{report['ranked']:,} of {report['lines']:,} lines ranked, in {output_name}", file=beside)
    if codes.keys() & MALFORMED:
        raise typer.Exit(WRONG)
    if codes:
        raise typer.Exit(FAILED)


def _check(endpoint: str, fusion: str | None, settings: Settings) -> None:
    try:
        route_of(endpoint)
    except Fault as fault:
        raise InputFault(f"--endpoint: {fault}") from None
    if fusion is not None:
        try:
            catalogue.resolve(fusion, settings.conf_dir)
        except JobRejected as error:
            raise InputFault(f"--{error}") from None


@contextmanager
def _on_disk(requests: str) -> Iterator[Path]:
    """Give the input as a file that can be read again: a pipe, or what is compressed, is written to one first."""
    with ExitStack() as kept:
        try:
            if requests != inputs.STDIN and Path(requests).is_file() and not inputs.is_compressed(requests):
                path = Path(requests)
            else:
                file = kept.enter_context(tempfile.NamedTemporaryFile(prefix="rerankq-", suffix=".jsonl"))
                with inputs.opened(requests) as source:
                    shutil.copyfileobj(source, file)
                file.flush()
                path = Path(file.name)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            # What gzip and bz2 raise are OSErrors without a number.
            raise InputFault(f"{requests}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        yield path


def _survey(requests: str, source: Path, longest: int) -> Survey:
    with source.open("rb") as file:
        found = survey(file, max_bytes=longest, at_most=sys.maxsize)
    if not found.lines:
        raise InputFault(f"{requests}: has no lines")
    return found


def _header(source: Path, endpoint: str, fusion: str | None, model: str) -> str:
    """Return everything that changes the output: a journal with another header cannot be resumed."""
    with source.open("rb") as file:
        content = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    work = {"journal": "rerankq batch 1", "input": content, "endpoint": endpoint, "fusion": fusion, "model": model}
    return json.dumps(work)


@contextmanager
def _journal(target: Output, header: str, *, restart: bool, force: bool) -> Iterator[tuple[Journal, Path]]:
    path = target.journal(digest(target.name, header))
    try:
        with Journal.open(path, header.encode(), restart=restart) as journal:
            if target.exists and not force and not len(journal):
                path.unlink(missing_ok=True)
                raise InputFault(f"--output: {target.name} exists; add --force to overwrite it")
            try:
                yield journal, path
            finally:
                if not len(journal):
                    path.unlink(missing_ok=True)
    except JournalInUse:
        raise InputFault(f"{path}: another process is writing this output") from None
    except JournalOfAnother:
        raise InputFault(
            f"{path}: is not the progress of this input, endpoint, fusion and model; add --restart to start again"
        ) from None


@contextmanager
def _progress_kept(path: Path, journal: Journal, notify: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, RerankqError):
        if len(journal):
            notify(f"stopped; the progress is kept in {path}, and the same command resumes")
        raise


def _run(plan: Plan, journal: Journal, settings: Settings, model: str | None, progress: render.PairProgress) -> None:
    if len(journal) >= plan.survey.lines:
        return
    progress.describe("connecting" if settings.broker_url else "loading the model")
    with open_client(settings, model, progress.notify) as connected:
        client = cast(BatchClient, connected.client)
        known = known_models(plan.survey.models, client.workers(), settings)
        progress.start(plan.survey.lines, len(journal))
        plan = plan.with_models(connected.model, known)
        run = Run(plan, journal, client, settings, supervise=connected.supervise, advance=progress.advance)
        try:
            run.run()
        except OSError as error:
            raise WriteFailed(f"the progress cannot be written: {error.strerror}") from None


def _print_failed(requests: str, journal: Journal) -> Counter[str]:
    """Print the first lines that were not ranked, and why; answer how many there are by code."""
    codes: Counter[str] = Counter()
    for at, raw in enumerate(journal.answers("error")):
        error: dict[str, Any] = from_json(raw)["error"]
        codes[error["code"]] += 1
        if at < FAULTS_PRINTED:
            render.print_message(f"{requests}:{error['line']}: {error['message']}")
    if codes.total() > FAULTS_PRINTED:
        render.print_message(f"… and {codes.total() - FAULTS_PRINTED} more")
    return codes
