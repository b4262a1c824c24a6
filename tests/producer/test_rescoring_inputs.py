import bz2
import gzip
import io
import json
import lzma
import os
import sys
import threading

import pytest

from rerankq.rescoring import inputs
from rerankq.rescoring.inputs import InputFault, Line


def gzipped(content: bytes) -> bytes:
    # Without the time: the name of a test is the same in every process.
    return gzip.compress(content, mtime=0)


@pytest.fixture
def file(tmp_path):
    def write(content, name="in.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def texts(source, **limits):
    return [line.text.strip() for line in inputs.lines(source, **limits)]


def test_blank_lines_are_skipped_and_still_counted(file):
    assert [(line.number, line.text.strip()) for line in inputs.lines(file("a\n\n  \nb"))] == [(1, "a"), (4, "b")]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["in.jsonl", "in.gz", "in.bz2"])
def test_compressed_file_is_recognised_by_its_bytes_not_its_name(file, compress, name):
    assert texts(file(compress("ä\nö\n".encode()), name)) == ["ä", "ö"]
    assert texts(file(compress(b"a\n") + compress(b"b\n"), name)) == ["a", "b"], (
        "files that were put one after the other"
    )
    assert texts(file(compress(b""), name)) == []
    assert texts(file(compress(gzip.compress(b"a\n")), name)) == ["a"]


def test_text_that_begins_like_a_compressed_file_is_text(file):
    assert texts(file("BZh9 Q0 d 1 1 x\n")) == ["BZh9 Q0 d 1 1 x"]
    assert texts(file("PK Q0 d 1 1 x\n")) == ["PK Q0 d 1 1 x"]


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_pipe_of_single_bytes_is_read_like_a_file(tmp_path, compress):
    os.mkfifo(tmp_path / "pipe")

    def write():
        with (tmp_path / "pipe").open("wb", buffering=0) as pipe:
            for byte in compress(b"one\ntwo\n"):
                pipe.write(bytes([byte]))

    writer = threading.Thread(target=write)
    writer.start()
    assert texts(str(tmp_path / "pipe")) == ["one", "two"]
    writer.join()


def test_line_of_a_pipe_is_yielded_before_the_next_is_written(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(writing, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdin", stdin)
        pipe.write(b"the first of them\n")
        found = inputs.lines("-")
        assert next(found).text == "the first of them\n"
        pipe.write(b"2\n")
        assert next(found).text == "2\n"


def test_closed_standard_input_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputFault, match="standard input is closed"):
        texts("-")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\n".encode("utf-16"), "UTF-16; expected UTF-8"),
        (gzipped("a\n".encode("utf-16")), "UTF-16; expected UTF-8"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "zstd"),
        (b"PK\x03\x04\x14\x00", "zip archive"),
    ],
)
def test_unsupported_file_format_is_named(file, content, message):
    with pytest.raises(InputFault, match=rf"in.jsonl: cannot be read: it is .*{message}"):
        texts(file(content))


def test_byte_order_marks_are_removed_even_from_concatenated_files(file):
    assert texts(file(b"\xef\xbb\xbf{}\n\xef\xbb\xbf{}\n")) == ["{}", "{}"]


def test_only_line_feeds_end_lines(file):
    assert texts(file("a\u2028b\x85c\x0bd\n")) == ["a\u2028b\x85c\x0bd"]


def test_standard_input_is_a_dash(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n")))
    reading = inputs.lines("-")
    assert next(reading).checked() == "one\n"
    with pytest.raises(InputFault, match="standard input:2: not UTF-8"):
        next(reading).checked()


def test_invalid_byte_is_an_error_only_in_a_field_that_is_used(file):
    (line,) = inputs.lines(file(b'{"_id": "d", "text": "right", "url": "\xff"}'))
    assert inputs.chunk_of(line).text == "right"
    (line,) = inputs.lines(file(b'{"_id": "d", "text": "a\xff"}'))
    with pytest.raises(InputFault, match=r"in.jsonl:1: text: not UTF-8: invalid byte at character 1"):
        inputs.chunk_of(line)


def test_overlong_lines_are_skipped_if_they_are_counted(file):
    skipped = inputs.Skipped()
    source = file("one\n" + "x" * 100 + "\ntwo\n" + "x" * 8 + "\n" + "y" * 50)
    assert [line.number for line in inputs.lines(source, max_bytes=8, skipped=skipped)] == [1, 3]
    assert str(skipped) == f"3 invalid lines skipped, the first: {source}:2: longer than 8 bytes"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"12345678\n", r"in.jsonl:1: longer than 8 bytes"),
        (gzipped(b"a\n" * 9999)[:-9], r"in.jsonl: cannot be read after line \d+: Compressed file ended"),
        (bz2.compress(b"a\n" * 9999)[:-9], r"in.jsonl: cannot be read.*: Compressed file ended"),
        (lzma.compress(b"a\n" * 9999)[:-9], r"in.jsonl: cannot be read.*: Compressed file ended"),
        (gzipped(b"a\n")[:-8] + b"12345678", r"in.jsonl: cannot be read.*: CRC check failed"),
        (b"\x1f\x8bnot gzip", r"in.jsonl: cannot be read"),
        (bz2.compress(b"a\n" * 9)[:20] + b"x" * 40, r"in.jsonl: cannot be read: Invalid data stream"),
        (lzma.compress(b"a\n" * 9)[:20] + b"x" * 40, r"in.jsonl: cannot be read: Corrupt input data"),
    ],
)
def test_unreadable_file_is_reported_with_the_line(file, content, message):
    with pytest.raises(InputFault, match=message):
        texts(file(content), max_bytes=8)


def test_missing_file_and_folder_are_reported(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputFault, match="cannot be read"):
            texts(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "q:7: not JSON"),
        ("[" * 100_000, "q:7: not JSON: nested too deep"),
        ("[]", "q:7: expected a JSON object, found list"),
        ("9" * 5_000, "q:7: expected a JSON object, found number"),
        ('{"text": "a"}', "q:7: _id: is missing"),
        ('{"_id": "", "text": "a"}', "q:7: _id: must be one word"),
        ('{"_id": "a b", "text": "a"}', "q:7: _id: must be one word"),
        ('{"_id": true, "text": "a"}', "q:7: _id: expected a text, found bool"),
        ('{"_id": "1"}', "q:7: text: is missing"),
        ('{"_id": "a\\u0000", "text": "a"}', "q:7: _id: must be one word"),
        ('{"_id": "\\udcff", "text": "a"}', "q:7: _id: not Unicode: a lone surrogate at character 0"),
        ('{"_id": "1", "text": null}', "q:7: text: is null; expected a text"),
        ('{"_id": "1", "text": 1' + "0" * 5_000 + "}", "q:7: text: expected a text, found number"),
        ('{"_id": "1", "text": " "}', "q:7: text: must not be blank"),
        ('{"_id": "1", "text": 5}', "q:7: text: expected a text, found number"),
        ('{"_id": "1", "text": "\\ud800"}', "q:7: text: not Unicode: a lone surrogate at character 0"),
    ],
)
def test_invalid_query_is_reported_with_line_and_field(text, message):
    with pytest.raises(InputFault) as fault:
        inputs.query_of(Line("q", 7, text))
    assert str(fault.value).startswith(message)


@pytest.mark.parametrize("written", ["12", "9.0", "-3", "1" * 5_000, "1e400"])
def test_id_may_be_a_number_as_it_is_written(written):
    assert inputs.query_of(Line("q", 1, f'{{"_id": {written}, "text": "a"}}')).id == written


@pytest.mark.parametrize("name", ["a\u00a0b", "文\u3000件", "a\u2028b", "a\x85b"])
def test_id_may_contain_blanks_that_separate_no_columns(name):
    assert inputs.query_of(Line("q", 1, json.dumps({"_id": name, "text": "a"}))).id == name
    assert inputs.run_line_of(Line("r", 1, f"{name} Q0 {name} 1 0.5 x\n")) == (name, name, 0.5)


@pytest.mark.parametrize("title", ["", '"title": "", ', '"title": null, '])
def test_document_needs_no_title_and_may_be_empty(title):
    assert inputs.chunk_of(Line("c", 1, f'{{"_id": "d", {title}"text": ""}}')).model_text == ""


def test_unused_fields_may_contain_anything():
    rest = '"metadata": {"n": ' + "9" * 5_000 + ', "x": NaN, "s": "\\ud800"}'
    assert inputs.chunk_of(Line("c", 1, f'{{"_id": "d", "text": "t", {rest}}}')).text == "t"


def test_input_fault_carries_the_id_if_it_could_be_read():
    with pytest.raises(InputFault) as fault:
        inputs.chunk_of(Line("c", 1, '{"_id": "d", "title": 5, "text": "t"}'))
    assert fault.value.about == "d"
    with pytest.raises(InputFault) as fault:
        inputs.chunk_of(Line("c", 1, '{"_id": "d'))
    assert fault.value.about is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 d 1 0.5", "r:1: expected six columns"),
        ("q Q0 d 1 high bm25", "r:1: score: expected a number"),
        ("q Q0 d 1 nan bm25", "r:1: score: expected a finite number"),
        ("q Q0 d 1 inf bm25", "r:1: score: expected a finite number"),
        ("q Q0 d 1 1e999 bm25", "r:1: score: expected a finite number"),
        ("q Q0 d 1 1_0 bm25", "r:1: score: expected a number"),
        ("q Q0 d 1 ٣ bm25", "r:1: score: expected a number"),
        ("q Q0 d\0 1 1 bm25", "r:1: not text: a NUL at character 6"),
        ("q Q0 d\udcff 1 1 bm25", "r:1: not UTF-8: invalid byte at character 6"),
    ],
)
def test_invalid_line_of_a_run_is_reported(text, message):
    with pytest.raises(InputFault) as fault:
        inputs.run_line_of(Line("r", 1, text))
    assert str(fault.value).startswith(message)


@pytest.mark.parametrize(
    "content",
    [
        "query-id\tcorpus-id\tscore\nq\td\t2\n",
        "query_id doc_id rel\nq d 2\n",
        "qid\tpid\trel\nq\td\t2\n",
        "QID\t0\tPID\tLabel\nq\t0\td\t2\n",
        "topic iter docno relevance\nq 0 d 2\n",
        "corpus-id\tquery-id\tscore\nd\tq\t2\n",
        "q\td\t2\n",
        "q\td\t2.0\n",
        "q d +2e0\n",
        "q 0 d 2\n",
        "q  0\td \t 2\r\n\r\n",
        "\n\nq d 2\n",
        "\ufeffquery-id corpus-id score\r\nq d 2\r\n",
        "q d 2\nq d 2\n",
        "#qid pid rel\nq d 2\n",
        "q d 2\nq d 2.0",
    ],
)
def test_judgements_may_have_a_header_or_four_columns(file, content):
    assert inputs.judgements(file(content)) == {"q": {"d": 2}}


def test_judgements_of_other_queries_may_be_invalid(file):
    skipped = inputs.Skipped()
    source = file("other a b c d\nq d 1\nother d high\nlone\nother d 1\n")
    assert inputs.judgements(source, queries={"q"}, skipped=skipped) == {"q": {"d": 1}}
    assert skipped.lines == 3
    assert str(skipped.first).endswith("found 5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q d\n", ":1: expected three columns"),
        ("q,d,1\n", ":1: expected three columns .* separated by tabs or spaces, found 1"),
        ("q d high\n", ":1: score: expected a number, found 'high'"),
        ("q d 1\nquery-id corpus-id score\n", ":2: score: expected a number, found 'score'"),
        ("q d 0.5\n", ":1: score: expected a whole number, found '0.5'"),
        ("q d nan\n", ":1: score: expected a finite number"),
        (f"q d {'9' * 5_000}\n", ":1: score: expected a finite number"),
        ("q d 1\nq d 0\n", ":2: corpus-id: query q and document d have two different judgements"),
        ("q d 0\nq d 1\n", ":2: corpus-id: query q and document d have two different judgements"),
        ("", "in.jsonl: contains no judgements"),
        ("query-id corpus-id score\n", "in.jsonl: contains no judgements"),
        (b"q d\xff 1\n", ":1: not UTF-8"),
        (b"q\0 d 1\n", ":1: not text: a NUL"),
    ],
)
def test_invalid_judgements_are_reported(file, content, message):
    with pytest.raises(InputFault, match=message):
        inputs.judgements(file(content))


@pytest.mark.parametrize("content", ["q,d,1\nother,d,1\n", '{"query": "q"}\n', "other a b c d\n"])
def test_judgements_without_a_valid_line_are_a_file_of_another_format(file, content):
    with pytest.raises(InputFault, match=r":1: expected three columns"):
        inputs.judgements(file(content), queries={"q"}, skipped=inputs.Skipped())


def test_invalid_job_is_reported_with_every_invalid_field():
    with pytest.raises(InputFault, match=r"j:3: query: .*blank; chunks: .*at least 1"):
        inputs.job_of(Line("j", 3, '{"query": "", "chunks": []}'))


def test_line_of_the_longest_length_is_read_and_one_byte_more_is_not(file):
    assert texts(file("1234567\n"), max_bytes=8) == ["1234567"]
    with pytest.raises(InputFault, match=r"in.jsonl:1: longer than 8 bytes"):
        texts(file("12345678\n"), max_bytes=8)


def test_truncated_file_names_the_last_line_that_was_read(file):
    torn = gzipped(b"a\n")[:-8] + gzipped(b"a\n")[-4:] * 2
    with pytest.raises(InputFault, match=r"cannot be read: CRC check failed|cannot be read after line 1: CRC"):
        texts(file(torn))
    with pytest.raises(InputFault, match=r"cannot be read: .*invalid"):
        texts(file(gzipped(b"a\n")[:10] + b"\xff" * 20))
    skipped = inputs.Skipped()
    for number in (3, 5):
        skipped.add(Line("s", number, "").fault("wrong"))
    assert str(skipped) == "2 invalid lines skipped, the first: s:3: wrong"


@pytest.mark.parametrize("title", ["0", "false", "[]", "{}"])
def test_title_is_a_text_or_null(title):
    with pytest.raises(InputFault, match=r"c:1: title: expected a text, found "):
        inputs.chunk_of(Line("c", 1, f'{{"_id": "d", "title": {title}, "text": "t"}}'))


def test_invalid_json_is_reported_with_its_column_from_1():
    with pytest.raises(InputFault, match=r"^q:2: not JSON: .* at column 9$"):
        inputs.query_of(Line("q", 2, '{"_id": nope}'))


@pytest.mark.parametrize("written", ["x" * 50, "9" * 400, "0." + "5" * 48])
def test_invalid_number_is_quoted_by_its_beginning(file, written):
    with pytest.raises(InputFault) as fault:
        inputs.judgements(file(f"q d {written}\n"))
    assert str(fault.value).endswith(f"found {written[:40]!r}")
