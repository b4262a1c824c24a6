"""Commands that keep running: ``rerankq up``, the whole stack on this machine, and ``rerankq worker``."""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer

from ..client.blocking import Client
from ..local import worker_command
from ..local.embedded import free_port
from ..local.stack import Stack, flower_is_installed, gateway_is_installed
from ..rescoring.inputs import InputFault
from ..urls import masked
from . import render
from .options import Json, Model, connected, settings_with


def up(
    model: Model = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65_535, help="The gateway's port; if it is in use, a free one is chosen. Default: RERANKQ_PORT."
        ),
    ] = None,
    flower_port: Annotated[
        int, typer.Option(min=1, max=65_535, help="Flower's port; if it is in use, a free one is chosen.")
    ] = 5555,
    as_json: Json = False,
) -> None:
    """Run Redis, a worker, the gateway and Flower on this machine until Ctrl-C.

    If RERANKQ_BROKER_URL is set, that Redis is used.
    """
    settings = settings_with(model=model)
    settings = settings.model_copy(update={"port": free_port(port or settings.port)})
    own_port = free_port(flower_port) if flower_is_installed() else None
    flower = f"http://127.0.0.1:{own_port}" if own_port else None
    address = f"http://127.0.0.1:{settings.port}" if gateway_is_installed() else None
    with (
        Stack(
            settings, gateway=address is not None, flower_port=own_port, quiet=False, notify=render.print_line
        ) as stack,
        Client(stack.settings) as client,
    ):
        if not as_json:
            render.print_stack(stack, flower, address)
        stack.wait_until_ready(client)
        if as_json:
            url = stack.settings.broker if stack.embedded else masked(stack.settings.broker)
            render.print_json(
                {
                    "broker_url": url,
                    "embedded": stack.embedded,
                    "model": stack.settings.model,
                    "gateway": address,
                    "flower": flower,
                }
            )
        else:
            print("\nReady. Ctrl-C stops everything.", flush=True)
        while True:
            stack.supervise()
            time.sleep(0.5)


def gateway(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: RERANKQ_HOST, else the loopback.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Port to listen on. Default: RERANKQ_PORT, else 8080.")
    ] = None,
) -> None:
    """Run the gateway: rerank jobs over HTTP, in its own API and in the dialects of other servers."""
    if not gateway_is_installed():
        raise InputFault("the gateway's packages are not installed: pip install 'rerankq[gateway]'")
    # Here, not at the top: everything else runs without those packages.
    from ..gateway import server  # noqa: PLC0415

    settings = connected()
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    server.serve(settings.model_copy(update=given))


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
