"""Files that callers upload and batches write: a folder that all gateways of a deployment share."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ..errors import RerankqError

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
CONTENT, META = "content", "meta.json"


class FileUnknown(RerankqError):
    """Raised when there is no such file, or it is another caller's."""

    http_status = 404


class FileRefused(RerankqError):
    """Raised when a file cannot be stored as it is; ``field`` names the field of the upload."""

    http_status = 413

    def __init__(self, message: str, *, field: str = "file") -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class StoreUnavailable(RerankqError):
    """Raised when the folder of files cannot be read or written."""

    http_status = 503
    retryable = True


# What files begin with that are no lines of JSON in UTF-8, and what they are.
_NOT_LINES = {
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
LONGEST_SIGNATURE = max(map(len, _NOT_LINES))


def not_lines(beginning: bytes) -> str:
    r"""Say what a file is that begins so, if it cannot be lines of JSON; empty if it can.

    >>> not_lines(b"\x1f\x8b\x08"), not_lines(b'{"custom_id"')
    ('compressed with gzip', '')
    """
    return next((what for signature, what in _NOT_LINES.items() if beginning.startswith(signature)), "")


class FileObject(BaseModel):
    """A file, in OpenAI's form. Times are seconds since the epoch."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: str = "processed"
    status_details: str | None = None


def new_id(kind: str) -> str:
    """Make an id that sorts by time.

    >>> re.fullmatch("file-[0-9a-f]{32}", new_id("file-")) is not None
    True
    """
    return f"{kind}{time.time_ns():016x}{secrets.token_hex(8)}"


def write_whole(path: Path, text: str) -> None:
    """Replace a small file at once: whoever reads it finds the old or the new one."""
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        with unfinished.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class FileStore:
    """The files of a deployment, each with its owner: the tenant that may see it, None = everybody."""

    def __init__(self, folder: Path) -> None:
        self._files = folder / "files"
        self._unfinished = folder / "unfinished"

    def write(
        self,
        name: str,
        parts: Iterable[bytes],
        *,
        filename: str,
        purpose: str,
        owner: str | None,
        expires_at: int | None = None,
    ) -> FileObject:
        """Store what comes, whole or not at all; under a name that is taken, what is there stays.

        Raises:
            StoreUnavailable: if it cannot be written.
        """
        with suppress(FileUnknown):
            return self.read(name, None)
        folder = self._begin(name)
        try:
            size = 0
            with (folder / CONTENT).open("xb") as file:
                for part in parts:
                    size += file.write(part)
                file.flush()
                os.fsync(file.fileno())
            return self._end(folder, name, size, filename, purpose, owner, expires_at)
        except OSError as error:
            raise _unavailable(error) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def content(self, name: str, owner: str | None) -> Path:
        """Find a file's content.

        Raises:
            FileUnknown: as :meth:`read` does.
        """
        self.read(name, owner)
        return self._files / name / CONTENT

    def page(
        self,
        owner: str | None,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int,
        oldest_first: bool = False,
    ) -> tuple[list[FileObject], bool]:
        """List an owner's files, the newest first, and whether there are more; *after* need not be there any more."""
        found: list[FileObject] = []
        for name in sorted(_names(self._files, FILE_ID), reverse=not oldest_first):
            # Names sort by time.
            if after is not None and (name <= after if oldest_first else name >= after):
                continue
            with suppress(FileUnknown):
                one = self.read(name, owner)
                if purpose is None or one.purpose == purpose:
                    found.append(one)
            if len(found) > limit:
                return found[:limit], True
        return found, False

    def delete(self, name: str, owner: str | None) -> None:
        """Delete a file.

        Raises:
            FileUnknown: as :meth:`read` does.
        """
        self._stored(name, owner)
        gone = self._unfinished / f"{name}-{secrets.token_hex(6)}"
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            (self._files / name).rename(gone)
        except FileNotFoundError:
            raise FileUnknown(f"there is no file {name}") from None
        except OSError as error:
            raise _unavailable(error) from error
        shutil.rmtree(gone, ignore_errors=True)

    def remove_old(self, *, older_than_s: float) -> None:
        """Delete the files that are past their time, and what uploads left unfinished."""
        now = time.time()
        for name in _names(self._files, FILE_ID):
            with suppress(FileUnknown, StoreUnavailable):
                one = self._stored(name, None)
                ends_at = one.expires_at or one.created_at + older_than_s
                if ends_at < now:
                    self.delete(name, None)
        for path in _folders(self._unfinished):
            with suppress(OSError):
                if now - path.stat().st_mtime > 86_400:
                    shutil.rmtree(path, ignore_errors=True)

    def _begin(self, name: str) -> Path:
        folder = self._unfinished / f"{name}-{secrets.token_hex(6)}"
        try:
            # Texts of callers: for this user alone.
            folder.mkdir(parents=True, mode=0o700)
            self._files.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise _unavailable(error) from error
        return folder

    def _end(  # noqa: PLR0917 - the fields of a file
        self, folder: Path, name: str, size: int, filename: str, purpose: str, owner: str | None, expires_at: int | None
    ) -> FileObject:
        made = FileObject(
            id=name,
            bytes=size,
            created_at=int(time.time()),
            expires_at=expires_at,
            filename=filename,
            purpose=purpose,
        )
        write_whole(folder / META, json.dumps({"file": made.model_dump(), "owner": owner}))
        try:
            folder.rename(self._files / name)
        except OSError:
            # Another gateway has written the same before us.
            if not (self._files / name).is_dir():
                raise
        return made

    def read(self, name: str, owner: str | None) -> FileObject:
        """Say what a file is.

        Raises:
            FileUnknown: if there is none, it is another owner's, or its time is over.
        """
        one = self._stored(name, owner)
        if one.expires_at is not None and one.expires_at <= time.time():
            raise FileUnknown(f"there is no file {name} any more: its time is over")
        return one

    def _stored(self, name: str, owner: str | None) -> FileObject:
        if FILE_ID.fullmatch(name):
            found = read_json(self._files / name / META)
            if found is not None and may_see(found.get("owner"), owner):
                with suppress(ValidationError):
                    return FileObject.model_validate(found.get("file"))
        raise FileUnknown(f"there is no file {name[:100]}")


def may_see(owner: str | None, asking: str | None) -> bool:
    """Whether what belongs to *owner* is to be seen by whoever is *asking*; None asks for all."""
    return asking is None or owner == asking


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a small file of JSON; None if it is not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise StoreUnavailable(f"{path.name} cannot be read: {error}") from error
    return found if isinstance(found, dict) else None


def _names(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    return [path.name for path in _folders(folder) if pattern.fullmatch(path.name)]


def _folders(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unavailable(error) from error


def _unavailable(error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"RERANKQ_FILES_DIR: files cannot be kept there: {error.strerror or error}")
