"""Cohere's rerank, v1 and v2."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ..rerank_call import RerankReply
from .dialect import Dialect
from .fields import Tokens
from .results import ResultsReply, ResultsRequest, call_of, response_of


class CohereRequest(ResultsRequest):
    """Body of a request to v2. ``relevant_spans`` is accepted and has no effect: spans are optional in responses."""


class CohereV1Request(ResultsRequest):
    """Body of a request to v1."""

    max_chunks_per_doc: Tokens | None = Field(
        None, description="No effect: a document is read in one piece, as far as the model reads."
    )


def response_of_v2(request: CohereRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply."""
    body = response_of(request, reply)
    body["meta"]["api_version"] = {"version": "2"}
    return body


COHERE = Dialect("cohere", CohereRequest, ResultsReply, call_of, response_of_v2)
COHERE_V1 = Dialect("cohere", CohereV1Request, ResultsReply, call_of, response_of)
