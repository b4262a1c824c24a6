"""What the commands share: common options, exit statuses, and reading settings."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any

import typer

from ..rescoring.inputs import InputFault
from ..settings import HOW_TO_SET_A_URL, Settings

FAILED = 1
WRONG = 2

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="A catalogue name, a hub name, a folder, 'bundled' or 'stub'. Default: RERANKQ_MODEL."
    ),
]


def _finite(seconds: float | None) -> float | None:
    if seconds is not None and not isfinite(seconds):
        msg = "expected a finite number of seconds"
        raise typer.BadParameter(msg)
    return seconds


Timeout = Annotated[float | None, typer.Option(min=0, callback=_finite, help="Seconds to wait. Default: no limit.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as submit printed it.")]


def settings_with(**given: Any) -> Settings:
    """Read the settings from the environment; options that were given override them."""
    return Settings(**{name: value for name, value in given.items() if value is not None})


def connected(**given: Any) -> Settings:
    """Read settings as :func:`settings_with` does, for a command that needs a broker.

    Raises:
        InputFault: if none is set.
    """
    settings = settings_with(**given)
    if not settings.broker_url:
        raise InputFault(HOW_TO_SET_A_URL)
    return settings
