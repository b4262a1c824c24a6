from dataclasses import replace

import pytest

from rerankq import RankedChunk
from rerankq.cli import render
from rerankq.local import demo


@pytest.fixture
def done():
    sample = demo.read_sample()
    comparisons = []
    for question in sample.questions:
        order = [chunk.id for chunk in demo.keyword_order(question.text, sample.chunks)]
        ranked = [
            RankedChunk(id=name, index=order.index(name), rank=rank, score=1 / rank, scores={"model": 0.5})
            for rank, name in enumerate(reversed(order), start=1)
        ]
        texts = {chunk.id: chunk.text for chunk in sample.chunks}
        comparisons.append(demo.Comparison(question.text, question.answer, order, ranked, texts))
    return demo.Demo(comparisons, len(sample.chunks), 6, 216, 0, 1.0, 216, 216, 0.1, 2.0)


def test_sample_answers_every_question_and_repeats_no_text():
    sample = demo.read_sample()
    names = [chunk.id for chunk in sample.chunks]
    assert len(set(names)) == len(names)
    assert len({chunk.text for chunk in sample.chunks}) == len(names)
    assert {question.answer for question in sample.questions} <= set(names)


def test_texts_without_a_query_word_score_zero():
    assert demo.bm25("moon", ["bread rises", ""]) == [0.0, 0.0]
    assert demo.bm25("moon", []) == []


def test_bm25_prefers_more_occurrences_and_shorter_texts():
    once, twice, longer = demo.bm25("moon", ["moon a b", "moon moon b", "moon a b c d"])
    assert twice > once > longer


def test_equal_scores_keep_the_order_of_the_sample():
    sample = demo.read_sample()
    ordered = demo.keyword_order("nowhereword", sample.chunks)
    assert [chunk.id for chunk in ordered] == [chunk.id for chunk in sample.chunks]


def test_moves_are_counted_from_the_keyword_order(done):
    one = done.comparisons[0]
    last = len(one.before)
    assert demo.move_of(one, one.after[0]) == last - 1
    assert demo.move_of(one, one.after[-1]) == 1 - last
    before, after = demo.rank_of_answer(one)
    assert before + after == last + 1


def test_printed_demo_has_every_question_with_its_scores(done, capsys):
    render.print_demo(done)
    shown = capsys.readouterr().out
    assert all(one.query in shown for one in done.comparisons)
    assert "fused" in shown
    assert "216 of 216 pairs" in shown
    assert f"of {len(done.comparisons)} after" in " ".join(shown.split())


def test_record_of_the_demo_equals_its_tables(done):
    record = demo.as_record(done)
    assert record["answers_first"] == {"before": done.first_before, "after": done.first_after}
    assert [one["before"] for one in record["comparisons"]] == [one.before for one in done.comparisons]


def test_answers_at_rank_1_are_counted_before_and_after(done):
    one = replace(done.comparisons[0], before=["a", "b"], answer="a")
    ranked = [RankedChunk(id=name, index=0, rank=rank, score=1) for rank, name in enumerate("ba", start=1)]
    worse, better = replace(one, after=ranked), replace(one, after=ranked, answer="b")
    counted = replace(done, comparisons=[worse, better, better])
    assert (counted.first_before, counted.first_after) == (1, 2)
    assert demo.as_record(replace(done, again_pairs=7))["again"]["pairs"] == 7
