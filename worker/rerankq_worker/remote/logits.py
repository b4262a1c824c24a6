"""From a server's scores to raw logits. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: The least probability, and one minus the greatest: those beyond are taken for these, so that 0 and 1 have logits
#: (-36.7 and 36.7), and the sigmoid gives every probability back within 1.2e-16.
LEAST_PROBABILITY = 2.0**-53


def logits_of(scores: Sequence[float], *, probabilities: bool) -> NDArray[np.float32]:
    """Turn a server's scores into logits: the inverse of the sigmoid where they are *probabilities*, else as they are.

    In float32, as they are kept in the score cache: a job gets the same logits whether they come from there or not.

    >>> logits_of([0.5, 0.0, 0.880797077978], probabilities=True).astype(int).tolist()
    [0, -36, 2]
    >>> logits_of([0.5, -3.0], probabilities=False).tolist()
    [0.5, -3.0]
    """
    values = np.array(scores, np.float64)
    if not probabilities:
        # Beyond what float32 holds.
        largest = float(np.finfo(np.float32).max)
        return np.clip(values, -largest, largest).astype(np.float32)
    bounded = np.clip(values, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return (np.log(bounded) - np.log1p(-bounded)).astype(np.float32)
