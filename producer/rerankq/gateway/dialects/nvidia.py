"""NVIDIA NIM's ranking: passages in, logits out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field

from ..rerank_call import RerankCall, RerankReply
from .dialect import Dialect
from .fields import Documents, Query, Reply, Request, TopN, chunks_of
from .results import TokenUsage, usage_of


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class NvidiaRequest(Request):
    """Body of a request."""

    query: Query
    passages: Documents
    model: str | None = None
    truncate: Annotated[Literal["NONE", "END", "START"], BeforeValidator(_upper)] | None = Field(
        None, description="No effect: what does not fit is always cut at its end, and the response says so by header."
    )
    top_n: TopN | None = Field(None, validation_alias=AliasChoices("top_n", "top_k"))


class NvidiaRanking(Reply):
    """A passage's position in the request, and the model's logit."""

    index: int
    logit: float


class NvidiaReply(Reply):
    """Body of a response: best first."""

    rankings: list[NvidiaRanking]
    usage: TokenUsage


def call_of(request: NvidiaRequest) -> RerankCall:
    """Read a request."""
    return RerankCall(
        query=request.query,
        documents=chunks_of(request.passages, name="passages"),
        model=request.model,
        top_n=request.top_n or None,
        raw_scores=True,
    )


def response_of(_: NvidiaRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply."""
    rankings = [{"index": document.index, "logit": document.score} for document in reply.documents]
    return {"rankings": rankings, "usage": usage_of(reply)}


NVIDIA = Dialect("nvidia", NvidiaRequest, NvidiaReply, call_of, response_of)
