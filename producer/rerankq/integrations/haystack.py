"""Haystack: a ranker. Extra ``haystack``."""

# No postponed annotations: earlier versions of Haystack compare those of `run` as they stand.

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import Secret

from ..client import AsyncClient, Client
from ..contract import Fusion, Priority
from .reranking import ChunkFields, Position, Reranker, chunk_fields


@component
class RerankqRanker:
    """Rank documents and keep the best; each is a copy with its new score.

    Of documents with one id, that with the best score is ranked. Documents that were not scored
    (``skip_at_or_below``) keep their score. It makes its clients when it first runs.

    .. code-block:: python

        pipeline.add_component("ranker", RerankqRanker(top_k=3))
        pipeline.connect("retriever.documents", "ranker.documents")
    """

    def __init__(
        self,
        *,
        url: str | Secret | None = None,
        model: str | None = None,
        top_k: int | None = 10,
        min_score: float | None = None,
        fusion: Fusion | str = "default",
        priority: Priority = "interactive",
        tenant: str = "",
        timeout: float | None = None,
        skip_at_or_below: int = 0,
        first_stage: Literal["vector", "keyword"] | None = None,
        title_key: str | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        job_fields: dict[str, Any] | None = None,
        client: Client | None = None,
        async_client: AsyncClient | None = None,
    ) -> None:
        """Make a ranker; what is not given comes from the environment (``RERANKQ_…``).

        :param url: The broker's URL, or a secret that holds it. A text with a password is not serialised.
        :param model: Name of the model. None: the deployment's default.
        :param top_k: At most so many documents. None: all.
        :param min_score: Leave out what scores lower, on the scale of the fusion.
        :param fusion: A fusion profile, or numbers of your own; ``model`` is the model's probability alone.
        :param priority: ``bulk`` where nobody waits for the answer.
        :param tenant: Who the jobs are for: tenants share workers in turn.
        :param timeout: Seconds to wait for an answer. None: as long as it takes.
        :param skip_at_or_below: So few documents keep their order, unscored. Ignored with ``min_score``.
        :param first_stage: The signal that the documents' scores are given to the fusion as. None: they are not.
        :param title_key: Meta field of the title, which the model reads before the text.
        :param meta_fields_to_embed: Meta fields that are put before the text.
        :param embedding_separator: What stands between them.
        :param job_fields: Any other field of a job, such as ``deadline_s``, ``cache`` or ``query_tags``.
        :param client: A client to use; it is not closed here.
        :param async_client: The same for ``run_async``.
        :raises ValueError: If an option is wrong.
        """
        if first_stage not in {None, "vector", "keyword"}:
            msg = f"first_stage: expected 'vector', 'keyword' or None, not {first_stage!r}"
            raise ValueError(msg)
        self.top_k = _checked(top_k)
        self.first_stage = first_stage
        self.title_key = title_key
        self.meta_fields_to_embed = list(meta_fields_to_embed or [])
        self.embedding_separator = embedding_separator
        self._secret = url if isinstance(url, Secret) else None
        self._reranker = Reranker(
            client=client,
            async_client=async_client,
            url=url.resolve_value() if isinstance(url, Secret) else url,
            model=model,
            min_score=min_score,
            fusion=fusion,
            priority=priority,
            tenant=tenant,
            timeout=timeout,
            skip_at_or_below=skip_at_or_below,
            job_fields=job_fields or {},
        )

    def to_dict(self) -> dict[str, Any]:
        """Serialise the options; clients that were given are not among them.

        :raises ValueError: If ``url`` is a secret that may not be written out, as one of a token.
        """
        options = self._reranker.model_dump(mode="json")
        if self._secret is not None:
            options["url"] = self._secret.to_dict()
        return default_to_dict(
            self,
            top_k=self.top_k,
            first_stage=self.first_stage,
            title_key=self.title_key,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
            **options,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make a ranker of what :meth:`to_dict` answered."""
        options = dict(data.get("init_parameters", {}))
        if isinstance(options.get("url"), dict):
            options["url"] = Secret.from_dict(options["url"])
        return default_from_dict(cls, {**data, "init_parameters": options})

    def warm_up(self) -> None:
        """Do nothing: the model is loaded by a worker, and the client is made by the first run."""

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Rank documents for a query.

        :param query: The query.
        :param documents: The candidates.
        :param top_k: At most so many documents, in place of the ranker's own limit.
        :returns: ``documents``, best first.
        :raises ValueError: If ``top_k`` is not above 0.
        """
        limit, documents = _checked(top_k) or self.top_k, _each_once(documents)
        return {"documents": _placed(documents, self._reranker.rank(query, self._chunks(documents), limit))}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Rank documents as :meth:`run` does, without blocking the event loop.

        :param query: The query.
        :param documents: The candidates.
        :param top_k: At most so many documents, in place of the ranker's own limit.
        :returns: ``documents``, best first.
        :raises ValueError: If ``top_k`` is not above 0.
        """
        limit, documents = _checked(top_k) or self.top_k, _each_once(documents)
        return {"documents": _placed(documents, await self._reranker.arank(query, self._chunks(documents), limit))}

    def close(self) -> None:
        """Close the blocking client that this ranker has made."""
        self._reranker.close()

    async def close_async(self) -> None:
        """Close every client that this ranker has made."""
        await self._reranker.aclose()

    def _chunks(self, documents: Sequence[Document]) -> list[ChunkFields]:
        return [
            chunk_fields(
                self._text(document),
                title=None if self.title_key is None else document.meta.get(self.title_key),
                vector_score=document.score if self.first_stage == "vector" else None,
                keyword_score=document.score if self.first_stage == "keyword" else None,
            )
            for document in documents
        ]

    def _text(self, document: Document) -> str:
        found = (document.meta.get(name) for name in self.meta_fields_to_embed)
        return self.embedding_separator.join([*(str(value) for value in found if value), document.content or ""])


def _checked(top_k: int | None) -> int | None:
    if top_k is not None and top_k <= 0:
        msg = f"top_k: expected a number above 0, not {top_k}"
        raise ValueError(msg)
    return top_k


def _each_once(documents: Iterable[Document]) -> list[Document]:
    """Keep one document of each id: that with the best score, where it first stands."""
    best: dict[str, Document] = {}
    for document in documents:
        kept = best.setdefault(document.id, document)
        if _score_of(document) > _score_of(kept):
            best[document.id] = document
    return list(best.values())


def _score_of(document: Document) -> float:
    return -math.inf if document.score is None else document.score


def _placed(documents: Sequence[Document], positions: Sequence[Position]) -> list[Document]:
    return [replace(documents[at], score=documents[at].score if score is None else score) for at, score in positions]
