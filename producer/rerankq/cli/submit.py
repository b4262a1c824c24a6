"""Jobs from lines of JSON: a file is checked whole before anything is submitted, a stream line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..contract import Ranking, RerankJob
from ..errors import RerankqError
from . import inputs
from .flow import Flow, batches
from .inputs import InputFault

Place = str

# More than these are counted, not said.
FAULTS_SAID = 20


class Reader:
    """Reads jobs; a line that is no job is told and passed over. ``faults`` counts such lines."""

    def __init__(self, source: str, tell: Callable[[str], None], *, max_bytes: int = inputs.MAX_LINE_BYTES) -> None:
        self.source = source
        self.faults = 0
        self._tell = tell
        self._max_bytes = max_bytes

    def jobs(self) -> Iterator[tuple[Place, RerankJob]]:
        """Yield each job with its file and line."""
        for line in inputs.lines(self.source, max_bytes=self._max_bytes):
            try:
                job = inputs.job_of(line)
            except InputFault as fault:
                self._count(fault)
            else:
                yield line.place, job

    def check(self) -> int:
        """Read it all and keep nothing; answer how many jobs there are."""
        return sum(1 for _ in self.jobs())

    def _count(self, fault: InputFault) -> None:
        self.faults += 1
        if self.faults <= FAULTS_SAID:
            self._tell(str(fault))
        elif self.faults == FAULTS_SAID + 1:
            self._tell(f"{self.source}: more lines are wrong")


def can_be_read_twice(source: str) -> bool:
    """Whether a source is a file, not a stream."""
    return source != inputs.STDIN and Path(source).is_file()


def ids(flow: Flow[Place], jobs: Iterable[tuple[Place, RerankJob]]) -> Iterator[tuple[Place, str | RerankqError]]:
    """Submit in batches; yield, in the input's order, each place with the job's id or the error that refused it.

    Raises:
        RerankqError: if nothing can be submitted any more; the ids accepted until then were yielded or are in
            ``accepted``.
    """
    for batch in batches(jobs):
        yield from flow.submit(batch)


def as_record(place: Place, outcome: Ranking | RerankqError) -> dict[str, Any]:
    """Write a ranking as JSON takes it; for an error ``{"line", "error_type", "error"}``."""
    if isinstance(outcome, Ranking):
        return outcome.model_dump(mode="json")
    return {"line": place, "error_type": type(outcome).__name__, "error": str(outcome)}
