"""Requests as real clients send them, seen on the wire: where each goes, and how its response is read."""

from typing import Any, NamedTuple

from tides import DOCUMENTS, QUERY

OBJECTS = [{"text": text} for text in DOCUMENTS]
ASKED = {"query": QUERY, "documents": DOCUMENTS}
TEXTS = {"query": QUERY, "texts": DOCUMENTS}

# How a response is read: where its results are, and the names of score and document.
RESULTS = ("results", "relevance_score")
DATA = ("data", "relevance_score")
LIST = (None, "score")
SCORES = ("scores", None)


class Recorded(NamedTuple):
    """A client's request. ``document``: what the second document comes back as, None if it does not."""

    client: str
    path: str
    body: dict[str, Any]
    dialect: str
    read: tuple[str | None, str | None]
    document: Any = None


TEXT, OBJECT = DOCUMENTS[1], {"text": DOCUMENTS[1]}

RECORDED = [
    Recorded("cohere 5 v2", "/v2/rerank", {"model": "rerank-v3.5", **ASKED, "top_n": 3}, "cohere", RESULTS),
    Recorded(
        "cohere 7 v2",
        "/v2/rerank",
        {
            "model": "rerank-v4.0-pro",
            **ASKED,
            "top_n": 3,
            "max_tokens_per_doc": 4096,
            "priority": 0,
            "relevant_spans": {"mode": "auto"},
        },
        "cohere",
        RESULTS,
    ),
    Recorded(
        "cohere v1",
        "/v1/rerank",
        {
            "model": "rerank-english-v3.0",
            "query": QUERY,
            "documents": OBJECTS,
            "top_n": 3,
            "rank_fields": ["text"],
            "return_documents": True,
            "max_chunks_per_doc": 10,
        },
        "cohere",
        RESULTS,
        OBJECT,
    ),
    Recorded(
        "langchain-cohere",
        "/v2/rerank",
        {"model": "rerank-v3.5", **ASKED, "top_n": 3, "max_tokens_per_doc": None},
        "cohere",
        RESULTS,
    ),
    Recorded(
        "langchain-community JinaRerank",
        "/v1/rerank",
        {**ASKED, "model": "jina-reranker-v1-base-en", "top_n": 3},
        "jina",
        RESULTS,
        OBJECT,
    ),
    Recorded(
        "infinity_client",
        "/rerank",
        {**ASKED, "model": "default", "return_documents": True, "raw_scores": False},
        "infinity",
        RESULTS,
        TEXT,
    ),
    Recorded("llama-index tei", "/rerank", TEXTS, "tei", LIST),
    Recorded("llama-index xinference", "/v1/rerank", {"model": "default", **ASKED}, "jina", RESULTS, OBJECT),
    Recorded(
        "llama-index siliconflow",
        "/v1/rerank",
        {
            "model": "default",
            **ASKED,
            "top_n": 3,
            "return_documents": True,
            "max_chunks_per_doc": 1024,
            "overlap_tokens": 80,
        },
        "siliconflow",
        RESULTS,
        OBJECT,
    ),
    Recorded(
        "haystack TEI",
        "/rerank",
        {**TEXTS, "raw_scores": False, "truncate": True, "truncation_direction": "Right"},
        "tei",
        LIST,
    ),
    Recorded(
        "litellm cohere",
        "/v2/rerank",
        {"model": "rerank-v3.5", **ASKED, "return_documents": True},
        "cohere",
        RESULTS,
        OBJECT,
    ),
    Recorded(
        "litellm infinity",
        "/infinity/rerank",
        {"model": "default", **ASKED, "return_documents": True},
        "infinity",
        RESULTS,
        TEXT,
    ),
    Recorded(
        "litellm hosted_vllm",
        "/rerank",
        {"model": "default", **ASKED, "return_documents": True, "truncate_prompt_tokens": -1, "instruction": "x"},
        "jina",
        RESULTS,
        OBJECT,
    ),
    Recorded(
        "litellm huggingface",
        "/rerank",
        {
            **TEXTS,
            "top_n": 3,
            "return_text": True,
            "raw_scores": False,
            "truncate": False,
            "truncation_direction": "Right",
        },
        "tei",
        LIST,
        TEXT,
    ),
    Recorded("litellm voyage", "/v1/rerank", {"model": "rerank-2.5", **ASKED, "top_k": 3}, "voyage", DATA),
    Recorded("voyageai in JavaScript", "/v1/rerank", {"model": "rerank-2", **ASKED}, "voyage", DATA),
    Recorded("Voyage's lite model", "/v1/rerank", {"model": "rerank-lite-1", **ASKED}, "voyage", DATA),
    Recorded(
        "Cohere's model, of which Voyage's is one letter off",
        "/v1/rerank",
        {"model": "rerank-v2.5", **ASKED},
        "jina",
        RESULTS,
        OBJECT,
    ),
    Recorded(
        "litellm deepinfra",
        "/inference/default",
        {"queries": [QUERY] * 3, "documents": DOCUMENTS},
        "deepinfra",
        SCORES,
    ),
    Recorded(
        "DeepInfra",
        "/v1/inference/default",
        {"queries": [QUERY], "documents": DOCUMENTS},
        "deepinfra",
        SCORES,
    ),
    Recorded(
        "voyageai",
        "/v1/rerank",
        {**ASKED, "model": "rerank-2", "top_k": None, "truncation": True, "return_documents": True},
        "voyage",
        DATA,
        TEXT,
    ),
    Recorded(
        "rerankers cohere",
        "/v1/rerank",
        {"model": "rerank-v3.5", **ASKED, "top_n": 3, "return_documents": True},
        "jina",
        RESULTS,
        OBJECT,
    ),
    Recorded(
        "rerankers TEI",
        "/rerank",
        {"model": "default", **TEXTS, "top_n": 3, "return_text": True},
        "tei",
        LIST,
        TEXT,
    ),
    Recorded(
        "mixedbread",
        "/v1/reranking",
        {"query": QUERY, "input": DOCUMENTS, "model": "mxbai-rerank-large-v1", "top_k": 3, "return_input": True},
        "mixedbread",
        ("data", "score"),
        TEXT,
    ),
    Recorded(
        "rerankers mixedbread",
        "/v1/rerank",
        {"query": QUERY, "input": DOCUMENTS, "model": "default", "top_k": 3, "return_input": True},
        "mixedbread",
        ("data", "score"),
        TEXT,
    ),
    Recorded(
        "rerankers pinecone",
        "/rerank",
        {
            "model": "default",
            "query": QUERY,
            "documents": OBJECTS,
            "top_n": 3,
            "return_documents": True,
            "parameters": {"truncate": "END"},
        },
        "pinecone",
        ("data", "score"),
        OBJECT,
    ),
    Recorded(
        "pinecone",
        "/rerank",
        {
            "model": "pinecone-rerank-v0",
            "query": QUERY,
            "documents": OBJECTS,
            "rank_fields": ["text"],
            "return_documents": True,
        },
        "pinecone",
        ("data", "score"),
        OBJECT,
    ),
    Recorded("zeroentropy", "/v1/models/rerank", {"model": "zerank-1", **ASKED, "top_n": 3}, "cohere", RESULTS),
    Recorded(
        "isaacus",
        "/v1/rerankings",
        {"model": "kanon-universal-classifier", **TEXTS, "is_iql": False, "scoring_method": "auto"},
        "tei-results",
        ("results", "score"),
    ),
    Recorded(
        "Open WebUI",
        "/v1/rerank",
        {"model": "default", **ASKED, "top_n": 3},
        "jina",
        RESULTS,
        OBJECT,
    ),
    Recorded("Dify", "/v1/rerank", {"model": "default", **ASKED, "top_n": 3}, "jina", RESULTS, OBJECT),
    Recorded(
        "Dify, docs_field_name texts", "/rerank", {"model": "default", **TEXTS, "top_n": 3}, "tei-results", RESULTS
    ),
    Recorded(
        "Xinference client",
        "/v1/rerank",
        {
            "model": "default",
            **ASKED,
            "top_n": None,
            "max_chunks_per_doc": None,
            "return_documents": None,
            "return_len": None,
            "kwargs": "{}",
        },
        "xinference",
        RESULTS,
    ),
    Recorded(
        "RAGFlow Xinference",
        "/v1/rerank",
        {"model": "default", **ASKED, "return_documents": "true", "return_len": "true"},
        "xinference",
        RESULTS,
        OBJECT,
    ),
    Recorded("RAGFlow LocalAI", "/rerank", {"model": "default", **ASKED, "top_n": 3}, "jina", RESULTS, OBJECT),
    Recorded("RAGFlow GPUStack", "/v1/v1/rerank", {"model": "default", **ASKED, "top_n": 3}, "jina", RESULTS, OBJECT),
    Recorded("RAGFlow RAGcon", "//rerank", {"model": "default", **ASKED, "top_n": 3}, "jina", RESULTS, OBJECT),
    Recorded(
        "RAGFlow SILICONFLOW",
        "/v1/rerank",
        {
            "model": "default",
            **ASKED,
            "top_n": 3,
            "return_documents": False,
            "max_chunks_per_doc": 1024,
            "overlap_tokens": 80,
        },
        "siliconflow",
        RESULTS,
    ),
    Recorded(
        "RAGFlow VLLM",
        "/v1/rerank/v1/rerank",
        {"model": "default", **ASKED, "top_n": 3, "return_documents": False},
        "jina",
        RESULTS,
    ),
    Recorded("RAGFlow HuggingFace", "/rerank", {**TEXTS, "raw_scores": False, "truncate": True}, "tei", LIST),
    Recorded(
        "RAGFlow NVIDIA",
        "/reranking",
        {
            "model": "nv-rerank-qa-mistral-4b:1",
            "query": {"text": QUERY},
            "passages": OBJECTS,
            "truncate": "END",
            "top_n": 3,
        },
        "nvidia",
        ("rankings", "logit"),
    ),
    Recorded(
        "RAGFlow NVIDIA v3",
        "/nv-rerankqa-mistral-4b-v3/reranking",
        {
            "model": "nvidia/nv-rerankqa-mistral-4b-v3",
            "query": {"text": QUERY},
            "passages": OBJECTS,
            "truncate": "END",
            "top_n": 3,
        },
        "nvidia",
        ("rankings", "logit"),
    ),
    Recorded(
        "langchain NVIDIARerank",
        "/v1/ranking",
        {"model": "nvidia/llama-3.2-nv-rerankqa-1b-v2", "query": {"text": QUERY}, "passages": OBJECTS},
        "nvidia",
        ("rankings", "logit"),
    ),
    Recorded(
        "litellm nvidia_nim",
        "/v1/retrieval/nvidia/llama-3_2-nv-rerankqa-1b-v2/reranking",
        {"model": "nvidia/llama-3.2-nv-rerankqa-1b-v2", "query": {"text": QUERY}, "passages": OBJECTS, "top_k": 3},
        "nvidia",
        ("rankings", "logit"),
    ),
    Recorded(
        "RAGFlow MWS",
        "/projects/x/cohere/v2/rerank",
        {"model": "default", **ASKED, "top_n": 3},
        "cohere",
        RESULTS,
    ),
    Recorded(
        "DashScope SDK",
        "/api/v1/services/rerank/text-rerank/text-rerank",
        {"model": "gte-rerank-v2", "input": ASKED, "parameters": {"return_documents": True, "top_n": 3}},
        "dashscope",
        ("output.results", "relevance_score"),
        OBJECT,
    ),
    Recorded(
        "litellm dashscope",
        "/compatible-api/v1/reranks",
        {"model": "qwen3-rerank", **ASKED, "top_n": 3},
        "jina",
        RESULTS,
        OBJECT,
    ),
    Recorded("litellm fireworks", "/inference/v1/rerank", {"model": "default", **ASKED}, "jina", RESULTS, OBJECT),
    Recorded(
        "vLLM score",
        "/score",
        {"model": "default", "text_1": QUERY, "text_2": DOCUMENTS},
        "vllm-score",
        ("data", "score"),
    ),
    Recorded(
        "vLLM score of queries",
        "/v1/score",
        {"model": "default", "queries": [QUERY], "documents": DOCUMENTS},
        "vllm-score",
        ("data", "score"),
    ),
    Recorded(
        "vLLM rerank",
        "/vllm/v1/rerank",
        {
            "model": "default",
            **ASKED,
            "top_n": 0,
            "priority": 0,
            "truncate_prompt_tokens": 256,
            "max_tokens_per_query": 64,
            "max_tokens_per_doc": 128,
        },
        "vllm",
        RESULTS,
        OBJECT,
    ),
    Recorded(
        "vLLM rerank of message parts",
        "/vllm/rerank",
        {
            "model": "default",
            "query": QUERY,
            "documents": [{"content": [{"type": "text", "text": text}]} for text in DOCUMENTS],
        },
        "vllm",
        RESULTS,
        OBJECT,
    ),
    Recorded("AIPerf hf_tei_rankings", "/rerank", TEXTS, "tei", LIST),
    Recorded("AIPerf cohere_rankings", "/v2/rerank", {"model": "default", **ASKED}, "cohere", RESULTS),
    Recorded(
        "AIPerf nim_rankings",
        "/v1/ranking",
        {"model": "default", "query": {"text": QUERY}, "passages": OBJECTS},
        "nvidia",
        ("rankings", "logit"),
    ),
    Recorded("a server of one's own", "/rerank", {"query": QUERY, "docs": DOCUMENTS}, "plain", SCORES),
    Recorded("a server of one's own", "/score", {"query": QUERY, "docs": DOCUMENTS}, "plain", SCORES),
    Recorded("SGLang", "/sglang/v1/rerank", {"model": "default", **ASKED}, "sglang", LIST, TEXT),
    Recorded("TEI below its prefix", "/tei/rerank", {**TEXTS, "return_text": True}, "tei", LIST, TEXT),
    Recorded("Jina below its prefix", "/jina/v1/rerank", {"model": "default", **ASKED}, "jina", RESULTS, OBJECT),
    Recorded(
        "Voyage below its prefix",
        "/voyage/v1/rerank",
        {"model": "default", **ASKED},
        "voyage",
        DATA,
    ),
    Recorded(
        "LocalAI below its prefix",
        "/localai/v1/rerank",
        {"model": "default___LocalAI", **ASKED},
        "localai",
        RESULTS,
        OBJECT,
    ),
    Recorded("GPUStack below its prefix", "/gpustack/v1/rerank", {**ASKED}, "gpustack", RESULTS, OBJECT),
    Recorded(
        "Cohere below its prefix",
        "/cohere/v1/rerank",
        {
            "query": {"text": QUERY},
            "documents": [{"title": "on tides", "text": text} for text in DOCUMENTS],
            "rank_fields": ["title", "text"],
            "return_documents": "true",
        },
        "cohere",
        RESULTS,
        {"title": "on tides", "text": DOCUMENTS[1]},
    ),
]


def results_in(body: Any, read: tuple[str | None, str | None]) -> list[tuple[int, float, Any]]:
    """Read a response as its client does: the index, score and document of each result."""
    where, score = read
    for key in (where or "").split("."):
        body = body[key] if key else body
    if score is None:
        return [(at, one, None) for at, one in enumerate(body)]
    return [(one["index"], one[score], one.get("document", one.get("text", one.get("input")))) for one in body]
