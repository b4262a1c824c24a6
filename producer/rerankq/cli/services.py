"""Commands that keep running: ``rerankq up``, the whole stack on this machine, and ``rerankq worker``."""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer

from ..client.blocking import Client
from ..local import worker_command
from ..local.embedded import free_port
from ..local.stack import Stack, flower_is_installed
from ..urls import masked
from . import render
from .options import Json, Model, connected, settings_with


def up(
    model: Model = None,
    flower_port: Annotated[
        int, typer.Option(min=1, max=65_535, help="Flower's port; if it is in use, a free one is chosen.")
    ] = 5555,
    as_json: Json = False,
) -> None:
    """Run Redis, a worker and Flower on this machine until Ctrl-C. If RERANKQ_BROKER_URL is set, that Redis is used."""
    port = free_port(flower_port) if flower_is_installed() else None
    flower = f"http://127.0.0.1:{port}" if port else None
    with (
        Stack(settings_with(model=model), flower_port=port, quiet=False, notify=render.print_line) as stack,
        Client(stack.settings) as client,
    ):
        if not as_json:
            render.print_stack(stack, flower)
        stack.wait_until_ready(client)
        if as_json:
            url = stack.settings.broker if stack.embedded else masked(stack.settings.broker)
            render.print_json(
                {"broker_url": url, "embedded": stack.embedded, "model": stack.settings.model, "flower": flower}
            )
        else:
            print("\nReady. Ctrl-C stops everything.", flush=True)
        while True:
            stack.supervise()
            time.sleep(0.5)


def worker(
    model: Model = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Jobs in flight. Default: RERANKQ_CONCURRENCY.")
    ] = None,
    name: Annotated[
        str, typer.Option(help="The worker's name; workers on one machine need different names.")
    ] = "rerankq",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print Celery's banner and a line per job.")] = False,
) -> None:
    """Run a worker: celery -A rerankq_worker.tasks worker, with the right options and environment."""
    settings = connected(model=model, concurrency=concurrency)
    environment = worker_command.tuned(os.environ) | worker_command.environment(settings)
    command = worker_command.command(name=name, verbose=verbose)
    # Replaced, not wrapped: signals and the exit status are the worker's own.
    os.execve(command[0], command, environment)  # noqa: S606 - our own program
