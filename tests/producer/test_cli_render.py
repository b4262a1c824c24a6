"""What a person reads: JSON in any encoding, counts that add up, and words that no terminal obeys."""

import io
import json

import pytest

from rerankq.cli import render
from rerankq.rescoring.rescore import Report

REPORT = Report(
    output="[red]o", model="m", weights="w", fusion="f", queries=5, resumed=2, pairs=1_234, cached_pairs=5,
    truncated_pairs=6, seconds=2.0, failed={"q1": "x"}, ndcg={"[red]a": None, "b": 0.12349}, judged_queries=3,
    missing={"vector": 5, "tag": 2}, skipped_lines={"c": 7},
)  # fmt: skip


@pytest.mark.parametrize(("encoding", "written"), [("utf-8", '{"a": "ä"}\n'), ("ascii", '{"a": "\\u00e4"}\n')])
def test_printed_json_is_valid_in_any_encoding(encoding, written):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    render.print_json({"a": "ä"}, file)
    file.seek(0)
    assert file.read() == written
    assert json.loads(written) == {"a": "ä"}


def test_report_has_output_cost_and_missing_signals(capsys):
    render.print_report(REPORT)
    order, first, second, over, *sentences = capsys.readouterr().out.splitlines()
    assert (order.split(), first.split(), second.split()) == (["order", "nDCG@10"], ["[red]a", "–"], ["b", "0.1235"])
    assert over == "over 3 judged queries of 5"
    assert sentences == [
        "4 queries in [red]o, 2 of them from an earlier start: 1,234 pairs, 5 cached, 6 truncated, 2.0 s, 617 pairs/s",
        "scored by m (weights w), fusion f",
        "weighted signals that no chunk has, which add nothing to the score: vector, tag (in 2 queries)",
        "invalid lines skipped in c: 7",
    ]


@pytest.mark.parametrize(("count", "last"), [(10, "rerankq: query q9: x"), (12, "rerankq: … and 2 more")])
def test_failed_queries_beyond_ten_are_counted_but_not_named(capsys, count, last):
    render.print_failed({f"q{number}": "x" for number in range(count)})
    printed = capsys.readouterr().err.splitlines()
    assert (len(printed), printed[-1]) == (min(count, 11), last)


def test_message_lines_begin_with_the_command_name(capsys):
    render.print_message("one\ntwo")
    assert capsys.readouterr().err == "rerankq: one\nrerankq: two\n"


@pytest.mark.parametrize(("places", "mark"), [(2, "^2"), (-2, "v2"), (0, "=")])
def test_move_is_shown_with_its_direction(places, mark):
    assert render._move(places, render.PLAIN).plain == mark
