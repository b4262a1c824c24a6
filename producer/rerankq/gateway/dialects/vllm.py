"""vLLM's rerank, and its score of pairs."""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, Field

from ...errors import JobRejected
from ..rerank_call import RerankCall, RerankReply, ScoreCall, by_query
from .dialect import Dialect, scores_in_order
from .fields import (
    Document,
    Flag,
    Reply,
    Request,
    Tokens,
    chunks_of,
    pair_tokens,
    priority_of,
    query_tokens,
    text_of,
)
from .results import ResultsReply, ResultsRequest, TokenUsage, call_of, response_of, usage_of

_OneOrMore = Document | list[Document]


class VllmRequest(ResultsRequest):
    """Body of a rerank request. The documents are returned unless told not to."""

    return_documents: Flag = True


class VllmScoreRequest(Request):
    """Body of a score request: one text with one or several, or as many with as many."""

    text_1: _OneOrMore = Field(validation_alias=AliasChoices("text_1", "queries", "query", "data_1"))
    text_2: _OneOrMore = Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))
    model: str | None = None
    max_tokens_per_doc: Tokens | None = None
    max_tokens_per_query: Tokens | None = None
    truncate_prompt_tokens: Tokens | None = None
    activation: Flag = Field(
        True, validation_alias=AliasChoices("use_activation", "activation"), description="False: answer logits."
    )
    priority: int | None = Field(None, description="0: interactive, above: bulk.")
    instruction: str | None = Field(None, description="What to judge by, where the model has a place for it.")


class VllmScore(Reply):
    """A pair's score."""

    index: int
    object: str
    score: float


class VllmScoreReply(Reply):
    """Body of a response to a score request, in the order of the pairs."""

    id: str
    object: str
    created: int
    model: str
    data: list[VllmScore]
    usage: TokenUsage


def score_call_of(request: VllmScoreRequest) -> RerankCall | ScoreCall:
    """Read a score request.

    Raises:
        JobRejected: if neither text stands alone and they are not as many.
    """
    first, second = (text if isinstance(text, list) else [text] for text in (request.text_1, request.text_2))
    if not first or not second:
        raise JobRejected("expected at least one text", field="text_2" if first else "text_1")
    if len(first) not in {1, len(second)}:
        raise JobRejected(f"expected 1 text, or {len(second)} as in text_2, not {len(first)}", field="text_1")
    queries = [text_of(query) for query in first] * (len(second) if len(first) == 1 else 1)
    return by_query(
        RerankCall(
            query="",
            documents=chunks_of(second, name="text_2"),
            model=request.model,
            raw_scores=not request.activation,
            priority=priority_of(request.priority),
            max_length=pair_tokens(
                document=request.max_tokens_per_doc,
                query=request.max_tokens_per_query,
                pair=request.truncate_prompt_tokens,
            ),
            query_max_tokens=query_tokens(request.max_tokens_per_query),
            instruction=request.instruction or "",
        ),
        queries,
    )


def scores_of(_: VllmScoreRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply to a score request."""
    return {
        "id": reply.id,
        "object": "list",
        # A clock has no place in a pure function, and no client reads it.
        "created": 0,
        "model": reply.model,
        "data": [
            {"index": index, "object": "score", "score": score} for index, score in enumerate(scores_in_order(reply))
        ],
        "usage": usage_of(reply),
    }


VLLM = Dialect("vllm", VllmRequest, ResultsReply, call_of, response_of)
VLLM_SCORE = Dialect("vllm-score", VllmScoreRequest, VllmScoreReply, score_call_of, scores_of)
