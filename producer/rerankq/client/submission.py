"""Submitting: jobs are checked, written as the ledger takes them, and sent in bulk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from .. import catalogue
from ..contract import RerankJob
from ..errors import (
    JobRejected,
    JobTooLarge,
    RerankqError,
)
from ..identity import digest, job_id, label_of, payload_of
from ..ledger import NewJob
from ..ledger.runner import yield_to_loop
from ..settings import Settings
from .routing import Route, queue_name

T = TypeVar("T")
Job = RerankJob | Mapping[str, Any] | str | bytes

# Jobs and bytes of one round trip of submit_many.
SUBMIT_AT_ONCE = 300
SUBMIT_BYTES = 4_000_000


def refuse_too_large(data: Job, settings: Settings) -> None:
    """Refuse a job that is clearly over a limit, before the work of reading it is done.

    Raises:
        JobTooLarge: if it cannot be a job within ``MAX_CHUNKS`` and ``MAX_JOB_BYTES``.
        JobRejected: if it is of a type that no job can be read from.
    """
    if not isinstance(data, RerankJob | Mapping | str | bytes):
        raise JobRejected(f"expected a RerankJob, a mapping or JSON, not {type(data).__name__}", field="job")
    if isinstance(data, str | bytes):
        # JSON that escapes all but ASCII takes three bytes for one of UTF-8, at most: six for the two of an é.
        if len(data) > 3 * settings.max_job_bytes:
            raise JobTooLarge(f"{len(data)} bytes of JSON; at most {settings.max_job_bytes} are allowed", field="job")
        return
    chunks = data.chunks if isinstance(data, RerankJob) else data.get("chunks")
    count = len(chunks) if isinstance(chunks, list | tuple) else 0
    if count > settings.max_chunks:
        raise JobTooLarge(f"{count} chunks; at most {settings.max_chunks} are allowed", field="chunks")


def prepare(job: RerankJob, route: Route, settings: Settings) -> NewJob:
    """Check a job against the deployment's limits and write it as the ledger takes it.

    Raises:
        JobTooLarge: over ``MAX_CHUNKS`` or ``MAX_JOB_BYTES``.
        JobRejected: if it names an unknown fusion profile, or asks for something that no worker can do.
    """
    refuse_too_large(job, settings)
    if job.long_chunks == "window":
        raise JobRejected("'window' is not available yet; use 'truncate'", field="long_chunks")
    # Where no worker lives yet, the one that takes the job finds out.
    if job.instruction and route.weights and not route.takes_instruction:
        raise JobRejected(f"the model {route.model!r} takes none", field="instruction")
    # The numbers travel, not a profile's name: a profile edited later must not change an accepted job.
    # And the model's full name, whatever alias was used; a job that names none is for whatever is the default then.
    named = {} if job.model is None else {"model": route.model}
    resolved = job.model_copy(update={"fusion": catalogue.resolve(job.fusion, settings.conf_dir), **named})
    payload = payload_of(resolved)
    if len(payload) > settings.max_job_bytes:
        raise JobTooLarge(f"{len(payload)} bytes as JSON; at most {settings.max_job_bytes} are allowed", field="job")
    content = digest(payload)
    return NewJob(
        id=job_id(job, content),
        content=content,
        queue=queue_name(job.priority, route.suffix),
        tenant=job.tenant,
        priority=job.priority,
        pairs=len(job.chunks),
        deadline_s=job.deadline_s,
        label=label_of(job, model=route.model),
        model=route.model,
        payload=payload,
        weights=route.weights,
    )


class Submission:
    """One bulk submission. While a round trip is under way, the jobs of the next are checked and written.

    Every error of ours that it raises carries ``accepted``: the ids accepted until then, by all round trips.
    """

    def __init__(
        self, prepare: Callable[[Job], Awaitable[NewJob]], submit: Callable[[list[NewJob]], asyncio.Task[list[str]]]
    ) -> None:
        self._prepare = prepare
        self._submit = submit
        self._accepted: list[str] = []
        self._sending: asyncio.Task[list[str]] | None = None

    @property
    def accepted(self) -> list[str]:
        """The ids of the jobs that the ledger has accepted, in order."""
        return list(self._accepted)

    async def add(self, jobs: Iterable[Job]) -> None:
        """Submit these too; the last round trip of them may still be under way."""
        new_jobs: list[NewJob] = []
        weight, since = 0, time.monotonic()
        try:
            for job in jobs:
                try:
                    new_jobs.append(await self._prepare(job))
                except RerankqError:
                    # Those before the one that is refused are accepted.
                    await self._send(new_jobs)
                    await self._sent()
                    raise
                weight += len(new_jobs[-1].payload)
                if weight > SUBMIT_BYTES or len(new_jobs) >= SUBMIT_AT_ONCE:
                    await self._send(new_jobs)
                    new_jobs, weight = [], 0
                since = await yield_to_loop(since)
            await self._send(new_jobs)
        except RerankqError as error:
            error.accepted = self._accepted + error.accepted
            raise

    async def end(self) -> list[str]:
        """Wait for what is under way; answer the ids of all that was accepted, in order."""
        try:
            await self._sent()
        except RerankqError as error:
            error.accepted = self._accepted + error.accepted
            raise
        return self._accepted

    async def _send(self, new_jobs: list[NewJob]) -> None:
        await self._sent()
        if new_jobs:
            self._sending = self._submit(new_jobs)

    async def _sent(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            # It goes on if the caller is cancelled: doorbells must still be sent for what the ledger has accepted.
            self._accepted += await asyncio.shield(sending)
