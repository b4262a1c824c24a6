"""The token signal: coverage of the query, with fields that weigh."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq_worker import fusion
from rerankq_worker.fusion import ragflow
from rerankq_worker.fusion.analyser import Analyser, analyse

FIELDS = ("content", "title", "keywords", "questions")
BOOSTS = {"title": 2.0, "keywords": 5.0, "questions": 6.0, "content": 1.0}


@dataclass(frozen=True)
class Spec:
    boosts: dict = field(default_factory=dict)
    token_rule: str = "coverage"
    method: str = "weighted"
    weights: dict = field(default_factory=dict)
    normalise: dict = field(default_factory=dict)
    rrf_k: int = 60


@dataclass(frozen=True)
class Chunk:
    text: str = ""
    title: str = ""
    keywords: list = field(default_factory=list)
    questions: list = field(default_factory=list)
    tokens: list | None = None


def slow_token_similarity(query, chunks, boosts):
    total = sum(weight for _, weight in query)
    if total == 0:
        return [math.nan] * len(chunks)
    if not boosts:
        held = [{t for name in FIELDS[:3] for t in chunk.get(name, ())} for chunk in chunks]
        return [sum(weight for token, weight in query if token in tokens) / total for tokens in held]
    boosts = {"content": 1.0} | boosts
    occurring = [name for name in boosts if any(chunk.get(name) for chunk in chunks)]
    most = sum(boosts[name] for name in occurring)
    scores = []
    for chunk in chunks:
        score = 0.0
        for token, weight in query:
            strength = sum(boosts[name] for name in occurring if token in chunk.get(name, ()))
            if strength:
                score += weight * (strength / (1 + strength)) / (most / (1 + most))
        scores.append(score / total)
    return scores


tokens = st.sampled_from(["a", "b", "c", "批", "大小"])
queries = st.lists(st.tuples(tokens, st.floats(0, 10).map(lambda w: round(w, 3))), max_size=6)
chunk_lists = st.lists(st.dictionaries(st.sampled_from(FIELDS), st.lists(tokens, max_size=4)), max_size=5)
boost_maps = st.dictionaries(st.sampled_from(FIELDS), st.sampled_from([0.0, 0.5, 1.0, 2.0, 6.0]))


@given(queries, chunk_lists, boost_maps)
def test_token_similarity_equals_its_slow_twin(query, chunks, boosts):
    expected = slow_token_similarity(query, chunks, boosts)
    np.testing.assert_allclose(fusion.token_similarity(query, chunks, boosts), expected, rtol=1e-9, atol=1e-12)


@given(queries, chunk_lists, boost_maps)
def test_coverage_lies_between_zero_and_one(query, chunks, boosts):
    scores = fusion.token_similarity(query, chunks, boosts)
    assert (np.isnan(scores) | ((scores >= 0) & (scores <= 1))).all()


@given(
    queries.filter(lambda query: any(w for _, w in query)), chunk_lists.filter(bool), st.sampled_from(FIELDS), tokens
)
def test_one_more_token_in_a_field_never_lowers_its_chunk(query, chunks, name, token):
    # A neighbour that has all fields keeps the yardstick the same.
    full = {field: ["elsewhere"] for field in FIELDS}
    richer = chunks[0] | {name: [*chunks[0].get(name, []), token]}
    before = fusion.token_similarity(query, [*chunks, full], BOOSTS)
    after = fusion.token_similarity(query, [richer, *chunks[1:], full], BOOSTS)
    assert after[0] >= before[0] - 1e-12
    np.testing.assert_allclose(after[1:], before[1:])


@given(
    queries.filter(lambda query: any(w for _, w in query)), chunk_lists.filter(bool), st.sampled_from(FIELDS), tokens
)
def test_one_more_matching_field_never_lowers_its_chunk_among_the_others(query, chunks, name, token):
    richer = chunks[0] | {name: [*chunks[0].get(name, []), token]}
    before = fusion.token_similarity(query, chunks, BOOSTS)
    after = fusion.token_similarity(query, [richer, *chunks[1:]], BOOSTS)
    overtaken = (before[0] >= before + 1e-9) & (after[0] < after - 1e-9)
    assert not overtaken.any()


def test_coverage_of_contents_alone_is_the_covered_share_of_the_query():
    query = [("tide", 3.0), ("moon", 1.0)]
    for boosts in ({}, BOOSTS, {"title": 9.0}):
        scores = fusion.token_similarity(query, [{"content": ["tide"]}, {"content": ["moon", "tide"]}, {}], boosts)
        np.testing.assert_allclose(scores, [0.75, 1.0, 0.0])


# Summed one after the other these give more than numpy's own sum of them.
@pytest.mark.parametrize("weights", [[0.1] * 16, [2.4, 2.0, 2.4, 2.9, 1.8, 1.8, 2.9, 1.1, 2.0]])
def test_full_coverage_is_exactly_one_however_weights_round(weights):
    query = [(f"token {at}", weight) for at, weight in enumerate(weights)]
    (score,) = fusion.token_similarity(query, [{"content": [token for token, _ in query]}])
    assert score == 1.0


def test_boosts_decide_the_order():
    query = [("tide", 1.0)]
    chunks = [{name: ["tide"]} for name in FIELDS]
    assert fusion.rank(fusion.token_similarity(query, chunks, BOOSTS)).tolist() == [3, 2, 1, 0]
    upside_down = {"content": 9.0, "title": 5.0, "keywords": 2.0, "questions": 1.0}
    assert fusion.rank(fusion.token_similarity(query, chunks, upside_down)).tolist() == [0, 1, 2, 3]


def test_without_boosts_questions_do_not_count_and_other_fields_count_once():
    chunks = [{"content": ["tide"], "title": ["tide"]}, {"keywords": ["tide"]}, {"questions": ["tide"]}]
    assert fusion.token_similarity([("tide", 2.0)], chunks).tolist() == [1.0, 1.0, 0.0]


def test_a_query_without_token_weight_is_a_missing_signal():
    assert np.isnan(fusion.token_similarity([], [{"content": ["tide"]}])).all()
    assert np.isnan(fusion.token_similarity([("tide", 0.0)], [{"content": ["tide"]}])).all()


@pytest.mark.parametrize(
    ("query", "boosts"),
    [
        ([("tide", -1.0)], {}),
        ([("tide", math.nan)], {}),
        ([("tide", 1.0)], {"titel": 1.0}),
        ([("tide", 1.0)], {"title": -1.0}),
        ([("tide", 1.0)], {"title": math.inf}),
    ],
)
def test_invalid_weights_and_boosts_are_refused(query, boosts):
    with pytest.raises(ValueError, match=r"finite|infinity"):
        fusion.token_similarity(query, [{"content": ["tide"]}], boosts)


@pytest.mark.parametrize("boost", [5e-324, 1e-300, 1e300])
def test_extreme_boosts_stay_within_range(boost):
    chunks = [{"content": ["tide"], "title": ["tide"]}, {"title": ["tide"]}]
    scores = fusion.token_similarity([("tide", 1.0)], chunks, {"content": boost, "title": boost})
    assert ((scores > 0) & (scores <= 1)).all()


@given(st.lists(tokens, max_size=6), st.lists(st.lists(tokens, max_size=4), max_size=6))
def test_idf_weights_equal_their_textbook_form(query, chunks):
    weighed = fusion.idf_weights(query, chunks)
    assert [token for token, _ in weighed] == list(dict.fromkeys(query))
    for token, weight in weighed:
        held = sum(token in chunk for chunk in chunks)
        assert weight > 0
        assert weight == pytest.approx(math.log(1 + (len(chunks) - held + 0.5) / (held + 0.5)))


CHUNKS = [
    Chunk("The moon pulls the sea.", "Tides", ["moon", "high tide"], ["Why are there tides?"]),
    Chunk("Bread rises because of yeast.", "Baking", ["yeast"]),
    Chunk("潮汐由月球引起。", "潮汐"),
    Chunk(),
]


@pytest.mark.parametrize("boosts", [{}, BOOSTS])
@pytest.mark.parametrize("query", ["What causes the tides of the sea?", "潮汐 and the moon", "nothing of it"])
def test_the_signal_equals_coverage_over_analysed_fields(query, boosts):
    fields = [
        {
            "content": analyse(chunk.text),
            "title": analyse(chunk.title),
            "keywords": [token for keyword in chunk.keywords for token in analyse(keyword)],
            "questions": [token for question in chunk.questions for token in analyse(question)],
        }
        for chunk in CHUNKS
    ]
    used = FIELDS if boosts else FIELDS[:3]
    weighed = fusion.idf_weights(analyse(query), [[t for name in used for t in chunk[name]] for chunk in fields])
    signal = fusion.token_signal(query, None, CHUNKS, Spec(boosts), Analyser())
    np.testing.assert_allclose(signal, fusion.token_similarity(weighed, fields, boosts))


def test_the_callers_own_tokens_are_used_as_given():
    chunks = [Chunk("tide", tokens=["Ebb & Flow"]), Chunk("Ebb & Flow")]
    assert fusion.token_signal("?", [("Ebb & Flow", 1.0)], chunks, Spec(), Analyser()).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("query", ["", "  ", "?!", "what is it", "\ud800"])
def test_a_query_of_no_tokens_has_no_signal_but_covers_all_by_ragflows_rule(query):
    assert np.isnan(fusion.token_signal(query, None, CHUNKS, Spec(), Analyser())).all()
    assert fusion.token_signal(query, None, CHUNKS, Spec(token_rule="ragflow"), Analyser()).tolist() == [1.0] * 4


@given(queries, st.lists(st.lists(tokens, max_size=6), max_size=4))
def test_ragflows_rule_over_hashes_equals_ragflows_rule_over_tokens(query, lists):
    signal = fusion.token_signal(
        "", query, [Chunk(tokens=held) for held in lists], Spec(token_rule="ragflow"), Analyser()
    )
    np.testing.assert_allclose(signal, ragflow.token_similarity(query, lists), rtol=1e-9)


def test_ragflows_rule_reads_content_title_and_keywords_in_that_order():
    chunk = Chunk("deep sea", "moon", ["high tide"], ["never read"])
    expected = ragflow.token_similarity([("sea", 1.0), ("moon", 1.0)], [["deep", "sea", "moon", "high", "tide"]])
    for tokens_given in (None, ["deep", "sea"]):
        chunks = [Chunk(chunk.text, chunk.title, chunk.keywords, chunk.questions, tokens_given)]
        query = [("sea", 1.0), ("moon", 1.0)]
        np.testing.assert_allclose(
            fusion.token_signal("", query, chunks, Spec(token_rule="ragflow"), Analyser()), expected
        )


_IN_ANOTHER_PROCESS = """
import json, sys
from types import SimpleNamespace as Bare
from rerankq_worker.fusion import token_signal
from rerankq_worker.fusion.analyser import Analyser
query, texts, rules = json.load(sys.stdin)
chunks = [Bare(text=text, title="", keywords=[], questions=[], tokens=None) for text in texts]
specs = [Bare(token_rule=rule, boosts={"title": 2.0}) for rule in rules]
print(json.dumps([token_signal("", query, chunks, spec, Analyser()).tolist() for spec in specs]))
"""


def test_equal_coverage_gives_equal_signals_in_every_process():
    found = "tide moon gravity ocean wave"
    texts = [f"{found} " + " ".join(f"word{at}" for at in range(size)) for size in (0, 1, 3, 10, 40, 150)]
    query = [("tide", 0.1), ("moon", 0.2), ("graviti", 0.3), ("ocean", 0.7), ("wave", 0.15), ("absent", 0.15)]
    signals = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", _IN_ANOTHER_PROCESS],
                input=json.dumps([query, texts, ["ragflow", "coverage"]]),
                env={**os.environ, "PYTHONHASHSEED": str(seed)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for seed in range(4)
    ]
    assert signals[1:] == signals[:1] * 3
    assert [len(set(signal)) for signal in signals[0]] == [1, 1]


@pytest.mark.parametrize("rule", ["ragflow", "coverage"])
@pytest.mark.parametrize("weight", [1e-300, 1e308, 1.7e308])
def test_token_weights_of_any_size_count_by_their_proportions(rule, weight):
    chunks = [Chunk("tide"), Chunk("moon"), Chunk("tide moon")]
    query = [("tide", weight), ("moon", weight)]
    signal = fusion.token_signal("", query, chunks, Spec(token_rule=rule), Analyser())
    plain = fusion.token_signal("", [("tide", 1.0), ("moon", 1.0)], chunks, Spec(token_rule=rule), Analyser())
    if weight > 1:
        np.testing.assert_allclose(signal, plain, atol=1e-8)
    else:
        assert np.isfinite(signal).all()


@pytest.mark.parametrize("boosts", [{"title": 1e308, "keywords": 1e308}, {"title": 1.7e308, "content": 1.7e308}])
def test_boosts_of_any_size_keep_the_signal_within_its_range(boosts):
    scores = fusion.token_similarity([("tide", 1.0)], [{"title": ["tide"]}, {"content": ["moon"]}], boosts)
    assert scores.tolist() == [pytest.approx(1.0), 0.0]


def test_an_unknown_token_rule_is_refused():
    with pytest.raises(ValueError, match="bm25"):
        fusion.token_signal("tide", None, CHUNKS, Spec(token_rule="bm25"), Analyser())


@pytest.mark.parametrize("rule", ["coverage", "ragflow"])
def test_no_chunks_give_no_signal(rule):
    assert fusion.token_signal("tide", None, [], Spec(token_rule=rule), Analyser()).shape == (0,)


def test_a_long_query_against_many_chunks_needs_no_table_of_both():
    words = [f"word{number}" for number in range(20_000)]
    chunks = [Chunk(tokens=[words[position], words[position + 1]]) for position in range(10_000)]
    signal = fusion.token_signal("", [(word, 1.0) for word in words], chunks, Spec(), Analyser())
    np.testing.assert_allclose(signal, 2 / 20_000)
