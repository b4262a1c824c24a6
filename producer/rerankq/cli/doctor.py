"""``rerankq doctor``: is everything reachable and consistent? One line for each finding."""

from __future__ import annotations

import typer

from ..doctor.checks import checks
from ..doctor.collect import collect
from ..doctor.render import lines, records
from .options import FAILED, Json, connected
from .render import print_json


def doctor(as_json: Json = False) -> None:
    """Check a live deployment: Redis roles, workers, models, versions, devices. Exit status 1 if a check fails."""
    found = checks(collect(connected()))
    if as_json:
        print_json(records(found))
    else:
        for line in lines(found):
            print(line, flush=True)
    if any(finding.level == "wrong" for finding in found):
        raise typer.Exit(FAILED)
