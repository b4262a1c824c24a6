"""The command line, a user of the library: ``rerankq demo`` and the other commands. Needs the extra ``cli``."""

from __future__ import annotations

import io
import os
import signal
import sys

HOW_TO_INSTALL = "rerankq: the command line is not installed: pip install 'rerankq[cli]'"

INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C, as shells report it."""


def main() -> None:
    """Run the command line; if its packages are not installed, say how to install them."""
    # While modules load there is nothing to clean up, and an exception might be swallowed. Commands set their own.
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # Characters that the terminal's encoding lacks are escaped.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from ..broker.celery_app import forget_celerys_environment  # noqa: PLC0415  # slow to load
        from .app import app  # noqa: PLC0415  # its packages may be missing
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        print(HOW_TO_INSTALL, file=sys.stderr)
        sys.exit(2)
    # Before any worker or Flower is started: Celery reads its own variables before our app is loaded.
    forget_celerys_environment()
    app(prog_name="rerankq")


def _fill_closed_streams() -> None:
    """Open /dev/null for standard streams that are closed: the next file opened would get their numbers."""
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.set_inheritable(os.open(os.devnull, mode), True)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
