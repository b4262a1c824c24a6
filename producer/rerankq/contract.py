"""What crosses a process: jobs, rankings, statuses, as frozen models.

Every model refuses unknown fields. What callers write (:class:`RerankJob`, :class:`Chunk`, :class:`Fusion`) and is not
well formed raises :class:`JobRejected` naming each field; where pydantic validates them as a part of other models, it
does so in its own way.
"""

from __future__ import annotations

import json
import math
import re
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
# The smallest weight; below, a product of two is zero or loses digits.
MIN_WEIGHT = 1e-30
# Tokens, chunks: more than any model reads, or any job holds.
MAX_COUNT = 1_000_000
# Seconds: thirty years. The ledger's clock has room for more, its scripts' numbers do not.
MIN_DEADLINE_S, MAX_DEADLINE_S = 0.001, 1e9
# Digits of an integer: readers of JSON give up somewhere beyond.
MAX_DIGITS = 1_000


def _no_truth_value(value: object) -> object:
    # True is an integer in Python; written where a number belongs, two fields were mixed up. numpy has its own type.
    if type(value).__name__ in {"bool", "bool_"}:
        msg = "expected a number, not true or false"
        raise ValueError(msg)
    # Too large for a float.
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
# NaN and infinity mean that the first stage has no score for the chunk.
FirstStage = Annotated[Number, AfterValidator(_at_most)]


def _sound(text: str) -> str:
    # Strings know whether they are ASCII; encoding a text to find out costs as much as all other checks of a chunk.
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        msg = f"holds a lone surrogate at character {error.start}, which is not valid text"
        raise ValueError(msg) from None
    return text


# pydantic takes any Python string, also one that no JSON can carry.
Text = Annotated[str, AfterValidator(_sound)]


# Levels of lists and mappings in metadata: what reads JSON gives up somewhere beyond.
MAX_DEPTH = 64


class _TooLong:
    """An integer with too many digits, as it was read: no field accepts it, so the error names the field."""


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


# pydantic would silently change values that JSON cannot carry; metadata is returned unchanged or rejected.
Metadata = Annotated[dict[str, JsonValue], BeforeValidator(_carriable)]


# Beside white space, control and format characters: letters, marks and symbols that show nothing (Unicode's
# default-ignorable ones, and the empty Braille pattern).
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cf", "Zs", "Zl", "Zp"} or bool(_INVISIBLE.match(character))


def is_blank(text: str) -> bool:
    """Whether a text shows nothing.

    >>> is_blank(" \u200b"), is_blank("a")
    (True, False)
    """
    return all(map(_is_invisible, text))


def _not_blank(text: str) -> str:
    if is_blank(text):
        msg = "must not be blank"
        raise ValueError(msg)
    return text


def _as_chunk(value: object) -> object:
    return {"text": value} if isinstance(value, str) else value


def _sorted(mapping: dict[Any, Any]) -> dict[Any, Any]:
    # The order in which a caller wrote weights or tags must not change the job's id.
    return dict(sorted(mapping.items()))


def _field(read_by: str, description: str, *, unit: str = "", **options: Any) -> Any:
    """Declare a field of a job: who reads it, and its unit. ``docs/jobs.md`` is made from this."""
    return Field(description=description, json_schema_extra={"read_by": read_by, "unit": unit}, **options)


def _unit(unit: str) -> dict[str, JsonValue]:
    """Name the unit of a number in an answer, for ``docs/jobs.md``."""
    return {"unit": unit}


class Record(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Written(Record):
    """A record that callers write.

    Raises:
        JobRejected: naming every field that is wrong, and why.
    """

    def __init__(self, **fields: Any) -> None:
        with _as_rejection():
            super().__init__(**fields)

    # pydantic's mark of an __init__ that is only its own: inside of other models it validates without it, and names
    # the whole way to a field.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, with our errors."""
        with _as_rejection():
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's, with our errors; a key that is given twice is refused."""
        return cls.model_validate(
            _read_json(bytes(json_data) if isinstance(json_data, bytearray) else json_data), **options
        )


class Chunk(Written):
    """One candidate text of a job, with what the first stage knows of it.

    >>> Chunk(title="Tides", text="The moon pulls.").model_text
    'Tides The moon pulls.'
    """

    text: Text = _field(
        "model, token signal", "The content. The model reads the title and the text, with a space between them."
    )
    id: Text = _field(
        "caller", "Your name for the chunk, unique in the job. Without one it is named by its position.", default=""
    )
    title: Text = _field("model, token signal", "Read by the model before the text.", default="")
    # Factories throughout: pydantic copies a default that could be changed with the slow ``copy.deepcopy``.
    keywords: list[Text] = _field(
        "token signal", "Words or phrases that describe the chunk. The model does not read them.", default_factory=list
    )
    questions: list[Text] = _field(
        "token signal", "Questions that the chunk answers. The model does not read them.", default_factory=list
    )
    vector_score: FirstStage | None = _field(
        "vector signal",
        "Similarity from your vector search, higher is better. None, NaN or infinity: the chunk has none.",
        default=None,
    )
    keyword_score: FirstStage | None = _field(
        "keyword signal",
        "Score from your keyword search (BM25 or the like). None, NaN or infinity: the chunk has none.",
        default=None,
    )
    pagerank: Number = _field(
        "pagerank signal",
        "Importance of the chunk, whatever the query is.",
        unit="percent",
        default=0,
        ge=0,
        le=100,
        allow_inf_nan=False,
    )
    tags: Annotated[dict[Text, Finite], AfterValidator(_sorted)] = _field(
        "tags signal", "Tags with their weights, compared with ``query_tags`` of the job.", default_factory=dict
    )
    tokens: list[Text] | None = _field(
        "token signal",
        "Your own tokens of the text, used as given. None: the worker makes them from the text.",
        default=None,
    )
    metadata: Metadata = _field(
        "caller",
        f"Any JSON object, at most {MAX_DEPTH} levels deep. Returned unchanged with the ranked chunk.",
        default_factory=dict,
    )

    @property
    def model_text(self) -> str:
        """The text that the model reads."""
        return f"{self.title} {self.text}".strip()


class Fusion(Written):
    """How the signals of a chunk become one score; the rules are those of ``rerankq_worker.fusion``."""

    method: Literal["weighted", "rrf"] = _field(
        "worker",
        "``weighted``: sum of weight x normalised signal. ``rrf``: reciprocal rank fusion, by ranks instead of values.",
        default="weighted",
    )
    weights: Annotated[dict[Signal, Weight], AfterValidator(_sorted)] = _field(
        "worker",
        "Weight of each signal. A signal that is not named weighs 0 and is not computed; one at least is above 0.",
        default={"model": 1.0},
        min_length=1,
    )
    normalise: Annotated[dict[Signal, Normalisation], AfterValidator(_sorted)] = _field(
        "worker",
        "Rule that brings a signal's values onto one scale. A signal that is not named follows, whatever the profile: "
        "model sigmoid, token none, vector none, keyword minmax, pagerank percent, tags cosine.",
        default_factory=dict,
    )
    boosts: Annotated[dict[TextField, Weight], AfterValidator(_sorted)] = _field(
        "worker",
        "Weight of each text field in the token signal. Empty: a token counts once, in content, title or keywords.",
        default_factory=dict,
    )
    rrf_k: Count = _field("worker", "The constant k of reciprocal rank fusion.", default=60, ge=1)
    token_rule: Literal["coverage", "ragflow"] = _field(
        "worker",
        "How the token signal is computed: field-weighted coverage of the query, or RAGFlow's formula.",
        default="coverage",
    )

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

    query: Annotated[Text, AfterValidator(_not_blank)] = _field(
        "model, token signal", "The question. It must hold a visible character."
    )
    chunks: Annotated[list[Annotated[Chunk, BeforeValidator(_as_chunk)]], AfterValidator(_each_named_once)] = _field(
        "worker",
        "The candidates; a plain string is a chunk with that text. At most ``RERANKQ_MAX_CHUNKS``.",
        min_length=1,
    )
    id: str | None = _field(
        "client, ledger",
        "Your name for the job. None: a hash of its content, so that an equal job gets the stored ranking; "
        "a random id if ``cache`` is not ``use``.",
        default=None,
        pattern=r"^[A-Za-z0-9._:-]{1,128}$",
    )
    model: Text | None = _field(
        "client, worker",
        "Name of the model, as ``RERANKQ_MODEL`` takes it. None: the deployment's default.",
        default=None,
        min_length=1,
        max_length=512,
    )
    top_k: Count | None = _field(
        "worker", "Return at most this many chunks, the best. None: all.", unit="chunks", default=None, ge=1
    )
    min_score: Finite | None = _field(
        "worker",
        "Leave out chunks whose fused score is lower. Its scale depends on the fusion: choose it from measured scores.",
        default=None,
    )
    fusion: Annotated[
        Annotated[Fusion, Tag(_NUMBERS)] | Annotated[Text, Tag(_PROFILE)], Discriminator(_kind_of_fusion)
    ] = _field(
        "client, worker",
        "Name of a profile in ``fusion.toml``, or numbers of your own. The client replaces a name by its numbers.",
        default="default",
    )
    query_tokens: list[tuple[Text, Weight]] | None = _field(
        "token signal",
        "Your own tokens of the query with their weights, used as given. None: the worker makes them from the query, "
        "weighted by their idf over the job's chunks.",
        default=None,
    )
    query_tags: Annotated[dict[Text, Finite], AfterValidator(_sorted)] = _field(
        "tags signal",
        "Tags that the query asks for, with weights. Empty: the tags signal plays no part.",
        default_factory=dict,
    )
    priority: Priority = _field(
        "ledger, worker",
        "``interactive`` if a person waits for the answer, else ``bulk``: bulk jobs give way to interactive ones.",
        default="interactive",
    )
    deadline_s: Number | None = _field(
        "ledger",
        "After this time from submission, a job that has not been started expires. A job that was started in time does "
        "not expire any more, even if it is queued again because its worker died or was stopped.",
        unit="seconds",
        default=None,
        ge=MIN_DEADLINE_S,
        le=MAX_DEADLINE_S,
        allow_inf_nan=False,
    )
    max_length: Count | None = _field(
        "worker",
        "Limit of a pair (query and chunk together). None: the model's own limit, which is also the maximum.",
        unit="tokens",
        default=None,
        ge=8,
    )
    query_max_tokens: Count = _field(
        "worker",
        "A query is cut to this length, but only in a pair that is longer than ``max_length``.",
        unit="tokens",
        default=128,
        ge=1,
    )
    long_chunks: Literal["truncate", "window"] = _field(
        "client, worker",
        "``truncate``: what does not fit is cut, and the ranked chunk says ``truncated``. "
        "``window`` does not exist yet and is refused.",
        default="truncate",
    )
    instruction: Annotated[Text, AfterValidator(str.strip)] = _field(
        "model",
        "What to judge by, for models whose chat template has a place for it, such as Qwen3-Reranker; in place of the "
        "template's own. Other models refuse the job. Empty: the template's own.",
        default="",
        max_length=8_192,
    )
    cache: Literal["use", "refresh", "bypass"] = _field(
        "client, worker",
        "``use``: read and store scores. ``refresh``: compute all pairs again and store them. ``bypass``: neither read "
        "nor store. With the last two, a job without an id of its own is never answered by a stored ranking.",
        default="use",
    )
    skip_at_or_below: Count = _field(
        "worker",
        "A job with so few chunks keeps your order, unscored, and its ranking says ``skipped``. "
        "Ignored if ``min_score`` is set.",
        unit="chunks",
        default=0,
        ge=0,
    )
    tenant: str = _field(
        "ledger, worker",
        "Who the job is for. Tenants share workers in turn, so that one with many jobs does not hold up another. "
        "No protection: every producer can read every job.",
        default="",
        pattern=r"^[A-Za-z0-9._@-]{0,128}$",
    )
    return_text: bool = _field("worker", "Return the chunks' texts in the ranking.", default=False)
    explain: bool = _field(
        "worker",
        "Tell what each signal added to each score, and where truncated chunks were cut: ``parts`` and ``span`` of the "
        "ranked chunks.",
        default=False,
    )

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

    id: str = Field(description="The chunk's own id, or the name that its position gave it.")
    index: int = Field(description="Position in the job, from 0.")
    rank: int = Field(description="Place in the ranking, from 1.")
    score: float = Field(description="Fused score: the ranking's order. Compare it within one ranking.")
    scores: dict[str, float] = Field(
        default_factory=dict, description="Every signal that took part, by name, after normalising."
    )
    parts: dict[str, float] = Field(
        default_factory=dict,
        description="What each of these signals added to the score, if the job asked for it with ``explain``. Their "
        "sum is the score.",
    )
    model_logit: float | None = Field(None, description="The model's raw output. None: the chunk was not scored.")
    missing: list[str] = Field(
        default_factory=list, description="Signals with a weight for which this chunk, or the whole job, has no value."
    )
    truncated: bool = Field(False, description="The pair was longer than its limit: the model read a part of it.")
    cached: bool = Field(False, description="The model's score came from the score cache.")
    span: tuple[int, int] | None = Field(
        None,
        description="Start and end of what the model read of a truncated chunk (its title, a space, its text), if the "
        "job asked for it with ``explain``. None: all of it, or it is not known.",
        json_schema_extra=_unit("characters"),
    )
    text: str | None = Field(None, description="The chunk's text, if the job asked for it with ``return_text``.")
    metadata: dict[str, JsonValue] = Field(default_factory=dict, description="As the job gave it.")


class ModelName(Record):
    """Which weights made a ranking."""

    name: str = Field(description="Full name of the model.")
    fingerprint: str = Field(description="Hash of the weights and of what else changes a score: precision, runtime.")


class Usage(Record):
    """What a job cost, in pairs and tokens."""

    pairs: int = Field(0, description="Pairs that the fusion needed.", json_schema_extra=_unit("pairs"))
    cached_pairs: int = Field(0, description="Of these, from the score cache.", json_schema_extra=_unit("pairs"))
    tokens: int = Field(
        0,
        description="Tokens computed for this job, without padding. Equal pairs count once; pairs from the score "
        "cache, or computed for another job at the same time, do not count.",
        json_schema_extra=_unit("tokens"),
    )
    truncated_pairs: int = Field(
        0, description="Pairs of which the model read only a part.", json_schema_extra=_unit("pairs")
    )


class Timings(Record):
    """Where a job's time went, in milliseconds."""

    queued: float = Field(
        0, description="From submission until a worker claimed the job.", json_schema_extra=_unit("ms")
    )
    tokenise: float = Field(0, description="Turning texts into tokens.", json_schema_extra=_unit("ms"))
    waiting: float = Field(
        0, description="Waiting for the device, while it computed other jobs' batches.", json_schema_extra=_unit("ms")
    )
    inference: float = Field(
        0, description="While batches with pairs of this job were on the device.", json_schema_extra=_unit("ms")
    )
    total: float = Field(
        0, description="From the claim to the finished ranking; ``queued`` is not in it.", json_schema_extra=_unit("ms")
    )


class Ranking(Record):
    """A job's answer: its chunks, best first.

    By score; equal scores by the model's raw logit, equal logits in the job's order.
    """

    job_id: str = Field(description="The job that it answers.")
    model: ModelName = Field(description="Which model made it.")
    chunks: list[RankedChunk] = Field(description="Best first.")
    usage: Usage = Field(Usage(), description="What it cost.")
    timings_ms: Timings = Field(Timings(), description="Where the time went.")
    skipped: bool = Field(
        False, description="The job had too few chunks to be scored (``skip_at_or_below``): they are in its own order."
    )
    dropped: int = Field(
        0, description="Chunks that ``top_k`` or ``min_score`` left out.", json_schema_extra=_unit("chunks")
    )


class JobStatus(Record):
    """Where a job stands. Times are seconds since the epoch by the ledger's clock."""

    job_id: str = Field(description="The job that was asked for.")
    state: State = Field(description="See ``docs/ledger.md``; ``unknown``: never submitted, forgotten, or too old.")
    pairs_done: int = Field(0, description="Pairs scored so far.", json_schema_extra=_unit("pairs"))
    pairs_total: int = Field(0, description="Pairs of the job.", json_schema_extra=_unit("pairs"))
    submitted_at: float | None = Field(
        None, description="When it was accepted.", json_schema_extra=_unit("seconds since the epoch")
    )
    started_at: float | None = Field(
        None, description="When a worker last claimed it.", json_schema_extra=_unit("seconds since the epoch")
    )
    ended_at: float | None = Field(
        None, description="When it ended.", json_schema_extra=_unit("seconds since the epoch")
    )
    attempts: int = Field(0, description="How often a worker has claimed it.")
    error: str | None = Field(None, description="Why there is no ranking.")
    tenant: str = Field("", description="As the job gave it.")


class JobEvent(Record):
    """One line of a dead job's history, such as ``claimed``, ``alone`` or ``lease-over``."""

    at: float = Field(description="When, by the ledger's clock.", json_schema_extra=_unit("seconds since the epoch"))
    event: str = Field(description="What happened; the events are explained in ``docs/ledger.md``.")
    worker: str = Field("", description="Which worker it concerns.")


class DeadJob(Record):
    """A job that was set aside because it crashed its workers. Times are seconds since the epoch."""

    job_id: str = Field(description="The job's id.")
    queue: str = Field(description="The queue that it waited in.")
    tenant: str = Field(description="As the job gave it.")
    label: str = Field(description="The query's first words, the number of chunks, the model.")
    pairs: int = Field(description="Pairs of the job.", json_schema_extra=_unit("pairs"))
    deaths: int = Field(description="How often a worker died while it ran this job alone.")
    submitted_at: float | None = Field(
        description="When it was accepted.", json_schema_extra=_unit("seconds since the epoch")
    )
    died_at: float | None = Field(
        description="When it was set aside.", json_schema_extra=_unit("seconds since the epoch")
    )
    error: str = Field(description="Why it is dead, in a sentence.")
    history: list[JobEvent] = Field(description="What happened to it, oldest first.")
    payload: str | None = Field(None, description="The job as JSON with all its texts, if it was asked for.")


class _Misplaced(ValueError):
    """Raised by a validator of a whole model for a fault in one part, whose location pydantic cannot know."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(message)
        self.place = place


def rejection(error: ValidationError) -> JobRejected:
    """Write a validation error as one line: the first five fields, each with what was expected."""
    faults = error.errors(include_url=False, include_input=False)
    places, messages = [], []
    for fault in faults:
        reason = fault.get("ctx", {}).get("error")
        parts = [str(part) for part in fault["loc"] if part not in {_NUMBERS, _PROFILE}]
        places.append(".".join([*parts, reason.place] if isinstance(reason, _Misplaced) else parts))
        messages.append(fault["msg"].removeprefix("Value error, "))
    said = [f"{place}: {message}" if place else message for place, message in zip(places, messages, strict=True)]
    more = f" (and {len(said) - 5} more)" if len(said) > 5 else ""
    rest = "; ".join(said[1:5])
    return JobRejected(messages[0] + (f"; {rest}" if rest else "") + more, field=places[0])


@contextmanager
def _as_rejection() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise rejection(error) from None


def _integer(digits: str) -> int | _TooLong:
    return int(digits) if len(digits) <= MAX_DIGITS else _TooLong()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON does not define which one counts, and readers differ.
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
        raise JobRejected(f"not JSON: byte {error.start} is not {error.encoding}") from None
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
