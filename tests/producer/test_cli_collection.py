import gzip
import json
import random

import pytest

from rerankq.cli import metrics
from rerankq.cli.collection import Collection
from rerankq.cli.inputs import InputFault

QUERIES = [("q2", "second"), ("q1", "first"), ("q3", "not in the run")]
DOCUMENTS = [("d1", "one"), ("d2", "two"), ("d3", "three"), ("d4", "not in the run")]
RUN = [("q1", "d1", 1.0), ("q2", "d3", 0.5), ("q1", "d2", 2.0), ("q1", "d3", 2.0)]


@pytest.fixture
def read(tmp_path):
    def read(queries=QUERIES, documents=DOCUMENTS, run=RUN, depth=100):
        write(tmp_path / "q.jsonl", (json.dumps({"_id": name, "text": text}) for name, text in queries))
        write(
            tmp_path / "c.jsonl.gz", (json.dumps({"_id": name, "title": "T", "text": text}) for name, text in documents)
        )
        write(tmp_path / "r.trec", (f"{query} Q0 {chunk} 1 {score} x" for query, chunk, score in run))
        names = {"queries": "q.jsonl", "corpus": "c.jsonl.gz", "run": "r.trec"}
        return Collection.read(**{what: str(tmp_path / name) for what, name in names.items()}, depth=depth)

    return read


def write(path, lines):
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_queries_come_in_the_order_of_the_run_even_where_their_lines_are_mixed(read):
    assert read().counts() == {"q1": 3, "q2": 1}


def test_a_query_has_its_chunks_best_first_with_the_score_of_the_run(read):
    first = read().first_stage("q1")
    assert first.query.text == "first"
    assert [(chunk.id, chunk.title, chunk.text, chunk.keyword_score) for chunk in first.chunks] == [
        ("d3", "T", "three", 2.0),
        ("d2", "T", "two", 2.0),
        ("d1", "T", "one", 1.0),
    ]


def test_a_depth_cuts_each_query_at_its_best(read):
    collection = read(depth=2)
    assert collection.counts() == {"q1": 2, "q2": 1}
    assert collection.scores("q1") == {"d2": 2.0, "d3": 2.0}


def test_the_order_is_that_of_trec_eval_for_random_runs(read):
    chance = random.Random(5)
    documents = [(f"d{number}", "x") for number in range(200)]
    run = [("q1", name, chance.randint(0, 20) / 4) for name, _ in documents]
    chunks = read(documents=documents, run=run, depth=50).first_stage("q1").chunks
    assert [chunk.id for chunk in chunks] == metrics.trec_order({name: score for _, name, score in run})[:50]


def test_documents_below_the_depth_may_be_missing_from_the_corpus(read):
    assert read(documents=[("d3", "three")], depth=1).counts() == {"q1": 1, "q2": 1}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"queries": QUERIES[:1]}, r"r.trec:1: query: q1 is not in .*q.jsonl$"),
        ({"documents": DOCUMENTS[:1]}, r"r.trec:2: document: d3 is not in .*c.jsonl.gz \(1 more like it\)"),
        ({"queries": [*QUERIES, ("q1", "again")]}, r"q.jsonl:4: _id: q1 stands here a second time"),
        ({"documents": [*DOCUMENTS, ("d1", "again")]}, r"c.jsonl.gz:5: _id: d1 stands here a second time"),
        ({"run": [*RUN, ("q1", "d1", 9.0)]}, r"r.trec:5: document: query q1 has document d1 twice"),
        ({"run": []}, r"r.trec: holds no line"),
    ],
)
def test_files_that_do_not_fit_together_are_said_with_their_place(read, files, said):
    with pytest.raises(InputFault, match=said):
        read(**files)


def test_a_query_that_is_not_there_is_a_key_error(read):
    with pytest.raises(KeyError):
        read().first_stage("nobody")
