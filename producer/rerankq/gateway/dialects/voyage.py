"""Voyage's rerank: ``top_k`` in, ``data`` out."""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, Field

from ..rerank_call import RerankCall, RerankReply
from .dialect import Dialect
from .fields import Documents, Flag, Query, Reply, Request, TopN, chunks_of, text_of
from .results import TokenUsage, usage_of


class VoyageRequest(Request):
    """Body of a request."""

    query: Query
    documents: Documents
    model: str | None = None
    top_k: TopN | None = Field(None, validation_alias=AliasChoices("top_k", "top_n"))
    return_documents: Flag = False
    truncation: Flag = Field(
        True, description="No effect: what does not fit is always cut, and the response says so by header."
    )


class VoyageResult(Reply):
    """A document's position in the request, and its score."""

    index: int
    relevance_score: float
    document: str | None = None


class VoyageReply(Reply):
    """Body of a response: best first."""

    object: str
    data: list[VoyageResult]
    model: str
    usage: TokenUsage


def call_of(request: VoyageRequest) -> RerankCall:
    """Read a request."""
    return RerankCall(
        query=request.query,
        documents=chunks_of(request.documents),
        model=request.model,
        top_n=request.top_k or None,
    )


def response_of(request: VoyageRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply."""
    data = [
        {
            "index": document.index,
            "relevance_score": document.score,
            **({"document": text_of(request.documents[document.index])} if request.return_documents else {}),
        }
        for document in reply.documents
    ]
    return {"object": "list", "data": data, "model": reply.model, "usage": usage_of(reply)}


VOYAGE = Dialect("voyage", VoyageRequest, VoyageReply, call_of, response_of)
