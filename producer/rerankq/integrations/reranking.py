"""What all adapters have in common: their options, and the way from texts to an order with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_serializer, model_validator
from pydantic.json_schema import SkipJsonSchema

from .. import contract
from ..client import AsyncClient, Client
from ..contract import Fusion, Priority, Ranking, RerankJob
from ..urls import masked
from .clients import Clients

# A chunk's fields, as a mapping: the job names the chunk and the field if one is wrong.
ChunkFields = dict[str, Any]


class Position(NamedTuple):
    """A text in the answer: where it stood in the question, and its score; None if nothing was scored."""

    at: int
    score: float | None


def chunk_fields(
    text: str, *, title: object = None, vector_score: object = None, keyword_score: object = None
) -> ChunkFields:
    """Write a document as a chunk; what is None is left out.

    >>> chunk_fields("The moon pulls.", title="Tides")
    {'text': 'The moon pulls.', 'title': 'Tides'}
    """
    fields = {
        "title": None if title is None else _without_surrogates(str(title)),
        "vector_score": vector_score,
        "keyword_score": keyword_score,
    }
    return {"text": _without_surrogates(text)} | {name: value for name, value in fields.items() if value is not None}


def _without_surrogates(text: str) -> str:
    # Readers of PDF leave them. A job with one is rejected, and one document must not fail the others.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def is_blank(chunk: Mapping[str, Any]) -> bool:
    """Whether there is nothing that a model could read.

    >>> is_blank({"text": " "}), is_blank({"text": "", "title": "Tides"})
    (True, False)
    """
    return contract.is_blank(f"{chunk.get('title', '')}{chunk['text']}")


class Adapter(BaseModel):
    """Options of every adapter: which deployment, and for whom. Closed as a client is; only what it made is closed."""

    # Input is hidden because a URL may hold a password.
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True)

    url: str | None = Field(
        None,
        description="The broker's URL; all else, and without one this too, comes from the environment (RERANKQ_…). "
        "One with a password is not serialised.",
        repr=False,
    )
    model: str | None = Field(None, description="Name of the model. None: the deployment's default.")
    priority: Priority = Field("interactive", description="`bulk` where nobody waits for the answer.")
    tenant: str = Field("", description="Who the jobs are for: tenants share workers in turn.")
    timeout: float | None = Field(None, ge=0, description="Seconds to wait for an answer. None: as long as it takes.")
    job_fields: dict[str, Any] = Field(
        default_factory=dict, description="Any other field of a job, such as `deadline_s`, `cache` or `query_tags`."
    )

    # Neither is data, so that neither is in the JSON schema.
    client: SkipJsonSchema[Client] | None = Field(
        None, description="A client to use instead of one of its own; it is not closed here.", exclude=True, repr=False
    )
    async_client: SkipJsonSchema[AsyncClient] | None = Field(
        None, description="The same for asyncio; one of both is enough.", exclude=True, repr=False
    )

    _clients: Clients = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Put the clients together."""
        super().model_post_init(context)
        self._clients = Clients(self.url, self.client, self.async_client)

    @model_validator(mode="after")
    def _makes_jobs(self) -> Self:
        own = self._own_fields()
        refused = self.job_fields.keys() & (own.keys() | {"id", "query", "chunks", "top_k", "return_text"})
        if refused:
            msg = f"job_fields: {', '.join(sorted(refused))} cannot be given here"
            raise ValueError(msg)
        RerankJob(query="?", chunks=["?"], **own, **self.job_fields)
        return self

    @field_serializer("url")
    def _no_password(self, url: str | None) -> str | None:
        return url if url is None or masked(url) == url else None

    def _own_fields(self) -> dict[str, Any]:
        """Fields of a job that are options."""
        return {"model": self.model, "priority": self.priority, "tenant": self.tenant}

    def close(self) -> None:
        """Close the blocking client that this adapter has made, if any; it makes another if it is used again."""
        self._clients.close()

    async def aclose(self) -> None:
        """Close every client that this adapter has made."""
        await self._clients.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Reranker(Adapter):
    """An adapter that puts texts into a new order. Errors are those of the client."""

    fusion: Fusion | str = Field(
        "default", description="A fusion profile, or numbers of your own; `model` is the model's probability alone."
    )
    min_score: float | None = Field(None, description="Leave out what scores lower, on the scale of the fusion.")
    skip_at_or_below: int = Field(
        0, ge=0, description="So few documents keep their order, unscored and without a job. Ignored with `min_score`."
    )

    def _own_fields(self) -> dict[str, Any]:
        return super()._own_fields() | {
            "fusion": self.fusion,
            "min_score": self.min_score,
            "skip_at_or_below": 0,  # decided here
        }

    def rank(self, query: str, chunks: Sequence[ChunkFields], limit: int | None = None) -> list[Position]:
        """Order texts, best first, at most *limit*; blank ones last."""
        if self._keeps_order(chunks):
            return _as_given(chunks, limit)
        job = self._job(query, chunks, limit)
        ranking = self._clients.blocking.rerank(timeout=self.timeout, **job) if job["chunks"] else None
        return self._positions(chunks, ranking, limit)

    async def arank(self, query: str, chunks: Sequence[ChunkFields], limit: int | None = None) -> list[Position]:
        """As :meth:`rank`, without blocking the event loop."""
        if self._keeps_order(chunks):
            return _as_given(chunks, limit)
        job = self._job(query, chunks, limit)
        ranking = await self._clients.asynchronous.rerank(timeout=self.timeout, **job) if job["chunks"] else None
        return self._positions(chunks, ranking, limit)

    def _keeps_order(self, chunks: Sequence[ChunkFields]) -> bool:
        return self.min_score is None and len(chunks) <= self.skip_at_or_below

    def _job(self, query: str, chunks: Sequence[ChunkFields], limit: int | None) -> dict[str, Any]:
        seen = [chunk for chunk in chunks if not is_blank(chunk)]
        return {"query": query, "chunks": seen, "top_k": limit, **self._own_fields(), **self.job_fields}

    def _positions(self, chunks: Sequence[ChunkFields], ranking: Ranking | None, limit: int | None) -> list[Position]:
        seen = [at for at, chunk in enumerate(chunks) if not is_blank(chunk)]
        ranked = [Position(seen[chunk.index], chunk.score) for chunk in ranking.chunks] if ranking else []
        # Raw logits may be below zero: nothing that was read stands below what could not be.
        least = min([0.0, *(one.score for one in ranked[-1:] if one.score is not None)])
        if self.min_score is None or least >= self.min_score:
            ranked += [Position(at, least) for at, chunk in enumerate(chunks) if is_blank(chunk)]
        return ranked[:limit]


def _as_given(chunks: Sequence[ChunkFields], limit: int | None) -> list[Position]:
    return [Position(at, None) for at in range(len(chunks))][:limit]
