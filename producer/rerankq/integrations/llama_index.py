"""LlamaIndex: a node postprocessor. Extra ``llama-index``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # as everybody imports it
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field

from .reranking import ChunkFields, Position, Reranker, chunk_fields

dispatcher = get_dispatcher(__name__)


class RerankqRerank(Reranker, BaseNodePostprocessor):
    """Rerank retrieved nodes and keep the best; nodes are the same objects, with new scores beside them.

    Nodes that were not scored (``skip_at_or_below``) keep the retriever's score.

    .. code-block:: python

        engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[RerankqRerank(top_n=3)])
    """

    top_n: int | None = Field(2, ge=1, description="At most so many nodes. None: all.")
    metadata_mode: MetadataMode = Field(
        MetadataMode.EMBED, description="Which metadata the model reads with a node's text; `none` is the text alone."
    )
    title_key: str | None = Field(
        None, description="Metadata key of the title, which the model reads before the text; best with mode `none`."
    )
    first_stage: Literal["vector", "keyword"] | None = Field(
        None, description="The signal that the retriever's scores are given to the fusion as. None: they are not."
    )

    @classmethod
    def class_name(cls) -> str:
        """Name the class in serialised components."""
        return "RerankqRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        query = _required(query_bundle)
        with self._told(nodes, query) as ranked:
            ranked.extend(_placed(nodes, self.rank(query.query_str, self._chunks(nodes), self.top_n)))
        return ranked

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        query = _required(query_bundle)
        with self._told(nodes, query) as ranked:
            ranked.extend(_placed(nodes, await self.arank(query.query_str, self._chunks(nodes), self.top_n)))
        return ranked

    def _chunks(self, nodes: Sequence[NodeWithScore]) -> list[ChunkFields]:
        return [
            chunk_fields(
                each.node.get_content(metadata_mode=self.metadata_mode),
                title=None if self.title_key is None else each.node.metadata.get(self.title_key),
                vector_score=each.score if self.first_stage == "vector" else None,
                keyword_score=each.score if self.first_stage == "keyword" else None,
            )
            for each in nodes
        ]

    @contextmanager
    def _told(self, nodes: list[NodeWithScore], query: QueryBundle) -> Iterator[list[NodeWithScore]]:
        """Tell callbacks and instrumentation of the nodes before, and of those that are put into the list after."""
        ranked: list[NodeWithScore] = []
        limit, model = self.top_n or len(nodes), self.model or "rerankq"
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=limit, model_name=model))
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: model,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: limit,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield ranked
            event.on_end(payload={EventPayload.NODES: ranked})
        dispatcher.event(ReRankEndEvent(nodes=ranked))


def _required(query: QueryBundle | None) -> QueryBundle:
    if query is None:
        msg = "query_bundle or query_str: expected a query to rank the nodes for"
        raise ValueError(msg)
    return query


def _placed(nodes: Sequence[NodeWithScore], positions: Sequence[Position]) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=nodes[at].node, score=nodes[at].score if score is None else score) for at, score in positions
    ]
