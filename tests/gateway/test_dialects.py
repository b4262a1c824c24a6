"""The dialects as pure functions: the requests of real clients, and what may be in them."""

import itertools
import json
import math

import pytest
from pydantic import ValidationError
from recorded_requests import ASKED, RECORDED, TEXTS, results_in
from tides import DOCUMENTS, QUERY

from rerankq.contract import Chunk, RankedChunk
from rerankq.errors import JobRejected, JobTooLarge
from rerankq.gateway.dialects import MOUNTS, PATHS, choose
from rerankq.gateway.dialects.dialect import with_explanation
from rerankq.gateway.dialects.fields import parsed
from rerankq.gateway.paths import canonical_path
from rerankq.gateway.rerank_call import CallOptions, RankedDocument, RerankReply, ScoreCall, job_of_call, joined

ROWS = [pytest.param(row, id=f"{row.client} {row.path}") for row in RECORDED]


def route_of(path):
    """Find the path of a request among those of the dialects, as the router does."""
    path = canonical_path(path)
    return path if path in PATHS else next(one for one in PATHS if "{" in one and path.startswith(one.split("{")[0]))


def reply_to(call, scores=(0.1, 0.9, 0.5), **more):
    ranked = [
        RankedDocument(at, score, RankedChunk(id=str(at), index=at, rank=1, score=score))
        for at, score in enumerate(scores)
    ]
    best_first = sorted(ranked, key=lambda document: -document.score)[: call.top_n]
    return RerankReply(job_id="call-1", model="org/model", documents=tuple(best_first), tokens=70, **more)


def read(path, body):
    dialect = choose(route_of(path), body)
    asked = parsed(dialect.request, body)
    return dialect, asked, dialect.call_of(asked)


@pytest.mark.parametrize("row", ROWS)
def test_a_recorded_request_is_answered_in_its_clients_dialect(row):
    dialect, asked, call = read(row.path, row.body)
    assert dialect.name == row.dialect
    assert call.query == QUERY
    assert [chunk.text for chunk in call.documents] == [
        f"title: on tides\ntext: {text}" if "rank_fields" in row.body and len(row.body["rank_fields"]) > 1 else text
        for text in DOCUMENTS
    ]
    body = json.loads(json.dumps(dialect.response_of(asked, reply_to(call))))
    # As its own model says.
    dialect.response.model_validate(body)
    results = results_in(body, row.read)
    assert sorted(index for index, _, _ in results) == [0, 1, 2]
    assert {index: score for index, score, _ in results} == {0: 0.1, 1: 0.9, 2: 0.5}
    if dialect.name != "vllm-score" and row.read[1]:
        assert [index for index, _, _ in results] == [1, 2, 0]
    assert next(document for index, _, document in results if index == 1) == row.document


@pytest.mark.parametrize("row", ROWS)
def test_a_recorded_request_may_ask_for_an_explanation(row):
    dialect, asked, call = read(row.path, row.body)
    body = with_explanation(dialect.response_of(asked, reply_to(call)), reply_to(call))
    told = json.dumps(body)
    assert told.count('"model_logit"') == 3
    dialect.response.model_validate(body)


@pytest.mark.parametrize(("mount", "below"), [(mount, below) for mount, paths in MOUNTS.items() for below in paths])
def test_every_path_below_a_prefix_has_its_dialects(mount, below):
    assert PATHS[f"/{mount}{below}"] == MOUNTS[mount][below]


@pytest.mark.parametrize(
    ("pasted", "meant"),
    [
        ("/rerank", "/rerank"),
        ("/rerank/", "/rerank"),
        ("//rerank", "/rerank"),
        ("///v1//rerank//", "/v1/rerank"),
        ("/v1/v1/rerank", "/v1/rerank"),
        ("/v1/rerank/rerank", "/rerank"),
        ("/v1/rerank/v1/rerank", "/v1/rerank"),
        ("/v1/rerank/v2/rerank", "/v2/rerank"),
        ("/v1/v2/rerank", "/v2/rerank"),
        ("/v2/v1/rerank", "/v1/rerank"),
        ("/v3/openai/rerank", "/rerank"),
        ("/jina/v1/v1/rerank", "/jina/v1/rerank"),
        ("/infinity//rerank", "/infinity/rerank"),
        ("/v1/v1/score", "/v1/score"),
        ("/v1/retrieval/nvidia/reranking", "/nvidia/reranking"),
        ("/nv-rerankqa-mistral-4b-v3/reranking", "/reranking"),
        ("/projects/x/cohere/v2/rerank", "/cohere/v2/rerank"),
        ("/projects/x/openai/v1/models", "/v1/models"),
        ("/tei/info", "/info"),
        ("/rerank/info", "/info"),
        ("/v1/api/tags", "/api/tags"),
        ("/localai/api/show", "/api/show"),
        ("/jina/v1/models", "/v1/models"),
        ("/vllm/v1/models/org/model", "/v1/models/org/model"),
        ("/deepinfra/v1/inference/org/model", "/deepinfra/v1/inference/org/model"),
        ("/v1/inference/org/model", "/v1/inference/org/model"),
        ("/inference/v1/rerank", "/inference/v1/rerank"),
        ("/dashscope/api/v1/services/rerank/text-rerank/text-rerank", None),
        ("/tei/health", "/health"),
        ("/infinity/models", "/infinity/models"),
        ("/v1/jobs", None),
        ("/v1/jobs/", "/v1/jobs"),
        ("//v1/jobs//batch/", "/v1/jobs/batch"),
        ("//", "/"),
        ("/v1/jobs/rerank", None),
        ("/elsewhere/rerank", None),
        ("/rerank/elsewhere", None),
        ("/infinty/rerank", None),
        ("/", None),
        ("", None),
        ("/v1", None),
        ("/tei", None),
        ("/v1/batches/v1/rerank", None),
    ],
)
def test_a_pasted_path_is_read_as_it_is_meant_and_others_stay(pasted, meant):
    assert canonical_path(pasted) == (pasted if meant is None else meant)


@pytest.mark.parametrize("path", [path for path in PATHS if "{" not in path])
def test_a_path_of_ours_stays(path):
    assert canonical_path(path) == path


def test_nvidias_truncation_is_read_in_either_case():
    _, asked, _ = read("/v1/ranking", {"query": QUERY, "passages": DOCUMENTS, "truncate": "end"})
    assert asked.truncate == "END"


def test_limits_in_tokens_beyond_every_model_are_those_that_a_job_can_have():
    for limit, query in ((10**9, 1_000_000), (1, 1)):
        asked = {**ASKED, "max_tokens_per_doc": limit, "max_tokens_per_query": limit}
        _, _, call = read("/v1/rerank", asked)
        assert job_of_call(call, CallOptions(), job_id="j", timeout_s=1).query_max_tokens == query
    _, _, call = read("/v1/rerank", {**ASKED, "truncate_prompt_tokens": 1})
    assert job_of_call(call, CallOptions(), job_id="j", timeout_s=1).max_length == 8


def test_limits_in_tokens_and_priorities_reach_the_call():
    _, _, call = read(
        "/v1/rerank",
        {**ASKED, "max_tokens_per_doc": 300, "max_tokens_per_query": 50, "truncate_prompt_tokens": 4000, "priority": 1},
    )
    assert (call.max_length, call.query_max_tokens, call.priority) == (350, 50, "bulk")
    _, _, call = read("/v2/rerank", {**ASKED, "max_tokens_per_doc": 300, "priority": 0})
    assert (call.max_length, call.query_max_tokens, call.priority) == (428, None, "interactive")
    _, _, call = read("/score", {"text_1": QUERY, "text_2": DOCUMENTS, "truncate_prompt_tokens": 100, "priority": -3})
    assert (call.max_length, call.priority) == (100, "interactive")
    _, _, call = read("/rerank", {**ASKED, "truncate_prompt_tokens": -1, "max_tokens_per_query": 0})
    assert (call.max_length, call.query_max_tokens, call.priority) == (None, None, None)
    _, _, call = read("/jina/rerank", {**ASKED, "max_doc_length": 100, "max_query_length": 20})
    assert (call.max_length, call.query_max_tokens) == (120, 20)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/vllm/rerank", "/jina/v1/rerank"])
def test_logits_are_asked_for_as_vllm_does_and_by_no_null(path):
    assert read(path, {**ASKED, "use_activation": False})[2].raw_scores
    assert not any(read(path, {**ASKED, "use_activation": value})[2].raw_scores for value in (True, None))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/rerank", {**ASKED, "instruction": "prefer recent ones"}),
        ("/v1/reranks", {**ASKED, "instruct": "prefer recent ones"}),
        ("/score", {"text_1": QUERY, "text_2": DOCUMENTS, "instruction": "prefer recent ones"}),
        ("/inference/m", {"queries": [QUERY], "documents": DOCUMENTS, "instruction": "prefer recent ones"}),
        ("/v1/reranking", {"query": QUERY, "input": DOCUMENTS, "instruction": "prefer recent ones"}),
        (
            "/api/v1/services/rerank/text-rerank/text-rerank",
            {"input": ASKED, "parameters": {"instruct": "prefer recent ones"}},
        ),
    ],
)
def test_an_instruction_is_read_out_of_every_dialect_that_has_one(path, body):
    _, _, call = read(path, body)
    for one in getattr(call, "calls", (call,)):
        assert (one.instruction, one.warnings) == ("prefer recent ones", ())


def test_warnings_are_told_in_the_meta_of_a_response():
    dialect, asked, call = read("/v2/rerank", ASKED)
    body = dialect.response_of(asked, reply_to(call, warnings=("one", "two")))
    assert body["meta"]["warnings"] == ["one", "two"]
    assert body["meta"]["api_version"] == {"version": "2"}
    assert body["meta"]["billed_units"] == {"search_units": 1, "input_tokens": 70}


def test_a_response_costs_a_token_at_least():
    dialect, asked, _ = read("/v1/rerank", ASKED)
    body = dialect.response_of(asked, RerankReply("id", "m", ()))
    assert body["usage"] == {"prompt_tokens": 1, "total_tokens": 1}


@pytest.mark.parametrize("row", ROWS)
def test_null_optionals_and_unknown_fields_are_accepted(row):
    dialect = choose(route_of(row.path), row.body)
    given = {name for name, field in dialect.request.model_fields.items() if field.is_required()}
    nulls = dict.fromkeys(name for name in dialect.request.model_fields if name not in given)
    body = {**nulls, **row.body, "unknown": [{"a": 1}], "user": None}
    assert dialect.call_of(parsed(dialect.request, body)).query == QUERY


@pytest.mark.parametrize(
    ("sent", "expected"), [(True, True), ("true", True), ("True", True), (1, True), ("false", False), (False, False)]
)
def test_truth_values_may_be_texts(sent, expected):
    dialect, asked, _ = read("/v1/rerank", {**ASKED, "return_documents": sent})
    assert asked.return_documents is expected
    assert dialect.name == "jina"


@pytest.mark.parametrize(("top_n", "expected"), [(1, 1), (3, 3), (99, None), (0, None), ("2", 2), (10**30, None)])
def test_top_n_may_be_beyond_the_documents_zero_or_a_text(top_n, expected):
    _, _, call = read("/v1/rerank", {**ASKED, "top_n": top_n})
    assert len(call.documents[: call.top_n]) == (expected or 3)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/rerank", {"query": QUERY}, "documents"),
        ("/rerank", {"documents": DOCUMENTS}, "query"),
        ("/rerank", {**ASKED, "documents": []}, "documents"),
        ("/rerank", {**ASKED, "documents": "one"}, "documents"),
        ("/rerank", {**ASKED, "documents": ["a", None]}, "documents.1"),
        ("/rerank", {**ASKED, "documents": ["a", 5]}, "documents.1"),
        ("/rerank", {**ASKED, "documents": ["a", {}]}, "documents.1"),
        ("/rerank", {**ASKED, "documents": ["a", {"id": 3}]}, "documents.1"),
        ("/rerank", {**ASKED, "documents": ["a", {"image": "https://x/y.png"}]}, "documents.1"),
        (
            "/vllm/rerank",
            {**ASKED, "documents": [{"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "documents.0",
        ),
        ("/rerank", {**ASKED, "query": {"image": "https://x/y.png"}}, "query"),
        ("/rerank", {**ASKED, "query": 5}, "query"),
        ("/rerank", {**ASKED, "query": ""}, "query"),
        ("/rerank", {**ASKED, "query": {"text": " \u200b"}}, "query"),
        ("/rerank", {**ASKED, "top_n": -1}, "top_n"),
        ("/rerank", {**ASKED, "top_n": True}, "top_n"),
        ("/rerank", {**ASKED, "top_n": 1.5}, "top_n"),
        ("/rerank", {**ASKED, "max_tokens_per_doc": -2}, "max_tokens_per_doc"),
        ("/rerank", {**ASKED, "return_documents": "maybe"}, "return_documents"),
        ("/rerank", {**TEXTS, "texts": ["a", 5]}, "texts.1"),
        ("/voyage/rerank", {**ASKED, "top_k": -1}, "top_k"),
        ("/v1/reranking", {"query": QUERY, "input": ["a", {"image": "x"}]}, "input.1"),
        ("/v1/ranking", {"query": {"text": QUERY}, "passages": [{"image": "x"}]}, "passages.0"),
        ("/v1/ranking", {"query": {"text": QUERY}, "passages": [{"text": "a"}], "truncate": "MAYBE"}, "truncate"),
        ("/score", {"text_1": QUERY}, "text_2"),
        ("/score", {"text_1": [], "text_2": ["a"]}, "text_1"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        ("/inference/m", {"queries": ["a", "b"], "documents": DOCUMENTS}, "queries"),
        ("/inference/m", {"queries": [], "documents": DOCUMENTS}, "queries"),
        ("/predict", {"inputs": "a text alone"}, "inputs"),
        ("/predict", {"inputs": []}, "inputs"),
        ("/predict", {"inputs": ["a", "b", "c"]}, "inputs"),
        ("/predict", {"inputs": [["a", "b"], ["c"]]}, "inputs"),
        ("/predict", {"inputs": [["a", 5]]}, "inputs"),
        ("/api/v1/services/rerank/text-rerank/text-rerank", {"input": {"query": QUERY}}, "input.documents"),
        ("/rerank", {"query": QUERY, "docs": [1]}, "docs.0"),
    ],
)
def test_what_is_wrong_in_a_request_is_named(path, body, field):
    with pytest.raises(JobRejected) as found:
        read(path, body)
    assert found.value.field.startswith(field)


def test_documents_that_are_objects_are_read_by_their_fields():
    documents = [{"text": "a", "title": "t", "vector_score": 0.5}, {"content": "b"}, {"name": "Ann", "age": 5}]
    _, _, call = read("/v1/rerank", {"query": QUERY, "documents": documents})
    assert [chunk.model_text for chunk in call.documents] == ["t a", "b", "name: Ann\nage: 5"]
    assert call.documents[0].vector_score == 0.5


@pytest.mark.parametrize(
    "field",
    [
        {"title": 5},
        {"tags": ["sea", "moon"]},
        {"keywords": "sea, moon"},
        {"questions": "why?"},
        {"tokens": 512},
        {"pagerank": 5_000},
        {"metadata": "none"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_field_that_means_something_else_to_its_caller_is_none_of_the_chunk(field):
    documents = [{"text": "a", "vector_score": 0.5, **field}]
    _, _, call = read("/v1/rerank", {"query": QUERY, "documents": documents})
    assert call.documents == (Chunk(text="a", vector_score=0.5),)


def test_a_document_whose_text_is_no_text_comes_back_with_one():
    dialect, asked, call = read("/v1/rerank", {"query": QUERY, "documents": [{"text": 5}] * 3})
    assert dialect.response_of(asked, reply_to(call))["results"][0]["document"] == {"text": "text: 5"}


def test_documents_come_back_as_they_were_sent():
    documents = [{"text": "a", "source": "x"}, "b", {"name": "Ann"}]
    body = {"query": QUERY, "documents": documents, "return_documents": True}
    dialect, asked, call = read("/v1/rerank", body)
    results = dialect.response_of(asked, reply_to(call))["results"]
    by_index = {one["index"]: one["document"] for one in results}
    assert by_index == {0: {"text": "a", "source": "x"}, 1: {"text": "b"}, 2: {"text": "name: Ann", "name": "Ann"}}
    dialect, asked, call = read("/infinity/rerank", body)
    results = dialect.response_of(asked, reply_to(call))["results"]
    assert {one["index"]: one["document"] for one in results} == {0: "a", 1: "b", 2: "name: Ann"}


def test_pairs_with_several_queries_are_calls_for_each_query():
    pairs = [["p", "a"], ["q", "b"], ["p", "c"]]
    dialect, asked, call = read("/predict", {"inputs": pairs})
    assert isinstance(call, ScoreCall)
    assert [(one.query, [chunk.text for chunk in one.documents]) for one in call.calls] == [
        ("p", ["a", "c"]),
        ("q", ["b"]),
    ]
    replies = [
        RerankReply("1", "m", (RankedDocument(1, 0.9), RankedDocument(0, 0.2)), tokens=5, warnings=("w",)),
        RerankReply("2", "m", (RankedDocument(0, 0.5),), tokens=7, truncated_pairs=1, warnings=("w",)),
    ]
    reply = joined(call, replies)
    assert [(one.index, one.score) for one in reply.documents] == [(2, 0.9), (1, 0.5), (0, 0.2)]
    assert (reply.tokens, reply.truncated_pairs, reply.job_id, reply.warnings) == (12, 1, "1,2", ("w",))
    assert [one[0]["score"] for one in dialect.response_of(asked, reply)] == [0.2, 0.5, 0.9]
    assert all(one[0]["label"] == "LABEL_0" for one in dialect.response_of(asked, reply))


def test_a_pair_alone_is_answered_without_a_list_round_it():
    dialect, asked, call = read("/predict", {"inputs": ["p", "a"], "raw_scores": True})
    assert (call.query, call.documents[0].text, call.raw_scores) == ("p", "a", True)
    assert dialect.response_of(asked, reply_to(call, [0.5])) == [{"score": 0.5, "label": "LABEL_0"}]
    dialect, asked, call = read("/predict", {"inputs": [["p", "a"]]})
    assert dialect.response_of(asked, reply_to(call, [0.5])) == [[{"score": 0.5, "label": "LABEL_0"}]]


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ("p", "a", [("p", "a")]),
        ("p", ["a", "b"], [("p", "a"), ("p", "b")]),
        (["p"], ["a", "b"], [("p", "a"), ("p", "b")]),
        (["p", "q"], ["a", "b"], [("p", "a"), ("q", "b")]),
        ({"content": [{"type": "text", "text": "p"}]}, "a", [("p", "a")]),
    ],
)
def test_scores_are_of_one_text_with_many_or_of_as_many(first, second, pairs):
    for names in [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")]:
        dialect, asked, call = read("/v1/score", dict(zip(names, (first, second), strict=True)))
        assert dialect.name == "vllm-score"
        found = [
            (at, one.query, chunk.text)
            for one, positions in calls_in(call)
            for at, chunk in zip(positions, one.documents, strict=True)
        ]
        assert [(query, text) for _, query, text in sorted(found)] == pairs
        assert asked.activation is True


def calls_in(call):
    return (
        zip(call.calls, call.positions, strict=True)
        if isinstance(call, ScoreCall)
        else [(call, range(len(call.documents)))]
    )


def test_a_score_without_activation_is_a_logit():
    _, _, call = read("/score", {"text_1": QUERY, "text_2": DOCUMENTS, "use_activation": False})
    assert call.raw_scores is True


def test_too_many_queries_of_one_call_are_refused():
    with pytest.raises(JobTooLarge):
        read("/score", {"text_1": [str(at) for at in range(1_001)], "text_2": ["a"] * 1_001})


def test_a_score_that_is_no_number_breaks_no_response():
    dialect, asked, call = read("/v1/rerank", ASKED)
    body = dialect.response_of(asked, reply_to(call, (0.1, math.nan, 0.5)))
    assert len(body["results"]) == 3


def test_no_two_requests_with_all_signs_at_once_crash_the_choice():
    fields = ["texts", "passages", "input", "docs", "queries", "top_k", "raw_scores", "text_1", "kwargs"]
    for one, other in itertools.combinations(fields, 2):
        for path in ("/rerank", "/v1/rerank", "/score", "/v1/reranking"):
            dialect = choose(path, {one: ["a"], other: ["b"], "query": QUERY})
            try:
                parsed(dialect.request, {one: ["a"], other: ["b"], "query": QUERY})
            except JobRejected:
                pass
            except ValidationError:
                pytest.fail("an error without its field")
