"""The command line, a user of the library: ``rerankq demo`` and its neighbours. Needs the extra ``cli``."""

from __future__ import annotations

import io
import os
import sys

HOW_TO_GET_IT = "rerankq: the command line needs more than the library: pip install 'rerankq[cli]'"


def main() -> None:
    """Run the command line; where its packages are not installed, say how to install them."""
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A name or a text that the terminal's encoding lacks is shown with escapes, and ends nothing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from ..broker.celery_app import forget_celerys_environment  # noqa: PLC0415  # an interrupt while it loads is quiet
        from .app import app  # noqa: PLC0415  # what it needs may be missing
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        print(HOW_TO_GET_IT, file=sys.stderr)
        sys.exit(2)
    # Before any worker or Flower is started: Celery's own options are read before our app is loaded.
    forget_celerys_environment()
    app(prog_name="rerankq")


def _fill_closed_streams() -> None:
    """Keep the places of standard streams that were closed: the next file to be opened would be taken for one."""
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.set_inheritable(os.open(os.devnull, mode), True)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
