"""The dialects of other rerank servers, and which of them a request is in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .cohere import COHERE, COHERE_V1
from .dashscope import DASHSCOPE
from .deepinfra import DEEPINFRA
from .dialect import Dialect
from .gpustack import GPUSTACK
from .infinity import INFINITY
from .jina import JINA
from .localai import LOCALAI
from .mixedbread import MIXEDBREAD
from .nvidia import NVIDIA
from .pinecone import PINECONE
from .plain import PLAIN
from .sglang import SGLANG
from .siliconflow import SILICONFLOW
from .tei import TEI, TEI_PREDICT, TEI_RESULTS
from .vllm import VLLM, VLLM_SCORE
from .voyage import VOYAGE
from .xinference import XINFERENCE

__all__ = ["MOUNTS", "PATHS", "Dialect", "choose"]

AnyDialect = Dialect[Any]
Body = Mapping[str, Any]


def _holds(*names: str, without: tuple[str, ...] = ()) -> Callable[[Body], bool]:
    """Tell a body by fields that it has, and fields that it has not."""
    return lambda body: all(name in body for name in names) and not any(name in body for name in without)


def _texts_read_as_results(body: Body) -> bool:
    # Dify can be told to send `texts`, and reads `results`; clients of TEI name no model, or ask for the texts.
    return _holds("texts", "model", without=("documents", "return_text", "raw_scores", "truncate"))(body)


# Voyage's: rerank-2.5, rerank-lite-1; Cohere's have a v before the number.
_VOYAGE_MODEL = re.compile(r"rerank-(lite-)?[0-9]")

#: How a request tells its dialect on a path of several, tried in this order.
_SIGNS: tuple[tuple[AnyDialect, Callable[[Body], bool]], ...] = (
    (TEI_RESULTS, _texts_read_as_results),
    (TEI, _holds("texts", without=("documents",))),
    (NVIDIA, _holds("passages", without=("documents",))),
    (DASHSCOPE, lambda body: isinstance(body.get("input"), Mapping)),
    (MIXEDBREAD, _holds("input", without=("documents",))),
    (PLAIN, _holds("docs", without=("documents",))),
    (DEEPINFRA, _holds("queries", "documents", without=("query",))),
    (PINECONE, _holds("parameters", "documents")),
    (PINECONE, lambda body: str(body.get("model")).startswith("pinecone-rerank-")),
    (VOYAGE, _holds("top_k", "documents", without=("top_n",))),
    (VOYAGE, _holds("truncation", "documents", without=("top_n",))),
    (VOYAGE, lambda body: bool(_VOYAGE_MODEL.match(str(body.get("model")))) and _holds(without=("top_n",))(body)),
    (INFINITY, _holds("raw_scores", "documents")),
    (XINFERENCE, _holds("return_len")),
    (XINFERENCE, _holds("kwargs")),
    (SILICONFLOW, _holds("overlap_tokens")),
    (COHERE_V1, _holds("rank_fields")),
    (COHERE_V1, _holds("max_chunks_per_doc")),
    (VLLM_SCORE, _holds("text_1")),
)
# The dialects that a path of several may be in: first the one of a request without a sign.
_BY_SIGN = (*dict.fromkeys(dialect for dialect, _ in _SIGNS if dialect is not VLLM_SCORE),)
_SCORE = (VLLM_SCORE, PLAIN)
_RANKING = (NVIDIA, MIXEDBREAD)

# Without a sign, documents are returned: Dify's plugins read them without asking for them.
_RERANK: dict[str, AnyDialect] = {"/rerank": JINA, "/v1/rerank": JINA, "/v2/rerank": COHERE}


def _at(paths: str, *dialects: AnyDialect) -> dict[str, tuple[AnyDialect, ...]]:
    return dict.fromkeys(paths.split(), dialects)


_RERANK_PATHS = "/rerank /v1/rerank /v2/rerank"
#: Prefixes for the dialect of one server, where two cannot be told apart: its paths below the prefix.
MOUNTS: dict[str, dict[str, tuple[AnyDialect, ...]]] = {
    "cohere": {"/rerank": (COHERE,), "/v1/rerank": (COHERE_V1,), "/v2/rerank": (COHERE,)},
    "jina": _at(_RERANK_PATHS, JINA),
    "vllm": {**_at(_RERANK_PATHS, VLLM), **_at("/score /v1/score", VLLM_SCORE)},
    "tei": {**_at("/rerank /v1/rerank", TEI), **_at("/predict", TEI_PREDICT)},
    "infinity": _at(_RERANK_PATHS, INFINITY),
    "xinference": _at(_RERANK_PATHS, XINFERENCE),
    "localai": _at(_RERANK_PATHS, LOCALAI),
    "voyage": _at(_RERANK_PATHS, VOYAGE),
    "mixedbread": _at("/reranking /v1/reranking /rerank /v1/rerank", MIXEDBREAD),
    "nvidia": _at("/ranking /v1/ranking /reranking /v1/reranking /rerank /v1/rerank", NVIDIA),
    "siliconflow": _at(_RERANK_PATHS, SILICONFLOW),
    "gpustack": _at(_RERANK_PATHS, GPUSTACK),
    "sglang": _at(_RERANK_PATHS, SGLANG),
    "pinecone": _at(_RERANK_PATHS, PINECONE),
    "deepinfra": _at("/inference/{model:path} /v1/inference/{model:path}", DEEPINFRA),
    "dashscope": {
        **_at("/api/v1/services/rerank/text-rerank/text-rerank /services/rerank/text-rerank/text-rerank", DASHSCOPE),
        **_at("/reranks /v1/reranks", JINA),
    },
    "plain": _at("/rerank /score", PLAIN),
}

#: The dialects of each path, first the one of a request without a sign of another.
PATHS: dict[str, tuple[AnyDialect, ...]] = {
    **{path: (dialect, *_BY_SIGN) for path, dialect in _RERANK.items()},
    # Fireworks; before DeepInfra's paths, which have room for any model.
    "/inference/v1/rerank": (JINA, *_BY_SIGN),
    **_at("/reranks /v1/reranks /compatible-api/v1/reranks", JINA),
    # ZeroEntropy, Isaacus.
    **_at("/models/rerank /v1/models/rerank", COHERE_V1),
    **_at("/rerankings /v1/rerankings", TEI_RESULTS),
    **_at("/score /v1/score", *_SCORE),
    "/predict": (TEI_PREDICT,),
    **_at("/ranking /v1/ranking /reranking /v1/reranking", *_RANKING),
    **_at("/inference/{model:path} /v1/inference/{model:path}", DEEPINFRA),
    **_at("/api/v1/services/rerank/text-rerank/text-rerank /services/rerank/text-rerank/text-rerank", DASHSCOPE),
    **{f"/{mount}{path}": dialects for mount, paths in MOUNTS.items() for path, dialects in paths.items()},
}


def choose(path: str, body: Body) -> AnyDialect:
    """Say which dialect of a path a request body is in.

    >>> choose("/rerank", {"query": "q", "texts": ["a"]}).name, choose("/rerank", {}).name
    ('tei', 'jina')
    >>> choose("/v1/rerank", {"query": "q", "documents": ["a"], "top_k": 3}).name
    'voyage'
    >>> choose("/infinity/rerank", {"query": "q", "documents": ["a"], "top_k": 3}).name
    'infinity'
    """
    default, *others = PATHS[path]
    return next((dialect for dialect, is_in in _SIGNS if dialect in others and is_in(body)), default)
