"""Ways to bring a signal's raw values onto one scale; NaN and infinities are missing and come back as NaN.

Each takes an array-like of shape ``(chunks,)`` and returns a new float64 array of that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# RAGFlow's range-aware rule does not stretch values that lie closer together than this.
FLAT_SPAN = 1e-3


def known(values: ArrayLike) -> Floats:
    """Copy the values as float64, with NaN for whatever is missing: None, NaN, an infinity.

    Raises:
        ValueError: if they are not one row of numbers.

    >>> known([1, None, float("inf")])
    array([ 1., nan, nan])
    """
    row = np.array(values, dtype=np.float64)
    if row.ndim != 1:
        raise ValueError(f"a signal is one number per chunk, not an array of shape {row.shape}")
    row[~np.isfinite(row)] = np.nan
    return row


def normalise_identity(values: ArrayLike) -> Floats:
    """Leave the values as they are.

    >>> normalise_identity([0.3, -2])
    array([ 0.3, -2. ])
    """
    return known(values)


def normalise_sigmoid(values: ArrayLike) -> Floats:
    """Turn logits into probabilities: ``1 / (1 + exp(-x))``, without overflow and without ties far below zero.

    >>> normalise_sigmoid([0, 1000, -1000])
    array([0.5, 1. , 0. ])
    """
    logits = known(values)
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def normalise_percent(values: ArrayLike) -> Floats:
    """Divide by 100, as for a pagerank of 0 to 100.

    >>> normalise_percent([50, 100])
    array([0.5, 1. ])
    """
    return known(values) / 100.0


def normalise_minmax(values: ArrayLike) -> Floats:
    """Stretch from the job's lowest value (0) to its highest (1).

    Values that are all equal tell no chunk from another and become 0.5, which neither lifts nor sinks them.

    >>> normalise_minmax([2, 4, 3]), normalise_minmax([7, 7])
    (array([0. , 1. , 0.5]), array([0.5, 0.5]))
    """
    row = known(values)
    present = row[~np.isnan(row)]
    if not present.size:
        return row
    low, high = present.min(), present.max()
    if low == high:
        return np.where(np.isnan(row), np.nan, 0.5)
    if high / 2 - low / 2 > np.finfo(np.float64).max / 2:  # the span itself would overflow
        row, low, high = row / 2, low / 2, high / 2
    stretched: Floats = (row - low) / (high - low)
    return stretched


def normalise_ragflow(values: ArrayLike) -> Floats:
    """Apply RAGFlow's range-aware rule to the values that are there: missing ones stay missing and spoil no others.

    >>> normalise_ragflow([10.0, float("nan"), -3.0, 0.0]).round(3)
    array([1.   ,   nan, 0.   , 0.231])
    """
    row = known(values)
    present = row[~np.isnan(row)]
    if not present.size or (present.min() >= 0.0 and present.max() <= 1.0):
        return row
    flat = present.max() / 2 - present.min() / 2 < FLAT_SPAN / 2
    return np.clip(row, 0.0, 1.0) if flat else normalise_minmax(row)


# "raw" changes nothing either; it says besides that the signal is added on top (see ``blending``).
RULES: Mapping[str, Callable[[ArrayLike], Floats]] = MappingProxyType(
    {
        "sigmoid": normalise_sigmoid,
        "minmax": normalise_minmax,
        "percent": normalise_percent,
        "ragflow": normalise_ragflow,
        "none": normalise_identity,
        "cosine": normalise_identity,
        "raw": normalise_identity,
    }
)
