"""What the request models of dialects share: documents, truth values, limits; liberal, as their clients need it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema, model_validator

from ...contract import Chunk
from ...errors import JobRejected

# Of a document that is an object: what the chunk takes from it, beside its text.
CHUNK_FIELDS = frozenset(Chunk.model_fields) - {"text"}
TEXT_KEYS = ("text", "content", "page_content")


class Request(BaseModel):
    """A request body: fields of no meaning here are ignored, null means not given."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, Mapping) else body


class Reply(BaseModel):
    """A response body."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


def _document(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, Mapping) and value):
        return value
    msg = "expected a text, or an object with a text"
    raise ValueError(msg)


Document = Annotated[
    str | dict[str, JsonValue],
    BeforeValidator(_document),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1}]}),
]
Documents = Annotated[list[Document], Field(min_length=1, description="Texts, or objects with a field `text`.")]


def _limit(value: object) -> object:
    if isinstance(value, bool):
        msg = "expected a whole number"
        raise ValueError(msg)  # noqa: TRY004 - pydantic reports it with its field
    return value


# How many results: 0 means all of them, as more than there are documents does.
TopN = Annotated[int, BeforeValidator(_limit), Field(ge=0, le=1_000_000)]
Tokens = Annotated[int, BeforeValidator(_limit), Field(ge=-1)]
Query = Annotated[str, Field(min_length=1)]


def chunks_of(
    documents: Sequence[str | Mapping[str, Any]], *, rank_fields: Iterable[str] = (), name: str = "documents"
) -> tuple[Chunk, ...]:
    r"""Make chunks of documents. Of an object the model reads the text, or what *rank_fields* names, as lines.

    Fields of a chunk (``title``, ``vector_score``, ``keywords`` …) are taken where they have a chunk's types.

    Raises:
        JobRejected: naming the document.

    >>> chunks_of(["a", {"text": "b", "vector_score": 0.5}])[1].vector_score
    0.5
    >>> chunks_of([{"name": "Ann", "role": "cook"}], rank_fields=["role", "name"])[0].text
    'role: cook\nname: Ann'
    """
    fields = list(rank_fields)
    return tuple(_chunk(document, fields, f"{name}.{at}") for at, document in enumerate(documents))


def _chunk(document: str | Mapping[str, Any], rank_fields: list[str], field: str) -> Chunk:
    if isinstance(document, str):
        return _made({"text": document}, field)
    if rank_fields:
        return _made({"text": _lines(document, rank_fields)}, field)
    text = next((document[key] for key in TEXT_KEYS if isinstance(document.get(key), str)), None)
    if text is None:
        # As structured documents are read elsewhere: every field that can be written as a line.
        text = _lines(document, [key for key in document if key not in {"id", "metadata"}])
        if not text:
            raise JobRejected("expected an object with a text", field=field)
        return _made({"text": text}, field)
    more = {key: value for key, value in document.items() if key in CHUNK_FIELDS and value is not None}
    # Ids of callers may repeat, and come back by their positions.
    more.pop("id", None)
    return _made({"text": text, **more}, field)


def _made(fields: dict[str, Any], field: str) -> Chunk:
    try:
        return Chunk(**fields)
    except JobRejected as error:
        raise JobRejected(str(error), field=f"{field}.{error.field}" if error.field else field) from None


def _lines(document: Mapping[str, Any], fields: Iterable[str]) -> str:
    return "\n".join(
        f"{name}: {document[name]}" for name in fields if isinstance(document.get(name), str | int | float)
    )
