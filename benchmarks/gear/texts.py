"""Questions with their first stage, from the judged collections that lie beside the repository."""

from __future__ import annotations

import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rerankq import Chunk, RerankJob

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


class Question(NamedTuple):
    """A query, and what its first stage found, best first."""

    query: str
    chunks: tuple[Chunk, ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What the model reads."""
        return [(self.query, chunk.model_text) for chunk in self.chunks]

    def job(self, **fields: Any) -> RerankJob:
        """Make a job of it."""
        return RerankJob(query=self.query, chunks=list(self.chunks), **fields)


def need(data: Path, *collections: str) -> None:
    """Leave with a clear message, and status 2, where a collection is absent."""
    absent = [name for name in collections if not (data / name / "corpus.jsonl.gz").is_file()]
    if absent:
        print(f"skipped: no collection {', '.join(absent)} in {data}; name the folder that holds it with --data")
        sys.exit(2)


class Judged(NamedTuple):
    """A question, the names of its chunks, and the grades of all that are relevant to it, found or not."""

    question: Question
    names: tuple[str, ...]
    grades: dict[str, int]


def questions(data: Path, collection: str, *, count: int, depth: int) -> list[Question]:
    """Read the first *count* questions for which BM25 found *depth* chunks, each with its best *depth*.

    Leaves where there are not so many: a benchmark over fewer would answer another question.
    """
    return [one.question for one in judged(data, collection, count=count, depth=depth)]


def judged(data: Path, collection: str, *, count: int, depth: int) -> list[Judged]:
    """Read the same questions, and what people judged relevant to them."""
    folder = data / collection
    corpus = {row["_id"]: Chunk(title=row.get("title", ""), text=row["text"]) for row in _rows(folder, "corpus")}
    found, grades = _first_stage(folder), _judgements(folder)
    asked = [
        Judged(Question(row["text"], tuple(corpus[one] for one in names)), tuple(names), grades[row["_id"]])
        for row in _rows(folder, "queries")
        if len(names := found[row["_id"]][:depth]) >= depth
    ]
    if len(asked) < count:
        print(f"{collection} holds {len(asked)} questions with {depth} chunks, not {count}: ask for fewer")
        sys.exit(2)
    return asked[:count]


def chunks(data: Path, collection: str) -> list[Chunk]:
    """Read all chunks of a collection."""
    return [Chunk(title=row.get("title", ""), text=row["text"]) for row in _rows(data / collection, "corpus")]


def _first_stage(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    with gzip.open(folder / "run.bm25.trec.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            query, _, chunk, place, *_ = line.split()
            found[query].append((int(place), chunk))
    return defaultdict(list, {query: [chunk for _, chunk in sorted(places)] for query, places in found.items()})


def _judgements(folder: Path) -> dict[str, dict[str, int]]:
    grades: dict[str, dict[str, int]] = defaultdict(dict)
    with gzip.open(folder / "qrels.tsv.gz", "rt", encoding="utf-8") as lines:
        next(lines)  # the header
        for line in lines:
            query, chunk, grade = line.split()
            grades[query][chunk] = int(grade)
    return grades


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
