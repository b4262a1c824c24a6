"""The command line, a user of the library: ``rerankq demo`` and its neighbours. Needs the extra ``cli``."""

from __future__ import annotations

import sys

HOW_TO_GET_IT = "rerankq: the command line needs more than the library: pip install 'rerankq[cli]'"


def main() -> None:
    """Run the command line; where its packages are not installed, say how to install them."""
    try:
        from .app import app  # noqa: PLC0415  # what it needs may be missing
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        print(HOW_TO_GET_IT, file=sys.stderr)
        sys.exit(2)
    app(prog_name="rerankq")
