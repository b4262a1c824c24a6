"""The output of a re-scored run: checked before the work starts, written when it is done."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import IO

from ..errors import RerankqError
from .inputs import InputFault

STDOUT = "-"

_STDOUT_FILENO = 1

SINGLE_MAX = 3.4028234663852886e38
"""The largest finite number of single precision."""

# Some readers treat subnormal numbers as zero.
_DENORMALS = 0x007FFFFF


class WriteFailed(RerankqError):
    """Raised when a file can no longer be written, most likely for want of space; the progress is kept."""


@dataclass(frozen=True)
class Output:
    """The target of a run: the file ``path``, or a stream, which may be open already.

    Attributes:
        name: as given on the command line.
        path: the file, with links resolved; the device or named pipe; None = ``descriptor``.
        descriptor: the open file descriptor that the name refers to.
        stream: written as it is, not replaced by a new file.
        exists: a file exists that would be overwritten.
    """

    name: str
    path: Path | None
    descriptor: int | None = None
    stream: bool = False
    exists: bool = False

    @property
    def is_stdout(self) -> bool:
        """Whether the run goes to standard output, where nothing else may be printed then."""
        return self.descriptor == _STDOUT_FILENO

    def journal(self, work: str) -> Path:
        """Return the journal's path: beside a file; for a stream in a private folder, under the name *work*.

        Raises:
            InputFault: if there is no private folder.
        """
        if self.path is not None and not self.stream:
            return self.path.with_name(f"{self.path.name}.part")
        try:
            return _private_folder() / f"{work}.part"
        except OSError as error:
            raise InputFault(f"--output: no folder for the journal: {error.strerror}") from None

    @contextmanager
    def opened(self, notify: Callable[[str], None]) -> Iterator[Callable[[Iterable[str]], None]]:
        """Open a stream before the work starts; yield a function that writes the lines of the run.

        Raises:
            InputFault: if it cannot be opened.
            WriteFailed: from that function, if they cannot be written.
        """
        if self.path is not None and not self.stream:
            yield partial(self._write, partial(_write_file, self.path))
            return
        if self.path is not None and self.path.is_fifo():
            notify(f"{self.name}: waiting for a reader")
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_NOCTTY) if self.path else os.dup(self.descriptor or 0)
        except OSError as error:
            raise InputFault(f"--output: {self.name} cannot be written: {error.strerror}") from None
        file = os.fdopen(descriptor, "w", encoding="utf-8", newline="\n")
        try:
            yield partial(self._write, partial(_write_stream, file))
        finally:
            with suppress(OSError):  # the failed write was reported
                file.close()

    def _write(self, write: Callable[[Iterable[str]], None], lines: Iterable[str]) -> None:
        try:
            write(lines)
        except OSError as error:
            if self.is_stdout and isinstance(error, BrokenPipeError):
                raise  # the reader has closed the pipe
            raise WriteFailed(f"{self.name}: cannot be written: {error.strerror}") from None


def resolve(name: str, inputs: Mapping[str, str | None]) -> Output:
    """Find out what ``--output NAME`` refers to; *inputs* are the other files by their options.

    ``-``, names of open file descriptors (``/dev/stdout``), devices and named pipes are streams; symbolic links are
    followed.

    Raises:
        InputFault: if it cannot be written, or is one of the inputs.
    """
    try:
        return _resolve(name, {option: path for option, path in inputs.items() if path is not None})
    except OSError as error:
        raise InputFault(f"--output: {name} cannot be written: {error.strerror}") from None


def _resolve(name: str, inputs: Mapping[str, str]) -> Output:
    descriptor = _STDOUT_FILENO if name == STDOUT else _own_descriptor(name)
    if descriptor is not None:
        return _through_descriptor(name, descriptor, inputs)
    path = Path(os.path.realpath(name))
    found = _stat(path)
    if (found is not None and stat.S_ISDIR(found.st_mode)) or name.endswith("/") or not name:
        raise InputFault(f"--output: {name or '.'} is a folder")
    if found is None or stat.S_ISREG(found.st_mode):
        return _into_file(name, path, found, inputs)
    if stat.S_ISCHR(found.st_mode) or stat.S_ISFIFO(found.st_mode):
        if not os.access(path, os.W_OK):
            raise InputFault(f"--output: {name} is not writable")
        return Output(name, path, stream=True)
    raise InputFault(f"--output: {name} is neither a file, a character device nor a named pipe")


def _into_file(name: str, path: Path, found: os.stat_result | None, inputs: Mapping[str, str]) -> Output:
    folder = path.parent if Path(name).is_symlink() else Path(name).parent
    if not folder.is_dir():
        raise InputFault(f"--output: {folder} is not a folder")
    if found is not None:
        _refuse_inputs(f"--output: {name}", found, inputs)
        with suppress(OSError):
            if os.path.samestat(found, os.fstat(_STDOUT_FILENO)):
                return Output(name, None, descriptor=_STDOUT_FILENO, stream=True)
    for what, mode in ((folder, os.W_OK | os.X_OK), (path, os.W_OK)):
        if (what is folder or found is not None) and not os.access(what, mode):
            raise InputFault(f"--output: {name if what is path else folder} is not writable")
    output = Output(name, path, exists=found is not None)
    journal = output.journal("")
    kept = _stat(journal)
    if kept is not None:
        if not stat.S_ISREG(kept.st_mode):
            raise InputFault(f"--output: {journal}, the journal, is not a regular file")
        _refuse_inputs(f"--output: {journal}, the journal,", kept, inputs)
    return output


def _through_descriptor(name: str, descriptor: int, inputs: Mapping[str, str]) -> Output:
    try:
        found = os.fstat(descriptor)
        writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        writable = False
    if not writable:
        raise InputFault(f"--output: {'standard output' if name == STDOUT else name} is not open for writing")
    _refuse_inputs(f"--output: {name}", found, inputs)
    return Output(name, None, descriptor=descriptor, stream=True)


def _refuse_inputs(what: str, found: os.stat_result, inputs: Mapping[str, str]) -> None:
    for option, path in inputs.items():
        other = _stat(Path(path))
        if other is not None and os.path.samestat(found, other):
            raise InputFault(f"{what} is the same file as --{option}")


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _own_descriptor(name: str) -> int | None:
    """Return the file descriptor that a name such as /dev/stdout refers to; None if it is no such name."""
    folders = {os.path.realpath(folder) for folder in ("/dev/fd", "/proc/self/fd")}
    path = Path(name)
    for _ in range(40):  # the kernel follows as many links
        if path.name.isdecimal() and os.path.realpath(path.parent) in folders:
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def _private_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"rerankq-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    # Every user may write to the folder of temporary files, and may have created ours before.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise InputFault(f"--output: {folder}, for the journal, is not a folder that belongs to this user")
    return folder


def _write_stream(file: IO[str], lines: Iterable[str]) -> None:
    file.writelines(lines)
    file.flush()


def _write_file(path: Path, lines: Iterable[str]) -> None:
    """Replace a file atomically; a file with several hard links is written in place, so that they stay one file."""
    before = _stat(path)
    if before is not None and before.st_nlink > 1:
        with path.open("r+", encoding="utf-8", newline="\n") as file:
            file.truncate()
            _write_stream(file, lines)
        return
    unfinished = path.with_name(f".rerankq-{secrets.token_hex(8)}.tmp")
    try:
        with unfinished.open("x", encoding="utf-8", newline="\n") as file:
            _write_stream(file, lines)
            os.fsync(file.fileno())
        if before is not None:
            unfinished.chmod(stat.S_IMODE(before.st_mode))
            with suppress(OSError):  # only root may
                os.chown(unfinished, before.st_uid, before.st_gid)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def run_lines(query: str, ranked: Sequence[tuple[str, float]]) -> Iterator[str]:
    """Format a query's documents, best first, as lines of a TREC run.

    >>> print(*run_lines("q1", [("d2", 0.5), ("d1", 0.5)]), sep="", end="")
    q1 Q0 d2 1 0.5 rerankq
    q1 Q0 d1 2 0.49999997 rerankq
    """
    scores = descending([score for _, score in ranked])
    for rank, ((chunk, _), score) in enumerate(zip(ranked, scores, strict=True), start=1):
        yield f"{query} Q0 {chunk} {rank} {score} rerankq\n"


def descending(scores: Sequence[float]) -> list[str]:
    """Format scores so that each is below the one before it, in single precision too.

    Readers sort by score (trec_eval in single precision) and by id where scores are equal, so equal scores would change
    the order. A score that is lower than the one before is written as it is; others as the next lower number of single
    precision. A score that is not finite becomes the nearest finite one.

    >>> descending([2.0, 0.7, 0.7, 0.1]), descending([0.0, 0.0])
    (['2.0', '0.7', '0.699999928', '0.1'], ['0.0', '-1.17549435e-38'])
    """
    written = []
    highest = _key(SINGLE_MAX)
    above = highest + 1
    for place, score in enumerate(scores):
        # Leave numbers for the scores that follow.
        lowest = len(scores) - 1 - place - highest
        key = min(max(_key(score), lowest), above - 1)
        written.append(repr(score) if key == _key(score) and abs(score) <= SINGLE_MAX else f"{_single(key):.9g}")
        above = key
    return written


def _key(score: float) -> int:
    """Map a score to an integer in the same order: its position among the normal numbers of single precision."""
    if isnan(score):
        return -_key(SINGLE_MAX)
    bits: int = struct.unpack("<i", struct.pack("<f", max(-SINGLE_MAX, min(SINGLE_MAX, score))))[0]
    magnitude = max(0, (bits & 0x7FFFFFFF) - _DENORMALS)
    return -magnitude if bits < 0 else magnitude


def _single(key: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<i", abs(key) + _DENORMALS if key else 0))[0]
    return -value if key < 0 else value
