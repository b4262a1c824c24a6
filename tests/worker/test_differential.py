"""Scores equal those of sentence-transformers' ``predict``, one pair at a time, for every family and hard texts.

``make differential`` goes on where these end, and writes a report.
"""

import warnings
from functools import cache
from itertools import chain

import pytest
from differential import WAYS, Drawn, Found, Peer, draw, expect, hold, load
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import QUERY, RECIPES, reading, write

pytestmark = pytest.mark.slow

#: Families that more than one runtime and precision is tried with.
SEVERAL_WAYS = ("bert", "xlm-r", "qwen3 says")


@pytest.fixture(scope="module")
def peer_of(tmp_path_factory):
    @cache
    def made(family):
        return Peer(family, write(family, tmp_path_factory.mktemp("checkpoint")))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn about what a tiny checkpoint lacks
        yield made


@pytest.fixture(scope="module")
def engine_of(peer_of):
    return cache(lambda family, *way: load(peer_of(family).folder, *way))


@pytest.fixture(scope="module")
def expected_of():
    """Every way of a family is held against the same draws."""
    return cache(expect)


def hold_some(peer, ours, expected_of, dice, way):
    found = Found(peer.family, *way)
    drawn = draw(dice, peer)
    hold(ours, drawn, expected_of(peer, drawn), found)
    assert not found.beyond
    assert not found.flags_wrong


# No shrinking: of a pair that differs each trial costs a forward pass of either side.
bounded = settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("family", RECIPES)
@given(dice=st.randoms())
@bounded
def test_scores_equal_those_of_predict_one_pair_at_a_time(peer_of, engine_of, expected_of, family, dice):
    hold_some(peer_of(family), engine_of(family, *WAYS[0]), expected_of, dice, WAYS[0])


@pytest.mark.parametrize("family", SEVERAL_WAYS)
@pytest.mark.parametrize("way", WAYS[1:], ids="-".join)
@given(dice=st.randoms())
@bounded
def test_scores_of_every_runtime_and_precision_stay_near_those_of_predict(
    peer_of, engine_of, expected_of, family, way, dice
):
    if way[0] == "openvino":
        pytest.importorskip("openvino")
    hold_some(peer_of(family), engine_of(family, *way), expected_of, dice, way)


@pytest.mark.parametrize("family", RECIPES)
def test_special_tokens_in_a_text_give_the_score_of_predict_in_any_batch(peer_of, engine_of, family):
    peer = peer_of(family)
    marks = sorted(set(reading(RECIPES[family].reads).roles.values()))

    def chunks_with(mark):
        return mark, f"a set{mark}", f"{mark}a set" * 2

    batches = {QUERY: ["a set of pairs", *chain.from_iterable(map(chunks_with, marks))]}
    # Beside a mark in the query, each in the chunk alone, which begins and ends with it; and its own everywhere.
    batches |= {f"which {mark}": ["a set of pairs", *marks, *chunks_with(mark)[1:]] for mark in marks}
    found = Found(family, *WAYS[0])
    for query, chunks in batches.items():
        drawn = Drawn(query, tuple(chunks), peer.max_length)
        hold(engine_of(family, *WAYS[0]), drawn, expect(peer, drawn), found)
    assert found.pairs == sum(map(len, batches.values()))
    assert not found.beyond
    assert not found.flags_wrong


def test_where_the_chunk_comes_first_it_is_cut_and_the_query_behind_it_kept(peer_of, engine_of):
    # Here predict keeps the chunk, and of the query nothing that stands beyond the length.
    peer = peer_of("qwen2 says, chunk first")
    ours, chunk = engine_of(peer.family, *WAYS[0]), "A very long sentence that goes on, " * 14
    [cut] = ours.tokenise(QUERY, [chunk])
    assert cut.truncated
    shorter = ours.tokenise(QUERY, [chunk[:end] for end in range(len(chunk))])
    read = next(
        chunk[:end] for end, pair in enumerate(shorter) if not pair.truncated and pair.ids.tolist() == cut.ids.tolist()
    )
    assert peer.length(QUERY, read) == cut.length <= peer.max_length
    assert abs(ours.forward([cut]).item() - peer.logit(QUERY, read, peer.max_length)) < 1e-5
    assert abs(ours.forward([cut]).item() - peer.logit(QUERY, chunk, peer.max_length)) > 1e-3
