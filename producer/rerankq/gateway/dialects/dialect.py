"""What a dialect is: a request model, a response, and two pure functions between them and a rerank call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from ..rerank_call import RankedDocument, RerankCall, RerankReply, ScoreCall

Asked = TypeVar("Asked", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Dialect(Generic[Asked]):
    """A way to ask for a ranking over HTTP.

    Args:
        name: as metrics name it.
        request: the model of its request body.
        response: the type of its response body, for the OpenAPI document.
        call_of: read a request. Raises JobRejected naming the field.
        response_of: write the reply to it, as plain values.
    """

    name: str
    request: type[Asked]
    response: Any
    call_of: Callable[[Asked], RerankCall | ScoreCall]
    response_of: Callable[[Asked, RerankReply], Any]


def scores_in_order(reply: RerankReply) -> list[float]:
    """List the scores in the order of the documents.

    >>> scores_in_order(RerankReply("id", "m", (RankedDocument(1, 0.9), RankedDocument(0, 0.1))))
    [0.1, 0.9]
    """
    return [document.score for document in sorted(reply.documents, key=lambda document: document.index)]


def explanation(document: RankedDocument) -> dict[str, Any]:
    """Say how a document's score was made: under the key ``rerankq`` of a result, if the caller asks for it."""
    if document.ranked is None:
        return {"scores": {}, "model_logit": None, "missing": [], "truncated": False, "cached": False}
    return document.ranked.model_dump(include={"score", "scores", "model_logit", "missing", "truncated", "cached"})


def with_explanation(body: Any, reply: RerankReply) -> Any:
    """Add an explanation to every result of a response; where results are bare numbers, beside them, in their order.

    >>> reply = RerankReply("id", "m", (RankedDocument(0, 0.5),))
    >>> with_explanation([{"index": 0}], reply)[0]["rerankq"]["cached"]
    False
    >>> with_explanation({"scores": [0.5]}, reply)["rerankq"][0]["cached"]
    False
    """
    by_index = {document.index: document for document in reply.documents}
    results = list(_results_of(body))
    for index, result in results:
        if index in by_index:
            result["rerankq"] = explanation(by_index[index])
    if not results and isinstance(body, dict):
        body["rerankq"] = [explanation(by_index[index]) for index in sorted(by_index)]
    return body


def _results_of(body: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Find the results of a response, each with the position of its document: their own, else their place."""
    if isinstance(body, list):
        for place, one in enumerate(body):
            result = one[0] if isinstance(one, list) and one else one
            if isinstance(result, dict):
                yield result.get("index", place), result
    elif isinstance(body, Mapping):
        for key in ("output", "results", "data", "rankings"):
            yield from _results_of(body.get(key))
