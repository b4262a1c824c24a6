"""The retrieval of a LangChain user: split documents, embed and store them, retrieve 20, keep the best 3.

pip install 'rerankq[langchain]' langchain-classic langchain-text-splitters numpy
RERANKQ_BROKER_URL=redis://localhost:6379/0 python examples/langchain_retrieval.py "which job is set aside as dead?"

The vectors are in memory; with PGVECTOR_URL=postgresql+psycopg://… (and langchain-postgres) they are in PostgreSQL.
Offline: the texts are this repository's docs/, and the embedder hashes words. Take a real one for real texts.
"""

import hashlib
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_text_splitters import RecursiveCharacterTextSplitter

from rerankq.integrations.langchain import RerankqCompressor

DOCS = Path(__file__).resolve().parents[1] / "docs"


class HashedWords(Embeddings):
    """Vectors of words: each word has a direction of its own, the same on every machine."""

    size = 256

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector = [0.0] * self.size
        for word, count in Counter(re.findall(r"\w{3,}", text.lower())).items():
            digest = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4])
            vector[digest % self.size] += math.copysign(1 + math.log(count), digest % 3 - 0.5)
        length = math.hypot(*vector) or 1.0
        return [value / length for value in vector]


def stored(documents: list[Document]) -> VectorStore:
    """Put documents into a vector store."""
    if url := os.environ.get("PGVECTOR_URL"):
        from langchain_postgres import PGVector  # noqa: PLC0415  # only where it is asked for

        store: VectorStore = PGVector(HashedWords(), connection=url, pre_delete_collection=True)
    else:
        store = InMemoryVectorStore(HashedWords())
    store.add_documents(documents)
    return store


def main(query: str) -> None:
    pages = [
        Document(path.read_text(encoding="utf-8"), metadata={"source": path.name}) for path in sorted(DOCS.glob("*.md"))
    ]
    splitter = RecursiveCharacterTextSplitter(chunk_size=800, chunk_overlap=80, add_start_index=True)
    store = stored(splitter.split_documents(pages))
    with RerankqCompressor(top_n=3, timeout=60) as compressor:
        retriever = ContextualCompressionRetriever(
            base_compressor=compressor, base_retriever=store.as_retriever(search_kwargs={"k": 20})
        )
        for document in retriever.invoke(query):
            source, start = document.metadata["source"], document.metadata["start_index"]
            beginning = " ".join(document.page_content.split())[:70]
            print(f"{document.metadata['relevance_score']:.3f} {source}:{start} {beginning}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "which job is set aside as dead?")
