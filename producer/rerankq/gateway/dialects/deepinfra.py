"""DeepInfra's inference of rerankers: queries and documents in, scores out in their order."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...errors import JobRejected
from ..rerank_call import RerankCall, RerankReply, ScoreCall, by_query
from .dialect import Dialect, scores_in_order
from .fields import Documents, Query, Reply, Request, chunks_of, priority_of


class DeepInfraRequest(Request):
    """Body of a request: one query for all documents, or one for each. The path names the model."""

    queries: list[Query] = Field(min_length=1)
    documents: Documents
    model: str | None = None
    instruction: str | None = Field(None, description="What to judge by, where the model has a place for it.")
    priority: int | None = Field(None, description="0: interactive, above: bulk.")


class DeepInfraStatus(Reply):
    """How a request went."""

    status: str
    runtime_ms: int
    cost: float
    tokens_generated: int
    tokens_input: int


class DeepInfraReply(Reply):
    """Body of a response, in the order of the documents."""

    scores: list[float]
    input_tokens: int
    request_id: str
    inference_status: DeepInfraStatus


def call_of(request: DeepInfraRequest) -> RerankCall | ScoreCall:
    """Read a request.

    Raises:
        JobRejected: if there are neither as many queries as documents nor one.
    """
    queries, count = request.queries, len(request.documents)
    if len(queries) not in {1, count}:
        raise JobRejected(f"expected 1 query, or {count} as in documents, not {len(queries)}", field="queries")
    call = RerankCall(
        query="",
        documents=chunks_of(request.documents),
        model=request.model,
        priority=priority_of(request.priority),
        instruction=request.instruction or "",
    )
    return by_query(call, queries * count if len(queries) == 1 else queries)


def response_of(_: DeepInfraRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply."""
    return {
        "scores": scores_in_order(reply),
        "input_tokens": reply.billed_tokens,
        "request_id": reply.id,
        "inference_status": {
            "status": "succeeded",
            "runtime_ms": round(reply.timings_ms.total),
            "cost": 0.0,
            "tokens_generated": 0,
            "tokens_input": reply.billed_tokens,
        },
    }


DEEPINFRA = Dialect("deepinfra", DeepInfraRequest, DeepInfraReply, call_of, response_of)
