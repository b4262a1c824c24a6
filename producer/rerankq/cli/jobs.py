"""Commands about one job that was submitted: ``rerankq result``, ``status`` and ``cancel``."""

from __future__ import annotations

import time

import typer

from ..client.blocking import Client
from ..local.worker_watch import WorkerWatch
from ..stream import wait_for
from . import render
from .options import FAILED, JobId, Json, Timeout, connected


def result(job: JobId, timeout: Timeout = None) -> None:
    """Wait for a job's ranking and print it as a line of JSON."""
    with Client(connected()) as client:
        watch = WorkerWatch(client.workers, render.print_message)
        try:
            ranking = wait_for(client, job, timeout, supervise=lambda: watch.check(job_ids=[job]))
        except KeyboardInterrupt:
            render.print_message(f"stopped waiting; job {job} continues")
            raise
        render.print_json(ranking.model_dump(mode="json"))


def status(job: JobId, as_json: Json = False) -> None:
    """Print a job's state. Exit status 1 if the job is unknown."""
    with Client(connected()) as client:
        found = client.status(job)
    if as_json:
        render.print_json(found.model_dump(mode="json"))
    else:
        render.print_status(found, time.time())
    if found.state == "unknown":
        raise typer.Exit(FAILED)


def cancel(job: JobId, as_json: Json = False) -> None:
    """Cancel a job for everyone who submitted the same content, and print its state.

    Exit status 1 if the job had already ended.
    """
    with Client(connected()) as client:
        state = client.cancel(job)
    if as_json:
        render.print_json({"job_id": job, "state": state})
    else:
        print(state)
    if state != "cancelled":
        raise typer.Exit(FAILED)
