"""What crosses a process: what is accepted, what is refused and how that is said, and what names a job."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from rerankq import Chunk, Fusion, JobStatus, RankedChunk, Ranking, RerankJob, contract
from rerankq.client.routing import Route
from rerankq.client.submission import prepare, refuse_too_large
from rerankq.contract import ModelName, Normalisation, Record, Signal, TextField, Timings, Usage, parse_job
from rerankq.errors import JobRejected, JobTooLarge
from rerankq.identity import digest, job_id, job_of, label_of, payload_of
from rerankq.settings import Settings

HERE = Route("m", ("weights of m",), "")
SURROGATE = "broken \ud800 text"


def with_(**fields: Any) -> dict[str, Any]:
    return {"query": "why?", "chunks": ["because"], **fields}


def id_of(job: RerankJob) -> str:
    return job_id(job, digest(payload_of(job)))


# What is refused, and how


REFUSED: list[tuple[dict[str, Any], str]] = [
    (with_(query=""), "query"),
    (with_(query=" \t\n　"), "query"),
    (with_(query=None), "query"),
    (with_(query=7), "query"),
    (with_(query=SURROGATE), "query"),
    ({"chunks": ["x"]}, "query"),
    ({"query": "q"}, "chunks"),
    (with_(chunks=[]), "chunks"),
    (with_(chunks="one string"), "chunks"),
    (with_(chunks=[None]), "chunks.0"),
    (with_(chunks=["good", 7]), "chunks.1"),
    (with_(chunks=[{"title": "no text"}]), "chunks.0.text"),
    (with_(chunks=[SURROGATE]), "chunks.0.text"),
    (with_(chunks=[{"text": "x", "title": SURROGATE}]), "chunks.0.title"),
    (with_(chunks=[{"text": "x", "keywords": ["fine", SURROGATE]}]), "chunks.0.keywords.1"),
    (with_(chunks=[{"text": "x", "colour": "red"}]), "chunks.0.colour"),
    (with_(chunks=[{"text": "x", "pagerank": math.nan}]), "chunks.0.pagerank"),
    (with_(chunks=[{"text": "x", "pagerank": 101}]), "chunks.0.pagerank"),
    (with_(chunks=[{"text": "x", "pagerank": -1}]), "chunks.0.pagerank"),
    (with_(chunks=[{"text": "x", "tags": {"a": math.inf}}]), "chunks.0.tags.a"),
    (with_(chunks=[{"text": "x", "vector_score": "near"}]), "chunks.0.vector_score"),
    (with_(chunks=[{"text": "x", "metadata": {"a": object()}}]), "chunks.0.metadata.a"),
    (with_(colour="red"), "colour"),
    (with_(id=""), "id"),
    (with_(id="a b"), "id"),
    (with_(id="x" * 129), "id"),
    (with_(id="schräg"), "id"),
    (with_(id="a\n"), "id"),
    (with_(tenant="a b"), "tenant"),
    (with_(tenant="x" * 129), "tenant"),
    (with_(tenant="a|b"), "tenant"),
    (with_(tenant="a:b"), "tenant"),
    (with_(tenant="a\n"), "tenant"),
    (with_(model=""), "model"),
    (with_(model=SURROGATE), "model"),
    (with_(top_k=0), "top_k"),
    (with_(top_k=1_000_001), "top_k"),
    (with_(top_k=2.5), "top_k"),
    (with_(top_k=True), "top_k"),
    (with_(top_k=10**5_000), "top_k"),
    (with_(top_k="9" * 5_000), "top_k"),
    (with_(top_k="many"), "top_k"),
    (with_(min_score=math.nan), "min_score"),
    (with_(min_score=math.inf), "min_score"),
    (with_(deadline_s=0), "deadline_s"),
    (with_(deadline_s=-1), "deadline_s"),
    *((with_(deadline_s=odd), "deadline_s") for odd in (math.inf, math.nan, 1e-320, 1e12, 1e9 + 1, 10**400, True)),
    *((with_(deadline_s=odd), "deadline_s") for odd in ("inf", "NaN", "1e400", "soon", np.bool_(True), [5], {})),
    (with_(max_length=0), "max_length"),
    (with_(max_length=1_000_001), "max_length"),
    (with_(max_length=True), "max_length"),
    (with_(query_max_tokens=10**20), "query_max_tokens"),
    (with_(skip_at_or_below=10**20), "skip_at_or_below"),
    (with_(min_score=True), "min_score"),
    (with_(min_score=-1e300), "min_score"),
    (with_(model="m" * 513), "model"),
    (with_(chunks=[{"text": "x", "pagerank": True}]), "chunks.0.pagerank"),
    (with_(chunks=[{"text": "x", "vector_score": 1e300}]), "chunks.0.vector_score"),
    (with_(chunks=[{"text": "x", "keyword_score": False}]), "chunks.0.keyword_score"),
    (with_(chunks=[{"text": "x", "tags": {"a": 1e31}}]), "chunks.0.tags.a"),
    (with_(chunks=[{"text": "x", "tags": {"a": True}}]), "chunks.0.tags.a"),
    (with_(query_tags={"a": -1e31}), "query_tags.a"),
    (with_(query_tokens=[["a", 1e10]]), "query_tokens.0.1"),
    (with_(query_tokens=[["a", 1e-320]]), "query_tokens.0.1"),
    (with_(fusion={"weights": {"model": 1e308, "token": 1e308}}), "fusion.weights.model"),
    (with_(fusion={"weights": {"model": 1e-320}}), "fusion.weights.model"),
    (with_(fusion={"weights": {"model": True}}), "fusion.weights.model"),
    (with_(fusion={"boosts": {"title": 1e300}}), "fusion.boosts.title"),
    (with_(fusion={"rrf_k": 10**20}), "fusion.rrf_k"),
    (with_(chunks=[{"text": "x", "id": "a"}, "y", {"text": "z", "id": "a"}]), "chunks.2.id"),
    (with_(query_max_tokens=0), "query_max_tokens"),
    (with_(priority="urgent"), "priority"),
    (with_(cache="never"), "cache"),
    (with_(long_chunks="drop"), "long_chunks"),
    (with_(skip_at_or_below=-1), "skip_at_or_below"),
    (with_(query_tokens=[["a", -1]]), "query_tokens.0.1"),
    (with_(query_tokens=[["a", math.nan]]), "query_tokens.0.1"),
    (with_(query_tags={"a": math.nan}), "query_tags.a"),
    (with_(fusion={"weights": {"model": -1}}), "fusion.weights.model"),
    (with_(fusion={"weights": {"model": math.nan}}), "fusion.weights.model"),
    (with_(fusion={"weights": {"model": 0}}), "fusion"),
    (with_(fusion={"weights": {}}), "fusion.weights"),
    (with_(fusion={"rrf_k": 0}), "fusion.rrf_k"),
    (with_(fusion={"colour": "red"}), "fusion.colour"),
]


@pytest.mark.parametrize(
    ("fields", "place"), REFUSED, ids=[f"{number}-{place}" for number, (_, place) in enumerate(REFUSED)]
)
def test_a_malformed_job_is_rejected_naming_the_place(fields: dict[str, Any], place: str):
    with pytest.raises(JobRejected) as caught:
        parse_job(fields)
    assert caught.value.field == place
    assert str(caught.value).startswith(f"{place}: ")
    assert type(caught.value) is JobRejected
    assert not caught.value.retryable
    with pytest.raises(JobRejected) as built:
        RerankJob(**fields)
    assert str(built.value) == str(caught.value)
    assert isinstance(caught.value, ValueError), "as pydantic's own was"


def test_a_fault_has_the_same_message_in_json():
    for fields, place in REFUSED:
        try:
            text = json.dumps(fields, allow_nan=True)
        except (TypeError, ValueError):
            continue
        with pytest.raises(JobRejected) as caught:
            parse_job(text)
        assert caught.value.field == place


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"query": "q", "chunks": ["x"], "top_k": %s}' % ("9" * 5_000), "top_k"),
        ('{"query": "q", "chunks": ["x"], "deadline_s": %s}' % ("9" * 5_000), "deadline_s"),
        ('{"query": "q", "chunks": ["x"], "deadline_s": 1e999}', "deadline_s"),
        ('{"query": "q", "chunks": ["x"], "deadline_s": -Infinity}', "deadline_s"),
        ('{"query": "q", "chunks": ["x"], "min_score": NaN}', "min_score"),
        ('{"query": "q", "chunks": [{"text": "x", "metadata": {"a": [%s]}}]}' % ("9" * 5_000), "chunks.0.metadata"),
        ('{"query": "q", "chunks": [{"text": "x", "metadata": {"a": NaN}}]}', "chunks.0.metadata"),
        ('{"query": "q", "chunks": [{"text": "x", "metadata": {"a": 1e999}}]}', "chunks.0.metadata"),
        (
            '{"query": "q", "chunks": [{"text": "x", "metadata": {"a": DEEP}}]}'.replace("DEEP", "[" * 300 + "]" * 300),
            "chunks.0.metadata",
        ),
        ('{"query": DEEP, "chunks": ["x"]}'.replace("DEEP", "[" * 300 + "]" * 300), "query"),
        ('{"query": "\\ud800", "chunks": ["x"]}', "query"),
        ('{"query": "q", "chunks": ["\\udc00"]}', "chunks.0.text"),
        ('{"query": "q", "query": "p", "chunks": ["x"]}', "query"),
        ('{"query": "q", "chunks": [{"text": "x", "text": "y"}]}', "text"),
        ('{"query": "q", "chunks": [{"text": "x", "metadata": {"a": 1, "a": 2}}]}', "a"),
        ('{"query": "q", "chunks": ["x"], "id": "a\\u0000b"}', "id"),
        ('{"query": "q", "chunks": ["x"], "tenant": "a\\u0000b"}', "tenant"),
        ('{"query": "\\u0000", "chunks": ["x"]} \u0000', ""),
        ('{"query": "q", "chunks": %s}' % ("[" * 100_000), ""),
        ('\ufeff{"query": "q"}', ""),
        (b'{"query": "q", "chunks": ["\xe9"]}', ""),
    ],
    ids=range(21),
)
def test_malformed_json_is_rejected_naming_the_field(text: str | bytes, field: str):
    with pytest.raises(JobRejected) as caught:
        parse_job(text)
    assert caught.value.field == field
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("field", ["top_k", "deadline_s", "min_score"])
@pytest.mark.parametrize("digits", [400, 5_000])
def test_a_number_with_too_many_digits_is_rejected_as_out_of_range(field: str, digits: int):
    with pytest.raises(JobRejected, match=r"expected a number from -1e\+30 to 1e\+30") as caught:
        parse_job(f'{{"query": "q", "chunks": ["x"], "{field}": {"9" * digits}}}')
    assert caught.value.field == field


def test_a_nul_is_a_character_of_a_text_like_any_other():
    job = parse_job('{"query": "a\\u0000b", "chunks": [{"text": "\\u0000", "id": "\\u0000"}]}')
    assert job_of(payload_of(job)) == job
    assert job.chunk_names() == ["\0"]


@pytest.mark.parametrize("taken", [0.001, 1, 1e9, "5", "1e3", np.float32(2.5), np.int64(5), 10**9])
def test_a_deadline_is_any_number_of_seconds_up_to_thirty_years(taken: object):
    assert parse_job(with_(deadline_s=taken)).deadline_s == float(taken)


@pytest.mark.parametrize(
    ("top_k", "taken"), [(1, 1), (2_048, 2_048), (10_000, 10_000), (1_000_000, 1_000_000), (5.0, 5)]
)
def test_top_k_may_be_more_than_there_are_chunks(top_k: float, taken: int):
    assert parse_job(with_(top_k=top_k)).top_k == taken


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Chunk(text=5), "text"),
        (Chunk, "text"),
        (lambda: Chunk(text="x", colour="red"), "colour"),
        (lambda: Chunk(text=SURROGATE), "text"),
        (lambda: Chunk(text="x", tags={"a": "b"}), "tags.a"),
        (lambda: Chunk.model_validate({"text": None}), "text"),
        (lambda: Chunk.model_validate(7), ""),
        (lambda: Chunk.model_validate_json('{"text": 5}'), "text"),
        (lambda: Chunk.model_validate_json(b'{"text": "x", "text": "y"}'), "text"),
        (lambda: Chunk.model_validate_json("{"), ""),
        (lambda: Fusion(weights={"modle": 1}), "weights.modle.[key]"),
        (lambda: Fusion(method="best"), "method"),
        (lambda: Fusion(weights={"model": 0}), ""),
        (lambda: Fusion.model_validate({"weights": {"model": -1}}), "weights.model"),
        (lambda: RerankJob(query="q", chunks=[{"text": 5}]), "chunks.0.text"),
        (lambda: RerankJob.model_validate({"query": "q", "chunks": ["x"], "fusion": {"rrf_k": 0}}), "fusion.rrf_k"),
    ],
    ids=range(16),
)
def test_mistakes_of_callers_raise_job_rejected(build: Callable[[], object], field: str):
    with pytest.raises(JobRejected) as caught:
        build()
    assert caught.value.field == field


def test_inside_of_other_models_pydantic_names_the_whole_way_to_a_fault():
    class Holder(BaseModel):
        jobs: list[RerankJob]

    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"jobs": [with_(), with_(chunks=["x", {"text": 5}])]})
    assert [fault["loc"] for fault in caught.value.errors()] == [("jobs", 1, "chunks", 1, "text")]


# Names of chunks


@runs(max_examples=200)
@given(st.lists(st.sampled_from(["", "", "0", "1", "2", "#1", "##1", "#2", "a"]), min_size=1, max_size=8))
def test_chunks_have_names_of_their_own_and_those_that_were_given(ids: list[str]):
    chunks = [{"text": "x", "id": name} for name in ids]
    given_ids = [name for name in ids if name]
    if len(set(given_ids)) < len(given_ids):
        with pytest.raises(JobRejected, match="is the id of chunk"):
            parse_job(with_(chunks=chunks))
        return
    names = parse_job(with_(chunks=chunks)).chunk_names()
    assert len(set(names)) == len(names)
    for at, (name, given_id) in enumerate(zip(names, ids, strict=True)):
        assert name == given_id if given_id else name.lstrip("#") == str(at)
        assert given_id or str(at) in given_ids or name == str(at), "its position, wherever that is free"


@pytest.mark.parametrize(
    "invisible",
    [
        "", " ", "\n\t\x00\x1f\x7f", "\u200b", "\u200b\u200c\u200d\u2060", "\ufeff", "\u00ad\u00a0\u3000",
        "\u2028\u2029",
        "\u115f\u1160", "\u3164", "\uffa0", "\ufe0f", "\U000e0100", "\U000e0001\U000e0041", "\u034f", "\u180e\u180b",
        "\u202e", "\u17b4", "\u2800", "\u2065", "\ufff0", "\u061c",
    ],
)  # fmt: skip
def test_a_query_of_invisible_characters_only_is_blank(invisible: str):
    with pytest.raises(JobRejected, match="blank") as refused:
        RerankJob(query=invisible, chunks=["x"])
    assert refused.value.field == "query"
    assert RerankJob(query=f"{invisible}?{invisible}", chunks=["x"]).query == f"{invisible}?{invisible}"


@pytest.mark.parametrize("visible", [".", "\u0301", "\ufffd", "\ue000", "👩\u200d👧", "ㄱ", "x\ufe0f"])
def test_a_query_that_shows_anything_is_not_blank(visible: str):
    assert RerankJob(query=visible, chunks=["x"]).query == visible


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"a job"',
        b"\xff",
        '{"query": "q", "chunks": ["x"]} {}',
        '{"query": "\\ud800"}',
        "[" * 9_999,
    ],
)
def test_json_that_is_not_an_object_is_rejected(text: str | bytes):
    with pytest.raises(JobRejected):
        parse_job(text)


def test_every_fault_is_named_up_to_five():
    with pytest.raises(JobRejected) as caught:
        parse_job({"query": "", "chunks": [], "top_k": 0, "cache": "x", "priority": "x", "tenant": " ", "colour": "x"})
    said = str(caught.value)
    assert said.startswith("query: ")
    assert all(f"; {place}: " in said for place in ("chunks", "top_k", "priority", "cache"))
    assert said.endswith("(and 2 more)")


def test_a_rejection_never_repeats_what_was_sent():
    with pytest.raises(JobRejected) as caught:
        parse_job(with_(chunks=[{"text": "the secret itself", "colour": "secret"}], top_k="secret"))
    assert "secret" not in str(caught.value)


def test_nan_in_a_first_stage_score_counts_as_missing():
    job = parse_job(with_(chunks=[{"text": "x", "vector_score": math.nan, "keyword_score": math.inf}]))
    (chunk,) = job_of(payload_of(job)).chunks
    assert (chunk.vector_score, chunk.keyword_score) == (None, None)
    from_json = parse_job('{"query": "q", "chunks": [{"text": "x", "vector_score": NaN, "keyword_score": -Infinity}]}')
    assert job_of(payload_of(from_json)).chunks[0].vector_score is None
    assert b"NaN" not in payload_of(from_json)


def nested(depth: int) -> Any:
    deep: Any = 1
    for _ in range(depth):
        deep = [deep]
    return deep


def round_itself() -> list[Any]:
    turns: list[Any] = []
    turns.append(turns)
    return turns


@pytest.mark.parametrize(
    "metadata",
    [
        *({"a": SURROGATE}, {SURROGATE: 1}, {"a": [[SURROGATE]]}, {"a": {"b": math.nan}}, {"a": [math.inf]}),
        *({"a": nested(depth)} for depth in (65, 200, 300, 2_000)),
        {"a": round_itself()},
    ],
)
def test_metadata_that_cannot_be_handed_back_untouched_is_rejected(metadata: dict[str, Any]):
    with pytest.raises(JobRejected) as caught:
        parse_job(with_(chunks=[{"text": "x", "metadata": metadata}]))
    assert caught.value.field == "chunks.0.metadata"
    assert len(str(caught.value)) < 200


def test_metadata_comes_back_as_it_went():
    metadata = {"z": 1, "a": [None, True, 1.5, 10**30, "三", {"deep": nested(50)}], "": ""}
    (chunk,) = job_of(payload_of(parse_job(with_(chunks=[{"text": "x", "metadata": metadata}])))).chunks
    assert chunk.metadata == metadata
    assert list(chunk.metadata) == list(metadata)


# What is too large


def test_a_hundred_thousand_chunks_are_too_many():
    with pytest.raises(JobTooLarge, match="100000 chunks; at most 10000") as caught:
        prepare(parse_job(with_(chunks=["x"] * 100_000)), HERE, Settings())
    assert caught.value.field == "chunks"
    assert isinstance(caught.value, JobRejected)


def test_a_chunk_of_ten_megabytes_is_taken_and_one_of_twenty_is_not():
    large = prepare(parse_job(with_(chunks=["x" * 10_000_000])), HERE, Settings())
    assert len(large.payload) > 10_000_000
    with pytest.raises(JobTooLarge, match="at most 16777216"):
        prepare(parse_job(with_(chunks=["x" * 10_000_000] * 2)), HERE, Settings())


def test_the_size_of_a_job_is_counted_in_bytes():
    settings = Settings(max_job_bytes=1_500)
    prepare(parse_job(with_(chunks=["x" * 900])), HERE, settings)
    with pytest.raises(JobTooLarge):
        prepare(parse_job(with_(chunks=["三" * 900])), HERE, settings)


def test_fully_escaped_json_is_not_refused_before_it_is_parsed():
    settings = Settings(max_job_bytes=1_500)
    for text in ("é" * 600, "三" * 400, "😀" * 300):
        escaped = json.dumps(with_(chunks=[text]))
        refuse_too_large(escaped, settings)
        prepare(parse_job(escaped), HERE, settings)
    with pytest.raises(JobTooLarge):
        refuse_too_large(" " * 4_501, settings)


# What names a job


def test_the_order_of_keys_does_not_change_an_id():
    def turned(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return dict(reversed(mapping.items()))

    fusion = {
        "weights": {"model": 0.7, "token": 0.3},
        "normalise": {"model": "sigmoid", "keyword": "minmax"},
        "boosts": {"title": 2, "keywords": 5},
    }
    tags = {"a": 1.0, "b": 2.0}
    one = with_(chunks=[{"text": "x", "tags": tags}], fusion=fusion, query_tags=tags)
    other = turned(
        with_(
            chunks=[{"tags": turned(tags), "text": "x"}],
            fusion=turned({key: turned(value) for key, value in fusion.items()}),
            query_tags=turned(tags),
        )
    )
    assert id_of(parse_job(one)) == id_of(parse_job(other))
    assert id_of(parse_job(one)) == id_of(parse_job(json.dumps(other)))


def test_an_explicit_default_does_not_change_an_id():
    said = {
        name: field.get_default(call_default_factory=True)
        for name, field in RerankJob.model_fields.items()
        if not field.is_required()
    }
    assert id_of(parse_job(with_(**said))) == id_of(parse_job(with_()))
    assert id_of(parse_job(with_(chunks=[{"text": "because", "title": "", "tags": {}}]))) == id_of(parse_job(with_()))


@pytest.mark.parametrize("beside", [{"deadline_s": 5.0}, {"priority": "bulk"}])
def test_deadline_and_priority_do_not_change_an_id(beside: dict[str, Any]):
    assert id_of(parse_job(with_(**beside))) == id_of(parse_job(with_()))


OTHER: dict[str, Any] = {
    "query": "why not?",
    "chunks": ["because", "so"],
    "model": "other",
    "top_k": 5,
    "min_score": 0.0,
    "fusion": "rrf",
    "query_tokens": [["why", 1.0]],
    "query_tags": {"a": 1.0},
    "max_length": 256,
    "query_max_tokens": 64,
    "long_chunks": "window",
    "instruction": "judge by it",
    "skip_at_or_below": 3,
    "tenant": "t",
    "return_text": True,
    "explain": True,
}


@pytest.mark.parametrize("field", OTHER)
def test_every_field_that_changes_the_ranking_changes_the_id(field: str):
    assert id_of(parse_job(with_(**{field: OTHER[field]}))) != id_of(parse_job(with_()))


def test_every_field_is_known_to_change_the_id_or_not():
    assert {*OTHER, "id", "cache", "deadline_s", "priority"} == set(RerankJob.model_fields)


def test_the_weights_of_the_model_and_its_aliases_do_not_change_the_id_or_the_content_and_its_name_does():
    settings = Settings()
    for named in ({}, {"model": "m"}, {"model": "m", "id": "mine"}):
        job = parse_job(with_(**named))
        here, elsewhere = prepare(job, HERE, settings), prepare(job, Route("m", (), ".m"), settings)
        assert (here.id, here.content, here.payload) == (elsewhere.id, elsewhere.content, elsewhere.payload)
    full, short = (prepare(parse_job(with_(model=name)), HERE, settings) for name in ("m", "an alias of m"))
    assert (full.id, full.content, full.payload) == (short.id, short.content, short.payload)
    other = prepare(parse_job(with_(model="n")), Route("n", ("weights of m",), ""), settings)
    unnamed = prepare(parse_job(with_()), HERE, settings)
    assert len({full.id, other.id, unnamed.id}) == 3


def test_a_profile_that_was_edited_changes_the_id():
    settings = Settings()
    by_name = prepare(parse_job(with_(fusion="model")), HERE, settings)
    by_numbers = prepare(job_of(by_name.payload), HERE, settings)
    assert by_name.id == by_numbers.id, "the numbers name it, not the profile's name"
    assert by_name.id != prepare(parse_job(with_(fusion="default")), HERE, settings).id


def test_digests_of_different_lists_of_texts_differ():
    assert id_of(parse_job(with_(chunks=["ab", "c"]))) != id_of(parse_job(with_(chunks=["a", "bc"])))
    titled = [{"title": "ab", "text": "c"}], [{"title": "a", "text": "b c"}]
    assert id_of(parse_job(with_(chunks=titled[0]))) != id_of(parse_job(with_(chunks=titled[1])))


@pytest.mark.parametrize("cache", ["refresh", "bypass"])
def test_a_job_that_wants_fresh_scores_has_a_random_id(cache: str):
    job = parse_job(with_(cache=cache))
    assert len({id_of(job) for _ in range(100)}) == 100
    assert id_of(parse_job(with_(cache=cache, id="mine"))) == "mine"


def test_an_id_fits_into_the_pattern_of_own_ids():
    assert parse_job(with_(id=id_of(parse_job(with_())))).id
    assert parse_job(with_(id="Az09._:-" * 16)).id


# Round trips


@pytest.mark.parametrize(
    "record",
    [
        Chunk(
            text="x", title="t", keywords=["k"], questions=["q"], tags={"a": 1}, tokens=["x"], metadata={"a": [None]}
        ),
        Fusion(weights={"model": 1, "tags": 0.5}, normalise={"tags": "cosine"}, boosts={"content": 1}, rrf_k=7),
        RankedChunk(id="a", index=0, rank=1, score=0.5, scores={"model": 0.5}, model_logit=-0.25, span=(0, 5)),
        Ranking(
            job_id="j",
            model=ModelName(name="m", fingerprint="f"),
            chunks=[RankedChunk(id="a", index=0, rank=1, score=1)],
            usage=Usage(pairs=1, cached_pairs=1),
            timings_ms=Timings(total=1.5),
            skipped=True,
        ),
        JobStatus(job_id="j", state="failed", error="why", submitted_at=1.5),
        RerankJob(
            **with_(id="mine", deadline_s=5, priority="bulk", fusion=Fusion(method="rrf"), query_tokens=[("a", 1)])
        ),
    ],
    ids=lambda record: type(record).__name__,
)
def test_every_record_survives_json_and_is_frozen(record: BaseModel):
    assert type(record).model_validate_json(record.model_dump_json()) == record
    assert type(record).model_validate(record.model_dump()) == record
    with pytest.raises(ValidationError, match="frozen"):
        setattr(record, next(iter(type(record).model_fields)), "changed")


def records() -> Iterator[type[Record]]:
    return (each for each in vars(contract).values() if isinstance(each, type) and issubclass(each, Record))


def test_every_record_refuses_unknown_fields():
    for record in records():
        assert record.model_config["frozen"]
        assert record.model_config["extra"] == "forbid"


words = st.text(st.characters(codec="utf-8"), max_size=12)
finite = st.floats(-1e30, 1e30)
weights = st.just(0.0) | st.floats(1e-30, 1e9)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | finite | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
chunks = st.builds(
    Chunk,
    text=words,
    id=words,
    title=words,
    keywords=st.lists(words, max_size=2),
    questions=st.lists(words, max_size=2),
    vector_score=st.none() | finite,
    keyword_score=st.none() | finite,
    pagerank=st.floats(0, 100),
    tags=st.dictionaries(words, finite, max_size=3),
    tokens=st.none() | st.lists(words, max_size=3),
    metadata=st.dictionaries(words, json_values, max_size=3),
)
fusions = st.builds(
    Fusion,
    method=st.sampled_from(["weighted", "rrf"]),
    weights=st.dictionaries(st.sampled_from(get_args(Signal)), st.floats(0.1, 10), min_size=1),
    normalise=st.dictionaries(st.sampled_from(get_args(Signal)), st.sampled_from(get_args(Normalisation))),
    boosts=st.dictionaries(st.sampled_from(get_args(TextField)), weights),
    rrf_k=st.integers(1, 100),
)
jobs = st.builds(
    RerankJob,
    query=words.map(lambda text: f"{text}?"),
    chunks=st.lists(chunks, min_size=1, max_size=4, unique_by=lambda chunk: chunk.id or id(chunk)),
    id=st.none() | st.from_regex(r"\A[A-Za-z0-9._:-]{1,128}\Z"),
    model=st.none() | words.filter(bool),
    top_k=st.none() | st.integers(1, 2048),
    min_score=st.none() | finite,
    fusion=fusions | st.sampled_from(["default", "rrf"]),
    query_tokens=st.none() | st.lists(st.tuples(words, weights), max_size=3),
    query_tags=st.dictionaries(words, finite, max_size=3),
    priority=st.sampled_from(["interactive", "bulk"]),
    deadline_s=st.none() | st.floats(0.001, 1e9),
    max_length=st.none() | st.integers(8, 8192),
    query_max_tokens=st.integers(1, 512),
    cache=st.sampled_from(["use", "refresh", "bypass"]),
    skip_at_or_below=st.integers(0, 10),
    tenant=st.from_regex(r"\A[A-Za-z0-9._@-]{0,128}\Z"),
    return_text=st.booleans(),
)


@runs(deadline=None)
@given(jobs)
def test_any_job_survives_its_payload_and_any_way_of_writing_it(job: RerankJob):
    travelled = job_of(payload_of(job))
    assert travelled == job.model_copy(update={"id": None, "deadline_s": None, "priority": "interactive"})
    assert payload_of(travelled) == payload_of(job)
    assert parse_job(job.model_dump_json()) == job
    assert parse_job(job.model_dump()) == job
    assert parse_job(json.dumps(job.model_dump(mode="json"))) == job


@runs(deadline=None, max_examples=30)
@given(jobs)
def test_a_label_is_short_and_holds_nothing_of_the_chunks(job: RerankJob):
    secret = "secret-" * 3
    hidden = [Chunk(text=secret, title=secret, metadata={"a": secret}) for _ in job.chunks]
    label = label_of(job.model_copy(update={"chunks": hidden}), model="m")
    assert "secret" not in label
    assert len(label) < 100
    assert "\n" not in label


def test_the_text_that_the_model_reads_is_title_and_text_and_nothing_else():
    chunk = Chunk(title=" Tides ", text="The moon pulls.\n", keywords=["k"], questions=["q"], tokens=["t"])
    assert chunk.model_text == "Tides  The moon pulls."
    assert Chunk(text="x").model_text == "x"


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 1


def test_values_just_within_a_limit_are_accepted():
    within = {"deep": nested(contract.MAX_DEPTH - 1), "long": 10 ** (contract.MAX_DIGITS - 1)}
    assert Chunk(text="x", metadata=within).metadata == within
    assert job_of(payload_of(RerankJob(query="q", chunks=[{"text": "x", "metadata": within}]))).chunks[0].metadata == (
        within
    )
    assert Fusion(weights={"model": contract.MIN_WEIGHT, "token": contract.MAX_WEIGHT}).weights["model"] == 1e-30
    for beyond in ({"deep": nested(contract.MAX_DEPTH)}, {"long": 10 ** (contract.MAX_DIGITS + 1)}):
        with pytest.raises(JobRejected):
            Chunk(text="x", metadata=beyond)


def test_a_payload_holds_the_fields_that_a_job_uses_and_no_others():
    # So that an older worker reads what a newer producer writes, as long as no new field is used.
    assert set(json.loads(payload_of(RerankJob(**with_())))) == {"query", "chunks"}
    assert set(json.loads(payload_of(RerankJob(**with_(top_k=3, tenant="t"))))) == {
        "query",
        "chunks",
        "top_k",
        "tenant",
    }
    assert json.loads(payload_of(RerankJob(**with_())))["chunks"] == [{"text": "because"}]
    with pytest.raises(JobRejected, match="field_of_a_newer_version"):
        job_of(json.dumps(with_(field_of_a_newer_version=1)).encode())
