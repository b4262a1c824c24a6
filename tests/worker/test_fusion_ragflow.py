"""RAGFlow's numbers, case by case, and a slow twin for what the cases do not reach."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq_worker.fusion import ragflow

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures" / "ragflow_fusion.json"
WEIGHTS = ("tkweight", "vtweight")
REAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def numbers(values):
    return [REAL.get(value, value) if isinstance(value, str) else value for value in values]


def token_similarity(inputs):
    chunks = [chunk["doc_tokens"] for chunk in inputs["chunks"]]
    return {"token_similarity": ragflow.token_similarity(inputs["query_tokens"], chunks)}


def hybrid_similarity(inputs):
    fused, token, vector = ragflow.hybrid_similarity(
        inputs["query_vector"],
        [chunk["vector"] for chunk in inputs["chunks"]],
        inputs["query_tokens"],
        [chunk["doc_tokens"] for chunk in inputs["chunks"]],
        *(inputs[name] for name in WEIGHTS),
    )
    return {"fused": fused, "token_similarity": token, "vector_similarity": vector}


def rank_features(inputs):
    return {"rank_feature": ragflow.rank_feature_scores(inputs["rank_feature"], inputs["chunks"])}


def normalise(inputs):
    return {"normalised": ragflow.normalise_model_scores(numbers(inputs["raw"]))}


def rerank(inputs):
    names = ("fused", "token_similarity", "vector_similarity", "rank_feature")
    weights = (inputs[name] for name in WEIGHTS)
    answers = ragflow.rerank(
        inputs["query_tokens"], inputs["chunks"], inputs["query_vector"], *weights, inputs["rank_feature"]
    )
    return dict(zip(names, answers, strict=True))


def rerank_by_model(inputs):
    names = ("fused", "token_similarity", "model_score_normalised", "rank_feature")
    weights = (inputs[name] for name in WEIGHTS)
    scores = numbers(chunk["model_score_raw"] for chunk in inputs["chunks"])
    answers = ragflow.rerank_by_model(
        inputs["query_tokens"], inputs["chunks"], scores, *weights, inputs["rank_feature"]
    )
    return dict(zip(names, answers, strict=True))


OURS = {
    "token_similarity": token_similarity,
    "hybrid_similarity": hybrid_similarity,
    "_rank_feature_scores": rank_features,
    "_normalize_rank": normalise,
    "rerank": rerank,
    "rerank_by_model": rerank_by_model,
}


def cases():
    if not FIXTURES.exists():
        return [
            pytest.param(None, marks=pytest.mark.skip("the recorded cases of RAGFlow are not beside this checkout"))
        ]
    recorded = json.loads(FIXTURES.read_text(encoding="utf-8"))["cases"]
    of_ours = [case for case in recorded if case["function"].rpartition(".")[2] in OURS]
    return [pytest.param(case, id=case["id"]) for case in of_ours]


@pytest.mark.parametrize("case", cases())
def test_every_recorded_case_gives_ragflows_numbers(case):
    ours = OURS[case["function"].rpartition(".")[2]](case["inputs"])
    for name, expected in case["outputs"].items():
        if name == "order":
            assert np.argsort(-ours["fused"], kind="stable").tolist() == expected
        else:
            np.testing.assert_allclose(ours[name], numbers(expected), rtol=1e-9, atol=0, equal_nan=True, err_msg=name)


def test_every_one_of_the_six_functions_is_recorded():
    if not FIXTURES.exists():
        pytest.skip("the recorded cases of RAGFlow are not beside this checkout")
    recorded = {case["function"].rpartition(".")[2] for case in json.loads(FIXTURES.read_text("utf-8"))["cases"]}
    assert set(OURS) <= recorded


def slow_token_similarity(query, chunk):
    wanted, total = [], 1e-9
    for position, (token, weight) in enumerate(query):
        wanted.append((token, 0.4 * weight))
        if position < len(query) - 1:
            wanted.append((token + query[position + 1][0], 0.6 * max(weight, query[position + 1][1])))
    held = list(chunk) + [chunk[i] + chunk[i + 1] for i in range(len(chunk) - 1)]
    score = 1e-9
    for key, weight in wanted:
        total += weight
        if key in held:
            score += weight
    return score / total


words = st.sampled_from(["a", "b", "ab", "ba", "aa", "批", "大小"])
queries = st.lists(st.tuples(words, st.floats(0, 10)), max_size=8)
chunk_lists = st.lists(st.lists(words, max_size=8), max_size=5)


@given(queries, chunk_lists)
def test_token_similarity_equals_its_slow_twin(query, chunks):
    expected = [slow_token_similarity(query, chunk) for chunk in chunks]
    np.testing.assert_allclose(ragflow.token_similarity(query, chunks), expected, rtol=1e-9)


@given(st.lists(st.floats(-50, 50), max_size=6))
def test_normalised_model_scores_lie_between_zero_and_one_and_keep_their_order(raw):
    normalised = ragflow.normalise_model_scores(raw)
    assert ((normalised >= 0) & (normalised <= 1)).all()
    assert (np.diff(normalised[np.argsort(raw, kind="stable")]) >= 0).all()


tag_weights = st.floats(-100, 100).filter(lambda weight: weight == 0 or abs(weight) > 1e-3)
tag_maps = st.dictionaries(st.sampled_from(["x", "y", "z", "pagerank_fea"]), tag_weights, max_size=4)


@given(tag_maps, st.lists(tag_maps, max_size=4))
def test_tags_written_as_json_as_a_literal_or_as_a_mapping_are_the_same(query, chunks):
    plain, as_json, literal = (
        ragflow.rank_feature_scores(query, [{"tag_feas": write(tags)} for tags in chunks])
        for write in (dict, json.dumps, repr)
    )
    np.testing.assert_array_equal(plain, as_json)
    np.testing.assert_array_equal(plain, literal)
    if "pagerank_fea" not in query:
        assert (abs(plain) <= 10 + 1e-9).all()


@pytest.mark.parametrize("junk", ["", "  ", "null", "[1]", "{", "{1: 2}", "os.exit()", "[" * 100_000, [1], 3, True])
def test_unreadable_tags_count_as_no_tags(junk):
    assert ragflow.rank_feature_scores({"tide": 1}, [{"tag_feas": junk, "pagerank_fea": 4}]).tolist() == [4.0]


def test_tags_without_finite_numbers_are_dropped():
    tags = {"tide": 1, "on": True, "word": "3", "nan": math.nan, "huge": 10**400, 7: 1, "  ": 2, "none": None}
    query = dict.fromkeys(["tide", "on", "word", "nan", "huge"], 1.0)
    expected = ragflow.rank_feature_scores(query, [{"tag_feas": {"tide": 1}}])
    np.testing.assert_array_equal(ragflow.rank_feature_scores(query, [{"tag_feas": tags}]), expected)


def test_a_tag_called_pagerank_can_exceed_ten():
    scores = ragflow.rank_feature_scores({"tide": 1, "pagerank_fea": 10}, [{"tag_feas": {"pagerank_fea": 1}}])
    assert scores.tolist() == [100.0]


@pytest.mark.parametrize(("written", "expected"), [("10", 10.0), (" 2.5 ", 2.5), (-3, -3.0), ("1e1", 10.0)])
def test_a_pagerank_may_be_a_numeric_string(written, expected):
    assert ragflow.rank_feature_scores(None, [{"pagerank_fea": written}]).tolist() == [expected]


def test_a_pagerank_of_none_is_not_a_number_and_a_word_is_an_error():
    assert math.isnan(ragflow.rank_feature_scores({}, [{"pagerank_fea": None}])[0])
    with pytest.raises(ValueError, match="abc"):
        ragflow.rank_feature_scores({}, [{"pagerank_fea": "abc"}])


def test_vectors_may_be_absent_or_written_between_tabs():
    chunks = [{"content_tokens": [], "vector": v} for v in ([3.0, 4.0], "3\t4", None)] + [{"content_tokens": []}]
    _, _, vector, _ = ragflow.rerank([("tide", 1.0)], chunks, [3.0, 4.0], 0.3, 0.7)
    np.testing.assert_allclose(vector, [1, 1, 0, 0])


@pytest.mark.parametrize("vector", [[1.0], [1.0, math.nan], [math.inf, 0.0], "1\tx", ""])
def test_a_vector_that_does_not_fit_is_an_error(vector):
    with pytest.raises(ValueError, match=r"finite parts|inhomogeneous"):
        ragflow.hybrid_similarity([1.0, 0.0], [vector], [], [[]], 0.3, 0.7)


def test_a_keyword_with_blanks_stays_one_token_and_a_bare_string_is_one_keyword():
    query = [("batch size", 1.0)]
    for keywords in ("batch size", ["batch size"]):
        chunk = {"content_tokens": "some words", "important_kwd": keywords}
        assert ragflow.rerank_by_model(query, [chunk], [0.5], 1, 0)[1].round(6).tolist() == [1.0]


def bigram_is_found(score, **fields):
    """Tell whether the chunk covers the bigram "batchsize", and not only its two halves."""
    chunk = {"content_tokens": []} | fields
    token = score([("batch", 1.0), ("size", 1.0)], chunk)
    return bool(token > 0.9)


def without_model(query, chunk):
    return ragflow.rerank(query, [chunk], [1.0], 1, 0)[1][0]


def with_model(query, chunk):
    return ragflow.rerank_by_model(query, [chunk], [0.5], 1, 0)[1][0]


def test_repeated_content_counts_once_without_a_model_and_as_often_as_it_stands_with_one():
    content = ["size", "batch", "size"]
    assert not bigram_is_found(without_model, content_tokens=content)
    assert bigram_is_found(with_model, content_tokens=content)


@pytest.mark.parametrize("name", ["title_tokens", "important_kwd", "question_tokens"])
def test_repeated_fields_add_their_wrap_around_bigram_only_without_a_model(name):
    assert bigram_is_found(without_model, **{name: ["size", "batch"]})
    assert not bigram_is_found(with_model, **{name: ["size", "batch"]})


def test_questions_count_only_without_a_model():
    query = [("tide", 1.0)]
    chunk = {"content_tokens": [], "question_tokens": "tide"}
    assert without_model(query, chunk) == pytest.approx(1)
    assert with_model(query, chunk) < 1e-6


def test_a_chunk_without_content_is_an_error():
    with pytest.raises(KeyError):
        ragflow.rerank_by_model([("tide", 1.0)], [{}], [0.5], 0.3, 0.7)


def test_no_chunks_give_empty_arrays():
    assert [len(part) for part in ragflow.rerank([("tide", 1.0)], [], [1.0], 0.3, 0.7, {"a": 1})] == [0] * 4
    assert [len(part) for part in ragflow.rerank_by_model([("tide", 1.0)], [], [], 0.3, 0.7, {"a": 1})] == [0] * 4


def test_arrays_are_taken_as_lists_are():
    query, vectors, tokens = [0.6, 0.8], [[1.0, 0.0], [0.6, 0.8]], [["moon"], ["tide", "moon"]]
    as_lists = ragflow.hybrid_similarity(query, vectors, [("moon", 1.0)], tokens, 0.3, 0.7)
    as_arrays = ragflow.hybrid_similarity(np.array(query), np.array(vectors), [("moon", 1.0)], tokens, 0.3, 0.7)
    for one, other in zip(as_lists, as_arrays, strict=True):
        np.testing.assert_array_equal(one, other)
