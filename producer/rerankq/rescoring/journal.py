"""The progress of a re-scoring, in a file: one that was interrupted is resumed."""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from .inputs import InputFault
from .output import WriteFailed

KIND = "rerankq rescore"
"""Prefix of the header's first field; the version follows."""


class Answer(NamedTuple):
    """What is kept of a query's ranking: each document's id, fused score and raw logit.

    ``model`` and ``weights`` are the model's name and fingerprint; ``missing`` are weighted signals that no chunk had.
    """

    query: str
    rows: list[tuple[str, float, float | None]]
    model: str
    weights: str
    pairs: int = 0
    cached_pairs: int = 0
    truncated_pairs: int = 0
    missing: tuple[str, ...] = ()


class Journal:
    """A file with a header, then one line of JSON per query, appended as queries are done.

    A last line that is incomplete is cut off. The file is locked: one process at a time writes an output.
    """

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self.path = path
        # Unbuffered: a write that failed for want of space must not be repeated when the file is closed.
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}
        self._model = ("", "")

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any], *, restart: bool = False) -> Self:
        """Start a journal, or resume the one that exists.

        Raises:
            InputFault: if it was started with another *header* (and not *restart*), is another kind of file, is in
                use, or cannot be written.
        """
        try:
            file = io.FileIO(path, "a+")
        except OSError as error:
            raise InputFault(f"{path}: cannot be written: {error.strerror}") from None
        journal = cls(path, file)
        try:
            journal._lock()
            journal._start_or_resume(_line(header), restart=restart)
        except OSError as error:
            file.close()
            raise InputFault(f"{path}: cannot be written: {error.strerror}") from None
        except BaseException:
            file.close()
            raise
        return journal

    @property
    def queries(self) -> set[str]:
        """The queries that are done."""
        return set(self._places)

    @property
    def model(self) -> tuple[str, str]:
        """The name and the fingerprint of the model that made the answers; empty if there are none."""
        return self._model

    def append(self, answer: Answer) -> None:
        """Write a query's answer.

        Raises:
            InputFault: if the model's weights differ from those of earlier answers.
            WriteFailed: if it cannot be written; earlier answers are kept.
        """
        self._check_weights(answer)
        raw = _line(answer._asdict())
        place = self._file.seek(0, os.SEEK_END)
        try:
            self._write(raw)
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(place)
            raise WriteFailed(f"{self.path}: cannot be written: {error.strerror}") from None
        self._places[answer.query] = place, len(raw)

    def answer(self, query: str) -> Answer:
        """Read a query's answer."""
        place, size = self._places[query]
        return _answer(os.pread(self._file.fileno(), size, place))

    def remove(self) -> None:
        """Remove the file: all queries are done."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file, and remove it if it holds no answer."""
        if not self._places:
            self.remove()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputFault(f"{self.path}: another process is writing this output") from None

    def _start_or_resume(self, header: bytes, *, restart: bool) -> None:
        self._file.seek(0)
        with open(self._file.fileno(), "rb", closefd=False) as file:
            found = file.readline()
            torn = not found.endswith(b"\n") and header.startswith(found)
            if torn or (_is_header(found) and (restart or not file.readline().endswith(b"\n"))):  # it holds no answer
                self._file.truncate(0)
                self._write(header)
            elif found != header:
                raise InputFault(f"{self.path}: {_difference(found, header)}")
            else:
                file.seek(len(header))
                self._read_places(file)

    def _read_places(self, file: io.BufferedReader) -> None:
        place = file.tell()
        while (raw := file.readline()).endswith(b"\n"):
            try:
                answer = _answer(raw)
            except (ValueError, TypeError, KeyError):
                break
            self._places[answer.query] = place, len(raw)
            self._model = answer.model, answer.weights
            place += len(raw)
        self._file.truncate(place)

    def _write(self, raw: bytes) -> None:
        while raw:
            raw = raw[self._file.write(raw) or 0 :]

    def _check_weights(self, answer: Answer) -> None:
        if self._places and answer.weights != self._model[1]:
            raise InputFault(
                f"{self.path}: the model's weights have changed ({self._model[1]} before, {answer.weights} now); "
                "add --restart to start again"
            )
        self._model = answer.model, answer.weights


def has_answers(path: Path, header: Mapping[str, Any]) -> bool:
    """Whether the file has this *header* and at least one answer."""
    try:
        with path.open("rb") as file:
            return file.readline() == _line(header) and file.readline().endswith(b"\n")
    except OSError:
        return False


def _line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _answer(raw: bytes) -> Answer:
    fields = json.loads(raw)
    rows = [(str(name), float(score), logit) for name, score, logit in fields.pop("rows")]
    return Answer(rows=rows, missing=tuple(fields.pop("missing")), **fields)


def _is_header(raw: bytes) -> bool:
    try:
        return str(json.loads(raw)["journal"]).startswith(KIND)
    except (ValueError, TypeError, KeyError):
        return False


def _difference(found: bytes, header: bytes) -> str:
    if not _is_header(found):
        return "not the journal of a re-scoring; move it away"
    before, now = json.loads(found), json.loads(header)
    changed = [
        f"{key} ({before.get(key)} before, {value} now)" for key, value in now.items() if before.get(key) != value
    ]
    return f"started with another {', another '.join(changed)}; add --restart to start again"
