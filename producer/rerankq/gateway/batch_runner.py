"""Runs the batches that have not ended: each by one gateway at a time, and by another as soon as that one is dead."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from ..batches.journal import Journal, JournalInUse, JournalOfAnother
from ..batches.requests import Defaults, Fault
from ..batches.running import BatchEnds, Plan, Run, Survey, known_models, survey, unknown_models
from ..client.blocking import Client
from ..contract import RerankJob
from ..errors import BrokerUnavailable, NoWorker, RerankqError
from ..settings import Settings
from .batch_store import ENDED, INPUT, JOURNAL, BatchError, BatchErrors, BatchStore, Status, StoredBatch
from .call_options import options_of
from .file_store import FileStore
from .keys import KeyLimits, KnownKeys
from .rates import Rates, tokens_in

logger = logging.getLogger("rerankq.gateway")

# Batches that one gateway runs at once, each in a thread: in all, and of one tenant, so that the others' need not wait.
AT_ONCE, AT_ONCE_EACH = 64, 4
# Seconds for an answer whether it is a line's turn.
ADMIT_WITHIN_S = 10.0
# Seconds between looks for batches, between writes of how far one is, and before one is tried again after an outage.
LOOK_EVERY_S, COUNT_EVERY_S, TRY_AGAIN_S = 1.0, 1.0, 5.0
# Seconds between looks for what is past its time, and for which a stopping gateway waits for its batches.
REMOVE_EVERY_S, STOP_WITHIN_S = 3_600.0, 6.0
# What a batch is in the end, by the code of the lines that it had not reached.
ENDINGS: dict[str, Status] = {"batch_cancelled": "cancelled", "batch_expired": "expired"}
CANCELLED = ("batch_cancelled", "the batch was cancelled before this line was ranked")
EXPIRED = ("batch_expired", "the batch's completion window ended before this line was ranked")


class GatewayStops(Exception):
    """Raised in a run whose gateway stops: another one goes on with it."""


class _Waiting(NamedTuple):
    """What decides whether a batch is run now."""

    tenant: str
    expires_at: float


class BatchRunner:
    """The batches that this gateway runs."""

    def __init__(
        self, settings: Settings, batches: BatchStore, files: FileStore, *, rates: Rates, keys: KnownKeys
    ) -> None:
        self._settings = settings
        self._batches = batches
        self._files = files
        self._rates = rates
        self._keys = keys
        self._running: dict[str, threading.Thread] = {}
        self._known: dict[str, _Waiting] = {}
        self._not_before: dict[str, float] = {}
        self._told: dict[str, str] = {}
        self._stops = threading.Event()
        self._removed_at = time.monotonic()

    async def run(self) -> None:
        """Look for batches and run them until cancelled."""
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    await asyncio.to_thread(self._look)
                except RerankqError as error:
                    logger.warning("batches wait: %s", error)
                    await asyncio.sleep(TRY_AGAIN_S)
                except Exception:
                    logger.exception("batches wait")
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
        found = self._batches.open()
        self._known = {name: self._known.get(name) or self._waiting(name) for name in found}
        for of_batches in (self._not_before, self._told):
            for name in of_batches.keys() - self._known.keys():
                of_batches.pop(name, None)
        busy = Counter(self._known[name].tenant for name in self._running if name in self._known)
        for name in found:
            if len(self._running) >= AT_ONCE:
                break
            if name in self._running or self._not_before.get(name, 0.0) > now:
                continue
            tenant, expires_at = self._known[name]
            # One that is to end takes no time: it need not wait for those before it.
            ends = time.time() >= expires_at or self._batches.cancelled_at(name) is not None
            if busy[tenant] >= AT_ONCE_EACH and not ends:
                continue
            busy[tenant] += 1
            # Not waited for when the process ends: what hangs must not hold it up.
            thread = threading.Thread(target=self._run, args=(name,), name="rerankq-batch", daemon=True)
            self._running[name] = thread
            thread.start()
        if now - self._removed_at > REMOVE_EVERY_S:
            self._removed_at = now
            kept_s = self._settings.file_ttl_s
            self._files.remove_old(older_than_s=kept_s)
            self._batches.remove_old(older_than_s=kept_s)

    def _waiting(self, name: str) -> _Waiting:
        try:
            stored = self._batches.stored(name)
        except RerankqError:  # told by whoever runs it
            return _Waiting("", float("inf"))
        return _Waiting(stored.tenant or stored.owner or "", stored.batch.expires_at)

    def _run(self, name: str) -> None:
        try:
            with Journal.open(self._batches.folder(name) / JOURNAL, name.encode()) as journal:
                stored = self._batches.stored(name)
                BatchWork(self._settings, self._batches, self._files, stored, journal, self._stops, self._admit)()
        except JournalInUse:
            # Another gateway runs it; if that one dies, its lock is free.
            self._not_before[name] = time.monotonic() + TRY_AGAIN_S
        except GatewayStops:
            pass
        except (RerankqError, OSError) as error:
            if self._told.get(name) != str(error):
                self._told[name] = str(error)
                logger.warning("batch %s waits: %s", name, error)
            self._not_before[name] = time.monotonic() + TRY_AGAIN_S
        except JournalOfAnother as error:
            self._fail(name, f"its journal is not its own: {error}")
        except Exception:
            logger.exception("batch %s", name)
            self._fail(name, "internal error")

    def _admit(self, key: KeyLimits, jobs: Sequence[RerankJob]) -> float:
        """Ask, in a batch's thread, how many seconds a line has to wait for its turn within its key's rates."""
        pairs = sum(len(job.chunks) for job in jobs)
        tokens = sum(tokens_in(job.query, job.chunks) for job in jobs)
        asked = asyncio.run_coroutine_threadsafe(self._spend(key, pairs, tokens), self._loop)
        try:
            return asked.result(ADMIT_WITHIN_S)
        except TimeoutError:
            asked.cancel()
            raise BrokerUnavailable("the rates of keys were not answered in time") from None

    async def _spend(self, key: KeyLimits, pairs: int, tokens: int) -> float:
        self._keys.refresh()
        # As the key is now; one that was taken out goes on with what it had.
        return await self._rates.spend_line(self._keys.named(key.name) or key, pairs=pairs, tokens=tokens)

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
        admit: Callable[[KeyLimits, Sequence[RerankJob]], float],
    ) -> None:
        self._settings = settings
        self._batches = batches
        self._files = files
        self._stored = stored
        self._journal = journal
        self._stops = stops
        self._admit = admit
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
        counts = self._stored.batch.request_counts.model_copy(update={"total": found.lines})
        if self._ending() is not None:  # no worker is needed for that
            self._change(request_counts=counts)
            return
        named = {*found.models, *(str(one) for one in [(self._stored.batch.request_params or {}).get("model")] if one)}
        workers = client.workers()
        unknown = unknown_models(named, workers, self._settings)
        if unknown and not workers:
            raise NoWorker(f"no worker lives that could say whether {min(unknown)!r} is served")
        known = known_models(named, workers, self._settings)
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
        key = self._stored.key
        run = Run(
            plan,
            self._journal,
            client,
            self._settings,
            supervise=self._supervise,
            advance=self._advance,
            admit=lambda jobs: 0.0 if key is None else self._admit(key, jobs),
        )
        run.run()

    def _supervise(self) -> None:
        if self._stops.is_set():
            raise GatewayStops
        # Lines that were answered just before others have to wait are counted, too.
        self._advance(0)
        ending = self._ending()
        if ending is None:
            return
        code, message = ending
        # Written down first: whoever goes on after a crash may find every line answered.
        if not self._stored.ending:
            self._stored = self._stored.model_copy(update={"ending": code})
            self._batches.write(self._stored)
        raise BatchEnds(code, message)

    def _ending(self) -> tuple[str, str] | None:
        """Say what ends the batch now, and why lines are not ranked any more; what has ended it once still does."""
        if self._stored.ending:
            return CANCELLED if self._stored.ending == CANCELLED[0] else EXPIRED
        batch = self._stored.batch
        if self._batches.cancelled_at(batch.id) is not None:
            return CANCELLED
        return EXPIRED if time.time() >= batch.expires_at else None

    def _advance(self, _: int) -> None:
        counts = self._stored.batch.request_counts
        told = len(self._journal) == counts.completed + counts.failed
        if not told and time.monotonic() - self._counted_at >= COUNT_EVERY_S:
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
                    expires_at=stored.output_life_s and int(time.time()) + stored.output_life_s,
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
