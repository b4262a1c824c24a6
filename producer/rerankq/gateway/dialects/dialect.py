"""What a dialect is: a request model, a response, and two pure functions between them and a rerank call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from ..rerank_call import RankedDocument, RerankCall, RerankReply

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
    call_of: Callable[[Asked], RerankCall]
    response_of: Callable[[Asked, RerankReply], Any]


def explanation(document: RankedDocument) -> dict[str, Any]:
    """Say how a document's score was made: under the key ``rerankq`` of a result, if the caller asks for it."""
    if document.ranked is None:
        return {"scores": {}, "model_logit": None, "missing": [], "truncated": False, "cached": False}
    return document.ranked.model_dump(include={"score", "scores", "model_logit", "missing", "truncated", "cached"})


def with_explanation(body: Any, reply: RerankReply) -> Any:
    """Add an explanation to every result of a response that lists results with their ``index``.

    >>> from rerankq.gateway.rerank_call import RankedDocument, RerankReply
    >>> with_explanation([{"index": 3}], RerankReply("id", "m", (RankedDocument(3, 0.5),)))[0]["rerankq"]["cached"]
    False
    """
    by_index = {document.index: document for document in reply.documents}
    results = body if isinstance(body, list) else next((v for v in _lists(body) if v), [])
    for result in results:
        if isinstance(result, dict) and result.get("index") in by_index:
            result["rerankq"] = explanation(by_index[result["index"]])
    return body


def _lists(body: Mapping[str, Any]) -> list[list[Any]]:
    return [body[key] for key in ("results", "data", "rankings") if isinstance(body.get(key), list)]
