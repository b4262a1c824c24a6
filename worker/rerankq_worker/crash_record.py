"""Which jobs were at work and which only waited: a file that outlives its worker, even if that is killed.

A job is *at work* while its thread does anything, or while a batch with pairs of it is on the device; only such a job
can have ended the process. Each worker writes that down before it happens, into a file that is mapped into its memory:
a store costs no system call, and the kernel keeps the pages when the process is gone. The worker holds a lock on the
file (``flock``), which the kernel releases with the process, so whoever gets the lock knows that the worker has ended.

The files are in a folder of the user's own, named after the ledger and the worker. Where there can be none, or where
one is damaged, nothing is known of the jobs, and all of them are suspects.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import stat
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from urllib.parse import quote, unquote

from .processes import boot_id

logger = logging.getLogger("rerankq")

# Seconds after which the record of a worker that ended is removed, if nobody of its ledger has read it.
KEPT_S = 86_400
# A worker never has more threads.
MOST_SLOTS = 65_536

MAGIC = b"rerankq1"
# Format, boot of the system, number of slots; then a checksum of these.
_HEADER = struct.Struct("<8s40sI")
_CHECKSUM = struct.Struct("<I")
# Fence, length of the id, id; before it three flags and a checksum of these.
_JOB = struct.Struct("<QH512s")
_FLAGS = 3
_SLOT_BYTES = _FLAGS + _CHECKSUM.size + _JOB.size
_START = _HEADER.size + _CHECKSUM.size

# Each flag is one byte. No value is 0: a page that was lost says nothing.
FREE, USED = 0, ord("U")
WORKS, WAITS = ord("W"), ord("-")
ON_DEVICE, OFF_DEVICE = ord("D"), ord("-")

Claimed = tuple[str, int]
Buffer = bytearray | mmap.mmap


class JobSlot:
    """One job in the record. Its own thread writes the first of its flags, the batcher the second."""

    __slots__ = ("_buffer", "at")

    def __init__(self, buffer: Buffer, at: int) -> None:
        self._buffer = buffer
        self.at = at

    def fill(self, job_id: str, fence: int) -> bool:
        """Record a job that is at work from now on; answers False where its id is too long."""
        name = job_id.encode("utf-8", "surrogatepass")
        if len(name) > _JOB.size - 10 or not 0 <= fence < 2**64:
            return False
        job = _JOB.pack(fence, len(name), name)
        buffer, at = self._buffer, self.at
        buffer[at + _FLAGS : at + _SLOT_BYTES] = _CHECKSUM.pack(zlib.crc32(job)) + job
        buffer[at + 1] = WORKS
        buffer[at + 2] = OFF_DEVICE
        # Last: until now the slot was free.
        buffer[at] = USED
        return True

    def clear(self) -> None:
        """Record that this worker holds the job no longer."""
        self._buffer[self.at] = FREE

    def set_working(self, working: bool) -> None:
        """Record whether the job's thread does anything but wait."""
        self._buffer[self.at + 1] = WORKS if working else WAITS

    def set_on_device(self, on_device: bool) -> None:
        """Record whether a batch with pairs of the job is on the device."""
        self._buffer[self.at + 2] = ON_DEVICE if on_device else OFF_DEVICE

    @property
    def on_device(self) -> bool:
        """Whether a batch with pairs of the job is on the device, or was when the device died."""
        return self._buffer[self.at + 2] == ON_DEVICE

    @property
    def at_work(self) -> bool:
        """Whether the job may be what ends this process."""
        return self.on_device or self._buffer[self.at + 1] == WORKS


class CrashRecord:
    """The record of a worker's jobs in flight: so many *slots*, in memory alone unless *buffer* is a mapped file."""

    def __init__(self, slots: int, buffer: Buffer | None = None, path: Path | None = None, file: int = -1) -> None:
        self._buffer = bytearray(_new_record(slots)) if buffer is None else buffer
        self._path = path
        # Kept open: the lock is held with it.
        self._file = file
        self._free = [_START + number * _SLOT_BYTES for number in reversed(range(slots))]
        self._slots = slots
        self._lock = threading.Lock()

    def begin(self, job_id: str, fence: int) -> JobSlot:
        """Record a job that was claimed; what finds no room is recorded in memory alone, and will be a suspect."""
        with self._lock:
            at = self._free.pop() if self._free else None
        if at is not None:
            slot = JobSlot(self._buffer, at)
            if slot.fill(job_id, fence):
                return slot
            with self._lock:
                self._free.append(at)
        unrecorded = JobSlot(bytearray(_SLOT_BYTES), 0)
        unrecorded.set_working(True)
        return unrecorded

    def end(self, slot: JobSlot) -> None:
        """Record that a job ended or was given back; nothing may be written to its slot from now on."""
        slot.clear()
        if slot.at:
            with self._lock:
                self._free.append(slot.at)

    def close(self) -> None:
        """Remove the file, unless jobs are left in it: then it is for whoever finds that this worker has ended."""
        if self._path is None:
            return
        with self._lock:
            left = len(self._free) < self._slots
        with suppress(OSError):
            if not left:
                self._path.unlink()
            fcntl.flock(self._file, fcntl.LOCK_UN)


class CrashRecords:
    """The records of the workers of one ledger, on this machine and of this user.

    *folder* is made where it is missing. None of the methods raises: without a folder that is safe to use, a record is
    kept in memory alone, and none is found.
    """

    def __init__(self, ledger_url: str, folder: Path | None = None) -> None:
        self._prefix = blake2b(ledger_url.encode(), digest_size=8).hexdigest() + "."
        self._boot = boot_id()
        self._given = folder

    def create(self, worker: str, slots: int) -> CrashRecord:
        """Begin the record of a worker."""
        try:
            folder = self._folder()
            self._remove_old(folder)
            return self._create(folder, worker, slots)
        except (OSError, ValueError) as error:
            logger.warning("no record of the jobs at work, if this worker crashes all its jobs are suspects: %s", error)
            return CrashRecord(slots)

    def ended(self) -> list[str]:
        """List workers that have ended without removing their records."""
        try:
            found = [path for path in self._folder().iterdir() if path.name.startswith(self._prefix)]
        except OSError:
            return []
        return [unquote(path.name.removeprefix(self._prefix)) for path in found if _is_unlocked(path)]

    def waiting(self, worker: str) -> list[Claimed]:
        """Read which jobs, ``(id, fence)``, only waited when a worker ended; none where its record cannot be read."""
        try:
            with _opened(self._path(self._folder(), worker)) as file:
                size = min(os.fstat(file).st_size, _START + MOST_SLOTS * _SLOT_BYTES)
                return waiting_jobs(os.pread(file, size, 0), self._boot)
        except OSError:
            return []

    def remove(self, worker: str) -> None:
        """Remove the record of a worker that has ended, if there is one."""
        with suppress(OSError):
            self._path(self._folder(), worker).unlink()

    def _create(self, folder: Path, worker: str, slots: int) -> CrashRecord:
        # Under another name until it is locked: nobody shall take it for that of an ended worker.
        new = folder / f".{self._prefix}{quote(worker, safe='')}"
        file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Written, not only made as long: a store to a page without a block would end this process on a full disk.
            content = _new_record(slots, self._boot)
            # As long as what was written: if the disk is full, that is less, and the mapping fails.
            os.write(file, content)
            buffer = mmap.mmap(file, len(content))
            path = self._path(folder, worker)
            new.rename(path)
        except BaseException:
            os.close(file)
            new.unlink(missing_ok=True)
            raise
        return CrashRecord(slots, buffer, path, file)

    def _path(self, folder: Path, worker: str) -> Path:
        return folder / f"{self._prefix}{quote(worker, safe='')}"

    def _folder(self) -> Path:
        """Find the folder, made where it is missing.

        Raises:
            OSError: if it is not a folder that is this user's alone.
        """
        folder = self._given or Path(tempfile.gettempdir()) / f"rerankq-{os.getuid()}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        # Anybody may have made it before us, or a link in its place.
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(f"{folder} must be a folder that no other user may enter")
        return folder

    def _remove_old(self, folder: Path) -> None:
        """Remove records, of any ledger, that nobody has come for."""
        for path in folder.iterdir():
            with suppress(OSError):
                if path.lstat().st_mtime < time.time() - KEPT_S and _is_unlocked(path):
                    path.unlink()


def waiting_jobs(record: bytes, boot: str) -> list[Claimed]:
    """Read which jobs, ``(id, fence)``, only waited; none of a record that is damaged, or of another *boot*.

    >>> record = CrashRecord(2)
    >>> record.begin("computes", 7).set_on_device(True)
    >>> record.begin("waits", 8).set_working(False)
    >>> waiting_jobs(bytes(record._buffer), "")
    [('waits', 8)]
    """
    if len(record) < _START:
        return []
    header, checksum = record[: _HEADER.size], _CHECKSUM.unpack_from(record, _HEADER.size)[0]
    magic, written_in, slots = _HEADER.unpack(header)
    if magic != MAGIC or checksum != zlib.crc32(header) or written_in != _boot_bytes(boot):
        return []
    if len(record) != _START + slots * _SLOT_BYTES:
        return []
    found = []
    for at in range(_START, len(record), _SLOT_BYTES):
        used, working, on_device = record[at : at + _FLAGS]
        if used == FREE:
            continue
        job = record[at + _FLAGS + _CHECKSUM.size : at + _SLOT_BYTES]
        intact = _CHECKSUM.unpack_from(record, at + _FLAGS)[0] == zlib.crc32(job)
        if used != USED or working not in (WORKS, WAITS) or on_device not in (ON_DEVICE, OFF_DEVICE) or not intact:
            return []
        if working == WAITS and on_device == OFF_DEVICE:
            fence, length, name = _JOB.unpack(job)
            found.append((name[:length].decode("utf-8", "surrogatepass"), fence))
    return found


def _new_record(slots: int, boot: str = "") -> bytes:
    header = _HEADER.pack(MAGIC, _boot_bytes(boot), slots)
    return header + _CHECKSUM.pack(zlib.crc32(header)) + bytes(slots * _SLOT_BYTES)


def _boot_bytes(boot: str) -> bytes:
    return boot.encode()[:40].ljust(40, b"\0")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield file
    finally:
        os.close(file)


def _is_unlocked(path: Path) -> bool:
    """Whether no process holds a lock on a file; False where that cannot be told."""
    with suppress(OSError), _opened(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
