"""Weights that callers bring, of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence


def scale_of(weights: Sequence[float]) -> float:
    """Find by what to multiply weights so that they can be added up: 1, unless some are beyond 1e200.

    >>> scale_of([0.3, 0.7]), scale_of([1e300, 1.0])
    (1.0, 1e-200)
    """
    largest = max(weights, default=0.0)
    return 1e-200 if math.isfinite(largest) and largest > 1e200 else 1.0
