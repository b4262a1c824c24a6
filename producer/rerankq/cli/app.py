"""The commands put together. Exit status: 0 done, 1 failed, 2 the command line or an input file is wrong."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import RerankqError, SettingsInvalid
from ..local.worker_command import WorkerNotInstalled
from ..rescoring.inputs import InputFault
from . import batch, dead, demo, doctor, jobs, keys, render, rescore, services, submit
from .options import FAILED, WRONG


class Stopped(KeyboardInterrupt):
    """Raised by SIGINT, SIGTERM and SIGHUP: whatever cleans up after Ctrl-C cleans up after each of them."""

    def __init__(self, number: int) -> None:
        super().__init__()
        # As shells report a death by signal.
        self.status = 128 + number


class CommandGroup(TyperGroup):
    """Commands whose errors are one sentence and an exit status, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _stopping_signals_raise():
            try:
                return super().invoke(ctx)
            except (InputFault, SettingsInvalid, WorkerNotInstalled) as error:
                _exit(str(error), WRONG)
            except RerankqError as error:
                _exit(str(error), FAILED)
            except Stopped as stop:
                raise typer.Exit(stop.status) from None
            except BrokenPipeError:
                raise  # ends quietly, with status 1
            except OSError as error:
                _exit(str(error), FAILED)
            finally:
                # Here, where a closed pipe can still be met.
                sys.stdout.flush()


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    # A traceback with every local variable would print passwords and people's texts.
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Asynchronous batch reranking. Start with: rerankq demo",
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
    """Asynchronous batch reranking. Start with: rerankq demo."""


# In the order of the help: what a newcomer runs first comes first.
for command in (
    demo.demo,
    services.up,
    services.worker,
    services.gateway,
    keys.key,
    submit.submit,
    jobs.result,
    jobs.status,
    jobs.cancel,
    rescore.rescore,
    batch.batch,
    doctor.doctor,
):
    app.command()(command)
app.add_typer(dead.app, name="dead")


def _exit(message: str, status: int) -> NoReturn:
    render.print_message(message)
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
