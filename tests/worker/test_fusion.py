"""Signals become scores and an order."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq_worker import fusion
from rerankq_worker.fusion.normalise import RULES
from rerankq_worker.fusion.ranks import competition_ranks

SIGNALS = tuple(fusion.DEFAULT_RULES)
MISSING = (None, math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Spec:
    method: str = "weighted"
    weights: dict = field(default_factory=lambda: {"model": 1.0})
    normalise: dict = field(default_factory=dict)
    boosts: dict = field(default_factory=dict)
    rrf_k: int = 60
    token_rule: str = "coverage"


PLAIN = dict.fromkeys(SIGNALS, "none")


def slow_fused(signals, spec):
    """The rules of fusion, chunk by chunk, in plain loops. Signals hold numbers or None."""
    chunks = len(next(iter(signals.values())))
    active = [n for n, row in signals.items() if spec.weights.get(n, 0) > 0 and any(v is not None for v in row)]
    absent = [n for n in SIGNALS if spec.weights.get(n, 0) > 0 and n not in active]
    scores, missing = [], []
    for chunk in range(chunks):
        lacking = [name for name in active if signals[name][chunk] is None]
        has = [name for name in active if name not in lacking]
        if spec.method == "rrf":
            score = 0.0
            for name in has:
                higher = [v for v in signals[name] if v is not None and v > signals[name][chunk]]
                score += spec.weights[name] / (spec.rrf_k + 1 + len(higher))
        else:
            sharing = [name for name in active if spec.normalise[name] != "raw"]
            there = [name for name in sharing if name in has]
            lost = sum(spec.weights[name] for name in sharing if name in lacking)
            held = sum(spec.weights[name] for name in there)
            score = 0.0
            for name in there:
                score += (spec.weights[name] + lost * spec.weights[name] / held) * signals[name][chunk]
            for name in has:
                if name not in sharing:
                    score += spec.weights[name] * signals[name][chunk]
        scores.append(score)
        missing.append(lacking + absent)
    return scores, missing


values = st.one_of(st.none(), st.floats(-100, 100).map(lambda v: round(v, 3)))


@st.composite
def jobs(draw):
    chunks = draw(st.integers(1, 6))
    names = draw(st.lists(st.sampled_from(SIGNALS), min_size=1, unique=True))
    signals = {name: draw(st.lists(values, min_size=chunks, max_size=chunks)) for name in names}
    weights = {name: draw(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0, 10.0])) for name in SIGNALS}
    normalise = {name: draw(st.sampled_from(["none", "raw"])) for name in SIGNALS}
    return signals, Spec(draw(st.sampled_from(["weighted", "rrf"])), weights, normalise, rrf_k=draw(st.integers(1, 60)))


@given(jobs())
def test_fused_scores_and_missing_signals_equal_their_slow_twin(job):
    signals, spec = job
    blend = fusion.blend(signals, spec)
    scores, missing = slow_fused(signals, spec)
    np.testing.assert_allclose(blend.scores, scores, rtol=1e-9, atol=1e-9)
    assert [sorted(names) for names in blend.missing] == [sorted(names) for names in missing]


@given(jobs())
def test_contributions_add_up_to_the_scores_and_are_those_of_the_other_signals_at_zero(job):
    signals, spec = job
    blended, parts = fusion.blend(signals, spec), fusion.contributions(signals, spec)
    assert parts.keys() == blended.normalised.keys()
    for name, row in parts.items():
        assert np.isnan(row).tolist() == np.isnan(blended.normalised[name]).tolist()
        if spec.method == "weighted":
            others = {other: [None if v is None else 0.0 for v in values] for other, values in signals.items()}
            alone, _ = slow_fused(others | {name: signals[name]}, spec)
            assert np.nan_to_num(row) == pytest.approx(np.where(np.isnan(row), 0, alone), abs=1e-9)
    total = np.sum([np.nan_to_num(row) for row in parts.values()], axis=0) if parts else 0
    assert total == pytest.approx(blended.scores, rel=1e-9, abs=1e-9)


def test_a_shared_out_weight_shows_in_what_the_other_signals_add():
    spec = Spec(weights={"model": 0.5, "keyword": 0.5}, normalise=PLAIN)
    parts = fusion.contributions({"model": [0.4, 0.4], "keyword": [0.2, None]}, spec)
    assert parts["model"].tolist() == pytest.approx([0.2, 0.4])
    assert parts["keyword"][0] == pytest.approx(0.1)


def test_contributions_of_reciprocal_ranks_are_the_weights_by_rank():
    spec = Spec("rrf", weights={"model": 1.0, "keyword": 2.0}, rrf_k=60)
    parts = fusion.contributions({"model": [3.0, 1.0], "keyword": [0.0, 9.0]}, spec)
    assert parts["model"].tolist() == pytest.approx([1 / 61, 1 / 62])
    assert parts["keyword"].tolist() == pytest.approx([2 / 62, 2 / 61])


@given(jobs(), st.randoms(use_true_random=False))
def test_the_order_in_which_chunks_arrive_changes_no_score(job, random):
    signals, spec = job
    spec = replace(spec, normalise={})
    order = list(range(len(next(iter(signals.values())))))
    random.shuffle(order)
    shuffled = {name: [row[position] for position in order] for name, row in signals.items()}
    np.testing.assert_array_equal(fusion.fuse(shuffled, spec), fusion.fuse(signals, spec)[order])


wild = st.one_of(st.none(), st.floats(), st.sampled_from([1e308, -1e308, 5e-324]))
any_rule = st.dictionaries(st.sampled_from(SIGNALS), st.sampled_from(sorted(RULES)))
any_weight = st.dictionaries(st.sampled_from(SIGNALS), st.sampled_from([0, 5e-324, 0.3, 1, 1e300, 1e308, 1.7e308]))


@given(st.lists(st.tuples(wild, wild, wild), max_size=5), any_rule, any_weight, st.sampled_from(["weighted", "rrf"]))
def test_scores_are_finite_and_inputs_unchanged_whatever_comes_in(rows, rules, weights, method):
    signals = {
        name: np.array([row[position] for row in rows], dtype=float) for position, name in enumerate(SIGNALS[:3])
    }
    before = copy.deepcopy(signals)
    assert np.isfinite(fusion.fuse(signals, Spec(method, weights, rules))).all()
    for name, row in before.items():
        np.testing.assert_array_equal(signals[name], row)


@pytest.mark.parametrize("model", [1e308, -1e308])
def test_no_weight_makes_a_score_infinite(model):
    spec = Spec(weights={"model": 1e300, "token": 1e300, "vector": 1.0}, normalise=PLAIN)
    assert np.isfinite(fusion.fuse({"model": [model], "token": [1e308], "vector": [0.5]}, spec)).all()
    assert np.isfinite(fusion.fuse({"model": [model, 1], "token": [None, 1]}, spec)).all()


def test_the_weighted_sum_is_not_divided_by_its_weights():
    spec = Spec(weights={"model": 0.7, "token": 0.3, "pagerank": 0.1, "tags": 0.1})
    signals = {"model": [1000.0], "token": [1.0], "pagerank": [100.0], "tags": [1.0]}
    np.testing.assert_allclose(fusion.fuse(signals, spec), [1.2])


@pytest.mark.parametrize("missing", MISSING)
def test_the_weight_of_a_missing_signal_goes_to_the_chunks_other_signals(missing):
    spec = Spec(weights={"model": 0.5, "token": 0.3, "vector": 0.2}, normalise=PLAIN)
    blend = fusion.blend({"model": [missing, 1.0], "token": [0.4, 0.4], "vector": [0.9, 0.9]}, spec)
    np.testing.assert_allclose(blend.scores, [(0.3 * 0.4 + 0.2 * 0.9) / 0.5, 0.5 + 0.12 + 0.18])
    assert blend.missing == [["model"], []]
    assert math.isnan(blend.normalised["model"][0])


def test_a_missing_signal_changes_no_bit_of_other_chunks_scores():
    spec = Spec(weights={"model": 0.7, "token": 0.3, "vector": 0.1}, normalise=PLAIN)
    rows = np.random.default_rng(0).uniform(size=(3, 50))
    alone = fusion.fuse(dict(zip(spec.weights, rows, strict=True)), spec)
    lacking = np.hstack([rows, [[math.nan], [0.5], [0.5]]])
    np.testing.assert_array_equal(fusion.fuse(dict(zip(spec.weights, lacking, strict=True)), spec)[:-1], alone)


@pytest.mark.parametrize("method", ["weighted", "rrf"])
def test_a_signal_that_no_chunk_has_is_inactive_and_listed_as_missing(method):
    spec = Spec(method, weights={"model": 0.7, "token": 0.3}, normalise=PLAIN)
    alone = fusion.fuse({"model": [0.2, 0.4]}, spec)
    for absent in (None, [None, math.nan], [math.inf, -math.inf]):
        blend = fusion.blend({"model": [0.2, 0.4], "token": absent}, spec)
        np.testing.assert_array_equal(blend.scores, alone)
        assert blend.missing == [["token"], ["token"]]
        assert list(blend.normalised) == ["model"]


def test_a_signal_of_weight_zero_is_neither_used_nor_reported():
    spec = Spec(weights={"model": 1.0, "token": 0.0})
    blend = fusion.blend({"model": [0.0], "token": [math.nan]}, spec)
    assert (blend.scores.tolist(), list(blend.normalised), blend.missing) == ([0.5], ["model"], [[]])
    assert fusion.signals_needed(spec) == {"model"}


def test_a_chunk_that_lacks_everything_scores_zero():
    spec = Spec(weights={"model": 0.7, "vector": 0.3})
    blend = fusion.blend({"model": [1.0, None], "vector": [0.5, None]}, spec)
    assert blend.scores[1] == 0
    assert blend.missing[1] == ["model", "vector"]


def test_a_raw_signal_is_added_on_top_and_takes_no_share():
    spec = Spec(weights={"model": 0.7, "token": 0.3, "pagerank": 1.0}, normalise=PLAIN | {"pagerank": "raw"})
    signals = {"model": [None, 0.5, None], "token": [0.4, 0.4, None], "pagerank": [3.0, None, 5.0]}
    blend = fusion.blend(signals, spec)
    np.testing.assert_allclose(blend.scores, [0.4 + 3, 0.35 + 0.12, 5])
    assert blend.missing == [["model"], ["pagerank"], ["model", "token"]]


def test_no_signals_and_no_chunks_give_no_scores():
    assert fusion.fuse({}, Spec()).shape == (0,)
    assert fusion.fuse({"model": []}, Spec()).shape == (0,)
    assert fusion.blend({"model": None, "token": [0.5]}, Spec()).scores.tolist() == [0.0]


@pytest.mark.parametrize(
    ("signals", "spec", "says"),
    [
        ({"modle": [1.0]}, Spec(), "modle"),
        ({"model": [1.0]}, Spec(weights={"bm25": 1}), "bm25"),
        ({"model": [1.0]}, Spec(normalise={"model": "softmax"}), "softmax"),
        ({"model": [1.0]}, Spec(method="mean"), "mean"),
        ({"model": [1.0]}, Spec(weights={"model": -1}), "negative"),
        ({"model": [1.0]}, Spec(weights={"model": math.nan}), "finite"),
        ({"model": [1.0]}, Spec(weights={"model": math.inf}), "finite"),
        ({"model": [1.0], "token": [1.0, 2.0]}, Spec(), "length"),
        ({"model": [[1.0]]}, Spec(), "shape"),
    ],
)
def test_invalid_signals_and_fusions_are_refused_with_a_message(signals, spec, says):
    with pytest.raises(ValueError, match=says):
        fusion.fuse(signals, spec)


finite = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8)


@pytest.mark.parametrize("rule", ["sigmoid", "minmax", "ragflow"])
@given(raw=finite)
def test_normalised_values_lie_between_zero_and_one_and_keep_their_order(rule, raw):
    normalised = RULES[rule](raw)
    assert ((normalised >= 0) & (normalised <= 1)).all()
    assert (np.diff(normalised[np.argsort(raw, kind="stable")]) >= 0).all()


@given(st.lists(st.floats(-50, 50), max_size=6))
def test_ragflows_rule_on_known_values_is_ragflows(raw):
    np.testing.assert_allclose(fusion.normalise_ragflow(raw), fusion.ragflow.normalise_model_scores(raw), rtol=1e-12)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_missing_values_stay_missing_and_spoil_no_others(rule):
    raw = [0.25, None, -3.0, math.inf, 8.0, -math.inf]
    normalised = RULES[rule](raw)
    assert np.isnan(normalised).tolist() == [False, True, False, True, False, True]
    np.testing.assert_array_equal(normalised[[0, 2, 4]], RULES[rule]([0.25, -3.0, 8.0]))
    assert np.isnan(RULES[rule]([None, math.inf])).all()
    assert RULES[rule]([]).shape == (0,)


@given(st.floats(-700, 700))
def test_the_sigmoid_equals_its_textbook_form(logit):
    np.testing.assert_allclose(fusion.normalise_sigmoid([logit])[0], 1 / (1 + math.exp(-logit)), rtol=1e-12)


def test_minmax_gives_equal_values_one_half():
    assert fusion.normalise_minmax([3.0, 3.0, None]).tolist()[:2] == [0.5, 0.5]


def test_minmax_stretches_a_span_that_is_larger_than_any_float():
    largest = float(np.finfo(np.float64).max)
    np.testing.assert_allclose(fusion.normalise_minmax([-largest, largest, 0.0, largest / 2]), [0.0, 1.0, 0.5, 0.75])


def slow_ranks(row):
    return [math.nan if v is None else 1 + sum(w > v for w in row if w is not None) for v in row]


@given(st.lists(st.one_of(st.none(), st.sampled_from([0.0, 1.0, 2.0, 3.5])), max_size=8))
def test_competition_ranks_equal_their_slow_twin(row):
    np.testing.assert_array_equal(competition_ranks(row), slow_ranks(row))


def test_a_chunk_gets_nothing_from_a_ranking_that_lacks_it():
    scores = fusion.reciprocal_rank_fusion({"a": [5.0, None], "b": [1.0, 1.0]}, k=60)
    np.testing.assert_allclose(scores, [2 / 61, 1 / 61])


def test_the_constant_of_reciprocal_ranks_is_60_unless_another_is_named():
    assert fusion.reciprocal_rank_fusion({"a": [5.0]}).tolist() == [1 / 61]
    assert fusion.reciprocal_rank_fusion({"a": [5.0]}, k=0, weights={"a": 0.5}).tolist() == [0.5]


def test_reciprocal_rank_fusion_takes_empty_signals_and_refuses_invalid_ones():
    assert fusion.reciprocal_rank_fusion({}).shape == (0,)
    assert fusion.reciprocal_rank_fusion({"a": []}).shape == (0,)
    with pytest.raises(ValueError, match="negative"):
        fusion.reciprocal_rank_fusion({"a": [1.0]}, k=-1)
    with pytest.raises(ValueError, match="length"):
        fusion.reciprocal_rank_fusion({"a": [1.0], "b": []})


score_lists = st.lists(st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1.0])), max_size=10)


def descending(value):
    return (math.isnan(value), 0 if math.isnan(value) else -value)


@given(score_lists, st.data(), st.one_of(st.none(), st.floats(-2, 2)), st.one_of(st.none(), st.integers(0, 12)))
def test_a_ranking_equals_its_slow_twin(scores, data, min_score, top_k):
    some = st.lists(st.floats() | st.sampled_from([0.0, 1.0]), min_size=len(scores), max_size=len(scores))
    logits = data.draw(st.none() | some)
    raw = [0.0] * len(scores) if logits is None else logits
    order = sorted(range(len(scores)), key=lambda i: (descending(scores[i]), descending(raw[i]), i))
    kept = [position for position in order if min_score is None or scores[position] >= min_score]
    ranked = fusion.rank(scores, min_score, top_k, logits=logits).tolist()
    assert ranked == (kept if top_k is None else kept[:top_k])


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=12), st.sampled_from([0.0, 0.3, 1e300]))
def test_equal_scores_are_ordered_by_logits_however_saturated_the_sigmoid_is(logits, token):
    spec = Spec(weights={"model": 0.7, "token": token})
    scores = fusion.fuse({"model": logits, "token": [0.5] * len(logits)}, spec)
    ranked = fusion.rank(scores, logits=logits).tolist()
    assert ranked == sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def test_rank_refuses_logits_of_another_length_than_the_scores():
    with pytest.raises(ValueError, match="one logit per score"):
        fusion.rank([1.0, 2.0], logits=[1.0])


@pytest.mark.parametrize("weights", [(1e308, 1e308), (1.7e308, 1.7e308), (5e-324, 5e-324), (1e308, 5e-324)])
@pytest.mark.parametrize("method", ["weighted", "rrf"])
def test_extreme_weights_give_finite_scores_and_are_shared_out(method, weights):
    spec = Spec(method, weights=dict(zip(("model", "token"), weights, strict=True)), normalise=PLAIN)
    scores = fusion.fuse({"model": [0.9, 0.1, 0.9], "token": [0.5, 0.5, None]}, spec)
    assert np.isfinite(scores).all()
    assert scores[0] >= scores[1]
    if method == "weighted" and weights == (5e-324, 5e-324):
        return  # too small to be multiplied by anything
    if method == "weighted":
        assert scores[2] >= scores[0]


def test_reciprocal_rank_fusion_takes_any_constant_and_any_weight():
    signals = {"model": [2.0, 1.0]}
    assert fusion.reciprocal_rank_fusion(signals, k=10**400).tolist() == pytest.approx([0.0, 0.0])
    all_signals = {name: [2.0, 1.0] for name in SIGNALS}
    assert np.isfinite(fusion.reciprocal_rank_fusion(all_signals, 0, dict.fromkeys(SIGNALS, 1.7e308))).all()


def test_a_signal_without_a_named_rule_follows_the_default_rule():
    signals = {"model": [0.0], "keyword": [3.0], "pagerank": [50.0], "tags": [0.5], "token": [0.5], "vector": [0.5]}
    blend = fusion.blend(signals, Spec(weights=dict.fromkeys(SIGNALS, 1.0)))
    assert {row.tolist()[0] for row in blend.normalised.values()} == {0.5}


def test_a_ranking_orders_numbers_of_any_type():
    for kind in (np.uint8, np.bool_):
        assert fusion.rank(np.array([0, 1, 0], dtype=kind)).tolist() == [1, 0, 2]
        assert fusion.rank([0.5] * 3, logits=np.array([0, 1, 0], dtype=kind)).tolist() == [1, 0, 2]


# Under a thousandth is almost equal: such values are clipped, not stretched.
@pytest.mark.parametrize(
    ("raw", "normalised"),
    [
        ([5.0, 5.0009, None], [1.0, 1.0, math.nan]),
        ([5.0, 5.0011], [0.0, 1.0]),
        ([-5.0009, -5.0], [0.0, 0.0]),
        ([0.9996, 1.0004], [0.9996, 1.0]),
        ([-0.0004, 0.0005], [0.0, 0.0005]),
        ([0.0, 0.5], [0.0, 0.5]),
        ([0.5, 1.0], [0.5, 1.0]),
        ([0.2, 0.7, None], [0.2, 0.7, math.nan]),
        ([0.0, 0.5, 1.0001], [0.0, 0.5 / 1.0001, 1.0]),
        ([-0.25, 0.0, 1.0], [0.0, 0.2, 1.0]),
    ],
)
def test_ragflows_rule_stretches_values_only_outside_0_to_1_and_not_almost_equal(raw, normalised):
    np.testing.assert_allclose(fusion.normalise_ragflow(raw), normalised, rtol=1e-12)


def test_a_negative_top_k_is_refused():
    with pytest.raises(ValueError, match="top_k"):
        fusion.rank([1.0], top_k=-1)


weights = st.dictionaries(st.sampled_from("abcd"), st.floats(-1e300, 1e300).filter(lambda w: w == 0 or abs(w) > 1e-300))


@given(weights, st.lists(weights, max_size=4))
def test_tag_scores_are_cosines(query, chunks):
    scores = fusion.rank_feature_scores(query, chunks)
    if not any(query.values()):
        assert np.isnan(scores).all()
        return
    assert (abs(scores) <= 1).all()
    for score, tags in zip(scores, chunks, strict=True):
        if not query.keys() & tags.keys() or not any(tags.values()):
            assert score == 0


small_weights = st.dictionaries(st.sampled_from("abcd"), st.integers(-9, 9))


@given(small_weights.filter(lambda tags: any(tags.values())), st.lists(small_weights, max_size=4))
def test_tag_scores_equal_the_cosines_of_their_definition(query, chunks):
    def norm(tags):
        return math.sqrt(sum(weight * weight for weight in tags.values()))

    expected = [
        sum(query.get(tag, 0) * weight for tag, weight in tags.items()) / (norm(query) * norm(tags) or 1)
        for tags in chunks
    ]
    np.testing.assert_allclose(fusion.rank_feature_scores(query, chunks), expected, rtol=1e-12, atol=1e-12)


def test_tags_in_one_direction_score_one_exactly_and_in_opposite_ones_minus_one():
    # Their parts squared add up to a little more than 1.
    tags = {"a": 1, "b": 1, "c": 1}
    scores = fusion.rank_feature_scores(tags, [tags, {tag: -weight for tag, weight in tags.items()}])
    assert scores.tolist() == [1.0, -1.0]


def test_tags_that_are_not_finite_do_not_count():
    scores = fusion.rank_feature_scores({"a": 1, "b": math.nan}, [{"a": 2, "c": math.inf}, {"b": 1}])
    assert scores.tolist() == [1.0, 0.0]
