"""SiliconFlow's rerank."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ..rerank_call import RerankReply
from .dialect import Dialect
from .fields import Tokens
from .results import ResultsReply, ResultsRequest, call_of, response_of

_NO_CHUNKS = "No effect: a document is read in one piece, as far as the model reads."


class SiliconFlowRequest(ResultsRequest):
    """Body of a request."""

    max_chunks_per_doc: Tokens | None = Field(None, description=_NO_CHUNKS)
    overlap_tokens: Tokens | None = Field(None, description=_NO_CHUNKS)


class SiliconFlowReply(ResultsReply):
    """Body of a response."""

    tokens: dict[str, int]


def with_tokens(request: SiliconFlowRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply."""
    body = response_of(request, reply)
    return {**body, "tokens": body["meta"]["tokens"]}


SILICONFLOW = Dialect("siliconflow", SiliconFlowRequest, SiliconFlowReply, call_of, with_tokens)
