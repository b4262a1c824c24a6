"""Runs the batches that have not ended: each by one gateway at a time, and by another as soon as that one is dead."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

from ..batches.journal import Journal, JournalInUse, JournalOfAnother
from ..batches.requests import Defaults, Fault
from ..batches.running import BatchEnds, Plan, Run, Survey, known_models, survey
from ..client.blocking import Client
from ..errors import RerankqError
from ..settings import Settings
from .batch_store import ENDED, INPUT, JOURNAL, BatchError, BatchErrors, BatchStore, Status, StoredBatch
from .call_options import options_of
from .file_store import FileStore

logger = logging.getLogger("rerankq.gateway")

# Batches that one gateway runs at once, each in a thread.
AT_ONCE = 4
# Seconds between looks for batches, between writes of how far one is, and before one is tried again after an outage.
LOOK_EVERY_S, COUNT_EVERY_S, TRY_AGAIN_S = 1.0, 1.0, 5.0
# Seconds between looks for what is past its time, and for which a stopping gateway waits for its batches.
REMOVE_EVERY_S, STOP_WITHIN_S = 3_600.0, 6.0
# What a batch is in the end, by the code of the lines that it had not reached.
ENDINGS: dict[str, Status] = {"batch_cancelled": "cancelled", "batch_expired": "expired"}


class GatewayStops(Exception):
    """Raised in a run whose gateway stops: another one goes on with it."""


class BatchRunner:
    """The batches that this gateway runs."""

    def __init__(self, settings: Settings, batches: BatchStore, files: FileStore) -> None:
        self._settings = settings
        self._batches = batches
        self._files = files
        self._running: dict[str, threading.Thread] = {}
        self._not_before: dict[str, float] = {}
        self._stops = threading.Event()
        self._removed_at = time.monotonic()

    async def run(self) -> None:
        """Look for batches and run them until cancelled."""
        try:
            while True:
                try:
                    await asyncio.to_thread(self._look)
                except RerankqError as error:
                    logger.warning("batches wait: %s", error)
                    await asyncio.sleep(TRY_AGAIN_S)
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            self._stops.set()
            ends = time.monotonic() + STOP_WITHIN_S
            for thread in self._running.values():
                await asyncio.to_thread(thread.join, max(0.0, ends - time.monotonic()))

    def _look(self) -> None:
        self._running = {name: thread for name, thread in self._running.items() if thread.is_alive()}
        now = time.monotonic()
        for name in self._batches.open():
            if len(self._running) >= AT_ONCE:
                break
            if name in self._running or self._not_before.get(name, 0.0) > now:
                continue
            # Not waited for when the process ends: what hangs must not hold it up.
            thread = threading.Thread(target=self._run, args=(name,), name="rerankq-batch", daemon=True)
            self._running[name] = thread
            thread.start()
        if now - self._removed_at > REMOVE_EVERY_S:
            self._removed_at = now
            kept_s = self._settings.file_ttl_s
            self._files.remove_old(older_than_s=kept_s)
            self._batches.remove_old(older_than_s=kept_s)

    def _run(self, name: str) -> None:
        try:
            with Journal.open(self._batches.folder(name) / JOURNAL, name.encode()) as journal:
                BatchWork(
                    self._settings, self._batches, self._files, self._batches.stored(name), journal, self._stops
                )()
        except JournalInUse:
            # Another gateway runs it; if that one dies, its lock is free.
            self._not_before[name] = time.monotonic() + TRY_AGAIN_S
        except GatewayStops:
            pass
        except (RerankqError, OSError) as error:
            logger.warning("batch %s waits: %s", name, error)
            self._not_before[name] = time.monotonic() + TRY_AGAIN_S
        except JournalOfAnother as error:
            self._fail(name, f"its journal is not its own: {error}")
        except Exception:
            logger.exception("batch %s", name)
            self._fail(name, "internal error")

    def _fail(self, name: str, message: str) -> None:
        with suppress(RerankqError, OSError):
            stored = self._batches.stored(name)
            self._batches.end(failed(stored, BatchError(code="internal_error", message=message)))


class BatchWork:
    """The work on one batch, by whoever holds its journal."""

    def __init__(  # noqa: PLR0917 - what it works with
        self,
        settings: Settings,
        batches: BatchStore,
        files: FileStore,
        stored: StoredBatch,
        journal: Journal,
        stops: threading.Event,
    ) -> None:
        self._settings = settings
        self._batches = batches
        self._files = files
        self._stored = stored
        self._journal = journal
        self._stops = stops
        self._counted_at = float("-inf")

    def __call__(self) -> None:
        """Take the batch from where it is to its end.

        Raises:
            GatewayStops: if its gateway stops before that.
            RerankqError, OSError: if it cannot go on at the moment.
        """
        batch = self._stored.batch
        if batch.status in ENDED:
            self._batches.end(self._stored)
            return
        source = self._batches.folder(batch.id) / INPUT
        max_line = 3 * self._settings.max_job_bytes
        try:
            with source.open("rb") as file:
                found = survey(file, max_bytes=max_line, at_most=self._settings.max_batch_lines)
        except Fault as fault:
            self._fail(BatchError(code=fault.code, message=str(fault), param=fault.field))
            return
        if not found.lines:
            self._fail(BatchError(code="empty_file", message="the file has no lines", param="input_file_id"))
            return
        with Client(self._settings) as client:
            if batch.status == "validating":
                self._begin(client, found)
            self._run(client, found, max_line)
        self._finish()

    def _begin(self, client: Client, found: Survey) -> None:
        named = {*found.models, *(str(one) for one in [(self._stored.batch.request_params or {}).get("model")] if one)}
        known = known_models(named, client.workers(), self._settings)
        counts = self._stored.batch.request_counts.model_copy(update={"total": found.lines})
        self._stored = self._stored.model_copy(update={"known_models": sorted(known)})
        self._change(status="in_progress", in_progress_at=int(time.time()), request_counts=counts)

    def _run(self, client: Client, found: Survey, max_line: int) -> None:
        batch = self._stored.batch
        options = replace(options_of(self._stored.headers), tenant=self._stored.tenant)
        plan = Plan(
            name=batch.id,
            input=self._batches.folder(batch.id) / INPUT,
            defaults=Defaults(batch.endpoint, batch.request_params or {}, options),
            survey=found,
            max_line_bytes=max_line,
            known_models=frozenset(self._stored.known_models or ()),
            expires_at=batch.expires_at,
        )
        run = Run(plan, self._journal, client, self._settings, supervise=self._supervise, advance=self._advance)
        run.run()

    def _supervise(self) -> None:
        if self._stops.is_set():
            raise GatewayStops
        batch = self._stored.batch
        if self._batches.cancelled_at(batch.id) is not None:
            self._end("batch_cancelled", "the batch was cancelled before this line was ranked")
        if time.time() >= batch.expires_at:
            self._end("batch_expired", "the batch's completion window ended before this line was ranked")

    def _end(self, code: str, message: str) -> NoReturn:
        # Written down first: whoever goes on after a crash may find every line answered.
        if not self._stored.ending:
            self._stored = self._stored.model_copy(update={"ending": code})
            self._batches.write(self._stored)
        raise BatchEnds(self._stored.ending, message)

    def _advance(self, _: int) -> None:
        if time.monotonic() - self._counted_at >= COUNT_EVERY_S:
            self._count()

    def _count(self, **changes: Any) -> None:
        self._counted_at = time.monotonic()
        done = {"completed": self._journal.counts["output"], "failed": self._journal.counts["error"]}
        counts = self._stored.batch.request_counts.model_copy(update=done)
        self._change(request_counts=counts, **changes)

    def _finish(self) -> None:
        cancelled_at = self._batches.cancelled_at(self._stored.batch.id)
        self._count(status="finalizing", finalizing_at=int(time.time()))
        self._journal.sync()
        stored, counts = self._stored, self._journal.counts
        changes: dict[str, Any] = {}
        for kind, name, field in (
            ("output", stored.output_id, "output_file_id"),
            ("error", stored.error_id, "error_file_id"),
        ):
            if counts[kind]:  # type: ignore[index]  # the two kinds
                self._files.write(
                    name,
                    self._journal.answers(kind),  # type: ignore[arg-type]
                    filename=f"{stored.batch.id}_{kind}.jsonl",
                    purpose="batch_output",
                    owner=stored.owner,
                )
                changes[field] = name
        now = int(time.time())
        status = ENDINGS.get(stored.ending, "completed")
        if status == "cancelled":
            changes["cancelling_at"] = cancelled_at
        self._change(write=False, status=status, **{f"{status}_at": now}, **changes)
        self._batches.end(self._stored)
        (self._batches.folder(stored.batch.id) / JOURNAL).unlink(missing_ok=True)

    def _fail(self, error: BatchError) -> None:
        self._batches.end(failed(self._stored, error))

    def _change(self, *, write: bool = True, **changes: Any) -> None:
        batch = self._stored.batch.model_copy(update=changes)
        self._stored = self._stored.model_copy(update={"batch": batch})
        if write:
            self._batches.write(self._stored)


def failed(stored: StoredBatch, *errors: BatchError) -> StoredBatch:
    """Mark a batch as failed."""
    changes = {"status": "failed", "failed_at": int(time.time()), "errors": BatchErrors(data=list(errors))}
    return stored.model_copy(update={"batch": stored.batch.model_copy(update=changes)})
