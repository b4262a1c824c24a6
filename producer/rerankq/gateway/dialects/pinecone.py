"""Pinecone's rerank: documents that are objects in, ``data`` out."""

from __future__ import annotations

from typing import Any

from pydantic import Field, JsonValue

from ..rerank_call import RerankReply
from .dialect import Dialect
from .fields import Flag, Reply
from .results import ResultsRequest, call_of


class PineconeRequest(ResultsRequest):
    """Body of a request."""

    return_documents: Flag = True
    parameters: dict[str, JsonValue] = Field({}, description="No effect.")


class PineconeResult(Reply):
    """A document's position in the request, and its score."""

    index: int
    score: float
    document: dict[str, JsonValue] | None = None


class PineconeReply(Reply):
    """Body of a response: best first."""

    model: str
    data: list[PineconeResult]
    usage: dict[str, int]


def response_of(request: PineconeRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply."""
    data = []
    for document in reply.documents:
        sent = request.documents[document.index]
        shown = {"document": {"text": sent} if isinstance(sent, str) else sent} if request.return_documents else {}
        data.append({"index": document.index, "score": document.score, **shown})
    return {"model": reply.model, "data": data, "usage": {"rerank_units": 1}}


PINECONE = Dialect("pinecone", PineconeRequest, PineconeReply, call_of, response_of)
