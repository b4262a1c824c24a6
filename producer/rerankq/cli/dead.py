"""``rerankq dead``: list, show, retry and drop the jobs that crashed their workers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..client.blocking import Client
from ..contract import DeadJob
from ..rescoring.inputs import InputFault
from .options import FAILED, JobId, Json, connected
from .render import print_json

app = typer.Typer(
    no_args_is_help=True, help="Jobs that crashed their workers: list | show ID | retry ID... | drop ID..."
)

DROPPED = "dropped"

JobIds = Annotated[list[str] | None, typer.Argument(metavar="ID...", help="The jobs' ids, as dead list prints them.")]
All = Annotated[bool, typer.Option("--all", help="All jobs that are dead now.")]


@app.command("list")
def list_dead(as_json: Json = False) -> None:
    """List the dead jobs, oldest first, without their texts. With --json: a line of JSON per job."""
    with Client(connected()) as client:
        found = client.dead()
    if as_json:
        for job in found:
            print_json(_record(job))
    elif found:
        Console(highlight=False).print(_table(found, time.time()), soft_wrap=True)
    else:
        print("no dead jobs")


@app.command()
def show(
    job: JobId,
    payload: Annotated[bool, typer.Option("--payload", help="Also print the job itself, with all its texts.")] = False,
    as_json: Json = False,
) -> None:
    """Show why a job is dead, with its history. Exit status 1 if the job is not dead."""
    with Client(connected()) as client:
        found = client.dead_job(job, payload=payload)
    if as_json:
        print_json(_record(found, payload=payload))
        return
    print(f"{found.job_id}  {_plain(found.label)}  queue {found.queue}, tenant {found.tenant or '(none)'}")
    print(found.error)
    for event in found.history:
        print(f"{_clock(event.at)}  {event.event}  {event.worker}".rstrip())
    if payload:
        print(found.payload or "")


@app.command()
def retry(jobs: JobIds = None, every: All = False, as_json: Json = False) -> None:
    """Queue dead jobs again; each runs alone. Prints their states. Exit status 1 if one was not dead."""
    with Client(connected()) as client:
        ids = _chosen(client, jobs, every=every)
        _print_states(((job, client.retry_dead(job)) for job in ids), as_json=as_json, done="queued")


@app.command()
def drop(jobs: JobIds = None, every: All = False, as_json: Json = False) -> None:
    """Forget dead jobs; their ids can be used again. Prints states. Exit status 1 if one was not dead; it stays."""
    with Client(connected()) as client:
        ids = _chosen(client, jobs, every=every)
        states = ((job, client.drop_dead(job)) for job in ids)
        shown = ((job, DROPPED if state == "dead" else state) for job, state in states)
        _print_states(shown, as_json=as_json, done=DROPPED)


def _chosen(client: Client, jobs: Sequence[str] | None, *, every: bool) -> list[str]:
    if bool(jobs) == every:
        raise InputFault("expected either the jobs' ids or --all")
    return [job.job_id for job in client.dead()] if every else list(dict.fromkeys(jobs or ()))


def _print_states(states: Iterable[tuple[str, str]], *, as_json: bool, done: str) -> None:
    """Print each state as it comes: if one fails midway, those before it have been printed."""
    others = False
    for job, state in states:
        others |= state != done
        if as_json:
            print_json({"job_id": job, "state": state})
        else:
            print(f"{job}  {state}")
    if others:
        raise typer.Exit(FAILED)


def _record(job: DeadJob, *, payload: bool = False) -> dict[str, Any]:
    record = job.model_dump(mode="json", exclude=None if payload else {"payload"})
    if payload and job.payload is not None:
        with suppress(ValueError):  # a payload that crashed a worker may not be JSON
            record["payload"] = json.loads(job.payload)
    return record


def _table(jobs: Sequence[DeadJob], now: float) -> Table:
    table = Table("id", "died", "deaths", "pairs", "tenant", "job", box=None, pad_edge=False)
    for job in jobs:
        died = f"{max(0.0, now - job.died_at):,.0f} s ago" if job.died_at is not None else ""
        # As Text: in a plain string rich would read brackets as markup.
        table.add_row(*map(Text, (job.job_id, died, str(job.deaths), str(job.pairs), job.tenant, _plain(job.label))))
    return table


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S.%fZ")


def _plain(text: str) -> str:
    # A query may contain control characters of a terminal.
    return "".join(letter if letter.isprintable() else "�" for letter in text)
