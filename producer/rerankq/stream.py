"""Jobs in, rankings out, with a bounded number of jobs in between."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from .contract import Ranking, RerankJob, State
from .errors import JobRejected, JobTimedOut, ModelUnknown, QueueFull, RerankqError

K = TypeVar("K")
Outcome = Ranking | RerankqError

JOBS_AT_ONCE = 128
PAIRS_AT_ONCE = 12_800

# Seconds between tries while the broker is away in the middle of the work: about a minute in all.
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)

# Seconds between two looks at those who do the work.
LOOK_S = 2.0


class JobClient(Protocol):
    """What is needed of a :class:`~rerankq.Client`."""

    def submit(self, job: RerankJob) -> str: ...  # noqa: D102
    def submit_many(self, jobs: Iterable[RerankJob]) -> list[str]: ...  # noqa: D102
    def as_completed(self, job_ids: Iterable[str], timeout: float | None = None) -> Iterator[tuple[str, Outcome]]: ...  # noqa: D102
    def cancel(self, job_id: str) -> State: ...  # noqa: D102
    def forget(self, *job_ids: str) -> None: ...  # noqa: D102


def nothing() -> None:
    """Look after nobody."""


@dataclass
class JobStream(Generic[K]):
    """Submit keyed jobs and yield their outcomes, at most two batches of them under way.

    Args:
        desk: the client.
        tend: called now and then while waiting; what it raises ends the flow.
        ours: the jobs are nobody else's: forgotten when done, cancelled when the flow is abandoned, and a model whose
            worker has vanished is waited for; otherwise a job for a model that nobody serves is refused.
        pause: waits, in seconds.

    ``under_way`` are the ids of jobs that were submitted and have not ended, with the models that they name.
    """

    client: JobClient
    supervise: Callable[[], None] = nothing
    ours: bool = False
    pause: Callable[[float], None] = time.sleep
    under_way: dict[str, str | None] = field(default_factory=dict)
    _waiting: deque[dict[str, list[K]]] = field(default_factory=deque)
    _begun: bool = False

    def outcomes(self, jobs: Iterable[tuple[K, RerankJob]]) -> Iterator[tuple[K, Outcome]]:
        """Yield each key with its ranking or error, in order of completion; a refused job's error comes first.

        Raises:
            RerankqError: if nothing can be submitted or waited for any more.
        """
        try:
            for batch in batches(jobs):
                waiting: dict[str, list[K]] = {}
                self._waiting.append(waiting)
                refused = []
                for (key, answer), (_, job) in zip(self.submit(batch), batch, strict=True):
                    if isinstance(answer, RerankqError):
                        refused.append((key, answer))
                    else:
                        # Equal jobs have equal ids, and one ranking.
                        waiting.setdefault(answer, []).append(key)
                        self.under_way[answer] = job.model
                yield from refused
                if len(self._waiting) > 1:
                    yield from self._collect()
            while self._waiting:
                yield from self._collect()
        finally:
            self._abandon()

    def submit(self, batch: Sequence[tuple[K, RerankJob]]) -> list[tuple[K, str | RerankqError]]:
        """Submit a batch, waiting for room where the queue is full; answer each key with an id or what refused it.

        Raises:
            RerankqError: if no job can be submitted; ``accepted`` holds the ids accepted until then.
        """
        named = [(key, with_id(job)) for key, job in batch]
        try:
            ids = self.client.submit_many([job for _, job in named])
            return [(key, job_id) for (key, _), job_id in zip(named, ids, strict=True)]
        except RerankqError as error:
            # A wrong URL is told at once; a broker that goes away in the middle is waited for.
            if not (self._begun or error.accepted or isinstance(error, (*self._refusals, QueueFull))):
                raise
        finally:
            self._begun = True
        return self._submit_apart(named)

    def _submit_apart(self, named: Sequence[tuple[K, RerankJob]]) -> list[tuple[K, str | RerankqError]]:
        # Which of them was refused? A job submitted twice is the same job, so each is asked for alone.
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
        return (JobRejected,) if self.ours else (JobRejected, ModelUnknown)

    def _submit_one(self, job: RerankJob) -> str | RerankqError:
        pauses = iter(PAUSES_S)
        while True:
            try:
                return self.client.submit(job)
            except self._refusals as error:
                return error
            except QueueFull as error:
                self._rest(error.retry_after_s)
            except RerankqError as error:
                wait_s = next(pauses, None)
                if not error.retryable or wait_s is None:
                    raise
                self._rest(wait_s)

    def _rest(self, seconds: float) -> None:
        self.supervise()
        self.pause(seconds)

    def _collect(self) -> Iterator[tuple[K, Outcome]]:
        waiting = self._waiting[0]
        while waiting:
            ended: list[str] = []
            try:
                for job_id, outcome in self.client.as_completed(list(waiting), timeout=LOOK_S):
                    ended.append(job_id)
                    self.under_way.pop(job_id, None)
                    yield from ((key, outcome) for key in waiting.pop(job_id))
            except JobTimedOut:
                pass
            finally:
                if self.ours and ended:
                    with suppress(RerankqError):  # what is not forgotten now goes by its time to live
                        self.client.forget(*ended)
            self.supervise()
        self._waiting.popleft()

    def _abandon(self) -> None:
        if self.ours:
            with suppress(RerankqError):
                for job_id in [job_id for batch in self._waiting for job_id in batch]:
                    self.client.cancel(job_id)
        self._waiting.clear()


def batches(jobs: Iterable[tuple[K, RerankJob]]) -> Iterator[list[tuple[K, RerankJob]]]:
    """Group jobs, in order, into batches of bounded jobs and pairs; a job too big for any batch stands alone."""
    batch: list[tuple[K, RerankJob]] = []
    pairs = 0
    for key, job in jobs:
        if batch and (len(batch) == JOBS_AT_ONCE or pairs + len(job.chunks) > PAIRS_AT_ONCE):
            yield batch
            batch, pairs = [], 0
        batch.append((key, job))
        pairs += len(job.chunks)
    if batch:
        yield batch


def with_id(job: RerankJob) -> RerankJob:
    """Give a job that would get a random id one of our choice, so that submitting it again doubles nothing."""
    return job if job.id is not None or job.cache == "use" else job.model_copy(update={"id": secrets.token_hex(16)})
