"""The dialects of other rerank servers, and which of them a request is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cohere import COHERE
from .dialect import Dialect
from .tei import TEI

__all__ = ["PATHS", "Dialect", "choose"]

#: The dialects of each path, the likeliest first.
PATHS: dict[str, tuple[Dialect[Any], ...]] = {
    "/rerank": (COHERE, TEI),
    "/v1/rerank": (COHERE, TEI),
    "/v2/rerank": (COHERE,),
}


def choose(path: str, body: Mapping[str, Any]) -> Dialect[Any]:
    """Say which dialect of a path a request body is in.

    >>> choose("/rerank", {"query": "q", "texts": ["a"]}).name, choose("/rerank", {}).name
    ('tei', 'cohere')
    """
    dialects = PATHS[path]
    if TEI in dialects and "texts" in body and "documents" not in body:
        return TEI
    return dialects[0]
