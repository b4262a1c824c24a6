"""Work done so far, in a file: a re-scoring that was stopped goes on where it stood."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from .inputs import InputFault


class Answer(NamedTuple):
    """What is kept of a query's ranking: per document its name, its fused score and its raw logit."""

    query: str
    rows: list[tuple[str, float, float | None]]
    weights: str
    pairs: int = 0
    cached_pairs: int = 0
    truncated_pairs: int = 0


class Journal:
    """A file with a header, then one line of JSON per query, appended and flushed as queries are done.

    A line that was torn by an interruption is cut off. The file is locked: one process at a time works on an output.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._file = file
        self._places: dict[str, int] = {}
        self._weights: str | None = None

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any], *, restart: bool = False) -> Self:
        """Begin a journal, or go on with the one that is there.

        Raises:
            InputFault: if it was begun with another *header* (and not *restart*), is another kind of file, is in use,
                or cannot be written.
        """
        try:
            file = path.open("a+b")
        except OSError as error:
            raise InputFault(f"{path}: cannot be written: {error.strerror}") from None
        journal = cls(path, file)
        try:
            journal._lock()
            if restart:
                file.truncate(0)
            journal._begin_or_go_on(header)
        except BaseException:
            file.close()
            raise
        return journal

    @property
    def queries(self) -> set[str]:
        """The queries that are done."""
        return set(self._places)

    @property
    def weights(self) -> str | None:
        """The fingerprint of the weights that made the answers; None while there are none."""
        return self._weights

    def append(self, answer: Answer) -> None:
        """Write a query's answer.

        Raises:
            InputFault: if other weights made it than those before.
        """
        self._admit(answer.weights)
        self._places[answer.query] = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(answer._asdict()).encode() + b"\n")
        self._file.flush()

    def answer(self, query: str) -> Answer:
        """Read a query's answer."""
        self._file.seek(self._places[query])
        return _answer(self._file.readline())

    def remove(self) -> None:
        """Remove the file: the work is done."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; it stays if there is anything in it."""
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
            raise InputFault(f"{self.path}: another process is at work on this output") from None

    def _begin_or_go_on(self, header: Mapping[str, Any]) -> None:
        wanted = json.dumps(header, sort_keys=True).encode() + b"\n"
        self._file.seek(0)
        found = self._file.readline()
        if not found.endswith(b"\n") and wanted.startswith(found):  # nothing yet, or a torn header
            self._start(wanted)
        elif found != wanted:
            if not self._file.readline().endswith(b"\n") and _is_header(found):  # begun, and nothing done
                self._start(wanted)
                return
            raise InputFault(f"{self.path}: {_difference(found, header)}; add --restart to begin again")
        else:
            self._read_places()

    def _start(self, header: bytes) -> None:
        self._file.truncate(0)
        self._file.write(header)
        self._file.flush()

    def _read_places(self) -> None:
        place = self._file.tell()
        while (raw := self._file.readline()).endswith(b"\n"):
            try:
                answer = _answer(raw)
            except (ValueError, TypeError, KeyError):
                break
            self._places[answer.query] = place
            self._weights = answer.weights
            place = self._file.tell()
        self._file.truncate(place)

    def _admit(self, weights: str) -> None:
        self._weights = self._weights or weights
        if weights != self._weights:
            raise InputFault(
                f"{self.path}: the model's weights have changed ({self._weights} before, {weights} now); "
                "add --restart to begin again"
            )


def _answer(raw: bytes) -> Answer:
    fields = json.loads(raw)
    rows = [(str(name), float(score), logit) for name, score, logit in fields.pop("rows")]
    return Answer(rows=rows, **fields)


def _is_header(raw: bytes) -> bool:
    try:
        return str(json.loads(raw)["journal"]).startswith("rerankq rescore")
    except (ValueError, TypeError, KeyError):
        return False


def _difference(found: bytes, header: Mapping[str, Any]) -> str:
    try:
        before = json.loads(found)
        changed = [
            f"{key} ({before[key]} before, {value} now)" for key, value in header.items() if before[key] != value
        ]
    except (ValueError, TypeError, KeyError):
        return "this is not the file of a re-scoring that was stopped"
    return f"begun with another {', another '.join(changed)}"
