"""Which model a caller's name means here: names that providers host stand for the deployment's default model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from .. import catalogue
from ..errors import JobRejected
from ..ledger.registry import WorkerInfo
from ..settings import Settings
from .call_options import PREFIX, PROVIDER_SEPARATOR, split_model
from .rerank_call import CallOptions, RerankCall

# Callers that changed nothing but the base URL still name them: the deployment's default model answers. Open models are
# not among them: who names one that is not served here is told so.
_PATTERNS = (
    "rerank-*",  # Cohere, Voyage ("rerank-2.5")
    "rerank",
    "reranker",  # Open WebUI's default
    "cohere-rerank-*",
    "cohere.rerank-*",
    "cohere/rerank-*",
    "jina-reranker-*",
    "jina-colbert-*",
    "jina_ai/jina-*",
    "voyage-rerank-*",
    "voyage/rerank-*",
    "mxbai-rerank-*",
    "mixedbread-ai/mxbai-rerank-*",  # as Mixedbread's own API names them
    "nv-rerank*",
    "nvidia/nv-rerank*",
    "nvidia/rerank-*",
    "nvidia/llama-*-rerank*",
    "gte-rerank",
    "gte-rerank-*",
    "qwen3-rerank",
    "qwen3*-vl-rerank",
    "qwen3*-text-rerank",
    "pinecone-rerank-*",
    "amazon.rerank-*",
    "ctxl-rerank-*",
    "green-rerank",
    "kanon-*",  # Isaacus
    "zerank-*",  # ZeroEntropy
    "text-rerank",
    "text-rerank-*",
    "default",
)
# Before the name of a model: providers' own marks of where it runs.
_PROVIDER_PREFIXES = ("fireworks/", "Pro/")
#: Told where an instruction has no effect.
NO_INSTRUCTION = "the model takes no instruction: it was ignored"
#: Behind the name of a model in listings where its own name does not say what it is.
RERANKER = "-reranker"


def is_hosted_elsewhere(name: str) -> bool:
    """Whether a name is that of a provider's hosted model, or stands for the default.

    >>> is_hosted_elsewhere("rerank-v3.5"), is_hosted_elsewhere("BAAI/bge-reranker-v2-m3")
    (True, False)
    """
    return any(fnmatchcase(name.lower(), pattern) for pattern in _PATTERNS)


def listed_name(name: str) -> str:
    """Name a model so that clients that go by names see a reranker.

    >>> listed_name("bge-reranker-base"), listed_name("ms-marco-MiniLM-L6-v2")
    ('bge-reranker-base', 'ms-marco-MiniLM-L6-v2-reranker')
    """
    return name if "rerank" in name.lower() else name + RERANKER


def serving(model: str | None, workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
    """List the workers that serve a model (None: the default)."""
    if model is None:
        return [worker for worker in workers if not worker.suffix]
    return [worker for worker in workers if model in (worker.model, *worker.aliases)]


def model_for(
    name: str | None, workers: Sequence[WorkerInfo], *, listed: Collection[str] = (), conf_dir: Path | None = None
) -> str | None:
    """Find what a caller's model name means: a model served or *listed*, the default (None), or the name as it is.

    Names are compared whole; then without a provider behind ``___``; then as this gateway lists them.

    >>> bundled = WorkerInfo("w", "bundled", (), "", ("rerankq.interactive",), 0.0, 0.0)
    >>> model_for("bundled___Xinference", [bundled]), model_for("bundled-reranker", [bundled])
    ('bundled', 'bundled')
    >>> model_for("rerank-v3.5", [bundled]), model_for("BAAI/bge-reranker-v2-m3", [bundled])
    (None, 'BAAI/bge-reranker-v2-m3')
    """
    if name is None:
        return None
    known = _known(name, workers, listed=listed, conf_dir=conf_dir)
    if known is not None:
        return known
    if any(map(is_hosted_elsewhere, _spellings(name))):
        return None
    return name.partition(PROVIDER_SEPARATOR)[0] or name


def _known(name: str, workers: Sequence[WorkerInfo], *, listed: Collection[str], conf_dir: Path | None) -> str | None:
    """Find the spelling of a name under which a model is served or listed; None: there is none."""
    for one in _spellings(name):
        full = catalogue.canonical(one, conf_dir)
        if serving(full, workers) or serving(one, workers) or full in listed:
            return one
    return None


def _spellings(name: str) -> Iterator[str]:
    yield name
    bare = name.partition(PROVIDER_SEPARATOR)[0]
    if bare:
        yield bare
        for prefix in _PROVIDER_PREFIXES:
            if bare.startswith(prefix):
                yield bare.removeprefix(prefix)
        if bare.endswith(RERANKER):
            yield bare.removesuffix(RERANKER)


def resolve(
    call: RerankCall, options: CallOptions, workers: Sequence[WorkerInfo], settings: Settings
) -> tuple[RerankCall, CallOptions]:
    """Split the model's name, map names of hosted models, and clamp lengths to what the model reads.

    An instruction is left out, with a warning, unless all workers of the model have a place for it.

    Raises:
        JobRejected: if there is no such fusion profile, by header or behind the name of a model that is known.
    """
    profiles = catalogue.profiles(settings.conf_dir)
    if isinstance(options.fusion, str) and options.fusion not in profiles:
        raise JobRejected(_no_profile(options.fusion, profiles), field=f"{PREFIX}Fusion")
    model, profile = split_model(call.model, profiles)
    if profile is None and model is not None:
        _refuse_unknown_profile(model, profiles, workers, settings)
    if profile is not None and options.fusion is None:
        options = replace(options, fusion=profile)
    model = model_for(model, workers, listed=settings.models, conf_dir=settings.conf_dir)
    found = serving(model, workers)
    if call.instruction and not (found and all(one.takes_instruction for one in found)):
        call = replace(call, instruction="", warnings=(*call.warnings, NO_INSTRUCTION))
    longest = min((one.max_length for one in found if one.max_length), default=None)
    if call.max_length is not None and longest is not None:
        call = replace(call, max_length=max(8, min(call.max_length, longest)))
    return replace(call, model=model), options


def _refuse_unknown_profile(
    name: str, profiles: Collection[str], workers: Sequence[WorkerInfo], settings: Settings
) -> None:
    model, plus, profile = name.partition(PROVIDER_SEPARATOR)[0].rpartition("+")

    def known(one: str) -> bool:
        return _known(one, workers, listed=settings.models, conf_dir=settings.conf_dir) is not None

    if plus and not known(name) and (not model or known(model) or is_hosted_elsewhere(model)):
        raise JobRejected(_no_profile(profile, profiles), field="model")


def _no_profile(name: str, profiles: Collection[str]) -> str:
    return f"no fusion profile {name[:200]!r}; there are {', '.join(sorted(profiles))}"
