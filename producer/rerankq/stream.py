"""A stream of jobs: keyed jobs in, outcomes out, a bounded number of them in flight."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from .contract import Ranking, RerankJob, State
from .errors import JobRejected, JobTimedOut, ModelUnknown, QueueFull, RerankqError

K = TypeVar("K")
Outcome = Ranking | RerankqError

JOBS_AT_ONCE = 128
PAIRS_AT_ONCE = 12_800

# Seconds between retries after the broker has gone away: about a minute in all.
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)

# Seconds between two checks of the workers.
SUPERVISE_EVERY_S = 2.0


class JobClient(Protocol):
    """The methods of :class:`~rerankq.Client` that a stream needs."""

    def submit(self, job: RerankJob) -> str: ...  # noqa: D102
    def submit_many(self, jobs: Iterable[RerankJob]) -> list[str]: ...  # noqa: D102
    def as_completed(self, job_ids: Iterable[str], timeout: float | None = None) -> Iterator[tuple[str, Outcome]]: ...  # noqa: D102
    def cancel(self, job_id: str) -> State: ...  # noqa: D102
    def forget(self, *job_ids: str) -> None: ...  # noqa: D102


class WaitingClient(Protocol):
    """The method of :class:`~rerankq.Client` that :func:`wait_for` needs."""

    def result(self, job_id: str, timeout: float | None = None) -> Ranking: ...  # noqa: D102


def nothing() -> None:
    """Supervise nothing."""


class OpenClient(NamedTuple):
    """A client that is open.

    Attributes:
        client: the client.
        model: the model to name in jobs; None = the deployment's default.
        supervise: to be called periodically while waiting; what it raises ends the work.
    """

    client: JobClient
    model: str | None = None
    supervise: Callable[[], None] = nothing


@dataclass
class JobStream(Generic[K]):
    """Submit keyed jobs and yield their outcomes, at most two batches of them in flight.

    Args:
        client: submits the jobs.
        supervise: called periodically while waiting; what it raises ends the stream.
        owned: nobody else has these jobs: they are forgotten when done and cancelled when the stream is abandoned, and
            a model whose worker has gone is waited for; otherwise a job for a model that no worker serves is refused.
        sleep: waits for a number of seconds.

    ``in_flight`` are the ids of jobs that were submitted and have not ended, with the models that they name.
    """

    client: JobClient
    supervise: Callable[[], None] = nothing
    owned: bool = False
    sleep: Callable[[float], None] = time.sleep
    in_flight: dict[str, str | None] = field(default_factory=dict)
    _waiting: deque[dict[str, list[K]]] = field(default_factory=deque)
    _begun: bool = False

    def outcomes(self, jobs: Iterable[tuple[K, RerankJob] | None]) -> Iterator[tuple[K, Outcome]]:
        """Yield each key with its ranking or error, in order of completion; a refused job's error comes first.

        None among the jobs: those before it are to be submitted and waited for before the next one is asked for.

        Raises:
            RerankqError: if nothing can be submitted or waited for any more.
        """
        try:
            for batch in batches(jobs):
                if not batch:
                    while self._waiting:
                        yield from self._collect()
                    continue
                waiting: dict[str, list[K]] = {}
                self._waiting.append(waiting)
                refused = []
                for (key, answer), (_, job) in zip(self.submit(batch), batch, strict=True):
                    if isinstance(answer, RerankqError):
                        refused.append((key, answer))
                    else:
                        # Equal jobs have equal ids, and one ranking.
                        waiting.setdefault(answer, []).append(key)
                        self.in_flight[answer] = job.model
                yield from refused
                if len(self._waiting) > 1:
                    yield from self._collect()
            while self._waiting:
                yield from self._collect()
        finally:
            self._abandon()

    def submit(self, batch: Sequence[tuple[K, RerankJob]]) -> list[tuple[K, str | RerankqError]]:
        """Submit a batch, waiting while the queue is full; return each key with an id or the error that refused it.

        Raises:
            RerankqError: if no job can be submitted; ``accepted`` holds the ids accepted until then.
        """
        named = [(key, with_id(job)) for key, job in batch]
        try:
            ids = self.client.submit_many([job for _, job in named])
            return [(key, job_id) for (key, _), job_id in zip(named, ids, strict=True)]
        except RerankqError as error:
            # A wrong URL is reported at once; a broker that goes away later is waited for.
            if not (self._begun or error.accepted or isinstance(error, (*self._refusals, QueueFull))):
                raise
        finally:
            self._begun = True
        return self._submit_one_by_one(named)

    def ids(self, jobs: Iterable[tuple[K, RerankJob]]) -> Iterator[tuple[K, str | RerankqError]]:
        """Submit in batches; yield each key, in order, with the job's id or the error that refused it.

        Raises:
            RerankqError: if no job can be submitted any more; the ids accepted until then were yielded or are in
                ``accepted``.
        """
        for batch in batches(jobs):
            yield from self.submit(batch)

    def _submit_one_by_one(self, named: Sequence[tuple[K, RerankJob]]) -> list[tuple[K, str | RerankqError]]:
        # Find the job that was refused. Submitting a job twice is harmless: it is the same job.
        answers: list[tuple[K, str | RerankqError]] = []
        try:
            for key, job in named:
                answers.append((key, self._submit_one(job)))
        except RerankqError as error:
            error.accepted = [answer for _, answer in answers if isinstance(answer, str)]
            raise
        return answers

    @property
    def _refusals(self) -> tuple[type[RerankqError], ...]:
        return (JobRejected,) if self.owned else (JobRejected, ModelUnknown)

    def _submit_one(self, job: RerankJob) -> str | RerankqError:
        pauses = iter(PAUSES_S)
        while True:
            try:
                return self.client.submit(job)
            except self._refusals as error:
                return error
            except QueueFull as error:
                self._pause(error.retry_after_s)
            except RerankqError as error:
                wait_s = next(pauses, None)
                if not error.retryable or wait_s is None:
                    raise
                self._pause(wait_s)

    def _pause(self, seconds: float) -> None:
        self.supervise()
        self.sleep(seconds)

    def _collect(self) -> Iterator[tuple[K, Outcome]]:
        waiting = self._waiting[0]
        while waiting:
            ended: list[str] = []
            try:
                for job_id, outcome in self.client.as_completed(list(waiting), timeout=SUPERVISE_EVERY_S):
                    ended.append(job_id)
                    self.in_flight.pop(job_id, None)
                    yield from ((key, outcome) for key in waiting.pop(job_id))
            except JobTimedOut:
                pass
            finally:
                if self.owned and ended:
                    with suppress(RerankqError):  # it expires by its time to live
                        self.client.forget(*ended)
            self.supervise()
        self._waiting.popleft()

    def _abandon(self) -> None:
        if self.owned:
            with suppress(RerankqError):
                for job_id in [job_id for batch in self._waiting for job_id in batch]:
                    self.client.cancel(job_id)
        self._waiting.clear()


def wait_for(
    client: WaitingClient, job_id: str, timeout: float | None, *, supervise: Callable[[], None] = nothing
) -> Ranking:
    """Wait for a ranking, at most *timeout* seconds, calling *supervise* every ``SUPERVISE_EVERY_S``.

    Raises:
        JobTimedOut, JobFailed, JobExpired, JobCancelled, JobDead, JobUnknown: as a client's ``result``.
    """
    ends_at = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if ends_at is None else ends_at - time.monotonic()
        try:
            return client.result(job_id, SUPERVISE_EVERY_S if left is None else max(0.0, min(SUPERVISE_EVERY_S, left)))
        except JobTimedOut:
            if left is not None and left <= SUPERVISE_EVERY_S:
                raise JobTimedOut(f"job {job_id}: no ranking within {timeout} s; it may still come") from None
        supervise()


def batches(jobs: Iterable[tuple[K, RerankJob] | None]) -> Iterator[list[tuple[K, RerankJob]]]:
    """Group jobs, in order, into batches of bounded jobs and pairs; a job too big for one is a batch of its own.

    None ends a batch early; an empty batch says where it was.
    """
    batch: list[tuple[K, RerankJob]] = []
    pairs = 0
    for one in jobs:
        if one is None:
            if batch:
                yield batch
                batch, pairs = [], 0
            yield []
            continue
        key, job = one
        if batch and (len(batch) == JOBS_AT_ONCE or pairs + len(job.chunks) > PAIRS_AT_ONCE):
            yield batch
            batch, pairs = [], 0
        batch.append((key, job))
        pairs += len(job.chunks)
    if batch:
        yield batch


def with_id(job: RerankJob) -> RerankJob:
    """Give a job an id if it would get a random one, so that submitting it again makes no second job."""
    return job if job.id is not None or job.cache == "use" else job.model_copy(update={"id": secrets.token_hex(16)})
