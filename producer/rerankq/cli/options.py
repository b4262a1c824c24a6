"""What the commands share: their common options, exit statuses, and how they read settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..settings import HOW_TO_SET_A_URL, Settings
from .inputs import InputFault

FAILED = 1
WRONG = 2

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="A catalogue name, a hub name, a folder, 'bundled' or 'stub'. Default: RERANKQ_MODEL."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as submit printed it.")]


def settings_with(**given: Any) -> Settings:
    """Read the environment's settings, and over them the options that were given."""
    return Settings(**{name: value for name, value in given.items() if value is not None})


def connected(**given: Any) -> Settings:
    """As :func:`settings_with`, where a broker is needed.

    Raises:
        InputFault: if none is set.
    """
    settings = settings_with(**given)
    if not settings.broker_url:
        raise InputFault(HOW_TO_SET_A_URL)
    return settings
