"""The answers of a batch so far, in a file that outlives whoever writes it."""

from __future__ import annotations

import fcntl
import io
import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

from pydantic_core import from_json

Kind = Literal["output", "error"]
_MARKS: dict[Kind, bytes] = {"output": b"o", "error": b"e"}


class JournalInUse(Exception):
    """Raised where another process, or another thread, writes this batch."""


class JournalOfAnother(Exception):
    """Raised where a file is the journal of other work, or none."""


class Journal:
    """A file with a header, then a line for each answer, in the order in which they came.

    It is locked: a batch is run by one process at a time, and by the next as soon as that one is dead. A last line that
    is incomplete is cut off. A line of the input is answered once: a second answer is refused.
    """

    def __init__(self, file: io.FileIO) -> None:
        # Unbuffered: a write that failed for want of space must not be repeated when the file is closed.
        self._file = file
        # By the number of the input's line: where its answer is, 0 = nowhere. Eight bytes a line, for a million lines.
        self._places = array("Q", [0])
        self.counts: dict[Kind, int] = {"output": 0, "error": 0}

    @classmethod
    def open(cls, path: Path, header: bytes, *, restart: bool = False) -> Self:
        r"""Begin a journal, or go on with the one that is there. *header* is a line that says whose it is.

        Raises:
            JournalInUse: if somebody else has it open.
            JournalOfAnother: if it has another header, unless *restart*.
            OSError: if it cannot be read or written.
        """
        file = io.FileIO(path, "a+")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JournalInUse(str(path)) from None
            journal = cls(file)
            journal._begin(header.rstrip(b"\n") + b"\n", restart=restart)
        except BaseException:
            file.close()
            raise
        return journal

    def __contains__(self, number: int) -> bool:
        return number < len(self._places) and self._places[number] > 0

    def __len__(self) -> int:
        return sum(self.counts.values())

    def append(self, number: int, kind: Kind, answer: bytes) -> None:
        """Write the answer of a line.

        Raises:
            ValueError: if it has one.
            OSError: if it cannot be written; nothing of it stays.
        """
        if number in self:
            raise ValueError(f"line {number} is answered already")
        place = self._file.seek(0, os.SEEK_END)
        raw = _MARKS[kind] + b"%d " % number + answer.rstrip(b"\n") + b"\n"
        try:
            self._write(raw)
        except OSError:
            with suppress(OSError):
                self._file.truncate(place)
            raise
        self._note(number, kind, place)

    def answers(self, *kinds: Kind) -> Iterator[bytes]:
        """Yield the answers of these kinds in the order of the input, each a line."""
        marks = {_MARKS[kind] for kind in kinds}
        with open(os.dup(self._file.fileno()), "rb") as file:  # noqa: PTH123 - a descriptor
            for place in self._places:
                if place:
                    file.seek(place)
                    raw = file.readline()
                    if raw[:1] in marks:
                        yield raw.partition(b" ")[2]

    def sync(self) -> None:
        """See that what was written is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others write."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, header: bytes, *, restart: bool) -> None:
        with open(os.dup(self._file.fileno()), "rb") as file:  # noqa: PTH123
            file.seek(0)
            found = file.readline()
            if not found or restart or (header.startswith(found) and not found.endswith(b"\n")):
                self._file.truncate(0)
                self._write(header)
                return
            if found != header:
                raise JournalOfAnother(found[:200].decode(errors="replace").strip())
            self._file.truncate(self._read(file))

    def _read(self, file: io.BufferedReader) -> int:
        """Read where the answers are; answer where the last whole one ends."""
        place = file.tell()
        while (raw := file.readline()).endswith(b"\n"):
            kind: Kind | None = {b"o": "output", b"e": "error"}.get(raw[:1])  # type: ignore[assignment]
            number = raw[1:20].partition(b" ")[0]
            # After a power failure a file may end with blocks that were never written.
            if kind is None or not number.isdigit() or not _is_json(raw.partition(b" ")[2]) or int(number) in self:
                break
            self._note(int(number), kind, place)
            place += len(raw)
        return place

    def _note(self, number: int, kind: Kind, place: int) -> None:
        if number >= len(self._places):
            self._places.extend(array("Q", bytes(8 * (number + 1 - len(self._places)))))
        self._places[number] = place
        self.counts[kind] += 1

    def _write(self, raw: bytes) -> None:
        while raw:
            raw = raw[self._file.write(raw) or 0 :]


def _is_json(raw: bytes) -> bool:
    try:
        from_json(raw)
    except ValueError:
        return False
    return True
