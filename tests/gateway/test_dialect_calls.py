"""The requests of real clients over HTTP, each answered by a real worker; what is listed of the models."""

import math
from typing import Any

import pytest
from recorded_requests import ASKED, RECORDED, TEXTS, results_in
from tides import DOCUMENTS, QUERY

from rerankq.contract import ENDED


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.client} {row.path}") for row in RECORDED])
def test_a_recorded_request_is_ranked_by_its_clients_rules(http, row):
    # As it is sent: joined to a base URL, httpx would tidy up the path.
    answer = http.post(str(http.base_url).rstrip("/") + row.path, json=row.body)
    assert answer.status_code == 200, answer.text
    results = results_in(answer.json(), row.read)
    assert sorted(index for index, _, _ in results) == [0, 1, 2]
    assert max(results, key=lambda one: one[1])[0] == 1
    assert all(math.isfinite(score) for _, score, _ in results)
    if row.dialect != "nvidia":
        assert all(0 <= score <= 1 for _, score, _ in results)
    assert next(document for index, _, document in results if index == 1) == row.document
    if row.read[1] and row.dialect != "vllm-score":
        assert results == sorted(results, key=lambda one: -one[1])
    if isinstance(answer.json(), dict) and "usage" in answer.json() and row.dialect != "pinecone":
        assert answer.json()["usage"]["total_tokens"] > 0


def test_one_model_answers_alike_in_every_dialect(http):
    scores = {
        tuple(sorted((index, round(score, 6)) for index, score, _ in results_in(answer, row.read)))
        for row in RECORDED
        if row.dialect != "nvidia" and "rank_fields" not in row.body and "//" not in row.path
        for answer in [http.post(row.path, json=row.body).json()]
    }
    assert len(scores) == 1


def test_predictions_of_pairs_are_the_scores_of_their_ranking(http):
    ranked = {one["index"]: one["score"] for one in http.post("/rerank", json=TEXTS).json()}
    pairs = [[QUERY, text] for text in DOCUMENTS]
    batch = http.post("/predict", json={"inputs": pairs}).json()
    assert [one[0]["score"] for one in batch] == pytest.approx([ranked[0], ranked[1], ranked[2]])
    alone = http.post("/tei/predict", json={"inputs": pairs[1]}).json()
    assert alone[0]["score"] == pytest.approx(ranked[1])


def test_pairs_with_several_queries_are_scored_each_with_its_own(http):
    queries = [QUERY, "how is bread made?", QUERY]
    answer = http.post("/v1/score", json={"text_1": queries, "text_2": DOCUMENTS})
    assert len(answer.headers["x-rerankq-job"].split(",")) == 2
    scores = [one["score"] for one in answer.json()["data"]]
    for query, text, score in zip(queries, DOCUMENTS, scores, strict=True):
        alone = http.post("/score", json={"text_1": query, "text_2": text}).json()["data"]
        assert [one["score"] for one in alone] == pytest.approx([score])


def test_a_wrong_query_among_several_fails_the_call(http):
    answer = http.post("/score", json={"text_1": ["a", " ", "b"], "text_2": DOCUMENTS})
    assert answer.status_code == 422
    assert "query" in answer.json()["message"]


def test_a_limit_in_tokens_cuts_and_is_told(http):
    long = {"query": QUERY, "documents": [*DOCUMENTS, "the moon and the sea " * 60]}
    whole = http.post("/v2/rerank", json=long)
    cut = http.post("/v2/rerank", json={**long, "max_tokens_per_doc": 20})
    assert whole.headers["x-rerankq-truncated"] == "0"
    assert cut.headers["x-rerankq-truncated"] == "1"
    assert "truncated" in cut.headers["x-rerankq-warning"]
    # More than the model reads is no more than it reads.
    beyond = http.post("/v2/rerank", json={**long, "max_tokens_per_doc": 1_000_000})
    assert beyond.json()["results"] == whole.json()["results"]


def test_an_instruction_is_ignored_with_a_warning(http):
    answer = http.post("/v1/rerank", json={**ASKED, "instruction": "prefer recent ones"})
    assert answer.json()["meta"]["warnings"] == ["the model takes no instruction: it was ignored"]
    assert "instruction" in answer.headers["x-rerankq-warning"]


@pytest.mark.parametrize(
    "name",
    [
        None,
        "rerank-v3.5",
        "bundled",
        "bundled___Xinference",
        "reranker",
        "Pro/bundled",
        "bundled-reranker",
        "nv-rerank-qa-mistral-4b:1",
        "default",
    ],
)
def test_a_name_that_clients_send_means_the_served_model(http, name):
    assert http.post("/v1/rerank", json={**ASKED, "model": name}).json()["model"] == "bundled"


@pytest.mark.parametrize(
    "name", ["jinaai/jina-reranker-v2-base-multilingual", "gte-reranker-modernbert-base", "Qwen/Qwen3-Reranker-0.6B"]
)
def test_an_open_model_that_is_not_served_is_unknown(http, name):
    answer = http.post("/v1/rerank", json={**ASKED, "model": name})
    assert answer.status_code == 404
    assert answer.json()["message"] == answer.json()["detail"]


def test_models_are_listed_with_a_name_that_says_rerank(http):
    def listed_at(path: str) -> dict[str, Any]:
        answer = http.get(path).json()
        for model in answer["data"]:
            model["stats"].pop("pairs_per_s")  # measured: differs from one moment to the next
        return answer

    listed = listed_at("/v1/models")
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["bundled", "bundled-reranker"]
    for model in listed["data"]:
        assert model["object"] == "model"
        assert model["model_type"] == "rerank"
        assert model["max_model_len"] == model["context_length"] == 512
    for path in ("/models", "/vllm/v1/models", "/rerank/v1/models", "/jina/models", "/v1/rerank/v1/models"):
        assert listed_at(path) == listed
    assert {model["owned_by"] for model in listed_at("/infinity/models")["data"]} == {"infinity"}


def test_a_model_is_described_by_its_name(http):
    assert http.get("/v1/models/bundled-reranker").json()["model_type"] == "rerank"
    assert http.get("/vllm/v1/models/bundled").json()["root"] == "bundled"
    assert http.get("/v1/models/no/such").status_code == 404


def test_info_says_that_the_model_reranks(http):
    for path in ("/info", "/tei/info", "/rerank/info", "/v1/info"):
        told = http.get(path).json()
        assert told["model_id"] == "bundled"
        assert "rerank" in told["model_type"]
        assert told["max_input_length"] == 512


def test_models_are_listed_as_localai_does(http):
    names = [model["name"] for model in http.get("/api/tags").json()["models"]]
    assert names == ["bundled:latest", "bundled-reranker:latest"]
    for name in names:
        shown = http.post("/v1/api/show", json={"model": name}).json()
        assert shown["capabilities"] == ["rerank"]
        assert shown["model_info"]["general.context_length"] == 512
    assert http.post("/api/show", json={"model": "no-such"}).status_code == 404
    assert http.post("/api/show", json={}).status_code == 422


def test_the_openapi_document_has_every_path_and_every_schema(http):
    document = http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert set(references(document)) <= {f"#/components/schemas/{name}" for name in schemas}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/predict", "/v1/ranking", "/v1/inference/{model}"):
        operation = document["paths"][path]["post"]
        assert "schema" in operation["requestBody"]["content"]["application/json"]
        assert {"200", "401", "404", "413", "422", "429", "503", "504"} <= set(operation["responses"])


def references(part):
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        part = list(part.values())
    if isinstance(part, list):
        for one in part:
            yield from references(one)


def test_the_jobs_of_a_call_are_named_and_done(http):
    answer = http.post("/score", json={"text_1": ["p", "q"], "text_2": ["a", "b"]})
    for job_id in answer.headers["x-rerankq-job"].split(","):
        assert http.get(f"/v1/jobs/{job_id}").json()["state"] in ENDED
