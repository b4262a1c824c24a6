"""What the request models of dialects share: documents, truth values, limits; liberal, as their clients need it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from ...contract import MAX_COUNT, Chunk, Priority, is_blank
from ...errors import JobRejected

Model = TypeVar("Model", bound=BaseModel)

# Of a document that is an object: what the chunk takes from it, beside its text. Ids of callers may repeat, and come
# back by their positions; so does metadata.
CHUNK_FIELDS = frozenset(Chunk.model_fields) - {"text", "id", "metadata"}
# Nobody calls anything else so: what is wrong in them is said.
SCORE_FIELDS = frozenset({"vector_score", "keyword_score"})
TEXT_KEYS = ("text", "content", "page_content")
IMAGE_KEYS = ("image", "image_url", "video", "video_url", "audio")
IMAGE = "is an image, a video or a sound; this model reads texts"

# Room for the query beside a document whose tokens are limited.
QUERY_TOKENS = 128
# What a pair takes at least.
LEAST_PAIR_TOKENS = 8


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


def _parts(value: object) -> object:
    """Join the texts of a message in parts, as OpenAI writes them."""
    parts = value.get("content") if isinstance(value, Mapping) else None
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        return value
    if any(part.get("type", "text") != "text" for part in parts):
        raise ValueError(IMAGE)
    return "\n".join(str(part.get("text", "")) for part in parts)


def _document(value: object) -> object:
    value = _parts(value)
    if isinstance(value, Mapping) and not _text_of(value) and any(key in value for key in IMAGE_KEYS):
        raise ValueError(IMAGE)
    if isinstance(value, str) or (isinstance(value, Mapping) and value):
        return value
    msg = "expected a text, or an object with a text"
    raise ValueError(msg)


def _query(value: object) -> object:
    value = _document(value)
    if isinstance(value, Mapping):
        text = _text_of(value)
        if text is None:
            msg = "expected a text, or an object with a text"
            raise ValueError(msg)
        value = text
    if isinstance(value, str) and is_blank(value):
        msg = "must not be blank"
        raise ValueError(msg)
    return value


def _text_of(document: Mapping[str, Any]) -> str | None:
    return next((document[key] for key in TEXT_KEYS if isinstance(document.get(key), str)), None)


def _limit(value: object) -> object:
    if isinstance(value, bool):
        msg = "expected a whole number"
        raise ValueError(msg)  # noqa: TRY004 - pydantic reports it with its field
    return value


_TEXT_OR_OBJECT = {"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1}]}
Document = Annotated[str | dict[str, JsonValue], BeforeValidator(_document), WithJsonSchema(_TEXT_OR_OBJECT)]
Documents = Annotated[list[Document], Field(min_length=1, description="Texts, or objects with a field `text`.")]
Query = Annotated[
    str,
    BeforeValidator(_query),
    Field(description="The question, or an object with a field `text`."),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "object", "required": ["text"]}]}),
]
TopN = Annotated[
    int,
    BeforeValidator(_limit),
    Field(ge=0, description="How many results. 0, or more than there are documents: all of them."),
]
Tokens = Annotated[int, BeforeValidator(_limit), Field(ge=-1, description="Tokens. 0 or -1: no limit of the call.")]
Flag = Annotated[bool, Field(description='A truth value, or `"true"` or `"false"`.')]


def chunks_of(
    documents: Sequence[str | Mapping[str, Any]], *, rank_fields: Iterable[str] = (), name: str = "documents"
) -> tuple[Chunk, ...]:
    r"""Make chunks of documents. Of an object the model reads the text, or what *rank_fields* names, as lines.

    Fields of a chunk (``title``, ``keywords`` …) are taken where they have a chunk's types: callers who know nothing
    of us have fields of these names, too.

    Raises:
        JobRejected: naming the document that has no text, or a first-stage score that is no number.

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
    # Cohere's default: the text alone. Its name before it would change the score.
    if rank_fields and rank_fields != ["text"]:
        return _made({"text": _lines(document, rank_fields)}, field)
    text = _text_of(document)
    if text is None:
        # As structured documents are read elsewhere: every field that can be written as a line.
        text = _lines(document, [key for key in document if key not in {"id", "metadata"}])
        if not text:
            raise JobRejected("expected an object with a text", field=field)
        return _made({"text": text}, field)
    more = {key: value for key, value in document.items() if key in CHUNK_FIELDS and value is not None}
    try:
        return _made({"text": text, **more}, field)
    except JobRejected:
        fitting = {key: value for key, value in more.items() if key in SCORE_FIELDS or _fits(key, value)}
        return _made({"text": text, **fitting}, field)


def _fits(key: str, value: object) -> bool:
    try:
        Chunk(text="", **{key: value})
    except JobRejected:
        return False
    return True


def _made(fields: dict[str, Any], field: str) -> Chunk:
    try:
        return Chunk(**fields)
    except JobRejected as error:
        said = str(error).removeprefix(f"{error.field}: ")
        raise JobRejected(said, field=f"{field}.{error.field}" if error.field else field) from None


def _lines(document: Mapping[str, Any], fields: Iterable[str]) -> str:
    return "\n".join(
        f"{name}: {document[name]}" for name in fields if isinstance(document.get(name), str | int | float)
    )


def text_of(document: str | Mapping[str, Any]) -> str:
    r"""Write a document back as a text.

    >>> text_of("a"), text_of({"text": "b"}), text_of({"name": "Ann", "age": 5})
    ('a', 'b', 'name: Ann\nage: 5')
    """
    if isinstance(document, str):
        return document
    text = _text_of(document)
    return _lines(document, document) if text is None else text


def pair_tokens(*, document: int | None = None, query: int | None = None, pair: int | None = None) -> int | None:
    """Make one limit of a pair from limits of its parts, one that a job can have; None, 0 and -1 are no limit.

    >>> pair_tokens(document=500), pair_tokens(document=500, query=20), pair_tokens(document=500, pair=256)
    (628, 520, 256)
    >>> pair_tokens(pair=-1) is None
    True
    """
    limits = []
    if document and document > 0:
        limits.append(document + (query if query and query > 0 else QUERY_TOKENS))
    if pair and pair > 0:
        limits.append(pair)
    return min(MAX_COUNT, max(LEAST_PAIR_TOKENS, min(limits))) if limits else None


def query_tokens(limit: int | None) -> int | None:
    """Read the limit of a query: 0 and -1 are no limit.

    >>> query_tokens(64), query_tokens(-1)
    (64, None)
    """
    return min(MAX_COUNT, limit) if limit and limit > 0 else None


def priority_of(number: int | None) -> Priority | None:
    """Read a priority as Cohere and vLLM write it: 0 is the most urgent, above waits.

    >>> priority_of(0), priority_of(7), priority_of(None)
    ('interactive', 'bulk', None)
    """
    if number is None:
        return None
    return "bulk" if number > 0 else "interactive"


def parsed(model: type[Model], body: Mapping[str, Any]) -> Model:
    """Read a body as a model.

    Raises:
        JobRejected: naming the first fields that are wrong, and what was expected.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        said = [
            (".".join(str(part) for part in fault["loc"]), fault["msg"].removeprefix("Value error, "))
            for fault in faults[:5]
        ]
        rest = "".join(f"; {place}: {message}" for place, message in said[1:])
        raise JobRejected(said[0][1] + rest, field=said[0][0] or "body") from None
