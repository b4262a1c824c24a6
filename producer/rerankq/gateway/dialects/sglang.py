"""SGLang's rerank: as vLLM's, with a bare list out."""

from __future__ import annotations

from typing import Any

from pydantic import RootModel

from ..rerank_call import RerankReply
from .dialect import Dialect
from .fields import Flag, Reply, text_of
from .results import ResultsRequest, call_of


class SglangRequest(ResultsRequest):
    """Body of a request."""

    return_documents: Flag = True


class SglangResult(Reply):
    """A document's position in the request, and its score."""

    score: float
    document: str | None = None
    index: int
    meta_info: dict[str, str]


class SglangReply(RootModel[list[SglangResult]]):
    """Body of a response: best first."""


def response_of(request: SglangRequest, reply: RerankReply) -> list[dict[str, Any]]:
    """Write a reply."""
    return [
        {
            "score": document.score,
            **({"document": text_of(request.documents[document.index])} if request.return_documents else {}),
            "index": document.index,
            "meta_info": {"id": reply.id},
        }
        for document in reply.documents
    ]


SGLANG = Dialect("sglang", SglangRequest, SglangReply, call_of, response_of)
