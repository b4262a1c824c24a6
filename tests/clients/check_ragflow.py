"""RAGFlow's rerank classes and model listings, from a checkout of its source, against the gateway."""

import asyncio
import importlib
import os
import sys
import types
from pathlib import Path

import dashscope
import voyageai
from checking import DOCUMENTS, KEY, QUERY, SCORES, URL, check, check_keys

SOURCE = Path(os.environ["RAGFLOW_SOURCE"])


def stand_in(name, **members):
    """Stand in for a module of the application that needs more of it."""
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


def total_tokens(response):
    usage = response["usage"] if isinstance(response, dict) else response.usage
    return usage["total_tokens"] if isinstance(usage, dict) else usage.total_tokens


def log_exception(error, *_):
    raise error


sys.path.insert(0, str(SOURCE))
for package in ("common", "rag", "rag.llm"):
    stand_in(package)
    sys.modules[package].__path__ = [str(SOURCE / package.replace(".", "/"))]
stand_in("common.log_utils", log_exception=log_exception)
stand_in(
    "common.token_utils",
    num_tokens_from_string=lambda text: len(text.split()),
    truncate=lambda text, tokens: text[: 4 * tokens],
    total_token_count_from_response=total_tokens,
)
stand_in("common.aimlapi_utils", attribution_headers=dict)
CLASSES = importlib.import_module("rag.llm.rerank_model")
LISTINGS = importlib.import_module("rag.llm.model_meta")

# Class, and the base URLs that people paste.
PASTED = [
    ("JinaRerank", ["/v1/rerank", "/rerank", "/jina/v1/rerank"]),
    ("GreenPTRerank", ["/v1", "/v1/rerank"]),
    ("XInferenceRerank", ["", "/v1", "/v1/rerank"]),
    ("LocalAIRerank", ["", "/v1", "/v1/rerank"]),
    ("NvidiaRerank", ["", "/v1", "/nvidia"]),
    ("OpenAI_APIRerank", ["", "/v1", "/v1/", "/v1/rerank"]),
    ("MWSRerank", ["/projects/x"]),
    ("CoHereRerank", ["", "/v1", "/v1/", "/v1/rerank", "/v1/rerank/v1", "/cohere"]),
    ("SILICONFLOWRerank", ["/v1", "/v1/rerank"]),
    ("HuggingfaceRerank", ["", "/rerank", "/tei", "/v1"]),
    ("GPUStackRerank", ["", "/v1"]),
    ("RAGconRerank", ["/v1", "/v1/", "/v1/rerank"]),
    ("NewAPIRerank", ["/v1", "/v1/rerank"]),
    ("FuturMixRerank", ["/v1"]),
    ("Ai302Rerank", ["/v1/rerank"]),
    ("NovitaRerank", ["/v3/openai/rerank"]),
    ("GiteeRerank", ["/v1/rerank"]),
    ("JiekouAIRerank", ["/v1/rerank"]),
]
# Clients whose scores RAGFlow stretches between the lowest and the highest, as they are logits.
STRETCHED = {"NvidiaRerank"}


def agrees(name, similarity, count):
    assert count > 0, "no tokens told: RAGFlow's check of a new model fails"
    assert len(similarity) == len(DOCUMENTS)
    if name in STRETCHED:
        assert sorted(range(len(SCORES)), key=lambda at: -similarity[at]) == sorted(
            range(len(SCORES)), key=lambda at: -SCORES[at]
        )
    else:
        assert all(abs(one - other) < 1e-4 for one, other in zip(similarity, SCORES, strict=True)), similarity


for class_name, bases in PASTED:
    if not hasattr(CLASSES, class_name):
        print(f"{class_name} is not in this version", file=sys.stderr)
        continue
    for pasted in bases:

        @check(f"RAGFlow {class_name}", f"similarity at {pasted or '/'}")
        def similarity(class_name=class_name, pasted=pasted):
            ranker = getattr(CLASSES, class_name)(KEY, "default", base_url=URL + pasted)
            agrees(class_name, *ranker.similarity(QUERY, DOCUMENTS))
            scores, _ = ranker.similarity(QUERY, [*DOCUMENTS, "", DOCUMENTS[0]])
            assert len(scores) == len(DOCUMENTS) + 2
            assert scores[len(DOCUMENTS)] == min(scores)


@check("RAGFlow HuggingfaceRerank", "21 texts, in eights")
def eights():
    ranker = CLASSES.HuggingfaceRerank(KEY, "default", base_url=URL)
    scores, _ = ranker.similarity(QUERY, (DOCUMENTS * 6)[:21])
    assert all(abs(score - SCORES[at % len(DOCUMENTS)]) < 1e-4 for at, score in enumerate(scores))


@check("RAGFlow VoyageRerank", "similarity")
def voyage():
    ranker = CLASSES.VoyageRerank(KEY, "rerank-2")
    ranker.client = voyageai.Client(api_key=KEY, base_url=f"{URL}/v1")
    agrees("VoyageRerank", *ranker.similarity(QUERY, DOCUMENTS))


@check("RAGFlow QWenRerank", "similarity")
def qwen():
    dashscope.base_http_api_url = f"{URL}/api/v1"
    for name in ("gte-rerank-v2", "qwen3-rerank"):
        agrees("QWenRerank", *CLASSES.QWenRerank(KEY, name).similarity(QUERY, DOCUMENTS))


DISCOVERY = [
    ("OpenAIAPICompatible", ["", "/v1", "/v1/rerank"]),
    ("Xinference", ["", "/v1", "/v1/rerank"]),
    ("VLLM", ["", "/v1", "/v1/rerank"]),
    ("NewAPI", ["/v1"]),
    ("RAGcon", ["/v1"]),
    ("HuggingFace", ["", "/rerank", "/tei"]),
    ("MWS", ["/projects/x"]),
    ("LocalAI", ["", "/v1"]),
]

for class_name, bases in DISCOVERY:
    for pasted in bases:

        @check(f"RAGFlow {class_name} listing", f"get_model_list at {pasted or '/'}")
        def listing(class_name=class_name, pasted=pasted):
            found = asyncio.run(getattr(LISTINGS, class_name)(KEY, URL + pasted).get_model_list())
            assert found, "no models"
            assert all(model["max_tokens"] == 512 for model in found), found
            if class_name == "LocalAI":
                # It knows chat, vision and embedding only: no name helps.
                return f"{len(found)} models, of no type: add the model by hand"
            assert any(model["model_types"] == ["rerank"] for model in found), found
            return ", ".join(f"{model['name']} {model['model_types']}" for model in found)


for class_name, bases in PASTED:
    # It sends no key.
    if class_name != "HuggingfaceRerank" and hasattr(CLASSES, class_name):

        def with_key(url, key, class_name=class_name, pasted=bases[-1]):
            return getattr(CLASSES, class_name)(key, "default", base_url=url + pasted).similarity(QUERY, DOCUMENTS)

        refused = {"CoHereRerank": "UnauthorizedError", "NewAPIRerank": "KeyError", "GPUStackRerank": "ValueError"}.get(
            class_name, "HTTPError"
        )
        check_keys(f"RAGFlow {class_name}", refused, with_key)
