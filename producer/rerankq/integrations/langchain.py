"""LangChain: a document compressor, and a cross encoder. Extra ``langchain``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableLambda
from pydantic import Field

from ..errors import RerankqError
from .reranking import Adapter, ChunkFields, Position, Reranker, chunk_fields


class RerankqCompressor(Reranker, BaseDocumentCompressor):
    """Rerank retrieved documents and keep the best; each is a copy whose metadata has its ``relevance_score``.

    Documents that were not scored (``skip_at_or_below``) get none. Callbacks are told of it as of a run of its name.

    .. code-block:: python

        compressor = RerankqCompressor(top_n=3)
        retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=vector_store_retriever)
    """

    top_n: int | None = Field(3, ge=1, description="At most so many documents. None: all.")
    title_key: str | None = Field(None, description="Metadata key of the title, which the model reads before the text.")
    vector_score_key: str | None = Field(None, description="Metadata key of the vector search's score.")
    keyword_score_key: str | None = Field(None, description="Metadata key of the keyword search's score.")

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rerank *documents*; the input stays as it is."""
        if not documents:
            return []
        return self._step().invoke({"query": query, "documents": list(documents)}, {"callbacks": callbacks})

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """As :meth:`compress_documents`, without blocking the event loop."""
        if not documents:
            return []
        return await self._step().ainvoke({"query": query, "documents": list(documents)}, {"callbacks": callbacks})

    def _step(self) -> RunnableLambda[dict[str, Any], list[Document]]:
        def compress(given: dict[str, Any]) -> list[Document]:
            documents = given["documents"]
            return _placed(documents, self.rank(given["query"], self._chunks(documents), self.top_n))

        async def acompress(given: dict[str, Any]) -> list[Document]:
            documents = given["documents"]
            return _placed(documents, await self.arank(given["query"], self._chunks(documents), self.top_n))

        return RunnableLambda(compress, acompress, name=type(self).__name__)

    def _chunks(self, documents: Sequence[Document]) -> list[ChunkFields]:
        return [
            chunk_fields(
                document.page_content,
                title=_value(document, self.title_key),
                vector_score=_value(document, self.vector_score_key),
                keyword_score=_value(document, self.keyword_score_key),
            )
            for document in documents
        ]


def _value(document: Document, key: str | None) -> object:
    return None if key is None else document.metadata.get(key)


def _placed(documents: Sequence[Document], positions: Sequence[Position]) -> list[Document]:
    return [_scored(documents[at], score) for at, score in positions]


def _scored(document: Document, score: float | None) -> Document:
    told = {} if score is None else {"relevance_score": score}
    return document.model_copy(update={"metadata": deepcopy(document.metadata) | told})


class RerankqCrossEncoder(Adapter, BaseCrossEncoder):
    """Score pairs of texts by the model alone, for whatever takes a LangChain cross encoder.

    The pairs of one query are one job. Blank texts are not among them: they score 0, or as little as any other pair.
    """

    raw_scores: bool = Field(False, description="Answer the model's raw logits instead of probabilities.")

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Score pairs of a query and a text; one score for each, in order.

        Raises:
            RerankqError: if one of the jobs has no ranking.
        """
        if not text_pairs:
            return []
        client = self._clients.blocking
        parts = list(_by_query(text_pairs, client.settings.max_chunks))
        job_ids = client.submit_many(
            {
                "query": query,
                "chunks": [chunk_fields(text_pairs[at][1]) for at in places],
                **self._own_fields(),
                **self.job_fields,
            }
            for query, places in parts
        )
        outcomes = dict(client.as_completed(job_ids, self.timeout))
        scores: dict[int, float] = {}
        for job_id, (_, places) in zip(job_ids, parts, strict=True):
            ranking = outcomes[job_id]
            if isinstance(ranking, RerankqError):
                raise ranking
            for chunk in ranking.chunks:
                logit = chunk.model_logit
                scores[places[chunk.index]] = logit if self.raw_scores and logit is not None else chunk.score
        least = min([0.0, *scores.values()])
        return [scores.get(at, least) for at in range(len(text_pairs))]

    def _own_fields(self) -> dict[str, Any]:
        return super()._own_fields() | {"fusion": "model"}


def _by_query(pairs: Sequence[tuple[str, str]], limit: int) -> Iterator[tuple[str, list[int]]]:
    """Group the positions of pairs by their query, at most *limit* together; those of blank texts are left out.

    >>> list(_by_query([("a", "1"), ("b", "2"), ("a", "3"), ("a", " "), ("a", "4")], 2))
    [('a', [0, 2]), ('a', [4]), ('b', [1])]
    """
    places: dict[str, list[int]] = {}
    for at, (query, text) in enumerate(pairs):
        if not text.strip():
            continue
        places.setdefault(query, []).append(at)
    for query, of_query in places.items():
        for start in range(0, len(of_query), limit):
            yield query, of_query[start : start + limit]
