"""Cohere's rerank, v1 and v2: what most servers and clients speak, in one form that all of them can read."""

from __future__ import annotations

import math
from typing import Any

from ..rerank_call import RerankCall, RerankReply
from .dialect import Dialect
from .fields import Documents, Query, Reply, Request, Tokens, TopN, chunks_of

# Room for the query beside a document whose tokens are limited.
QUERY_TOKENS = 128


class CohereRequest(Request):
    """Body of a rerank request."""

    query: Query
    documents: Documents
    model: str | None = None
    top_n: TopN | None = None
    rank_fields: tuple[str, ...] = ()
    return_documents: bool = False
    max_tokens_per_doc: Tokens | None = None
    priority: int | None = None


class CohereResult(Reply):
    """A document's score."""

    index: int
    relevance_score: float


class CohereReply(Reply):
    """Body of a response."""

    id: str
    results: list[CohereResult]


def call_of(request: CohereRequest) -> RerankCall:
    """Read a request."""
    limit = request.max_tokens_per_doc
    return RerankCall(
        query=request.query,
        documents=chunks_of(request.documents, rank_fields=request.rank_fields),
        model=request.model,
        top_n=request.top_n or None,
        priority=None if request.priority is None else "bulk" if request.priority > 0 else "interactive",
        max_length=limit + QUERY_TOKENS if limit and limit > 0 else None,
    )


def response_of(request: CohereRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply."""
    results: list[dict[str, Any]] = [
        {"index": document.index, "relevance_score": document.score} for document in reply.documents
    ]
    if request.return_documents:
        for result in results:
            sent = request.documents[result["index"]]
            result["document"] = {"text": sent} if isinstance(sent, str) else sent
    return {
        "id": reply.job_id,
        "object": "rerank",
        "model": reply.model,
        "results": results,
        "usage": {"prompt_tokens": reply.billed_tokens, "total_tokens": reply.billed_tokens},
        "meta": meta_of(reply, documents=len(request.documents)),
    }


def meta_of(reply: RerankReply, *, documents: int) -> dict[str, Any]:
    """Say what a reply cost, as Cohere does: a search unit is a query with up to 100 documents."""
    warnings = []
    if reply.truncated_pairs:
        warnings.append(f"{reply.truncated_pairs} documents were longer than the model reads, and were truncated")
    if reply.degraded:
        warnings.append("no ranking in time: this is the order that was sent")
    return {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": math.ceil(documents / 100), "input_tokens": reply.billed_tokens},
        "tokens": {"input_tokens": reply.billed_tokens, "output_tokens": 0},
        "warnings": warnings,
    }


COHERE = Dialect("cohere", CohereRequest, CohereReply, call_of, response_of)
