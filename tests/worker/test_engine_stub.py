"""The stub: a stated cost, stable scores, the same rules of length as a real engine, and no torch."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq_worker import engine
from rerankq_worker.engine import AsynchronousStubEngine, ModelUnusable, StubEngine


def test_loading_the_stub_imports_no_torch():
    script = (
        "import sys, rerankq_worker.engine as engine\n"
        "stub = engine.load('stub')\n"
        "with engine.Batcher(stub) as batcher:\n"
        "    batcher.submit(stub.tokenise('q', ['c'])).result(10)\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'celery', 'redis', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_batch_costs_its_padded_tokens():
    slept = []
    stub = StubEngine(seconds_per_token=0.5, sleep=slept.append)
    stub.forward(stub.tokenise("one two", ["a", "b c d"]))
    # Two pairs, the longer one with two words, three words and three marks.
    assert slept == [0.5 * 2 * 8]
    stub.forward([])
    assert len(slept) == 1


def test_an_unpadded_batch_costs_the_sum_of_its_tokens():
    slept = []
    stub = StubEngine(seconds_per_token=0.5, sleep=slept.append, padded=False)
    future = stub.launch(stub.tokenise("one two", ["a", "b c d"]))
    assert slept == [0.5 * (6 + 8)]
    assert future.done()
    assert future.result().shape == (2,)


class Clock:
    """A device's clock that only moves when somebody waits, or the test says so."""

    now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_an_asynchronous_stub_runs_one_batch_after_the_other():
    clock = Clock()
    stub = AsynchronousStubEngine(seconds_per_token=0.5, clock=clock, sleep=clock.sleep)
    batch = stub.tokenise("one two", ["a", "b c d"])
    first, second = stub.launch(batch), stub.launch(batch)
    assert clock.now == 100
    assert not first.done()
    clock.now += 5
    np.testing.assert_array_equal(second.result(), StubEngine(seconds_per_token=0).forward(batch))
    assert clock.now == 100 + 2 * 8
    assert first.done()
    assert second.done()
    assert stub.idle_s == 0
    clock.now += 3
    stub.forward(batch)
    assert clock.now == 100 + 3 * 8 + 3
    assert stub.idle_s == 3


def test_the_cost_is_part_of_the_name():
    assert engine.load("stub:0").score([("q", "c")]).shape == (1,)
    assert engine.load("stub:0").name == "stub:0"
    assert engine.load("stub:0").fingerprint == engine.load("stub").fingerprint


@pytest.mark.parametrize("model", ["stub:fast", "stub:-1", "stub:inf", "stub:nan"])
def test_an_invalid_cost_per_token_is_rejected(model):
    with pytest.raises(ModelUnusable, match="stub:2e-6"):
        engine.load(model)


def test_batches_without_a_batcher_cost_no_more_than_the_budget():
    slept = []
    stub = StubEngine(seconds_per_token=1, max_batch_tokens=24, sleep=slept.append)
    stub.score([("a query", "word " * words) for words in (1, 5, 3, 1, 19)])
    assert max(slept) == 24, "the pair of 24 tokens fits, alone"
    assert sum(slept) >= 24 + 6 + 10 + 8 + 6


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=40)), max_size=20))
def test_scores_depend_on_query_and_chunk_alone(pairs):
    stub = StubEngine(seconds_per_token=0, max_batch_tokens=50)
    logits = stub.score(pairs)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    for pair, logit in zip(pairs, logits, strict=True):
        assert stub.score([pair])[0] == logit


def test_moving_a_word_from_query_to_chunk_is_another_pair():
    stub = StubEngine(seconds_per_token=0)
    assert stub.score([("a b", "c")])[0] != stub.score([("a", "b c")])[0]


def test_scores_are_the_same_in_every_process():
    np.testing.assert_array_equal(
        StubEngine(seconds_per_token=0).score([("a query", "a chunk"), ("查询", "\ud800")]).round(3),
        np.array([-3.085, 1.761], dtype=np.float32),
    )


@pytest.mark.parametrize(
    ("query", "chunk", "length", "truncated"),
    [
        (5, 5, 13, False),
        (5, 500, 64, True),
        (30, 31, 64, False),
        (31, 5, 39, False),
        (56, 5, 64, False),
        (57, 5, 38, True),
        (31, 31, 64, True),
        (500, 500, 64, True),
        (61, 0, 64, False),
        (62, 0, 33, True),
        (0, 61, 64, False),
        (0, 62, 64, True),
        (0, 0, 3, False),
    ],
)
def test_a_pair_that_fits_is_whole_and_another_keeps_half_the_room_for_its_query(query, chunk, length, truncated):
    stub = StubEngine(max_length=64)
    pair = stub.tokenise("word " * query, ["word " * chunk])[0]
    assert (pair.length, pair.truncated) == (length, truncated)


def test_a_huge_chunk_is_cut_without_counting_its_words():
    pair = StubEngine().tokenise("q", ["word " * 2_000_000])[0]
    assert (pair.length, pair.truncated) == (512, True)


def test_a_maximum_length_beyond_the_engines_is_rejected():
    with pytest.raises(ValueError, match="more than this model reads"):
        StubEngine(max_length=64).tokenise("q", ["c"], max_length=65)
