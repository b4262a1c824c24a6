"""Text Embeddings Inference's rerank: texts in, a bare list out."""

from __future__ import annotations

from typing import Any

from pydantic import RootModel

from ..rerank_call import RerankCall, RerankReply
from .dialect import Dialect
from .fields import Documents, Query, Reply, Request, TopN, chunks_of


class TeiRequest(Request):
    """Body of a rerank request. ``truncate`` is accepted: what does not fit is always cut, and said so by header."""

    query: Query
    texts: Documents
    model: str | None = None
    raw_scores: bool = False
    return_text: bool = False
    top_n: TopN | None = None


class TeiRank(Reply):
    """A text's score."""

    index: int
    score: float
    text: str | None = None


class TeiReply(RootModel[list[TeiRank]]):
    """Body of a response."""


def call_of(request: TeiRequest) -> RerankCall:
    """Read a request."""
    return RerankCall(
        query=request.query,
        documents=chunks_of(request.texts, name="texts"),
        model=request.model,
        top_n=request.top_n or None,
        raw_scores=request.raw_scores,
    )


def response_of(request: TeiRequest, reply: RerankReply) -> list[dict[str, Any]]:
    """Write a reply."""
    ranks: list[dict[str, Any]] = [{"index": document.index, "score": document.score} for document in reply.documents]
    if request.return_text:
        for rank in ranks:
            sent = request.texts[rank["index"]]
            rank["text"] = sent if isinstance(sent, str) else sent.get("text")
    return ranks


TEI = Dialect("tei", TeiRequest, TeiReply, call_of, response_of)
