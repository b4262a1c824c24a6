"""One rule of truncation against a slow twin: a pair that fits is whole; else its query is cut, then its chunk."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import TEXTS, reading

from rerankq_worker.cache import score_fingerprint
from rerankq_worker.engine import PairFailed, StubEngine, TokenisedPair
from rerankq_worker.engine.protocol import PairLimits
from rerankq_worker.engine.tokenising.chat_pairs import ChatPairs
from rerankq_worker.engine.tokenising.pair_tokeniser import PairTokeniser
from rerankq_worker.engine.tokenising.rendering import Rendering
from rerankq_worker.engine.tokenising.whole_pairs import WholeChats, WholePairs

MAX_LENGTH = 48
IN_MARKS = Rendering("<|im_start|>", "<|im_end|><|im_start|>", "<|im_end|>")
WORDS = " ".join(TEXTS[:2]).split()
#: Lines of a table, each of them one token: more characters for a token than are read at first.
RULES = ["-" * 18, "=" * 100]


def twin(query, chunk, *, frame, max_length, query_max_tokens):
    """Say what of the two is read, one token off at a time, and whether anything is missing."""
    total = max_length - frame
    query, chunk = list(query), list(chunk)
    if len(query) + len(chunk) <= total:
        return query, chunk, False
    while len(query) > query_max_tokens or len(query) > total // 2:
        query.pop()
    while len(query) + len(chunk) > total:
        chunk.pop()
    return query, chunk, True


def with_rules(name):
    tokenizer = reading(name).tokenizer
    tokenizer.add_tokens(RULES)
    return tokenizer


def by_marks(pairs_of, name):
    tokenizer, whole = with_rules(name), with_rules(name)
    probe = whole.encode("fever", "pain")
    ours = pairs_of(tokenizer, max_length=MAX_LENGTH)

    def framed(query, chunk):
        ids = iter(query), iter(chunk)
        framed, last = [], None
        for at, side in zip(probe.ids, probe.sequence_ids, strict=True):
            if side is None:
                framed.append(at)
            elif side != last:
                framed += ids[side]
            last = side
        return framed

    return ours.pairs, lambda text: whole.encode(text, add_special_tokens=False).ids, framed


def by_chat(pairs_of):
    tokenizer, whole = with_rules("chat bytes"), with_rules("chat bytes")

    def ids(text):
        return whole.encode(text, add_special_tokens=False).ids

    def framed(query, chunk):
        return [*ids(IN_MARKS.before), *query, *ids(IN_MARKS.between), *chunk, *ids(IN_MARKS.after)]

    return pairs_of(tokenizer, IN_MARKS, max_length=MAX_LENGTH).pairs, ids, framed


def by_words():
    def ids(text):
        return [StubEngine().tokenise(word, [""])[0].ids[1] for word in text.split()]

    return StubEngine(max_length=MAX_LENGTH).tokenise, ids, lambda query, chunk: [0, *query, 1, *chunk, 2]


WAYS = {
    "word pieces": lambda: by_marks(PairTokeniser, "word pieces"),
    "unigrams": lambda: by_marks(PairTokeniser, "unigrams"),
    "roberta bytes": lambda: by_marks(PairTokeniser, "roberta bytes"),
    "t5": lambda: by_marks(PairTokeniser, "unigrams of t5"),
    "no marks": lambda: by_marks(PairTokeniser, "chat bytes"),
    "whole word pieces": lambda: by_marks(WholePairs, "word pieces"),
    "whole roberta bytes": lambda: by_marks(WholePairs, "roberta bytes"),
    "chat": lambda: by_chat(ChatPairs),
    "whole chat": lambda: by_chat(WholeChats),
    "stub": by_words,
}


@pytest.fixture(scope="module")
def ways():
    return {name: make() for name, make in WAYS.items()}


def words(most):
    return st.lists(st.sampled_from(WORDS), min_size=1, max_size=most).map(" ".join)


@pytest.mark.parametrize("name", WAYS)
@given(
    query=words(40),
    chunks=st.lists(st.just("") | words(40), min_size=1, max_size=4),
    max_length=st.integers(12, MAX_LENGTH),
    query_max_tokens=st.integers(1, 60),
)
@example(query="fever " * 200, chunks=["pain", "", "pain " * 200], max_length=MAX_LENGTH, query_max_tokens=1)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_tokeniser_truncates_by_pair_limits(ways, name, query, chunks, max_length, query_max_tokens):
    pairs, ids, framed = ways[name]
    frame = len(framed([], []))
    options = {"max_length": max_length, "query_max_tokens": query_max_tokens}
    for chunk, pair in zip(chunks, pairs(query, chunks, **options), strict=True):
        read, kept, cut = twin(ids(query), ids(chunk), frame=frame, **options)
        assert pair.ids.tolist() == framed(read, kept)
        assert pair.truncated is cut


@given(query=st.integers(0, 200), chunk=st.integers(0, 200), total=st.integers(2, 130), budget=st.integers(1, 200))
def test_pair_limits_equal_their_slow_twin(query, chunk, total, budget):
    limits = PairLimits.within(total + 3, special_tokens=3, query_max_tokens=budget)
    read, kept, _ = twin(range(query), range(chunk), frame=3, max_length=total + 3, query_max_tokens=budget)
    assert limits.kept(query, chunk) == (len(read), len(kept))


@pytest.mark.parametrize("name", WAYS)
def test_the_same_query_is_whole_beside_a_short_chunk_and_cut_beside_a_long_one(ways, name):
    pairs, ids, _ = ways[name]
    query = next(" ".join(WORDS[:n]) for n in itertools.count(1) if len(ids(" ".join(WORDS[:n]))) > MAX_LENGTH // 2)
    short, long = pairs(query, ["a", " ".join(WORDS * 3)], query_max_tokens=5)
    assert (short.truncated, long.truncated) == (False, True)
    assert long.length == MAX_LENGTH
    asked = ids(query)
    assert any(short.ids.tolist()[at : at + len(asked)] == asked for at in range(short.length))


@pytest.mark.parametrize("name", WAYS)
def test_a_long_query_and_a_long_chunk_are_truncated_to_their_first_tokens(ways, name):
    pairs, ids, framed = ways[name]
    query, chunk = "fever " * 9_000, "pain " * 9_000
    [pair] = pairs(query, [chunk], query_max_tokens=1)
    read, kept, _ = twin(
        ids(query)[:60], ids(chunk)[:60], frame=len(framed([], [])), max_length=MAX_LENGTH, query_max_tokens=1
    )
    assert pair.ids.tolist() == framed(read, kept)


@pytest.mark.parametrize("rule", RULES, ids=len)
@pytest.mark.parametrize("name", WAYS)
def test_texts_of_long_tokens_are_read_until_the_pair_is_full(ways, name, rule):
    pairs, ids, framed = ways[name]
    for query, chunk in (("fever", rule * 200), (rule * 30, "pain"), ("fever", rule * 30)):
        [pair] = pairs(query, [chunk])
        read, kept, cut = twin(
            ids(query), ids(chunk), frame=len(framed([], [])), max_length=MAX_LENGTH, query_max_tokens=128
        )
        assert pair.ids.tolist() == framed(read, kept)
        assert pair.truncated is cut


def test_another_truncation_rule_gives_another_fingerprint():
    options = {"max_length": 512, "query_max_tokens": 128, "long_chunks": "truncate"}
    now, before = (score_fingerprint("engine", **options, rule=rule) for rule in (PairLimits.RULE, "another"))
    assert now != before


def test_a_pair_without_tokens_is_refused():
    with pytest.raises(PairFailed, match="no token"):
        TokenisedPair(np.empty(0, np.int32), 0, truncated=False)
