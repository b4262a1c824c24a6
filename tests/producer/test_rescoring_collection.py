import gzip
import json
import random

import pytest

from rerankq.rescoring import metrics
from rerankq.rescoring.collection import Collection
from rerankq.rescoring.inputs import InputFault

QUERIES = [("q2", "second"), ("q1", "first"), ("q3", "not in the run")]
DOCUMENTS = [("d1", "one"), ("d2", "two"), ("d3", "three"), ("d4", "not in the run")]
RUN = [("q1", "d1", 1.0), ("q2", "d3", 0.5), ("q1", "d2", 2.0), ("q1", "d3", 2.0)]


@pytest.fixture
def read(tmp_path):
    def read(queries=QUERIES, documents=DOCUMENTS, run=RUN, depth=100, more=(), **options):
        write(tmp_path / "q.jsonl", (json.dumps({"_id": name, "text": text}) for name, text in queries))
        write(
            tmp_path / "c.jsonl.gz", (json.dumps({"_id": name, "title": "T", "text": text}) for name, text in documents)
        )
        write(tmp_path / "r.trec", (f"{query} Q0 {chunk} 1 {score} x" for query, chunk, score in run))
        names = {"queries": "q.jsonl", "corpus": "c.jsonl.gz", "run": "r.trec"}
        for name, content in dict(more).items():
            with (tmp_path / name).open("ab") as file:
                file.write(gzip.compress(content) if name.endswith(".gz") else content)
        if "qrels" in options:
            (tmp_path / "j.tsv").write_text(options["qrels"])
            options["qrels"] = str(tmp_path / "j.tsv")
        return Collection.read(**{what: str(tmp_path / name) for what, name in names.items()}, depth=depth, **options)

    return read


def write(path, lines):
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_queries_keep_the_order_of_the_run_even_if_their_lines_are_mixed(read):
    assert read().counts() == {"q1": 3, "q2": 1}


def test_chunks_of_a_query_are_best_first_with_the_score_of_the_run(read):
    first = read().first_stage("q1")
    assert first.query.text == "first"
    assert [(chunk.id, chunk.title, chunk.text, chunk.keyword_score) for chunk in first.chunks] == [
        ("d3", "T", "three", 2.0),
        ("d2", "T", "two", 2.0),
        ("d1", "T", "one", 1.0),
    ]


def test_depth_keeps_the_best_documents_of_each_query(read):
    collection = read(depth=2)
    assert collection.counts() == {"q1": 2, "q2": 1}
    assert collection.scores("q1") == {"d2": 2.0, "d3": 2.0}


def test_order_is_that_of_trec_eval_for_random_runs(read):
    chance = random.Random(5)
    documents = [(f"d{number}", "x") for number in range(200)]
    run = [("q1", name, chance.randint(0, 20) / 4) for name, _ in documents]
    chunks = read(documents=documents, run=run, depth=50).first_stage("q1").chunks
    assert [chunk.id for chunk in chunks] == metrics.trec_order({name: score for _, name, score in run})[:50]


def test_documents_below_the_depth_may_be_missing_from_the_corpus(read):
    assert read(documents=[("d3", "three")], depth=1).counts() == {"q1": 1, "q2": 1}


ODD_LINES = [
    b'{"_id": "a b", "text": "an id with a space"}',
    b'{"_id": "x"}',
    b'{"_id": "x", "text": null}',
    b'{"_id": "x", "text": " ", "title": 5}',
    b'{"_id": 9.0, "title": [], "text": 5}',
    b'{"_id": null, "text": "x"}',
    b'{"_id": "x", "text": "\\ud800"}',
    b'{"_id": "x", "text": "\xff"}',
    b'{"_id": "x", "te',
    b"\0\0\0",
    b"[1, 2]",
    b'{"_id": "x", "text": 1' + b"0" * 5_000 + b"}",
    b"[" * 100_000,
]


@pytest.mark.parametrize("odd", ODD_LINES)
def test_invalid_line_that_the_run_does_not_need_is_counted_and_reported(read, odd):
    # A title, or none of it, is nothing to a query.
    collection = read(more={"q.jsonl": odd.replace(b'" ", "title"', b'"", "title"') + b"\n", "c.jsonl.gz": odd + b"\n"})
    assert collection.counts() == {"q1": 3, "q2": 1}
    counted = {
        source.rsplit("/", 1)[1]: (skipped.lines, str(skipped)) for source, skipped in collection.skipped.items()
    }
    assert (counted["q.jsonl"][0], counted["c.jsonl.gz"][0]) == (1, 1)
    assert "1 invalid line skipped, the first: " in counted["c.jsonl.gz"][1]
    assert "c.jsonl.gz:5: " in counted["c.jsonl.gz"][1]


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (b'{"_id": "d1"}', "text: is missing"),
        (b'{"_id": "d1", "text": null}', "text: is null; expected a text"),
        (b'{"_id": "d1", "text": "x", "title": 5}', "title: expected a text, found number"),
        (b'{"_id": "d1", "text": "\xff"}', "text: not UTF-8: invalid byte at character 0"),
        (b'{"_id": "d1", "text": "\\ud800"}', "text: not Unicode: a lone surrogate at character 0"),
    ],
)
def test_invalid_line_that_the_run_needs_is_an_error_naming_it(read, odd, message):
    with pytest.raises(InputFault, match=rf"c.jsonl.gz:5: {message}"):
        read(more={"c.jsonl.gz": odd})


def test_missing_text_is_reported_with_the_lines_that_were_skipped(read):
    with pytest.raises(
        InputFault, match=r"d3 is not in .*c.jsonl.gz; 1 invalid line skipped, the first: .*c.jsonl.gz:3"
    ):
        read(documents=DOCUMENTS[:2], more={"c.jsonl.gz": b'{"_id": "d3", "te\n'})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"_id": "d1", "text": "x"}]', r"c.jsonl.gz:1: expected a JSON object, found list"),
        (b'[\n{"_id": "d1", "text": "x"},\n]', r"c.jsonl.gz:1: not JSON"),
        (b"id,text\nd1,x\n", r"c.jsonl.gz:1: not JSON"),
        (b"", r"c.jsonl.gz: is empty"),
    ],
)
def test_file_of_another_format_is_reported_by_its_first_line(read, content, message):
    with pytest.raises(InputFault, match=message):
        read(documents=[], more={"c.jsonl.gz": content})


def test_limit_takes_the_first_queries_and_needs_no_text_of_others(read):
    collection = read(limit=1, documents=DOCUMENTS[:3], queries=QUERIES[1:])
    assert collection.counts() == {"q1": 3}
    assert read(limit=99).counts() == {"q1": 3, "q2": 1}
    assert read(limit=1, run=RUN[1:]).counts() == {"q2": 1}


def test_judgements_are_read_for_queries_of_the_run_alone(read):
    collection = read(qrels="qid pid rel\nq1 d1 1\nq3 d1 1\nq9 d1 high\n", limit=1)
    assert collection.grades == {"q1": {"d1": 1}}
    with pytest.raises(InputFault, match=r"j.tsv:1: score: expected a number, found 'high'"):
        read(qrels="q1 d1 high\n")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"queries": QUERIES[:1]}, r"r.trec:1: query: q1 is not in .*q.jsonl$"),
        ({"documents": DOCUMENTS[:1]}, r"r.trec:2: document: d3 is not in .*c.jsonl.gz \(and 1 more\)"),
        ({"queries": [*QUERIES, ("q1", "again")]}, r"q.jsonl:4: _id: q1 was given before"),
        ({"documents": [*DOCUMENTS, ("d1", "again")]}, r"c.jsonl.gz:5: _id: d1 was given before"),
        ({"run": [*RUN, ("q1", "d1", 9.0)]}, r"r.trec:5: document: query q1 has document d1 twice"),
        ({"run": []}, r"r.trec: is empty"),
    ],
)
def test_files_that_do_not_match_are_reported_with_file_and_line(read, files, message):
    with pytest.raises(InputFault, match=message):
        read(**files)


def test_unknown_query_is_a_key_error(read):
    with pytest.raises(KeyError):
        read().first_stage("nobody")
