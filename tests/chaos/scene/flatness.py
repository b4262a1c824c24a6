"""Does a figure stay flat over a run? A stated rule, as a pure function."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Growth that is none: so much of the figure, or so much in its own unit, whichever is more.
SLACK = 0.05
SLACKS = {"rss_mib": 4.0, "memory_mib": 1.0, "threads": 2.0, "fds": 3.0, "connections": 3.0}


class Course(NamedTuple):
    """A figure over a run: medians of its second and of its last quarter (the first is warm-up), and the judgement."""

    early: float
    late: float
    greatest: float
    flat: bool


def course(values: Sequence[float], *, slack: float) -> Course:
    """Judge: flat is what grew, from its second quarter's median to its last's, by no more than 5 % or *slack*.

    >>> course([1, 9, 10, 10, 10, 11, 10, 10], slack=0)
    Course(early=10.0, late=10.0, greatest=11, flat=True)
    >>> course(range(100, 180), slack=4.0).flat
    False
    """
    quarter = max(1, len(values) // 4)
    early, late = statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])
    return Course(float(early), float(late), max(values), late - early <= max(slack, SLACK * early))
