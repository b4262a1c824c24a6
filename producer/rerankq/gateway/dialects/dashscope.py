"""DashScope's text rerank (Alibaba Cloud Model Studio): ``input`` and ``parameters`` in, ``output`` out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ..rerank_call import RerankCall, RerankReply
from .dialect import Dialect
from .fields import Documents, Flag, Query, Reply, Request, TopN, chunks_of, text_of
from .results import ResultsResult


class DashScopeInput(Request):
    """What is to be ranked."""

    query: Query
    documents: Documents


class DashScopeParameters(Request):
    """How."""

    top_n: TopN | None = None
    return_documents: Flag = False
    instruct: str | None = Field(None, description="What to judge by, where the model has a place for it.")


class DashScopeRequest(Request):
    """Body of a request."""

    model: str | None = None
    input: DashScopeInput
    parameters: DashScopeParameters = DashScopeParameters()


class DashScopeOutput(Reply):
    """Best first."""

    results: list[ResultsResult]


class DashScopeUsage(Reply):
    """Tokens that were computed for this call, at least 1."""

    total_tokens: int
    input_tokens: int


class DashScopeReply(Reply):
    """Body of a response."""

    output: DashScopeOutput
    usage: DashScopeUsage
    request_id: str


def call_of(request: DashScopeRequest) -> RerankCall:
    """Read a request."""
    return RerankCall(
        query=request.input.query,
        documents=chunks_of(request.input.documents, name="input.documents"),
        model=request.model,
        top_n=request.parameters.top_n or None,
        instruction=request.parameters.instruct or "",
    )


def response_of(request: DashScopeRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply."""
    results: list[dict[str, Any]] = [
        {"index": document.index, "relevance_score": document.score} for document in reply.documents
    ]
    if request.parameters.return_documents:
        for result in results:
            result["document"] = _object(request.input.documents[result["index"]])
    return {
        "output": {"results": results},
        "usage": {"total_tokens": reply.billed_tokens, "input_tokens": reply.billed_tokens},
        "request_id": reply.id,
    }


def _object(document: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"text": document} if isinstance(document, str) else {**document, "text": text_of(document)}


DASHSCOPE = Dialect("dashscope", DashScopeRequest, DashScopeReply, call_of, response_of)
