"""Jobs from lines of JSON: a file is checked whole before anything is submitted, a stream line by line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..contract import Ranking, RerankJob
from ..errors import JobTimedOut, RerankqError
from ..rescoring import inputs
from ..rescoring.inputs import InputFault
from ..stream import LOOK_S, JobStream, batches

Route = str


class Waiting(Protocol):
    """What is needed of a :class:`~rerankq.Client` to wait for a job."""

    def result(self, job_id: str, timeout: float | None = None) -> Ranking: ...  # noqa: D102


# More than these are counted, not said.
FAULTS_SAID = 20


class Reader:
    """Reads jobs; a line that is no job is told and passed over. ``faults`` counts such lines."""

    def __init__(self, source: str, tell: Callable[[str], None], *, max_bytes: int = inputs.MAX_LINE_BYTES) -> None:
        self.source = source
        self.faults = 0
        self.pairs = 0
        self._tell = tell
        self._max_bytes = max_bytes

    def jobs(self) -> Iterator[tuple[Route, RerankJob]]:
        """Yield each job with its file and line."""
        for line in inputs.lines(self.source, max_bytes=self._max_bytes):
            try:
                job = inputs.job_of(line)
            except InputFault as fault:
                self._count(fault)
            else:
                self.pairs += len(job.chunks)
                yield line.place, job

    def check(self) -> int:
        """Read it all and keep nothing; answer how many pairs there are."""
        self.pairs = 0
        for _ in self.jobs():
            pass
        return self.pairs

    def _count(self, fault: InputFault) -> None:
        self.faults += 1
        if self.faults <= FAULTS_SAID:
            self._tell(str(fault))
        elif self.faults == FAULTS_SAID + 1:
            self._tell(f"{self.source}: more lines are wrong")


def can_be_read_twice(source: str) -> bool:
    """Whether a source is a file, not a stream."""
    return source != inputs.STDIN and Path(source).is_file()


def ids(flow: JobStream[Route], jobs: Iterable[tuple[Route, RerankJob]]) -> Iterator[tuple[Route, str | RerankqError]]:
    """Submit in batches; yield, in the input's order, each place with the job's id or the error that refused it.

    Raises:
        RerankqError: if nothing can be submitted any more; the ids accepted until then were yielded or are in
            ``accepted``.
    """
    for batch in batches(jobs):
        yield from flow.submit(batch)


def wait_for(open_client: Waiting, job_id: str, timeout: float | None, snapshot: Callable[[], None]) -> Ranking:
    """Wait for a ranking, and *look* now and then who is to make it.

    Raises:
        JobTimedOut, JobFailed, JobExpired, JobCancelled, JobDead, JobUnknown: as a client's ``result``.
    """
    ends_at = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if ends_at is None else ends_at - time.monotonic()
        try:
            return open_client.result(job_id, LOOK_S if left is None else max(0.0, min(LOOK_S, left)))
        except JobTimedOut:
            if left is not None and left <= LOOK_S:
                raise JobTimedOut(f"job {job_id}: no ranking within {timeout} s; it may still come") from None
        snapshot()


def as_record(place: Route, outcome: Ranking | RerankqError) -> dict[str, Any]:
    """Write a ranking as JSON takes it; for an error ``{"line", "error_type", "error"}``."""
    if isinstance(outcome, Ranking):
        return outcome.model_dump(mode="json")
    return {"line": place, "error_type": type(outcome).__name__, "error": str(outcome)}
