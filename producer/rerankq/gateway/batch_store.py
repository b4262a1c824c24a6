"""Batches on the disk, beside their files: what each is, and the marks by which gateways speak of it."""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ..errors import RerankqError
from .file_store import StoreUnavailable, may_see, new_id, read_json, write_whole
from .keys import KeyLimits

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
RECORD, INPUT, JOURNAL, CANCEL = "batch.json", "input", "journal", "cancel"


class BatchUnknown(RerankqError):
    """Raised when there is no such batch, or it is another caller's."""

    http_status = 404


class BatchEnded(RerankqError):
    """Raised when a batch that has ended is to be cancelled."""

    http_status = 409


class Counts(BaseModel):
    """How many lines there are, and how many are answered."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(BaseModel):
    """Why a batch failed."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(BaseModel):
    """Why a batch failed, as a list."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchObject(BaseModel):
    """A batch, in OpenAI's form. Times are seconds since the epoch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = Field(default_factory=Counts)
    metadata: dict[str, str] | None = None
    request_params: dict[str, Any] | None = None


class StoredBatch(BaseModel):
    """A batch with what only gateways know of it.

    ``headers`` are the options of its caller; ``ending`` says what ends it before all its lines had their turn; ``key``
    says how much its caller's key may, as it was when the batch was made; ``output_life_s`` for how many seconds its
    answers are kept, None = as other files.
    """

    batch: BatchObject
    owner: str | None = None
    tenant: str = ""
    key: KeyLimits | None = None
    output_life_s: int | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    known_models: list[str] | None = None
    ending: str = ""
    output_id: str = Field(default_factory=lambda: new_id("file-"))
    error_id: str = Field(default_factory=lambda: new_id("file-"))


class BatchStore:
    """The batches of a deployment. Whoever holds a batch's journal writes its record; others leave marks."""

    def __init__(self, folder: Path) -> None:
        self._batches = folder / "batches"
        # A mark for each batch that has not ended: whoever looks for work reads no others.
        self._open = folder / "open-batches"

    def folder(self, name: str) -> Path:
        """Say where a batch's files are."""
        return self._batches / name

    def add(self, stored: StoredBatch, content: Path) -> BatchObject:
        """Store a new batch with its input.

        Raises:
            StoreUnavailable: if it cannot be written.
        """
        name = stored.batch.id
        try:
            self.folder(name).mkdir(parents=True, mode=0o700)
            self._open.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                # So that it stays when the file is deleted.
                os.link(content, self.folder(name) / INPUT)
            except OSError:
                shutil.copyfile(content, self.folder(name) / INPUT)
            # First: a batch without a mark would never be run.
            (self._open / name).touch()
            self.write(stored)
        except OSError as error:
            raise StoreUnavailable(f"RERANKQ_FILES_DIR: batches cannot be kept there: {error.strerror}") from error
        return stored.batch

    def write(self, stored: StoredBatch) -> None:
        """Replace a batch's record."""
        write_whole(self.folder(stored.batch.id) / RECORD, stored.model_dump_json())

    def stored(self, name: str, owner: str | None = None) -> StoredBatch:
        """Read a batch's record.

        Raises:
            BatchUnknown: if there is none, or it is another owner's.
        """
        if BATCH_ID.fullmatch(name):
            found = read_json(self.folder(name) / RECORD)
            if found is not None and may_see(found.get("owner"), owner):
                with suppress(ValidationError):
                    return StoredBatch.model_validate(found)
        raise BatchUnknown(f"there is no batch {name[:100]}")

    def read(self, name: str, owner: str | None) -> BatchObject:
        """Say how far a batch is.

        Raises:
            BatchUnknown: as :meth:`stored` does.
        """
        batch = self.stored(name, owner).batch
        cancelled_at = self.cancelled_at(name)
        if batch.status in {"validating", "in_progress"} and cancelled_at is not None:
            return batch.model_copy(update={"status": "cancelling", "cancelling_at": cancelled_at})
        return batch

    def page(self, owner: str | None, *, after: str | None, limit: int) -> tuple[list[BatchObject], bool]:
        """List an owner's batches, the newest first, and whether there are more."""
        found: list[BatchObject] = []
        for name in sorted(self._names(self._batches), reverse=True):
            if after is not None and name >= after:
                continue
            with suppress(BatchUnknown):
                found.append(self.read(name, owner))
            if len(found) > limit:
                return found[:limit], True
        return found, False

    def cancel(self, name: str, owner: str | None) -> BatchObject:
        """Mark a batch as to be cancelled.

        Raises:
            BatchUnknown: as :meth:`stored` does.
            BatchEnded: if it has ended, or all its lines are answered.
        """
        batch = self.read(name, owner)
        if batch.status in ENDED or batch.status == "finalizing":
            raise BatchEnded(f"batch {name} cannot be cancelled: it is {batch.status}")
        try:
            # Said twice, it is cancelling since the first time.
            (self.folder(name) / CANCEL).open("a").close()
        except OSError as error:
            raise StoreUnavailable(f"the batch cannot be marked: {error.strerror}") from error
        return self.read(name, owner)

    def cancelled_at(self, name: str) -> int | None:
        """Say when a batch was marked as to be cancelled."""
        try:
            return int((self.folder(name) / CANCEL).stat().st_mtime)
        except OSError:
            return None

    def open(self) -> list[str]:
        """List the batches that have not ended, the oldest first."""
        # One without a record was never accepted: its gateway was killed before.
        return [name for name in sorted(self._names(self._open)) if (self.folder(name) / RECORD).exists()]

    def end(self, stored: StoredBatch) -> None:
        """Write the last state of a batch, and remove what only its run needed."""
        self.write(stored)
        name = stored.batch.id
        (self._open / name).unlink(missing_ok=True)
        for file in (INPUT, CANCEL):
            (self.folder(name) / file).unlink(missing_ok=True)

    def remove_old(self, *, older_than_s: float) -> None:
        """Remove the batches that ended long ago."""
        waiting = set(self.open())
        for name in self._names(self._batches):
            with suppress(OSError):
                if name not in waiting and time.time() - self.folder(name).stat().st_mtime > older_than_s:
                    shutil.rmtree(self.folder(name), ignore_errors=True)
                    (self._open / name).unlink(missing_ok=True)

    @staticmethod
    def _names(folder: Path) -> list[str]:
        try:
            return [name for name in os.listdir(folder) if BATCH_ID.fullmatch(name)]  # noqa: PTH208 - names alone
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreUnavailable(f"RERANKQ_FILES_DIR: cannot be read: {error.strerror}") from error
