"""Infinity's rerank: as Jina's, with documents as texts."""

from __future__ import annotations

from typing import Any

from ..rerank_call import RerankReply
from .dialect import Dialect
from .fields import Reply, text_of
from .results import ResultsMeta, ResultsRequest, TokenUsage, body_of, call_of


class InfinityRequest(ResultsRequest):
    """Body of a request."""


class InfinityResult(Reply):
    """A document's position in the request, and its score."""

    index: int
    relevance_score: float
    document: str | None = None


class InfinityReply(Reply):
    """Body of a response: best first."""

    id: str
    object: str
    model: str
    results: list[InfinityResult]
    usage: TokenUsage
    meta: ResultsMeta


def response_of(request: InfinityRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply; documents, where they are asked for, as texts."""
    results: list[dict[str, Any]] = [
        {
            "index": document.index,
            "relevance_score": document.score,
            **({"document": text_of(request.documents[document.index])} if request.return_documents else {}),
        }
        for document in reply.documents
    ]
    return body_of(results, reply, documents=len(request.documents))


INFINITY = Dialect("infinity", InfinityRequest, InfinityReply, call_of, response_of)
