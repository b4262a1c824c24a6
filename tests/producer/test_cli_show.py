"""What a person reads: JSON in any encoding, counts that add up, and words that no terminal obeys."""

import io
import json

import pytest

from rerankq.cli import show
from rerankq.rescoring.rescore import Report

REPORT = Report(
    output="[red]o", model="m", weights="w", fusion="f", queries=5, resumed=2, pairs=1_234, cached_pairs=5,
    truncated_pairs=6, seconds=2.0, failed={"q1": "x"}, ndcg={"[red]a": None, "b": 0.12349}, judged_queries=3,
    missing={"vector": 5, "tag": 2}, skipped_lines={"c": 7},
)  # fmt: skip


@pytest.mark.parametrize(("encoding", "written"), [("utf-8", '{"a": "ä"}\n'), ("ascii", '{"a": "\\u00e4"}\n')])
def test_json_is_json_in_whatever_encoding_it_goes_out(encoding, written):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show.print_json({"a": "ä"}, file)
    file.seek(0)
    assert file.read() == written
    assert json.loads(written) == {"a": "ä"}


def test_a_report_tells_what_was_written_at_what_cost_and_what_is_missing(capsys):
    show.show_report(REPORT)
    order, first, second, over, *sentences = capsys.readouterr().out.splitlines()
    assert (order.split(), first.split(), second.split()) == (["order", "nDCG@10"], ["[red]a", "–"], ["b", "0.1235"])
    assert over == "over 3 judged queries of 5"
    assert sentences == [
        "4 queries in [red]o, 2 of them from before: 1,234 pairs, 5 cached, 6 truncated, 2.0 s, 617 pairs/s",
        "scored by m (weights w), fusion f",
        "signals that no chunk has, so that their weight counts for nothing: vector, tag (in 2 queries)",
        "invalid lines skipped in c: 7",
    ]


@pytest.mark.parametrize(("count", "last"), [(10, "rerankq: query q9: x"), (12, "rerankq: … and 2 more")])
def test_of_many_failed_queries_the_first_are_named_and_the_others_counted(capsys, count, last):
    show.show_failed({f"q{number}": "x" for number in range(count)})
    told = capsys.readouterr().err.splitlines()
    assert (len(told), told[-1]) == (min(count, 11), last)


def test_each_line_that_is_told_says_whose_it_is(capsys):
    show.note("one\ntwo")
    assert capsys.readouterr().err == "rerankq: one\nrerankq: two\n"


@pytest.mark.parametrize(("places", "mark"), [(2, "^2"), (-2, "v2"), (0, "=")])
def test_a_move_is_shown_with_its_direction(places, mark):
    assert show._move(places, show.PLAIN).plain == mark
