"""Calls in a dialect are jobs: ranked by a real worker, told by headers, ended with their callers."""

import json
import math
import threading

import httpx
import pytest
from tides import DOCUMENTS, QUERY

from rerankq import Client


def body(**more):
    return {"query": QUERY, "documents": DOCUMENTS, **more}


def test_a_call_is_ranked_best_first_with_probabilities(http):
    answer = http.post("/v2/rerank", json=body(model="rerank-v3.5"))
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert results[0]["index"] == 1
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert answer.json()["usage"]["total_tokens"] > 0
    assert answer.headers["x-rerankq-status"] == "ranked"
    assert "inference;dur=" in answer.headers["server-timing"]


def test_raw_scores_are_the_logits_of_the_probabilities(http):
    texts = {"query": QUERY, "texts": DOCUMENTS}
    raw = http.post("/rerank", json={**texts, "raw_scores": True}).json()
    for one, other in zip(raw, http.post("/rerank", json=texts).json(), strict=True):
        assert one["index"] == other["index"]
        assert 1 / (1 + math.exp(-one["score"])) == pytest.approx(other["score"], abs=1e-6)


def test_the_second_call_is_answered_from_the_score_cache(http):
    asked = body(documents=[*DOCUMENTS, "a text that only this test sends"])
    first, second = (http.post("/v1/rerank", json=asked) for _ in range(2))
    assert second.headers["x-rerankq-cached-pairs"] == "4"
    assert first.json()["results"] == second.json()["results"]
    assert first.headers["x-rerankq-job"] != second.headers["x-rerankq-job"]


def test_blank_documents_rank_last_and_cost_nothing(http):
    answer = http.post("/v2/rerank", json=body(documents=["", *DOCUMENTS, " \n "])).json()
    assert [result["index"] for result in answer["results"]][-2:] == [0, 4]
    assert answer["results"][0]["index"] == 2
    only = http.post("/v2/rerank", json=body(documents=["", "  "])).json()
    assert [(result["index"], result["relevance_score"]) for result in only["results"]] == [(0, 0.0), (1, 0.0)]


@pytest.mark.parametrize(("top_n", "expected"), [(1, 1), (3, 3), (99, 3), (0, 3), (None, 3)])
def test_top_n_beyond_the_documents_or_zero_is_all_of_them(http, top_n, expected):
    assert len(http.post("/v2/rerank", json=body(top_n=top_n)).json()["results"]) == expected


def test_a_fusion_is_asked_for_by_header_or_behind_the_models_name(http):
    by_header = http.post("/v2/rerank", json=body(), headers={"X-Rerankq-Fusion": "rrf"}).json()["results"]
    by_name = http.post("/v2/rerank", json=body(model="bundled+rrf")).json()["results"]
    assert by_header == by_name
    assert by_header[0]["relevance_score"] < 0.1  # a sum of 1 / (60 + rank)


def test_an_explanation_comes_beside_every_score(http):
    answer = http.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS}, headers={"X-Rerankq-Explain": "true"})
    assert all(set(result["rerankq"]["scores"]) == {"model"} for result in answer.json())


def test_a_cut_document_is_told_by_header(http):
    answer = http.post("/v2/rerank", json=body(documents=[*DOCUMENTS, "tides " * 2_000]))
    assert answer.headers["x-rerankq-truncated"] == "1"
    assert "truncated" in answer.json()["meta"]["warnings"][0]


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'{"query": "q"}', "documents"),
        (b'{"documents": ["a"]}', "query"),
        (b'{"query": "  ", "documents": ["a"]}', "query"),
        (b'{"query": "q", "documents": []}', "documents"),
        (b'{"query": "q", "documents": ["a", 5]}', "documents.1"),
        (b'{"query": "q", "documents": ["a", {}]}', "documents.1"),
        (b'{"query": "q", "documents": [{"text": "a", "vector_score": "much"}]}', "documents.0.vector_score"),
        (b'{"query": "q", "documents": ["a"], "top_n": -1}', "top_n"),
        (b'{"query": "q", "documents": ["a"], "top_n": true}', "top_n"),
    ],
)
def test_malformed_bodies_are_refused_by_field(http, sent, field):
    answer = http.post("/v2/rerank", content=sent, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    told = answer.json()
    assert told["field"] == field
    assert told["message"] == told["detail"] == told["error"]
    assert told["error_type"] == "validation"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Timeout", "-1"),
        ("Timeout", "soon"),
        ("Priority", "high"),
        ("Cache", "no"),
        ("On-Timeout", "x"),
        ("Fusion", "{"),
    ],
)
def test_malformed_headers_are_refused_by_name(http, header, value):
    answer = http.post("/v2/rerank", json=body(), headers={f"X-Rerankq-{header}": value})
    assert answer.status_code == 422
    assert answer.json()["field"] == f"X-Rerankq-{header}"


def test_an_open_model_that_is_not_served_is_unknown(http):
    answer = http.post("/v2/rerank", json=body(model="BAAI/bge-reranker-v2-m3"))
    assert answer.status_code == 404
    assert "bge-reranker-v2-m3" in answer.json()["message"]


def test_without_a_worker_a_call_is_told_to_come_back(start_gateway):
    answer = httpx.post(f"{start_gateway().url}/v2/rerank", json=body())
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1


@pytest.fixture
def slow(start_gateway, start_worker):
    """A gateway whose worker takes seconds for a call."""
    gateway = start_gateway(model="stub:0.1")
    start_worker(gateway.settings)
    return gateway


def test_after_its_time_a_call_is_given_up_and_its_job_cancelled(slow, wait_until):
    answer = httpx.post(f"{slow.url}/v2/rerank", json=body(), headers={"X-Rerankq-Timeout": "0.5"}, timeout=30)
    assert answer.status_code == 504
    assert int(answer.headers["retry-after"]) >= 1
    job_id = answer.json()["job_id"]
    with Client(slow.settings) as client:
        wait_until(lambda: client.status(job_id).state == "cancelled")


def test_after_its_time_a_call_gets_its_first_stage_if_it_asked_for_that(slow):
    documents = [{"text": "a", "vector_score": 0.1}, {"text": "b", "vector_score": 0.8}]
    headers = {"X-Rerankq-Timeout": "0.5", "X-Rerankq-On-Timeout": "first-stage"}
    answer = httpx.post(f"{slow.url}/v2/rerank", json=body(documents=documents), headers=headers, timeout=30)
    assert answer.status_code == 200
    assert answer.headers["x-rerankq-status"] == "degraded"
    assert [(one["index"], one["relevance_score"]) for one in answer.json()["results"]] == [(1, 0.8), (0, 0.1)]


def test_a_caller_that_hangs_up_cancels_its_job(slow, wait_until):
    with Client(slow.settings) as client:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{slow.url}/v2/rerank", json=body(), timeout=httpx.Timeout(30, read=1))
        # It was under way, and is not any more: nothing else was submitted.
        wait_until(lambda: states_of(slow.settings.ledger) == ["cancelled"])
        assert client.dead() == []


def states_of(ledger_url: str) -> list[str]:
    import redis  # noqa: PLC0415

    with redis.Redis.from_url(ledger_url, decode_responses=True) as ledger:
        return [ledger.hget(key, "state") for key in ledger.scan_iter("rerankq:job:*")]


def test_many_callers_wait_at_once(slow):
    answers = []

    def ask():
        answers.append(httpx.post(f"{slow.url}/rerank", json={"query": QUERY, "texts": ["same"]}, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 20
    assert len({json.dumps(answer.json()) for answer in answers}) == 1


def test_who_waits_while_the_gateway_stops_is_told_to_ask_again_and_its_job_is_cancelled(slow, monkeypatch, wait_until):
    monkeypatch.setattr("rerankq.gateway.server.ANSWER_WITHIN_S", 0.1)
    answers = []
    caller = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{slow.url}/v2/rerank", json=body(documents=["x"] * 99), timeout=60))
    )
    caller.start()
    wait_until(lambda: states_of(slow.settings.ledger) == ["running"])
    slow.server.should_exit = True
    caller.join(30)
    assert answers[0].status_code == 503
    assert int(answers[0].headers["retry-after"]) >= 1
    assert answers[0].json()["code"] == "GatewayStopping"
    wait_until(lambda: states_of(slow.settings.ledger) == ["cancelled"])


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_with_words_and_not_by_a_reset(http, chunked):
    part = b"x" * (1 << 20)
    content = (part for _ in range(60)) if chunked else part * 60
    answer = http.post("/v2/rerank", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["message"] == "the body is too large"
