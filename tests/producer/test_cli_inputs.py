import gzip
import io
import sys

import pytest

from rerankq.cli import inputs
from rerankq.cli.inputs import InputFault, Line


@pytest.fixture
def file(tmp_path):
    def write(content, name="in.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def texts(source, **limits):
    return [line.text.strip() for line in inputs.lines(source, **limits)]


def test_blank_lines_are_passed_over_and_still_counted(file):
    assert [(line.number, line.text.strip()) for line in inputs.lines(file("a\n\n  \nb"))] == [(1, "a"), (4, "b")]


def test_a_gzipped_file_is_recognised_by_its_bytes_whatever_its_name(file):
    assert texts(file(gzip.compress("ä\nö\n".encode()))) == ["ä", "ö"]


def test_a_byte_order_mark_is_not_part_of_the_first_line(file):
    assert texts(file(b"\xef\xbb\xbf{}\n")) == ["{}"]


def test_only_line_feeds_end_lines(file):
    assert texts(file("a\u2028b\x85c\x0bd\n")) == ["a\u2028b\x85c\x0bd"]


def test_standard_input_is_a_dash(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n")))
    reading = inputs.lines("-")
    assert next(reading).text == "one\n"
    with pytest.raises(InputFault, match="standard input:2: not UTF-8"):
        next(reading)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"ok\n\xff\xfe\n", r"in.jsonl:2: not UTF-8"),
        (b"12345678\n", r"in.jsonl:1: longer than 8 bytes"),
        (gzip.compress(b"a\n" * 9999)[:-40], r"in.jsonl: cannot be read"),
        (b"\x1f\x8bnot gzip", r"in.jsonl: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_with_its_place(file, content, said):
    with pytest.raises(InputFault, match=said):
        texts(file(content), max_bytes=8)


def test_a_missing_file_and_a_folder_are_said(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputFault, match="cannot be read"):
            texts(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "q:7: not JSON"),
        ("[" * 100_000, "q:7: not JSON: nested too deep"),
        ("[]", "q:7: expected a JSON object"),
        ('{"text": "a"}', "q:7: _id: is missing"),
        ('{"_id": "", "text": "a"}', "q:7: _id: must be one word"),
        ('{"_id": "a b", "text": "a"}', "q:7: _id: must be one word"),
        ('{"_id": true, "text": "a"}', "q:7: _id: expected a text, found bool"),
        ('{"_id": "1"}', "q:7: text: is missing"),
        ('{"_id": "1", "text": " "}', "q:7: text: must not be blank"),
        ('{"_id": "1", "text": 5}', "q:7: text: expected a text, found int"),
        ('{"_id": "1", "text": "\\ud800"}', "q:7: text: not Unicode: a lone surrogate at character 0"),
    ],
)
def test_a_query_that_is_none_is_said_with_line_and_field(text, said):
    with pytest.raises(InputFault) as fault:
        inputs.query_of(Line("q", 7, text))
    assert str(fault.value).startswith(said)


def test_a_number_may_be_an_id():
    assert inputs.query_of(Line("q", 1, '{"_id": 12, "text": "a"}')).id == "12"


def test_a_document_needs_no_title_and_may_be_empty():
    assert inputs.chunk_of(Line("c", 1, '{"_id": "d", "text": ""}')).model_text == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q Q0 d 1 0.5", "r:1: expected six columns"),
        ("q Q0 d 1 high bm25", "r:1: score: expected a number"),
        ("q Q0 d 1 nan bm25", "r:1: score: expected a finite number"),
        ("q Q0 d 1 inf bm25", "r:1: score: expected a finite number"),
    ],
)
def test_a_line_of_a_run_that_is_none_is_said(text, said):
    with pytest.raises(InputFault) as fault:
        inputs.run_line_of(Line("r", 1, text))
    assert str(fault.value).startswith(said)


@pytest.mark.parametrize("content", ["query-id\tcorpus-id\tscore\nq\td\t2\n", "q\td\t2\n", "q 0 d 2\n"])
def test_judgements_may_have_a_header_or_four_columns(file, content):
    assert inputs.judgements(file(content)) == {"q": {"d": 2}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("q d\n", ":1: expected three columns"),
        ("q d high\n", ":1: score: expected an integer"),
        ("q d 1\nq d 1\n", ":2: corpus-id: query q and document d are judged twice"),
    ],
)
def test_judgements_that_are_none_are_said(file, content, said):
    with pytest.raises(InputFault, match=said):
        inputs.judgements(file(content))


def test_a_job_that_is_none_is_said_with_every_wrong_field():
    with pytest.raises(InputFault, match=r"j:3: query: .*blank; chunks: .*at least 1"):
        inputs.job_of(Line("j", 3, '{"query": "", "chunks": []}'))
