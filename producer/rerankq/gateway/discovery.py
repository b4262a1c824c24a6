"""Which models there are, in the forms that clients look for them: OpenAI's, TEI's, Ollama's (LocalAI)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .. import __version__, catalogue
from ..errors import JobRejected, ModelUnknown
from ..ledger.registry import WorkerInfo
from .bodies import json_object
from .callers import Caller, caller_of
from .dialect_routes import ranker_of
from .hosted_models import listed_name, model_for, serving
from .openapi import failing

# Of workers of earlier versions, which do not say what their model reads.
_LENGTH = 512

routes = APIRouter(tags=["models"], responses=failing("401", "503"))
_OF_ONE = failing("404", "422")
_SHOW_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object", "properties": {"model": {"type": "string"}}, "required": ["model"]}
            }
        },
    }
}
Sender = Annotated[Caller, Depends(caller_of)]


def listed_models(workers: Iterable[WorkerInfo]) -> list[dict[str, Any]]:
    """List the served models, the default first: full names, then their aliases; one name at least says "rerank".

    >>> worker = WorkerInfo("w", "org/MiniLM", ("MiniLM",), "", ("rerankq.interactive",), 0.0, 0.0, max_length=512)
    >>> [model["id"] for model in listed_models([worker])]
    ['org/MiniLM', 'MiniLM', 'org/MiniLM-reranker']
    """
    found: dict[str, dict[str, Any]] = {}
    for worker in sorted(workers, key=lambda one: (bool(one.suffix), one.model)):
        names = [worker.model, *worker.aliases]
        if not any("rerank" in name.lower() for name in names):
            names.append(listed_name(worker.model))
        for name in names:
            if name not in found:
                found[name] = _model(name, worker)
    return list(found.values())


def _model(name: str, worker: WorkerInfo) -> dict[str, Any]:
    length = worker.max_length or _LENGTH
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "rerankq",
        "root": worker.model,
        "model_type": "rerank",
        "model_name": name,
        "capabilities": ["rerank"],
        "backend": "rerankq",
        "max_model_len": length,
        "context_length": length,
        "max_tokens": length,
        "stats": {"pairs_per_s": worker.pairs_per_s},
    }


async def _listed(request: Request) -> list[dict[str, Any]]:
    return listed_models(await ranker_of(request).client.workers())


@routes.get("/v1/models")
@routes.get("/models")
async def models(request: Request, caller: Sender) -> Response:  # noqa: ARG001 - who may see them
    """List the models that are served, as OpenAI does."""
    return JSONResponse({"object": "list", "data": await _listed(request)})


@routes.get("/infinity/models")
async def infinity_models(request: Request, caller: Sender) -> Response:  # noqa: ARG001
    """List the models, as Infinity does: its client knows no other owner."""
    return JSONResponse({"object": "list", "data": [{**one, "owned_by": "infinity"} for one in await _listed(request)]})


@routes.get("/v1/models/{model:path}", responses=_OF_ONE)
@routes.get("/models/{model:path}", responses=_OF_ONE)
async def model(request: Request, model: str, caller: Sender) -> Response:  # noqa: ARG001
    """Describe a model, as OpenAI and Xinference do."""
    return JSONResponse(await _described(request, model))


async def _described(request: Request, name: str) -> dict[str, Any]:
    client = ranker_of(request).client
    workers = await client.workers()
    meant = model_for(name, workers, listed=client.settings.models, conf_dir=client.settings.conf_dir)
    live = serving(meant if meant is None else catalogue.canonical(meant, client.settings.conf_dir), workers)
    live = live or serving(meant, workers)
    if not live:
        raise ModelUnknown(f"model: no worker serves {name!r}")
    return _model(name, live[0])


@routes.get("/info")
@routes.get("/v1/info")
async def info(request: Request, caller: Sender) -> Response:  # noqa: ARG001
    """Describe the default model, as Text Embeddings Inference does."""
    client = ranker_of(request).client
    name, live = await client.serving()
    return JSONResponse(info_of(name, live, max_chunks=client.settings.max_chunks))


def info_of(name: str, workers: Sequence[WorkerInfo], *, max_chunks: int) -> dict[str, Any]:
    """Describe a model, as Text Embeddings Inference does; RAGFlow looks for the key ``rerank``."""
    length = min((worker.max_length for worker in workers if worker.max_length), default=_LENGTH)
    return {
        "model_id": name,
        "model_sha": workers[0].fingerprint if workers else None,
        "model_dtype": "auto",
        "model_type": {"rerank": {}, "reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
        "max_concurrent_requests": None,
        "max_input_length": length,
        "max_batch_tokens": None,
        "max_batch_requests": None,
        "max_client_batch_size": max_chunks,
        "auto_truncate": True,
        "tokenization_workers": None,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


@routes.get("/v1/cluster/auth", responses={})
async def cluster_auth(request: Request) -> Response:
    """Say whether a key is needed, as Xinference does: its client asks before it sends one."""
    return JSONResponse({"auth": bool(request.app.state.keys)})


@routes.get("/api/tags")
async def tags(request: Request, caller: Sender) -> Response:  # noqa: ARG001
    """List the models, as Ollama and LocalAI do."""
    listed = await _listed(request)
    return JSONResponse(
        {
            "models": [
                {"name": f"{one['id']}:latest", "model": f"{one['id']}:latest", "size": 0, "details": _DETAILS}
                for one in listed
            ]
        }
    )


@routes.post("/api/show", responses=_OF_ONE, openapi_extra=_SHOW_BODY)
async def show(request: Request, caller: Sender) -> Response:  # noqa: ARG001
    """Describe a model, as Ollama and LocalAI do."""
    body = await json_object(request)
    name = body.get("model") or body.get("name")
    if not isinstance(name, str):
        raise JobRejected("expected the name of a model", field="model")
    found = await _described(request, name.removesuffix(":latest"))
    return JSONResponse(
        {
            "details": _DETAILS,
            "capabilities": ["rerank"],
            "model_info": {
                "general.architecture": PurePath(found["root"]).name,
                "general.context_length": found["context_length"],
            },
        }
    )


_DETAILS = {"family": "rerank", "format": "safetensors", "parameter_size": "", "quantization_level": ""}
