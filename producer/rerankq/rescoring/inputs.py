"""Input files, read line by line; a fault is reported with file, line and field."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import re
import sys
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ..contract import Chunk, RerankJob, parse_job
from ..errors import JobRejected

STDIN = "-"

MAX_LINE_BYTES = 64 * 2**20
"""Longest line in bytes: a longer one means a file of another format, and would fill the memory."""

COMPRESSED: tuple[tuple[re.Pattern[bytes], Callable[[IO[bytes]], object]], ...] = (
    (re.compile(rb"\x1f\x8b"), lambda file: gzip.GzipFile(fileobj=file)),
    # A text may begin with "BZh9"; the bytes after it mark a block, or an empty file.
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.LZMAFile),
)
"""Signatures of compressed files, and what decompresses them; names do not matter."""

UNREADABLE = (
    (re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16; expected UTF-8"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "compressed with zstd; expected plain text, gzip, bzip2 or xz"),
    (re.compile(rb"PK\x03\x04"), "a zip archive; expected plain text, gzip, bzip2 or xz"),
)
"""Signatures of files that cannot be read, and what they are."""

_LONGEST_SIGNATURE = 10

# Only ASCII separates columns, as for trec_eval: an id may contain a no-break or an ideographic space.
_BLANKS = " \t\n\v\f\r"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)

# Names for the columns of judgements, in lower case and with hyphens.
_QUERY_NAMES = {"query-id", "query", "qid", "q-id", "queryid", "topic", "topic-id"}
_CHUNK_NAMES = {"corpus-id", "doc-id", "document-id", "document", "doc", "did", "docid", "docno", "pid", "passage-id"}
_GRADE_NAMES = {"score", "grade", "rel", "relevance", "relevancy", "label", "judgement", "judgment"}


class InputFault(Exception):
    """Raised when the command line or an input file is wrong; the message names the option, or the file and line.

    ``about`` is the id of the invalid record, if it could be read.
    """

    def __init__(self, message: str, *, about: str | None = None) -> None:
        super().__init__(message)
        self.about = about


class Line(NamedTuple):
    """A line of a file; ``number`` counts from 1.

    A byte that is not UTF-8 is a lone surrogate in ``text``: it is an error only in a field that is used.
    """

    source: str
    number: int
    text: str

    def fault(self, reason: str, field: str = "", *, about: str | None = None) -> InputFault:
        """Make an error that names this line.

        >>> print(Line("q.jsonl", 3, "{}").fault("is missing", "_id"))
        q.jsonl:3: _id: is missing
        """
        return InputFault(f"{self.place}: {field}: {reason}" if field else f"{self.place}: {reason}", about=about)

    @property
    def place(self) -> str:
        """The file and the line."""
        return f"{self.source}:{self.number}"

    def checked(self) -> str:
        """Return the text, all of which must be UTF-8.

        Raises:
            InputFault: if a byte is not UTF-8.
        """
        wrong = _surrogate(self.text)
        if wrong is not None:
            raise self.fault(f"not UTF-8: invalid byte at character {wrong}")
        return self.text

    def columns(self) -> list[str]:
        r"""Split at tabs and spaces.

        >>> Line("r", 1, "q1\tQ0  d1 1\r\n").columns()
        ['q1', 'Q0', 'd1', '1']

        Raises:
            InputFault: if it is not UTF-8, or contains a NUL.
        """
        text = self.checked()
        if "\0" in text:
            raise self.fault(f"not text: a NUL at character {text.index(chr(0))}")
        return [column for column in re.split(f"[{_BLANKS}]+", text) if column]


class Query(NamedTuple):
    """A query of a collection."""

    id: str
    text: str


class RunLine(NamedTuple):
    """A chunk's first-stage score for a query."""

    query: str
    chunk: str
    score: float


@dataclass
class Skipped:
    """Invalid lines that were not needed: how many, and the fault of the first."""

    lines: int = 0
    first: InputFault | None = None

    def add(self, fault: InputFault) -> None:
        """Count a line."""
        self.lines += 1
        self.first = self.first or fault

    def __str__(self) -> str:
        return f"{self.lines} invalid line{'s' if self.lines > 1 else ''} skipped, the first: {self.first}"


def lines(source: str, *, max_bytes: int = MAX_LINE_BYTES, skipped: Skipped | None = None) -> Iterator[Line]:
    """Read a file's lines that are not blank; ``-`` is standard input. Gzip, bzip2 and xz are decompressed.

    Raises:
        InputFault: if the file cannot be read; for a line of more than *max_bytes* if no *skipped* counts it.
    """
    number = 0
    name = "standard input" if source == STDIN else source
    try:
        with opened(source) as file:
            while raw := file.readline(max_bytes + 1):
                number += 1
                if len(raw) > max_bytes:
                    fault = Line(name, number, "").fault(f"longer than {max_bytes} bytes")
                    if skipped is None:
                        raise fault
                    skipped.add(fault)
                    _skip_to_the_next_line(file, raw)
                    continue
                # Concatenated files have byte order marks in the middle too.
                text = raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
                if text.strip(_BLANKS):
                    yield Line(name, number, text)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        # gzip.BadGzipFile, and what bz2 raises, are OSErrors.
        reason = getattr(error, "strerror", None) or str(error)
        after = f" after line {number}" if number else ""
        raise InputFault(f"{name}: cannot be read{after}: {reason}") from None


def job_of(line: Line) -> RerankJob:
    """Read a :class:`RerankJob` from a line of JSON.

    Raises:
        InputFault: naming every field that is wrong.
    """
    try:
        return parse_job(line.checked())
    except JobRejected as error:
        raise line.fault(str(error)) from None


def query_of(line: Line) -> Query:
    """Read a query in the BEIR form.

    >>> query_of(Line("q.jsonl", 1, '{"_id": "7", "text": "why tides?", "split": "test"}'))
    Query(id='7', text='why tides?')
    """
    record = _Record(line)
    query = Query(record.id, record.text("text"))
    if not query.text.strip():
        raise record.fault("must not be blank", "text")
    return query


def chunk_of(line: Line) -> Chunk:
    """Read a document in the BEIR form; a title may be missing or null.

    >>> chunk_of(Line("c.jsonl", 1, '{"_id": "d1", "title": "Tides", "text": "The moon pulls."}')).model_text
    'Tides The moon pulls.'
    """
    record = _Record(line)
    title = "" if record.fields.get("title") is None else record.text("title")
    return Chunk(id=record.id, title=title, text=record.text("text"))


def run_line_of(line: Line) -> RunLine:
    """Read a line of a TREC run: query, ``Q0``, document, rank, score, name. The rank is not used.

    >>> run_line_of(Line("in.trec", 1, "q1 Q0 d9 1 12.5 bm25"))
    RunLine(query='q1', chunk='d9', score=12.5)
    """
    columns = line.columns()
    if len(columns) != 6:
        raise line.fault(f"expected six columns (query Q0 document rank score name), found {len(columns)}")
    query, _, chunk, _, score, _ = columns
    return RunLine(query, chunk, _finite(line, score))


class JudgementColumns(NamedTuple):
    """Positions of the columns of judgements."""

    query: int = 0
    chunk: int = -2
    grade: int = -1


def judgement_header(cells: Sequence[str]) -> JudgementColumns | None:
    """Read the positions of the columns from a header; None if these cells are no header.

    >>> judgement_header(["qid", "pid", "rel"]), judgement_header(["corpus-id", "query-id", "score"])
    (JudgementColumns(query=0, chunk=1, grade=2), JudgementColumns(query=1, chunk=0, grade=2))
    >>> judgement_header(["q1", "d1", "1"])
    """
    names = [cell.lower().replace("_", "-").lstrip("#") for cell in cells]
    if _NUMBER.fullmatch(cells[-1]) or not set(names) & (_QUERY_NAMES | _CHUNK_NAMES | _GRADE_NAMES):
        return None
    places = (
        next((at for at, name in enumerate(names) if name in known), usual)
        for known, usual in zip((_QUERY_NAMES, _CHUNK_NAMES, _GRADE_NAMES), JudgementColumns(), strict=True)
    )
    return JudgementColumns(*places)


def judgements(
    source: str, *, queries: Container[str] | None = None, skipped: Skipped | None = None
) -> dict[str, dict[str, int]]:
    """Read judgements: three columns (query-id, corpus-id, score) with or without a header, or TREC's four.

    Returns the grades by query and document; above zero is relevant. Only *queries* (None = all) are kept; invalid
    lines of others are *skipped*.

    Raises:
        InputFault: if a line that is needed is invalid, or no line is valid.
    """
    grades: dict[str, dict[str, int]] = {}
    columns = JudgementColumns()
    first: InputFault | None = None
    valid = False
    for at, line in enumerate(lines(source)):
        cells = line.columns()
        header = judgement_header(cells) if at == 0 else None
        if header is not None:
            columns = header
            continue
        needed = queries is None or (len(cells) > columns.query and cells[columns.query] in queries)
        try:
            query, chunk, grade = _judgement(line, cells, columns)
            if needed and grades.setdefault(query, {}).setdefault(chunk, grade) != grade:
                raise line.fault(f"query {query} and document {chunk} have two different judgements", "corpus-id")
            valid = True
        except InputFault as fault:
            first = first or fault
            if needed or skipped is None:
                raise
            skipped.add(fault)
    if not valid:
        # No line is valid: a file of another format.
        raise first or InputFault(f"{source}: contains no judgements")
    return grades


def _judgement(line: Line, cells: Sequence[str], columns: JudgementColumns) -> tuple[str, str, int]:
    if len(cells) not in {3, 4}:
        raise line.fault(
            "expected three columns (query-id corpus-id score) or TREC's four, separated by tabs or spaces, "
            f"found {len(cells)}"
        )
    return cells[columns.query], cells[columns.chunk], _grade(line, cells[columns.grade])


@contextmanager
def opened(source: str) -> Iterator[IO[bytes]]:
    """Open a file, or standard input for ``-``; what is compressed is read decompressed.

    Raises:
        InputFault: if it is of a kind that cannot be read.
        OSError: if it cannot be opened.
    """
    if source != STDIN:
        with Path(source).open("rb") as file:
            yield _decompressed(source, file)
    elif sys.stdin is None:
        raise InputFault("standard input is closed")
    else:
        yield _decompressed("standard input", sys.stdin.buffer)


def is_compressed(source: str) -> bool:
    """Whether a file begins as one that :func:`opened` decompresses, or cannot read."""
    with Path(source).open("rb") as file:
        beginning = file.read(_LONGEST_SIGNATURE)
    return any(signature.match(beginning) for signature, _ in (*COMPRESSED, *UNREADABLE))


class _Rewound(io.RawIOBase):
    """A stream whose first bytes have been read already."""

    def __init__(self, beginning: bytes, rest: IO[bytes]) -> None:
        self._beginning = beginning
        # Never wait for a full buffer: the writer of a pipe may wait for an answer first.
        self._read = getattr(rest, "read1", rest.read)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part: bytes = self._beginning[: len(buffer)] or self._read(len(buffer))
        self._beginning = self._beginning[len(part) :]
        buffer[: len(part)] = part
        return len(part)


def _decompressed(name: str, file: IO[bytes]) -> IO[bytes]:
    beginning = file.readline(_LONGEST_SIGNATURE)
    whole = cast(IO[bytes], io.BufferedReader(_Rewound(beginning, file), 2**16))
    for signature, what in UNREADABLE:
        if signature.match(beginning):
            raise InputFault(f"{name}: cannot be read: it is {what}")
    for signature, decompress in COMPRESSED:
        if signature.match(beginning):
            return _decompressed(name, cast(IO[bytes], decompress(whole)))
    return whole


def _skip_to_the_next_line(file: IO[bytes], raw: bytes) -> None:
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(2**20)


class _Number(str):
    """A JSON number as it was written: of any size, and 9.0 stays "9.0"."""

    __slots__ = ()


class _Record:
    """A JSON object with an ``_id``."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.fields = _object(line)
        self._id: str | None = None
        found = self.fields.get("_id")
        name = str(found) if isinstance(found, _Number) else self.text("_id")
        if not name or set(name) & {*_BLANKS, "\0"}:
            raise self.fault("must be one word without blanks: they separate the columns of a run", "_id")
        self.id = self._id = name

    def fault(self, reason: str, field: str) -> InputFault:
        return self._line.fault(reason, field, about=self._id)

    def text(self, field: str) -> str:
        value = self.fields.get(field)
        if value is None:
            raise self.fault("is null; expected a text" if field in self.fields else "is missing", field)
        if isinstance(value, _Number) or not isinstance(value, str):
            raise self.fault(f"expected a text, found {_kind(value)}", field)
        wrong = _surrogate(value)
        if wrong is not None:
            in_json = _surrogate(self._line.text) is None
            what = "not Unicode: a lone surrogate" if in_json else "not UTF-8: invalid byte"
            raise self.fault(f"{what} at character {wrong}", field)
        return value


def _object(line: Line) -> Mapping[str, Any]:
    try:
        record = json.loads(line.text, parse_int=_Number, parse_float=_Number, parse_constant=_Number)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        )
        raise line.fault(f"not JSON: {reason}") from None
    if not isinstance(record, dict):
        raise line.fault(f"expected a JSON object, found {_kind(record)}")
    return record


def _kind(value: object) -> str:
    return "number" if isinstance(value, _Number) else type(value).__name__


def _surrogate(text: str) -> int | None:
    """Return the index of the first character that is not valid Unicode; None if there is none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _finite(line: Line, text: str) -> float:
    if not _NUMBER.fullmatch(text) and not re.fullmatch(r"(?i)[+-]?(inf(inity)?|nan)", text):
        raise line.fault(f"expected a number, found {text[:40]!r}", "score")
    score = float(text)
    if not math.isfinite(score):
        raise line.fault(f"expected a finite number, found {text[:40]!r}", "score")
    return score


def _grade(line: Line, text: str) -> int:
    grade = _finite(line, text)
    if not grade.is_integer():
        raise line.fault(f"expected a whole number, found {text[:40]!r}", "score")
    return int(grade)
