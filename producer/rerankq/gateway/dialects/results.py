"""The form that most servers answer in: ``results`` with ``index`` and ``relevance_score``, best first.

Their requests and responses are one family: each server's clients read a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import AliasChoices, Field

from ..rerank_call import RerankCall, RerankReply
from .fields import (
    Documents,
    Flag,
    Query,
    Reply,
    Request,
    Tokens,
    TopN,
    chunks_of,
    pair_tokens,
    priority_of,
    query_tokens,
    text_of,
)


class ResultsRequest(Request):
    """Body of a rerank request."""

    query: Query
    documents: Documents
    model: str | None = None
    top_n: TopN | None = None
    return_documents: Flag = False
    rank_fields: tuple[str, ...] = Field((), description="Fields of documents that are objects: read as lines.")
    max_tokens_per_doc: Tokens | None = Field(
        None, validation_alias=AliasChoices("max_tokens_per_doc", "max_doc_length")
    )
    max_tokens_per_query: Tokens | None = Field(
        None, validation_alias=AliasChoices("max_tokens_per_query", "max_query_length")
    )
    truncate_prompt_tokens: Tokens | None = None
    raw_scores: Flag = Field(False, description="Answer the model's logits instead of probabilities.")
    activation: Flag = Field(
        True, validation_alias=AliasChoices("use_activation", "activation"), description="False: answer logits."
    )
    priority: int | None = Field(None, description="0: interactive, above: bulk.")
    instruction: str | None = Field(
        None,
        validation_alias=AliasChoices("instruction", "instruct"),
        description="What to judge by, where the model has a place for it.",
    )


class TextDocument(Reply):
    """A document as it was sent; further fields of an object come back with it."""

    text: str


class ResultsResult(Reply):
    """A document's position in the request, and its score."""

    index: int
    relevance_score: float
    document: TextDocument | None = None


class TokenUsage(Reply):
    """Tokens that were computed for this call, at least 1."""

    prompt_tokens: int
    total_tokens: int


class ResultsMeta(Reply):
    """Cost and warnings, as Cohere writes them."""

    api_version: dict[str, str]
    billed_units: dict[str, int]
    tokens: dict[str, int]
    warnings: list[str]


class ResultsReply(Reply):
    """Body of a response: best first."""

    id: str
    object: str
    model: str
    results: list[ResultsResult]
    usage: TokenUsage
    meta: ResultsMeta


def call_of(request: ResultsRequest) -> RerankCall:
    """Read a request."""
    return RerankCall(
        query=request.query,
        documents=chunks_of(request.documents, rank_fields=request.rank_fields),
        model=request.model,
        top_n=request.top_n or None,
        raw_scores=request.raw_scores or not request.activation,
        priority=priority_of(request.priority),
        max_length=pair_tokens(
            document=request.max_tokens_per_doc,
            query=request.max_tokens_per_query,
            pair=request.truncate_prompt_tokens,
        ),
        query_max_tokens=query_tokens(request.max_tokens_per_query),
        instruction=request.instruction or "",
    )


def response_of(request: ResultsRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply; documents, where they are asked for, as objects."""
    results = [
        {
            "index": document.index,
            "relevance_score": document.score,
            **({"document": _object(request.documents[document.index])} if request.return_documents else {}),
        }
        for document in reply.documents
    ]
    return body_of(results, reply, documents=len(request.documents))


def body_of(results: list[dict[str, Any]], reply: RerankReply, *, documents: int, version: str = "1") -> dict[str, Any]:
    """Write a body round its results. A search unit is a query with up to 100 documents."""
    return {
        "id": reply.id,
        "object": "rerank",
        "model": reply.model,
        "results": results,
        "usage": usage_of(reply),
        "meta": {
            "api_version": {"version": version},
            "billed_units": {"search_units": math.ceil(documents / 100), "input_tokens": reply.billed_tokens},
            "tokens": {"input_tokens": reply.billed_tokens, "output_tokens": 0},
            "warnings": list(reply.warnings),
        },
    }


def usage_of(reply: RerankReply) -> dict[str, int]:
    """Say what a reply cost."""
    return {"prompt_tokens": reply.billed_tokens, "total_tokens": reply.billed_tokens}


def _object(document: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(document, str):
        return {"text": document}
    return document if isinstance(document.get("text"), str) else {**document, "text": text_of(document)}
