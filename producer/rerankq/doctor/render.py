"""How findings are written: a line each for a person, a record each for a program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .checks import Finding


def lines(found: Iterable[Finding]) -> Iterator[str]:
    """Write a line for each finding.

    >>> list(lines([Finding("ok", "cache", "reachable")]))
    ['ok     cache: reachable']
    """
    for level, subject, said in found:
        yield f"{level:5}  {subject}: {said}"


def records(found: Iterable[Finding]) -> list[dict[str, Any]]:
    """Make a record of each finding, as JSON takes it.

    >>> records([Finding("ok", "cache", "reachable")])
    [{'level': 'ok', 'subject': 'cache', 'said': 'reachable'}]
    """
    return [finding._asdict() for finding in found]
