"""Text Embeddings Inference: rerank (texts in, a bare list out) and predict (pairs)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, RootModel

from ..rerank_call import RerankCall, RerankReply, ScoreCall, by_query
from .dialect import Dialect, scores_in_order
from .fields import Documents, Flag, Query, Reply, Request, TopN, chunks_of, text_of
from .results import ResultsReply, body_of

# What it says of a model with one score.
LABEL = "LABEL_0"
_CUT_AT_THE_END = "No effect: what does not fit is always cut at its end, and the response says so by header."


class TeiRequest(Request):
    """Body of a rerank request."""

    query: Query
    texts: Documents
    model: str | None = None
    raw_scores: Flag = Field(False, description="Answer the model's logits instead of probabilities.")
    return_text: Flag = False
    truncate: Flag | None = Field(None, description=_CUT_AT_THE_END)
    truncation_direction: str | None = Field(None, description=_CUT_AT_THE_END)
    top_n: TopN | None = None


class TeiRank(Reply):
    """A text's position in the request, and its score."""

    index: int
    score: float
    text: str | None = None


class TeiReply(RootModel[list[TeiRank]]):
    """Body of a response: best first."""


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
    return [
        {
            "index": document.index,
            "score": document.score,
            **({"text": text_of(request.texts[document.index])} if request.return_text else {}),
        }
        for document in reply.documents
    ]


def results_of(request: TeiRequest, reply: RerankReply) -> dict[str, Any]:
    """Write a reply as most servers do, for clients that send ``texts`` and read ``results``."""
    results = [
        {"index": document.index, "relevance_score": document.score, "score": document.score}
        for document in reply.documents
    ]
    return body_of(results, reply, documents=len(request.texts))


def _pairs(value: object) -> object:
    pairs = [value] if _is_pair(value) else value
    if not isinstance(pairs, list) or not pairs:
        msg = "expected a pair of texts, or a list of pairs"
        raise ValueError(msg)
    for at, pair in enumerate(pairs):
        if not _is_pair(pair):
            msg = f"expected a pair of texts at position {at}: this model scores a text for another one"
            raise ValueError(msg)
    return value


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


Pair = Annotated[list[str], Field(min_length=2, max_length=2)]
Pairs = Annotated[Pair | Annotated[list[Pair], Field(min_length=1)], BeforeValidator(_pairs)]


class TeiPredictRequest(Request):
    """Body of a predict request: a pair of texts, or a list of pairs."""

    inputs: Pairs
    raw_scores: Flag = Field(False, description="Answer the model's logits instead of probabilities.")
    truncate: Flag | None = Field(None, description=_CUT_AT_THE_END)

    @property
    def pairs(self) -> list[list[str]]:
        """The pairs, one too."""
        return [self.inputs] if _is_pair(self.inputs) else self.inputs  # type: ignore[list-item,return-value]


class TeiPrediction(Reply):
    """A pair's score."""

    score: float
    label: str


class TeiPredictReply(RootModel[list[TeiPrediction] | list[list[TeiPrediction]]]):
    """Body of a response, in the order of the pairs."""


def predict_call_of(request: TeiPredictRequest) -> RerankCall | ScoreCall:
    """Read a predict request."""
    documents = chunks_of([text for _, text in request.pairs], name="inputs")
    call = RerankCall(query="", documents=documents, raw_scores=request.raw_scores)
    return by_query(call, [query for query, _ in request.pairs])


def predictions_of(request: TeiPredictRequest, reply: RerankReply) -> list[Any]:
    """Write a reply to a predict request: a pair alone without a list round it."""
    predictions = [[{"score": score, "label": LABEL}] for score in scores_in_order(reply)]
    return predictions[0] if _is_pair(request.inputs) else predictions


TEI = Dialect("tei", TeiRequest, TeiReply, call_of, response_of)
TEI_RESULTS = Dialect("tei-results", TeiRequest, ResultsReply, call_of, results_of)
TEI_PREDICT = Dialect("tei-predict", TeiPredictRequest, TeiPredictReply, predict_call_of, predictions_of)
