"""Names of rerank models that providers host, and nobody else can serve."""

from __future__ import annotations

from fnmatch import fnmatchcase

# Callers that changed nothing but the base URL still name them: the deployment's default model answers. Open models are
# not among them: who names one that is not served here is told so.
_PATTERNS = (
    "rerank-*",  # Cohere, Voyage ("rerank-2.5"), Pinecone
    "rerank",
    "jina-reranker-*",
    "jina-colbert-*",
    "voyage-rerank-*",
    "mxbai-rerank-*",
    "nv-rerank*",
    "nvidia/nv-rerank*",
    "nvidia/llama-*-rerank*",
    "gte-rerank*",
    "qwen3-rerank*",
    "cohere.rerank-*",
    "amazon.rerank-*",
    "text-rerank*",
    "default",
)


def is_hosted_elsewhere(name: str) -> bool:
    """Whether a name is that of a provider's hosted model, or stands for the default.

    >>> is_hosted_elsewhere("rerank-v3.5"), is_hosted_elsewhere("BAAI/bge-reranker-v2-m3")
    (True, False)
    """
    return any(fnmatchcase(name.lower(), pattern) for pattern in _PATTERNS)
