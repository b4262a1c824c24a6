"""Read what a person's files hold, line by line; what is wrong is said with file, line and field."""

from __future__ import annotations

import gzip
import io
import json
import math
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..contract import Chunk, RerankJob, parse_job
from ..errors import JobRejected

STDIN = "-"

MAX_LINE_BYTES = 64 * 2**20
"""A line longer than this is a file of another kind; refused before it fills the memory."""


class InputFault(Exception):
    """Raised when the command line or an input file is wrong; the message names the place."""


class Line(NamedTuple):
    """A line of a file, with the place to name when it is wrong; ``number`` counts from 1."""

    source: str
    number: int
    text: str

    def fault(self, reason: str, field: str = "") -> InputFault:
        """Say what is wrong here.

        >>> print(Line("q.jsonl", 3, "{}").fault("is missing", "_id"))
        q.jsonl:3: _id: is missing
        """
        return InputFault(f"{self.source}:{self.number}: {field}: {reason}" if field else f"{self.place}: {reason}")

    @property
    def place(self) -> str:
        """The file and the line."""
        return f"{self.source}:{self.number}"


class Query(NamedTuple):
    """A query of a collection."""

    id: str
    text: str


class RunLine(NamedTuple):
    """What the first stage gave a chunk for a query."""

    query: str
    chunk: str
    score: float


def lines(source: str, *, max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Read a file's lines that are not blank; ``-`` is standard input, and gzip is recognised by its first bytes.

    Raises:
        InputFault: if the file cannot be read, is not UTF-8, or has a line of more than *max_bytes*.
    """
    number = 0
    name = "standard input" if source == STDIN else source
    with _opened(source) as file:
        while raw := file.readline(max_bytes + 1):
            number += 1
            if len(raw) > max_bytes:
                raise Line(name, number, "").fault(f"longer than {max_bytes} bytes")
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise Line(name, number, "").fault(f"not UTF-8: {error.reason} at byte {error.start}") from None
            if text.strip():
                yield Line(name, number, text)


def job_of(line: Line) -> RerankJob:
    """Read a :class:`RerankJob` from a line of JSON.

    Raises:
        InputFault: naming every field that is wrong.
    """
    try:
        return parse_job(line.text)
    except JobRejected as error:
        raise line.fault(str(error)) from None


def query_of(line: Line) -> Query:
    """Read a query in the BEIR form.

    >>> query_of(Line("q.jsonl", 1, '{"_id": "7", "text": "why tides?", "split": "test"}'))
    Query(id='7', text='why tides?')
    """
    record = _record(line)
    query = Query(_id(line, record), _text(line, record, "text"))
    if not query.text.strip():
        raise line.fault("must not be blank", "text")
    return query


def chunk_of(line: Line) -> Chunk:
    """Read a document in the BEIR form; a title may be missing.

    >>> chunk_of(Line("c.jsonl", 1, '{"_id": "d1", "title": "Tides", "text": "The moon pulls."}')).model_text
    'Tides The moon pulls.'
    """
    record = _record(line)
    return Chunk(id=_id(line, record), title=_text(line, record, "title", missing=""), text=_text(line, record, "text"))


def run_line_of(line: Line) -> RunLine:
    """Read a line of a TREC run: query, ``Q0``, document, rank, score, name. The rank is not used.

    >>> run_line_of(Line("in.trec", 1, "q1 Q0 d9 1 12.5 bm25"))
    RunLine(query='q1', chunk='d9', score=12.5)
    """
    columns = line.text.split()
    if len(columns) != 6:
        raise line.fault(f"expected six columns (query Q0 document rank score name), found {len(columns)}")
    query, _, chunk, _, score, _ = columns
    return RunLine(query, chunk, _finite(line, score))


def judgements(source: str) -> dict[str, dict[str, int]]:
    """Read judgements: three columns (query-id, corpus-id, score) with or without a header, or TREC's four.

    Answers each query's documents with their grades; above zero is relevant.
    """
    grades: dict[str, dict[str, int]] = {}
    for line in lines(source):
        columns = line.text.split()
        if len(columns) not in {3, 4}:
            raise line.fault(f"expected three columns (query-id corpus-id score) or TREC's four, found {len(columns)}")
        if line.number == 1 and columns[-1].lower() in {"score", "grade", "relevance", "label"}:
            continue
        query, chunk = columns[0], columns[-2]
        if chunk in grades.setdefault(query, {}):
            raise line.fault(f"query {query} and document {chunk} are judged twice", "corpus-id")
        grades[query][chunk] = _grade(line, columns[-1])
    return grades


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    try:
        if source == STDIN:
            yield _unpacked(sys.stdin.buffer)
            return
        with Path(source).open("rb") as file:
            yield _unpacked(file)
    except (OSError, EOFError, zlib.error) as error:
        # gzip.BadGzipFile is an OSError.
        reason = getattr(error, "strerror", None) or str(error)
        raise InputFault(f"{source}: cannot be read: {reason}") from None


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    peekable = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)  # type: ignore[type-var]
    if peekable.peek(2)[:2] == b"\x1f\x8b":
        # Buffered: a GzipFile's own readline is slow.
        return io.BufferedReader(gzip.GzipFile(fileobj=peekable))
    return peekable


def _record(line: Line) -> Mapping[str, Any]:
    try:
        record = json.loads(line.text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        )
        raise line.fault(f"not JSON: {reason}") from None
    if not isinstance(record, dict):
        raise line.fault("expected a JSON object")
    return record


def _id(line: Line, record: Mapping[str, Any]) -> str:
    value = record.get("_id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = _text(line, record, "_id")
    if not name or name.split() != [name]:
        raise line.fault("must be one word: a run has its columns parted by spaces", "_id")
    return name


def _text(line: Line, record: Mapping[str, Any], field: str, *, missing: str | None = None) -> str:
    value = record.get(field, missing)
    if value is None:
        raise line.fault("is missing", field)
    if not isinstance(value, str):
        raise line.fault(f"expected a text, found {type(value).__name__}", field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise line.fault(f"not Unicode: a lone surrogate at character {error.start}", field) from None
    return value


def _finite(line: Line, written: str) -> float:
    try:
        score = float(written)
    except ValueError:
        raise line.fault(f"expected a number, found {written!r}", "score") from None
    if not math.isfinite(score):
        raise line.fault(f"expected a finite number, found {written!r}", "score")
    return score


def _grade(line: Line, written: str) -> int:
    try:
        return int(written)
    except ValueError:
        raise line.fault(f"expected an integer, found {written!r}", "score") from None
