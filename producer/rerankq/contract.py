"""What crosses a process: jobs in, rankings out, as frozen models.

Every model refuses unknown fields. A :class:`RerankJob` that is not well formed raises :class:`JobRejected` naming the
field; :class:`Chunk` and :class:`Fusion` built alone raise pydantic's own ``ValidationError``.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from .errors import JobRejected

Signal = Literal["model", "token", "vector", "keyword", "pagerank", "tags"]
Normalisation = Literal["sigmoid", "minmax", "percent", "ragflow", "none", "raw", "cosine"]
TextField = Literal["title", "keywords", "questions", "content"]
Priority = Literal["interactive", "bulk"]
State = Literal["queued", "running", "done", "failed", "expired", "cancelled", "dead", "unknown"]

ENDED: frozenset[str] = frozenset({"done", "failed", "expired", "cancelled", "dead"})

Finite = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _sound(text: str) -> str:
    # Strings know whether they are ASCII; encoding a text to find out costs as much as all other checks of a chunk.
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        msg = f"holds a lone surrogate at character {error.start}, which is no text"
        raise ValueError(msg) from None
    return text


# pydantic takes any Python string, also one that no JSON can carry.
Text = Annotated[str, AfterValidator(_sound)]


# Levels of lists and mappings in metadata: what reads JSON gives up somewhere beyond.
MAX_DEPTH = 64


def _carriable(value: object, depth: int = 0) -> object:
    if depth > MAX_DEPTH:
        msg = f"is nested deeper than {MAX_DEPTH} levels"
        raise ValueError(msg)
    if isinstance(value, str):
        _sound(value)
    elif isinstance(value, float) and not math.isfinite(value):
        msg = f"holds {value}, which JSON cannot carry"
        raise ValueError(msg)
    elif isinstance(value, Mapping | list | tuple):
        for part in [*value, *value.values()] if isinstance(value, Mapping) else value:
            _carriable(part, depth + 1)
    return value


# pydantic would change what JSON cannot carry without a word; metadata is handed back untouched or not taken.
Metadata = Annotated[dict[str, JsonValue], BeforeValidator(_carriable)]


def _not_blank(text: str) -> str:
    if not text.strip():
        msg = "must not be blank"
        raise ValueError(msg)
    return text


def _as_chunk(value: object) -> object:
    return {"text": value} if isinstance(value, str) else value


def _sorted(mapping: dict[Any, Any]) -> dict[Any, Any]:
    # The order in which a caller wrote weights or tags must not change the job's id.
    return dict(sorted(mapping.items()))


class Record(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Chunk(Record):
    """One candidate text of a job, with what the first stage knows of it.

    >>> Chunk(title="Tides", text="The moon pulls.").model_text
    'Tides The moon pulls.'
    """

    text: Text
    id: Text = Field("", description="The caller's name for it; empty = its position in the job.")
    title: Text = ""
    # Factories throughout: pydantic copies a default that could be changed with the slow ``copy.deepcopy``.
    keywords: list[Text] = Field(default_factory=list)
    questions: list[Text] = Field(default_factory=list)
    vector_score: float | None = Field(None, description="First-stage similarity; NaN counts as missing.")
    keyword_score: float | None = Field(None, description="First-stage BM25 or the like; NaN counts as missing.")
    pagerank: float = Field(0, ge=0, le=100, allow_inf_nan=False)
    tags: Annotated[dict[Text, Finite], AfterValidator(_sorted)] = Field(default_factory=dict)
    tokens: list[Text] | None = Field(None, description="The caller's own tokenisation of the text, used as given.")
    metadata: Metadata = Field(default_factory=dict, description="Handed back untouched.")

    @property
    def model_text(self) -> str:
        """The text that the model reads."""
        return f"{self.title} {self.text}".strip()


class Fusion(Record):
    """How the signals of a chunk become one score; the rules are those of ``rerankq_worker.fusion``."""

    method: Literal["weighted", "rrf"] = "weighted"
    weights: Annotated[dict[Signal, Weight], AfterValidator(_sorted)] = Field({"model": 1.0}, min_length=1)
    normalise: Annotated[dict[Signal, Normalisation], AfterValidator(_sorted)] = Field(
        default_factory=dict,
        description="Per signal; by default model sigmoid, token and vector none, keyword minmax, pagerank percent, "
        "tags cosine.",
    )
    boosts: Annotated[dict[TextField, Weight], AfterValidator(_sorted)] = Field(default_factory=dict)
    rrf_k: int = Field(60, ge=1)
    token_rule: Literal["coverage", "ragflow"] = "coverage"  # noqa: S105  # no secret: tokens of text

    @model_validator(mode="after")
    def _weighs_something(self) -> Self:
        if not any(self.weights.values()):
            msg = "at least one weight must be above zero"
            raise ValueError(msg)
        return self


# Tags of the two forms of a job's fusion, so that an error speaks of the form that was meant.
_NUMBERS, _PROFILE = "(numbers)", "(profile)"


def _kind_of_fusion(value: object) -> str:
    return _PROFILE if isinstance(value, str) else _NUMBERS


class RerankJob(Record):
    """A query with its candidate chunks, and how to rank them.

    Raises:
        JobRejected: naming every field that is wrong, and why.

    >>> RerankJob(query="why tides?", chunks=["The moon pulls.", "Bread rises."]).chunks[1].text
    'Bread rises.'
    """

    query: Annotated[Text, AfterValidator(_not_blank)]
    chunks: list[Annotated[Chunk, BeforeValidator(_as_chunk)]] = Field(min_length=1)
    id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    model: Text | None = Field(None, min_length=1)
    top_k: int | None = Field(None, ge=1, le=2048)
    min_score: Finite | None = Field(None, description="On the fused score.")
    fusion: Annotated[
        Annotated[Fusion, Tag(_NUMBERS)] | Annotated[Text, Tag(_PROFILE)], Discriminator(_kind_of_fusion)
    ] = "default"
    query_tokens: list[tuple[Text, Weight]] | None = Field(None, description="Tokens with weights, used as given.")
    query_tags: Annotated[dict[Text, Finite], AfterValidator(_sorted)] = Field(default_factory=dict)
    priority: Priority = "interactive"
    deadline_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds from submission; a job not started by then expires. Once started it never does, "
        "even where it is queued again because its worker died or was stopped.",
    )
    max_length: int | None = Field(None, ge=8, description="Tokens of a pair; at most what the model takes.")
    query_max_tokens: int = Field(128, ge=1)
    long_chunks: Literal["truncate", "window"] = "truncate"
    cache: Literal["use", "refresh", "bypass"] = "use"
    skip_at_or_below: int = Field(
        0,
        ge=0,
        description="Chunks; a job with so few keeps its first-stage order, unscored, unless ``min_score`` is to be "
        "judged.",
    )
    tenant: str = Field("", pattern=r"^[A-Za-z0-9._@-]{0,128}$")
    return_text: bool = False

    @model_validator(mode="wrap")
    @classmethod
    def _reject_in_words(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise rejection(error) from None


class RankedChunk(Record):
    """A chunk's place in a ranking."""

    id: str
    index: int = Field(description="Position in the job, from 0.")
    rank: int = Field(description="Place in the ranking, from 1.")
    score: float = Field(description="Fused.")
    scores: dict[str, float] = Field(
        default_factory=dict, description="Every signal by name, normalised; missing ones are left out."
    )
    model_logit: float | None = Field(None, description="Raw; None where the chunk was not scored.")
    missing: list[str] = Field(
        default_factory=list, description="Signals with a weight that this chunk, or the whole job, has no value of."
    )
    truncated: bool = False
    cached: bool = False
    span: tuple[int, int] | None = Field(
        None, description="Start and end in characters of the window that scored best."
    )
    text: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class ModelName(Record):
    """Which weights made a ranking."""

    name: str
    fingerprint: str


class Usage(Record):
    """What a job cost, in pairs and tokens."""

    pairs: int = 0
    cached_pairs: int = 0
    tokens: int = Field(
        0,
        description="Real tokens, no padding, of the pairs computed for this job: equal ones once, none that were "
        "known or computed for another job.",
    )
    truncated_pairs: int = 0


class Timings(Record):
    """Where a job's time went, in milliseconds."""

    queued: float = Field(0, description="From submission to the claim by a worker.")
    tokenise: float = 0
    waiting: float = Field(0, description="For the device, while batches of other jobs were on it.")
    inference: float = Field(0, description="Batches with pairs of this job were on the device.")
    total: float = Field(0, description="From the claim by a worker to the finished ranking, so without ``queued``.")


class Ranking(Record):
    """A job's answer: its chunks, best first.

    By score; equal scores by the model's raw logit, equal logits in the job's order.
    """

    job_id: str
    model: ModelName
    chunks: list[RankedChunk]
    usage: Usage = Usage()
    timings_ms: Timings = Timings()
    skipped: bool = Field(False, description="Too few chunks to be worth scoring: first-stage order, unscored.")
    dropped: int = Field(0, description="Chunks of the job that ``top_k`` or ``min_score`` left out.")


class JobStatus(Record):
    """Where a job stands. Times are seconds since the epoch by the ledger's clock."""

    job_id: str
    state: State
    pairs_done: int = 0
    pairs_total: int = 0
    submitted_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    attempts: int = Field(0, description="How often a worker has claimed it.")
    error: str | None = None


class JobEvent(Record):
    """What befell a job: ``alone`` and ``claimed`` by a worker, ``lease-over``, ``handed-back``, ``retried``."""

    at: float = Field(description="Seconds since the epoch by the ledger's clock.")
    event: str
    worker: str = ""


class DeadJob(Record):
    """A job that was set aside because its worker died of it. Times are seconds since the epoch."""

    job_id: str
    queue: str
    tenant: str
    label: str = Field(description="The query's first words, the number of chunks, the model.")
    pairs: int
    deaths: int = Field(description="Of workers, alone with it.")
    submitted_at: float | None
    died_at: float | None
    error: str
    history: list[JobEvent]
    payload: str | None = Field(None, description="The job as JSON, texts and all, where it was asked for.")


def rejection(error: ValidationError) -> JobRejected:
    """Say a validation error in one line: each field with what was expected, the first five."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    places = [".".join(str(part) for part in fault["loc"] if part not in {_NUMBERS, _PROFILE}) for fault in faults]
    words = [fault["msg"].removeprefix("Value error, ") for fault in faults]
    said = [f"{place}: {word}" if place else word for place, word in zip(places, words, strict=True)]
    more = f" (and {len(said) - 5} more)" if len(said) > 5 else ""
    rest = "; ".join(said[1:5])
    return JobRejected(words[0] + (f"; {rest}" if rest else "") + more, field=places[0])


def parse_job(data: RerankJob | Mapping[str, Any] | str | bytes) -> RerankJob:
    """Make a job of what a caller wrote: a job, a mapping, or a JSON object as text.

    Raises:
        JobRejected: if it is not a well-formed job.
    """
    if isinstance(data, RerankJob):
        return data
    if isinstance(data, str | bytes):
        try:
            return RerankJob.model_validate_json(data)
        except ValidationError as error:  # not JSON at all: this comes before the model is asked
            raise rejection(error) from None
    return RerankJob.model_validate(data)


# A job's fields that do not change its ranking; they live beside the payload, not in it.
_BESIDE_THE_PAYLOAD = {"id", "deadline_s", "priority"}


def payload_of(job: RerankJob) -> bytes:
    """Write the part of a job that decides its ranking, as compact JSON with a fixed order of fields.

    Raises:
        JobRejected: if it cannot be written as JSON.
    """
    try:
        return job.model_dump_json(exclude=_BESIDE_THE_PAYLOAD, exclude_defaults=True).encode()
    except PydanticSerializationError as error:
        raise JobRejected(f"cannot be written as JSON: {error}") from None


def job_of(payload: bytes) -> RerankJob:
    """Read back what :func:`payload_of` wrote.

    Raises:
        JobRejected: if it is not a well-formed job; what it holds is not quoted.
    """
    return parse_job(payload)


def digest(*parts: str | bytes) -> str:
    """Hash parts so that no two lists of parts run together: BLAKE2b, 128 bits, as 32 hex digits.

    >>> digest("ab", "c") == digest("a", "bc")
    False
    """
    sponge = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        sponge.update(len(raw).to_bytes(8, "big"))
        sponge.update(raw)
    return sponge.hexdigest()


def job_id(job: RerankJob, content: str) -> str:
    """Name a job: the caller's id, else (cache not ``use``) a random one, else its content's with the model's name.

    No weights are part of it: whoever submits before the first worker comes, or while weights are renewed, gets the
    same.
    """
    if job.id is not None:
        return job.id
    return content if job.cache == "use" else secrets.token_hex(16)


def label_of(job: RerankJob, *, model: str) -> str:
    """Say a job in a few words for Flower and logs: no chunk's text, and short enough for Flower to show it whole.

    >>> label_of(RerankJob(query="why do tides rise and fall twice a day?", chunks=["x"]), model="m")
    '"why do tides rise and…" 1 chunk, m'
    """
    words = " ".join(job.query.split())
    first = words if len(words) <= 24 else f"{words[:24].rsplit(' ', 1)[0]}…"
    count = len(job.chunks)
    return f"{json.dumps(first, ensure_ascii=False)} {count} chunk{'s' if count != 1 else ''}, {model}"
