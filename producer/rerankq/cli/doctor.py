"""``rerankq doctor``: is everything reachable and consistent? One line for each finding."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from ..doctor.checks import Finding, checks
from ..doctor.collect import collect
from .options import FAILED, Json, connected
from .show import print_json


def doctor(as_json: Json = False) -> None:
    """Check a live deployment: Redis roles, workers, models, versions, devices. Something wrong: exit status 1."""
    found = checks(collect(connected()))
    if as_json:
        print_json([finding._asdict() for finding in found])
    else:
        show_findings(found)
    if any(finding.level == "wrong" for finding in found):
        raise typer.Exit(FAILED)


def show_findings(found: Sequence[Finding]) -> None:
    """Print a line for each."""
    for level, subject, said in found:
        print(f"{level:5}  {subject}: {said}", flush=True)
