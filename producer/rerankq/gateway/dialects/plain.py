"""Small servers of people's own: a query and texts in, one score for each text out, in their order."""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, Field

from ..rerank_call import RerankCall, RerankReply
from .dialect import Dialect, scores_in_order
from .fields import Documents, Flag, Query, Reply, Request, chunks_of


class PlainRequest(Request):
    """Body of a request."""

    query: Query
    docs: Documents = Field(validation_alias=AliasChoices("docs", "documents", "texts", "passages"))
    model: str | None = None
    raw_scores: Flag = Field(False, description="Answer the model's logits instead of probabilities.")


class PlainReply(Reply):
    """Body of a response, in the order of the texts."""

    scores: list[float]


def call_of(request: PlainRequest) -> RerankCall:
    """Read a request."""
    return RerankCall(
        query=request.query,
        documents=chunks_of(request.docs, name="docs"),
        model=request.model,
        raw_scores=request.raw_scores,
    )


def response_of(_: PlainRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply."""
    return {"scores": scores_in_order(reply)}


PLAIN = Dialect("plain", PlainRequest, PlainReply, call_of, response_of)
