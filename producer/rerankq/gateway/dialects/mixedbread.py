"""Mixedbread's reranking: ``input`` in, ``data`` out."""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, Field

from ..rerank_call import RerankCall, RerankReply
from .dialect import Dialect
from .fields import Document, Documents, Flag, Query, Reply, Request, TopN, chunks_of
from .results import TokenUsage, usage_of


class MixedbreadRequest(Request):
    """Body of a request."""

    query: Query
    input: Documents
    model: str | None = None
    rank_fields: tuple[str, ...] = Field((), description="Fields of documents that are objects: read as lines.")
    top_k: TopN | None = Field(None, validation_alias=AliasChoices("top_k", "top_n"))
    return_input: Flag = False
    instruction: str | None = Field(None, description="What to judge by, where the model has a place for it.")


class MixedbreadResult(Reply):
    """A document's position in the request, and its score."""

    index: int
    score: float
    input: Document | None = None
    object: str


class MixedbreadUsage(TokenUsage):
    """Tokens that were computed for this call, at least 1."""

    completion_tokens: int


class MixedbreadReply(Reply):
    """Body of a response: best first."""

    usage: MixedbreadUsage
    model: str
    data: list[MixedbreadResult]
    object: str
    top_k: int
    return_input: bool


def call_of(request: MixedbreadRequest) -> RerankCall:
    """Read a request."""
    return RerankCall(
        query=request.query,
        documents=chunks_of(request.input, rank_fields=request.rank_fields, name="input"),
        model=request.model,
        top_n=request.top_k or None,
        instruction=request.instruction or "",
    )


def response_of(request: MixedbreadRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply."""
    data = [
        {
            "index": document.index,
            "score": document.score,
            "input": request.input[document.index] if request.return_input else None,
            "object": "rank_result",
        }
        for document in reply.documents
    ]
    return {
        "usage": {**usage_of(reply), "completion_tokens": 0},
        "model": reply.model,
        "data": data,
        "object": "list",
        "top_k": len(data),
        "return_input": request.return_input,
    }


MIXEDBREAD = Dialect("mixedbread", MixedbreadRequest, MixedbreadReply, call_of, response_of)
