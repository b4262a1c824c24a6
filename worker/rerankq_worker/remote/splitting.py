"""Which texts share a request: as few requests as the server's limits allow. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence


def split(sizes: Sequence[int], *, max_documents: int, max_chars: float = math.inf) -> list[list[int]]:
    """Split texts, given by their lengths in characters, into requests; answers the positions in each, in order.

    A request has at most *max_documents* texts, evenly many where their number decides, and *max_chars* characters. A
    longer text has a request of its own.

    >>> split([1, 1, 1, 1], max_documents=3)
    [[0, 1], [2, 3]]
    >>> split([5, 5, 90, 5], max_documents=3, max_chars=10)
    [[0, 1], [2], [3]]
    """
    if not sizes:
        return []
    each = math.ceil(len(sizes) / math.ceil(len(sizes) / max_documents))
    requests: list[list[int]] = [[]]
    chars = 0
    for at, size in enumerate(sizes):
        if requests[-1] and (len(requests[-1]) >= each or chars + size > max_chars):
            requests.append([])
            chars = 0
        requests[-1].append(at)
        chars += size
    return requests
