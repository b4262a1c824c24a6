import itertools
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq.rescoring import metrics

NAMES = "abcdefg"


def slow_dcg(gains):
    total = 0.0
    for place in range(1, len(gains) + 1):
        total += gains[place - 1] * log(2) / log(place + 1)
    return total


def slow_ndcg(order, grades, depth):
    """The definition: try every order of the judged documents and take the best for the ideal."""
    gains = [max(0, grades.get(name, 0)) for name in order][:depth]
    best = max(slow_dcg([max(0, grades[name]) for name in one][:depth]) for one in itertools.permutations(grades))
    return slow_dcg(gains) / best if best else 0.0


@given(
    st.permutations(NAMES),
    st.dictionaries(st.sampled_from("abcxyz"), st.integers(-1, 3), min_size=1),
    st.integers(1, 8),
)
def test_ndcg_equals_its_definition(order, grades, depth):
    assert metrics.ndcg(order, grades, depth=depth) == pytest.approx(slow_ndcg(order, grades, depth))


def test_ndcg_is_one_for_the_best_order_and_zero_without_relevant_documents():
    assert metrics.ndcg(["a", "b", "c"], {"a": 2, "b": 1, "c": 0}) == 1
    assert metrics.ndcg(["a"], {"a": 0}) == 0
    assert metrics.ndcg([], {"a": 1}) == 0


def test_ndcg_counts_relevant_documents_that_were_not_found():
    assert metrics.ndcg(["a"], {"a": 1, "missed": 1}) == pytest.approx(1 / (1 + 1 / 1.584962500721156))


def test_scores_equal_in_single_precision_are_ties():
    assert metrics.trec_order({"a": 1.0, "b": 1.0 - 1e-12}) == ["b", "a"]
    assert metrics.trec_order({"a": 1.0, "b": 1.0 - 1e-3}) == ["a", "b"]
    assert metrics.trec_order({"a": 1e300, "b": 5.0}) == ["a", "b"]


def test_ndcg_depth_is_ten_by_default():
    order = [f"d{place}" for place in range(1, 12)]
    assert metrics.ndcg(order, {"d11": 1}) == 0
    assert metrics.ndcg(order, {"d10": 1}) == pytest.approx(1 / 3.4594316186372973)  # log2(11)
