"""What each kind of server is asked, and what it answers. Pure functions; a dialect is a row of ``DIALECTS``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple

from rerankq.catalogue import DialectName

Json = dict[str, Any]


class RerankRequest(NamedTuple):
    """One query and texts, to be scored by one request.

    ``raw`` asks for logits where the dialect can; ``max_length`` is in tokens, of query and text together.
    ``instruction`` is left out where it is empty, or where the dialect has no field for it.
    """

    model: str
    query: str
    texts: Sequence[str]
    raw: bool
    max_length: int
    instruction: str = ""


class Reply(NamedTuple):
    """The scores of a request's texts in their order, and the tokens used; 0 where the server does not say."""

    scores: list[float]
    tokens: int = 0


class ReplyMalformed(Exception):
    """Raised when a server's reply does not hold exactly one finite score for each text; says what is wrong with it."""


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is asked.

    ``results`` leads through the reply to the list of results, ``score`` names the score of each. ``reads_max_length``:
    whether it can be told how many tokens of a pair to read, so that scores depend on it. ``instruction`` leads through
    the request to the field for one; empty: there is none.
    """

    body: Callable[[RerankRequest], Json]
    results: tuple[str, ...] = ("results",)
    score: str = "relevance_score"
    reads_max_length: bool = False
    instruction: tuple[str, ...] = ()


def _documents(request: RerankRequest) -> Json:
    return {"model": request.model, "query": request.query, "documents": list(request.texts)}


def _cohere(request: RerankRequest) -> Json:
    return {**_documents(request), "top_n": len(request.texts)}


def _without_documents(request: RerankRequest) -> Json:
    # The texts are here; sent back they would double the traffic.
    return {**_documents(request), "top_n": len(request.texts), "return_documents": False}


def _dashscope(request: RerankRequest) -> Json:
    return {
        "model": request.model,
        "input": {"query": request.query, "documents": list(request.texts)},
        "parameters": {"top_n": len(request.texts), "return_documents": False},
    }


def _infinity(request: RerankRequest) -> Json:
    return {**_documents(request), "raw_scores": request.raw, "return_documents": False}


def _tei(request: RerankRequest) -> Json:
    # Without truncate a text that is too long is an error of the whole request.
    return {
        "query": request.query,
        "texts": list(request.texts),
        "raw_scores": request.raw,
        "truncate": True,
        "return_text": False,
    }


def _vllm(request: RerankRequest) -> Json:
    # Without a limit a text that is too long is an error of the whole request.
    activation = {"use_activation": False} if request.raw else {}
    return {**_cohere(request), "truncate_prompt_tokens": request.max_length, **activation}


def _voyage(request: RerankRequest) -> Json:
    return {**_documents(request), "top_k": len(request.texts), "truncation": True, "return_documents": False}


def _xinference(request: RerankRequest) -> Json:
    # return_len asks for the number of tokens.
    return {**_without_documents(request), "return_len": True}


DIALECTS: Mapping[DialectName, Dialect] = MappingProxyType(
    {
        "cohere": Dialect(_cohere),
        "dashscope": Dialect(_dashscope, results=("output", "results"), instruction=("parameters", "instruct")),
        "infinity": Dialect(_infinity),
        "jina": Dialect(_without_documents),
        "localai": Dialect(_cohere),
        "siliconflow": Dialect(_without_documents, instruction=("instruction",)),
        "tei": Dialect(_tei, results=(), score="score"),
        "vllm": Dialect(_vllm, reads_max_length=True, instruction=("instruction",)),
        "voyage": Dialect(_voyage, results=("data",)),
        "xinference": Dialect(_xinference),
    }
)


def body_of(dialect: Dialect, request: RerankRequest, parameters: Mapping[str, Any]) -> bytes:
    """Write a request as JSON; *parameters* of the catalogue are added, or take the place of what is there.

    A job's instruction goes before one of theirs.

    >>> request = RerankRequest("m", "q", ["a"], raw=False, max_length=512)
    >>> body_of(DIALECTS["cohere"], request, {"max_tokens_per_doc": 64})
    b'{"model":"m","query":"q","documents":["a"],"top_n":1,"max_tokens_per_doc":64}'
    """
    body = _merged(dialect.body(request), parameters)
    if request.instruction and dialect.instruction:
        *way, name = dialect.instruction
        body = _merged(body, reduce(lambda inner, outer: {outer: inner}, reversed(way), {name: request.instruction}))
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def read_reply(
    dialect: Dialect, content: bytes, headers: Mapping[str, str], *, texts: int, probabilities: bool
) -> Reply:
    """Read the reply to a request with so many *texts*.

    Raises:
        ReplyMalformed: unless each text has exactly one finite score, between 0 and 1 where they are *probabilities*.
    """
    try:
        read = json.loads(content)
    except (ValueError, RecursionError):
        raise ReplyMalformed("it is not JSON, or not all of it came") from None
    found = read
    for name in dialect.results:
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, list):
        raise ReplyMalformed(f"it has no list {'.'.join(dialect.results) or 'of results'}")
    scores: dict[int, float] = {}
    for result in found:
        index, score = _result(result, dialect.score)
        if not 0 <= index < texts:
            raise ReplyMalformed(f"index {index} is out of range: {texts} texts were sent")
        if index in scores:
            raise ReplyMalformed(f"index {index} is there twice")
        if probabilities and not -_ROUNDING <= score <= 1 + _ROUNDING:
            raise ReplyMalformed(
                f'index {index} scores {score:g}, which is no probability: score = "logit" may be meant'
            )
        scores[index] = score
    if missing := [at for at in range(texts) if at not in scores]:
        raise ReplyMalformed(f"{len(missing)} of {texts} texts have no score, the first of them index {missing[0]}")
    return Reply([scores[at] for at in range(texts)], _tokens(read, headers))


# A probability that was computed in half precision may be a little above 1.
_ROUNDING = 1e-3


def _result(result: Any, name: str) -> tuple[int, float]:
    if not isinstance(result, dict):
        raise ReplyMalformed("a result is no object")
    index, score = result.get("index"), result.get(name)
    if not isinstance(index, int) or isinstance(index, bool):
        raise ReplyMalformed("a result has no whole number as its index")
    if not isinstance(score, int | float) or isinstance(score, bool):
        raise ReplyMalformed(f"index {index} has no number as its {name}")
    try:
        number = float(score)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ReplyMalformed(f"index {index} scores {number}")
    return index, number


def _tokens(reply: Any, headers: Mapping[str, str]) -> int:
    """Find the tokens that a server says it used, wherever it says so."""
    said = reply if isinstance(reply, dict) else {}
    places = [
        _at(said, "usage", "total_tokens"),
        _at(said, "meta", "tokens", "input_tokens"),
        _at(said, "meta", "billed_units", "input_tokens"),
        # Text Embeddings Inference.
        _number(headers.get("x-compute-tokens", "")),
    ]
    return next((found for found in places if found > 0), 0)


def _at(reply: Any, *path: str) -> int:
    for name in path:
        reply = reply.get(name) if isinstance(reply, dict) else None
    return int(reply) if isinstance(reply, int | float) and not isinstance(reply, bool) and 0 < reply < _MANY else 0


# No request uses so many tokens: a counter beyond is nonsense, and would stop a limit of tokens per minute for ever.
_MANY = 1e9


def _number(header: str) -> int:
    return int(header) if header.isdecimal() and len(header) < 10 else 0


def _merged(body: Json, more: Mapping[str, Any]) -> Json:
    merged = dict(body)
    for name, value in more.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
