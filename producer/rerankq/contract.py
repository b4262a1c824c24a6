"""What crosses a process: jobs in, rankings out, as frozen models.

Every model refuses unknown fields. What callers write (:class:`RerankJob`, :class:`Chunk`, :class:`Fusion`) and is not
well formed raises :class:`JobRejected` naming each field; where pydantic validates them as a part of other models, it
does so in its own way.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
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

# The largest size of a number, and of a weight: products of several of them still are numbers.
MAX_SIZE = 1e30
MAX_WEIGHT = 1e9
# The smallest weight that is one; below, a product of two is nothing, or loses its digits.
MIN_WEIGHT = 1e-30
# Tokens, chunks: more than any model reads, or any job holds.
MAX_COUNT = 1_000_000
# Seconds: thirty years. The ledger's clock has room for more, its scripts' numbers do not.
MIN_DEADLINE_S, MAX_DEADLINE_S = 0.001, 1e9
# Digits of an integer: readers of JSON give up somewhere beyond.
MAX_DIGITS = 1_000


def _no_truth_value(value: object) -> object:
    # Python counts with True; whoever writes it where a number belongs has mixed up two fields. numpy has its own.
    if type(value).__name__ in {"bool", "bool_"}:
        msg = "expected a number, not true or false"
        raise ValueError(msg)
    # What Python's floating-point numbers have no room for.
    if isinstance(value, _TooLong) or (isinstance(value, int) and value.bit_length() > 1_000):
        msg = f"expected a number from {-MAX_SIZE:g} to {MAX_SIZE:g}"
        raise ValueError(msg)
    return value


def _at_most(value: float) -> float:
    if math.isfinite(value) and abs(value) > MAX_SIZE:
        msg = f"expected a number from {-MAX_SIZE:g} to {MAX_SIZE:g}"
        raise ValueError(msg)
    return value


def _weight(value: float) -> float:
    if 0 < value < MIN_WEIGHT:
        msg = f"expected 0, or {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
        raise ValueError(msg)
    return value


Number = Annotated[float, BeforeValidator(_no_truth_value)]
Count = Annotated[int, BeforeValidator(_no_truth_value), Field(le=MAX_COUNT)]
Finite = Annotated[Number, Field(allow_inf_nan=False), AfterValidator(_at_most)]
Weight = Annotated[Number, Field(ge=0, le=MAX_WEIGHT, allow_inf_nan=False), AfterValidator(_weight)]
# NaN and infinity are what a first stage says of a chunk that it has not seen.
FirstStage = Annotated[Number, AfterValidator(_at_most)]


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


class _TooLong:
    """An integer of more digits than is allowed, as it was read: no field takes it, so that its place is named."""


_MAX_BITS = int(MAX_DIGITS * math.log2(10))


def _carriable(value: object, depth: int = 0) -> object:
    if depth > MAX_DEPTH:
        msg = f"is nested deeper than {MAX_DEPTH} levels"
        raise ValueError(msg)
    if isinstance(value, str):
        _sound(value)
    elif isinstance(value, float) and not math.isfinite(value):
        msg = f"holds {value}, which JSON cannot carry"
        raise ValueError(msg)
    elif isinstance(value, _TooLong) or (isinstance(value, int) and value.bit_length() > _MAX_BITS):
        msg = f"holds an integer of more than {MAX_DIGITS} digits"
        raise ValueError(msg)
    elif isinstance(value, Mapping | list | tuple):
        for part in [*value, *value.values()] if isinstance(value, Mapping) else value:
            _carriable(part, depth + 1)
    return value


# pydantic would change what JSON cannot carry without a word; metadata is handed back untouched or not taken.
Metadata = Annotated[dict[str, JsonValue], BeforeValidator(_carriable)]


# Beside white space, control and format characters: letters, marks and symbols that show nothing (Unicode's
# default-ignorable ones, and the empty Braille pattern).
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cf", "Zs", "Zl", "Zp"} or bool(_INVISIBLE.match(character))


def _not_blank(text: str) -> str:
    if all(map(_is_invisible, text)):
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


class Written(Record):
    """A record that callers write.

    Raises:
        JobRejected: naming every field that is wrong, and why.
    """

    def __init__(self, **fields: Any) -> None:
        with _in_words():
            super().__init__(**fields)

    # pydantic's mark of an __init__ that is only its own: inside of other models it validates without it, and names
    # the whole way to a field.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, in words of ours."""
        with _in_words():
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's, in words of ours; a key that is given twice is refused."""
        return cls.model_validate(
            _read_json(bytes(json_data) if isinstance(json_data, bytearray) else json_data), **options
        )


class Chunk(Written):
    """One candidate text of a job, with what the first stage knows of it.

    >>> Chunk(title="Tides", text="The moon pulls.").model_text
    'Tides The moon pulls.'
    """

    text: Text
    id: Text = Field("", description="The caller's name for it; empty: see ``chunk_names`` of the job.")
    title: Text = ""
    # Factories throughout: pydantic copies a default that could be changed with the slow ``copy.deepcopy``.
    keywords: list[Text] = Field(default_factory=list)
    questions: list[Text] = Field(default_factory=list)
    vector_score: FirstStage | None = Field(None, description="First-stage similarity; NaN counts as missing.")
    keyword_score: FirstStage | None = Field(None, description="First-stage BM25 or the like; NaN counts as missing.")
    pagerank: Number = Field(0, ge=0, le=100, allow_inf_nan=False)
    tags: Annotated[dict[Text, Finite], AfterValidator(_sorted)] = Field(default_factory=dict)
    tokens: list[Text] | None = Field(None, description="The caller's own tokenisation of the text, used as given.")
    metadata: Metadata = Field(default_factory=dict, description="Handed back untouched.")

    @property
    def model_text(self) -> str:
        """The text that the model reads."""
        return f"{self.title} {self.text}".strip()


class Fusion(Written):
    """How the signals of a chunk become one score; the rules are those of ``rerankq_worker.fusion``."""

    method: Literal["weighted", "rrf"] = "weighted"
    weights: Annotated[dict[Signal, Weight], AfterValidator(_sorted)] = Field({"model": 1.0}, min_length=1)
    normalise: Annotated[dict[Signal, Normalisation], AfterValidator(_sorted)] = Field(
        default_factory=dict,
        description="Per signal; by default model sigmoid, token and vector none, keyword minmax, pagerank percent, "
        "tags cosine.",
    )
    boosts: Annotated[dict[TextField, Weight], AfterValidator(_sorted)] = Field(default_factory=dict)
    rrf_k: Count = Field(60, ge=1)
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


def _each_named_once(chunks: list[Chunk]) -> list[Chunk]:
    named: dict[str, int] = {}
    for at, chunk in enumerate(chunks):
        if chunk.id and named.setdefault(chunk.id, at) != at:
            raise _Misplaced(f"{at}.id", f"is the id of chunk {named[chunk.id]} too")
    return chunks


class RerankJob(Written):
    """A query with its candidate chunks, and how to rank them.

    A chunk without an id is named by its position, ``"0"`` the first; with as many ``#`` before it as it takes that no
    chunk was given that name. Two chunks of one id are refused.

    Raises:
        JobRejected: naming every field that is wrong, and why.

    >>> RerankJob(query="why tides?", chunks=["The moon pulls.", "Bread rises."]).chunks[1].text
    'Bread rises.'
    """

    query: Annotated[Text, AfterValidator(_not_blank)]
    chunks: Annotated[list[Annotated[Chunk, BeforeValidator(_as_chunk)]], AfterValidator(_each_named_once)] = Field(
        min_length=1
    )
    id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    model: Text | None = Field(None, min_length=1, max_length=512)
    top_k: Count | None = Field(None, ge=1, description="Chunks of the ranking, at most; more than there are: all.")
    min_score: Finite | None = Field(None, description="On the fused score.")
    fusion: Annotated[
        Annotated[Fusion, Tag(_NUMBERS)] | Annotated[Text, Tag(_PROFILE)], Discriminator(_kind_of_fusion)
    ] = "default"
    query_tokens: list[tuple[Text, Weight]] | None = Field(None, description="Tokens with weights, used as given.")
    query_tags: Annotated[dict[Text, Finite], AfterValidator(_sorted)] = Field(default_factory=dict)
    priority: Priority = "interactive"
    deadline_s: Number | None = Field(
        None,
        ge=MIN_DEADLINE_S,
        le=MAX_DEADLINE_S,
        allow_inf_nan=False,
        description="Seconds from submission; a job not started by then expires. Once started it never does, "
        "even where it is queued again because its worker died or was stopped.",
    )
    max_length: Count | None = Field(None, ge=8, description="Tokens of a pair; at most what the model takes.")
    query_max_tokens: Count = Field(128, ge=1)
    long_chunks: Literal["truncate", "window"] = "truncate"  # "window" does not exist yet: submitting it is refused
    cache: Literal["use", "refresh", "bypass"] = "use"
    skip_at_or_below: Count = Field(
        0,
        ge=0,
        description="Chunks; a job with so few keeps its first-stage order, unscored, unless ``min_score`` is to be "
        "judged.",
    )
    tenant: str = Field("", pattern=r"^[A-Za-z0-9._@-]{0,128}$")
    return_text: bool = False

    def chunk_names(self) -> list[str]:
        """Name each chunk as the ranking does.

        >>> RerankJob(query="q", chunks=["zero", {"text": "one", "id": "2"}, "two"]).chunk_names()
        ['0', '2', '#2']
        """
        given = {chunk.id for chunk in self.chunks}
        names = []
        for at, chunk in enumerate(self.chunks):
            name = chunk.id or str(at)
            while not chunk.id and name in given:
                name = f"#{name}"
            names.append(name)
        return names


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


class _Misplaced(ValueError):
    """Raised by a validator of a whole for a fault in a part of it, whose place pydantic cannot know."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(message)
        self.place = place


def rejection(error: ValidationError) -> JobRejected:
    """Say a validation error in one line: each field with what was expected, the first five."""
    faults = error.errors(include_url=False, include_input=False)
    places, words = [], []
    for fault in faults:
        reason = fault.get("ctx", {}).get("error")
        parts = [str(part) for part in fault["loc"] if part not in {_NUMBERS, _PROFILE}]
        places.append(".".join([*parts, reason.place] if isinstance(reason, _Misplaced) else parts))
        words.append(fault["msg"].removeprefix("Value error, "))
    said = [f"{place}: {word}" if place else word for place, word in zip(places, words, strict=True)]
    more = f" (and {len(said) - 5} more)" if len(said) > 5 else ""
    rest = "; ".join(said[1:5])
    return JobRejected(words[0] + (f"; {rest}" if rest else "") + more, field=places[0])


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise rejection(error) from None


def _integer(digits: str) -> int | _TooLong:
    return int(digits) if len(digits) <= MAX_DIGITS else _TooLong()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON leaves open which one counts, and readers differ.
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if key in {before for before, _ in pairs[:at]})
        raise JobRejected("is given twice in one object", field=twice[:100].encode(errors="replace").decode())
    return found


def _read_json(text: str | bytes) -> Any:
    """Read JSON, with Python's NaN and Infinity.

    Raises:
        JobRejected: saying where it is none.
    """
    try:
        return json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise JobRejected(f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise JobRejected(f"not JSON: byte {error.start} is no {error.encoding}") from None
    except RecursionError:
        raise JobRejected("not a job: nested too deeply") from None


def parse_job(data: RerankJob | Mapping[str, Any] | str | bytes) -> RerankJob:
    """Make a job of what a caller wrote: a job, a mapping, or a JSON object as text.

    Raises:
        JobRejected: if it is not a well-formed job.
    """
    if isinstance(data, RerankJob):
        return data
    if isinstance(data, str | bytes):
        return RerankJob.model_validate_json(data)
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
