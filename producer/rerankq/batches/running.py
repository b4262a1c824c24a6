"""Runs a batch: what is not answered yet becomes bulk jobs, a bounded number of them at a time."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from .. import catalogue
from ..contract import Ranking, RerankJob, State
from ..errors import JobRejected, JobUnknown, ModelUnknown, NoWorker, RerankqError
from ..gateway.call_options import split_model
from ..gateway.hosted_models import model_for, resolve, serving
from ..gateway.rerank_call import CallOptions, RerankCall, RerankReply, job_of_call, joined, reply_of
from ..identity import digest
from ..ledger.registry import WorkerInfo
from ..settings import Settings
from ..stream import JobClient, JobStream, Outcome
from .journal import Journal
from .requests import Defaults, Fault, RawLine, Request, answer, answer_fault, fault_of, head_of, lines, request_of

logger = logging.getLogger("rerankq.batches")

# Seconds for which the registry of workers is not read again, and between calls of *supervise* while lines are read.
REGISTRY_TTL_S, SUPERVISE_EVERY_S = 2.0, 1.0
# How often a line is submitted again whose job the ledger has lost.
TRIES = 3
# Seconds after which a line that must wait for its turn asks again, at the latest.
ASK_AGAIN_S = 5.0


class BatchClient(JobClient, Protocol):
    """The methods of :class:`~rerankq.Client` that a batch needs."""

    def workers(self) -> list[WorkerInfo]: ...  # noqa: D102


class BatchEnds(Exception):
    """Raised by whoever supervises a batch to end it: lines without an answer get this fault."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


# Parts in which the hashes of ids are compared.
PARTS = 16
# Models of a batch that are looked for before it starts.
MAX_MODELS = 100


@dataclass(frozen=True)
class Survey:
    """What a look through the whole input found: lines that are not blank, and ids that several lines may have.

    ``repeated`` are hashes: two ids may have the same one, so that an id among them need not be repeated. ``models``
    are the first models that lines name.
    """

    lines: int = 0
    repeated: frozenset[int] = frozenset()
    models: frozenset[str] = frozenset()


def survey(file: IO[bytes], *, max_bytes: int, at_most: int) -> Survey:
    """Look through an input once, in eight bytes a line.

    Raises:
        Fault: if it has more than *at_most* lines.
    """
    count, hashes = 0, array("Q")
    models: set[str] = set()
    for line in lines(file, max_bytes=max_bytes):
        count += 1
        if count > at_most:
            raise Fault(f"more than {at_most} lines", field="input_file_id", code="too_many_lines", status=413)
        name, model = head_of(line)
        if name is not None:
            hashes.append(_hash(name))
        if model is not None and len(models) < MAX_MODELS:
            models.add(model)
    return Survey(count, frozenset(_repeated(hashes)), frozenset(models))


def _hash(name: str) -> int:
    return int(digest(name)[:16], 16)


def _repeated(hashes: Sequence[int]) -> Iterator[int]:
    # In parts: sorted at once they would take five times the memory, and no other thread would run meanwhile.
    for part in range(PARTS):
        before = None
        for one in sorted(one for one in hashes if one % PARTS == part):
            if one == before:
                yield one
            before = one


@dataclass(frozen=True)
class Plan:
    """What a run needs to know of its batch.

    Args:
        name: names its jobs: a batch that is run again asks for the same ones.
        input: the file.
        defaults: what the batch says for all its lines.
        survey: what a look through the file found.
        max_line_bytes: of a line of the input.
        known_models: models that are waited for if no worker serves them at the moment; others are unknown.
        model: for lines that name none, or one that is hosted elsewhere; None = the deployment's default.
        expires_at: seconds since the epoch; None = never.
    """

    name: str
    input: Path
    defaults: Defaults
    survey: Survey
    max_line_bytes: int
    known_models: frozenset[str] = frozenset()
    model: str | None = None
    expires_at: float | None = None

    def with_models(self, model: str | None, known: frozenset[str]) -> Plan:
        """Name the models once there is somebody to ask."""
        return replace(self, model=model, known_models=known)


@dataclass
class _InFlight:
    """A line that waits for its rankings: one for each of its calls."""

    request: Request
    calls: tuple[RerankCall, ...]
    options: CallOptions
    replies: dict[int, RerankReply] = field(default_factory=dict)


class _PatientClient:
    """A client for which a model that was known when the batch began is away, not unknown."""

    def __init__(self, client: BatchClient, known: Callable[[str], bool]) -> None:
        self._client = client
        self._known = known

    def submit(self, job: RerankJob) -> str:
        try:
            return self._client.submit(job)
        except ModelUnknown as error:
            if job.model is not None and self._known(job.model):
                raise NoWorker(f"no worker serves {job.model!r} at the moment") from error
            raise

    def submit_many(self, jobs: Iterable[RerankJob]) -> list[str]:
        return self._client.submit_many(jobs)

    def as_completed(self, job_ids: Iterable[str], timeout: float | None = None) -> Iterator[tuple[str, Outcome]]:
        return self._client.as_completed(job_ids, timeout)

    def cancel(self, job_id: str) -> State:
        return self._client.cancel(job_id)

    def forget(self, *job_ids: str) -> None:
        self._client.forget(*job_ids)


class _Stream(JobStream[tuple[int, int]]):
    """A stream whose jobs are nobody else's, and whose unknown models are an answer."""

    @property
    def _refusals(self) -> tuple[type[RerankqError], ...]:
        return (JobRejected, ModelUnknown)


class Run:
    """One run over a batch, until every line is answered; what a run before it has answered is left as it is.

    *supervise* is called every second or two, and may raise: :class:`BatchEnds` ends the batch, anything else the run.
    *admit* is asked before the jobs of a line are submitted: how many seconds they have to wait for their turn (0 =
    none); JobTooLarge: it never comes.
    """

    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        client: BatchClient,
        settings: Settings,
        *,
        supervise: Callable[[], None],
        advance: Callable[[int], None] = lambda _: None,
        admit: Callable[[Sequence[RerankJob]], float] = lambda _: 0.0,
    ) -> None:
        self._plan = plan
        self._journal = journal
        self._client = client
        self._settings = settings
        self._supervise = supervise
        self._advance = advance
        self._admit = admit
        self._in_flight: dict[int, _InFlight] = {}
        self._lost: dict[int, int] = {}
        self._workers: list[WorkerInfo] = []
        self._workers_at = self._supervised_at = float("-inf")

    def run(self) -> None:
        """Answer every line.

        Raises:
            RerankqError: if the work cannot go on at the moment: what is answered stays.
            OSError: if an answer cannot be written.
        """
        try:
            while (before := len(self._journal)) < self._plan.survey.lines:
                self._pass()
                if len(self._journal) == before and not self._lost:
                    return
        except BatchEnds as end:
            self._end_rest(end)

    def _pass(self) -> None:
        self._in_flight.clear()
        stream = _Stream(
            _PatientClient(self._client, self._is_known), supervise=self._supervise, owned=True, sleep=self._sleep
        )
        outcomes = stream.outcomes(self._jobs())
        # Closing cancels the jobs that are still queued: nobody else waits for them.
        with closing(outcomes):  # type: ignore[type-var]  # it is a generator
            for (number, part), outcome in outcomes:
                self._collect(number, part, outcome)

    def _lines(self) -> Iterator[RawLine]:
        """Yield the lines that have no answer."""
        with self._plan.input.open("rb") as file:
            for line in lines(file, max_bytes=self._plan.max_line_bytes):
                # Before a line, too: a batch that has ended asks nobody for anything more.
                if time.monotonic() - self._supervised_at >= SUPERVISE_EVERY_S:
                    self._supervised_at = time.monotonic()
                    self._supervise()
                if line.number not in self._journal:
                    yield line

    def _jobs(self) -> Iterator[tuple[tuple[int, int], RerankJob] | None]:
        repeated: dict[str, int] = self._repeated_before()
        for line in self._lines():
            try:
                with _own_fault(line.number, partial(_custom_id, line)):
                    request = request_of(line, self._plan.defaults)
                    self._refuse_repeated(request, repeated)
                    made = self._made(request)
                yield from self._turn([job for _, job in made], request.custom_id)
            except Fault as fault:
                self._in_flight.pop(line.number, None)
                self._answer_fault(line.number, fault)
                continue
            yield from (((line.number, part), job) for part, job in made)

    def _turn(self, jobs: Sequence[RerankJob], custom_id: str) -> Iterator[None]:
        """Wait until it is these jobs' turn; None: the jobs before them are to be waited for first."""
        waited = False
        try:
            while jobs and (wait_s := self._admit(jobs)) > 0:
                if waited:
                    self._sleep(min(wait_s, ASK_AGAIN_S))
                else:
                    waited = True
                    yield None
        except JobRejected as error:
            raise fault_of(error, custom_id, within="body") from None

    def _repeated_before(self) -> dict[str, int]:
        """Find the first lines of the ids that may be repeated: some may be answered already."""
        first: dict[str, int] = {}
        if self._plan.survey.repeated:
            with self._plan.input.open("rb") as file:
                for line in lines(file, max_bytes=self._plan.max_line_bytes):
                    name, _ = head_of(line)
                    if name is not None and _hash(name) in self._plan.survey.repeated:
                        first.setdefault(name, line.number)
        return first

    @staticmethod
    def _refuse_repeated(request: Request, first: Mapping[str, int]) -> None:
        at = first.get(request.custom_id, request.number)
        if at < request.number:
            message = f"line {at} has the same; expected each id once"
            raise Fault(message, field="custom_id", code="duplicate_custom_id", status=409, custom_id=request.custom_id)

    def _made(self, request: Request) -> list[tuple[int, RerankJob]]:
        """Make the jobs of a request; what has nothing to rank is answered at once."""
        options = replace(self._plan.defaults.options, priority="bulk")
        left_s = 1e9 if self._plan.expires_at is None else max(1.0, self._plan.expires_at - time.time())
        jobs, calls, replies = [], [], {}
        try:
            for part, asked in enumerate(request.calls):
                call, resolved = resolve(asked, options, self._living_workers(), self._settings)
                call = replace(call, model=call.model or self._plan.model)
                self._refuse_unknown(call.model)
                job_id = self._job_id(request, part)
                job = job_of_call(call, replace(resolved, priority="bulk"), job_id=job_id, timeout_s=left_s)
                calls.append(call)
                if job is None:
                    nothing = Ranking(
                        job_id="", model={"name": call.model or self._settings.model, "fingerprint": ""}, chunks=[]
                    )
                    replies[part] = reply_of(call, resolved, nothing)
                else:
                    jobs.append((part, job))
        except RerankqError as error:
            if error.retryable and not isinstance(error, ModelUnknown):
                raise
            raise fault_of(error, request.custom_id, within="body") from None
        self._in_flight[request.number] = _InFlight(request, tuple(calls), resolved, replies)
        self._finish_if_whole(request.number)
        return jobs

    def _job_id(self, request: Request, part: int) -> str:
        """Name a job by batch and line: whoever runs the batch next asks for the same job."""
        of_several = f"-{part}" if len(request.calls) > 1 else ""
        tries = self._lost.get(request.number, 0)
        return f"{self._plan.name}-{request.number}{of_several}{f'-r{tries}' if tries else ''}"

    def _refuse_unknown(self, model: str | None) -> None:
        if model in {None, self._plan.model} or model in self._plan.known_models:
            return
        if is_served(str(model), self._living_workers(), self._settings):
            return
        raise ModelUnknown(f"no worker serves {model!r}")

    def _collect(self, number: int, part: int, outcome: Outcome) -> None:
        waiting = self._in_flight.get(number)
        if waiting is None:  # another of its jobs has failed
            return
        if isinstance(outcome, Ranking):
            try:
                with _own_fault(number, lambda: waiting.request.custom_id):
                    waiting.replies[part] = reply_of(waiting.calls[part], waiting.options, outcome)
                self._finish_if_whole(number)
            except Fault as fault:
                self._in_flight.pop(number, None)
                self._answer_fault(number, fault)
            return
        del self._in_flight[number]
        again = isinstance(outcome, JobUnknown) or (isinstance(outcome, JobRejected) and outcome.field == "id")
        if again and self._lost.get(number, 0) < TRIES:
            # The ledger has lost it, or has one of an earlier run that read less of its texts: a new id.
            self._lost[number] = self._lost.get(number, 0) + 1
            return
        self._answer_fault(number, fault_of(outcome, waiting.request.custom_id, within="body"))

    def _finish_if_whole(self, number: int) -> None:
        waiting = self._in_flight[number]
        if len(waiting.replies) < len(waiting.calls):
            return
        del self._in_flight[number]
        with _own_fault(number, lambda: waiting.request.custom_id):
            answered = self._answer(waiting)
        self._journal.append(number, "output", answered)
        self._lost.pop(number, None)
        self._advance(1)

    def _answer(self, whole: _InFlight) -> bytes:
        replies = [whole.replies[part] for part in range(len(whole.calls))]
        call = whole.request.call
        reply = replies[0] if isinstance(call, RerankCall) else joined(call, replies)
        return answer(self._plan.name, whole.request, reply, whole.options)

    def _answer_fault(self, number: int, fault: Fault) -> None:
        self._journal.append(number, "error", answer_fault(self._plan.name, number, fault))
        self._lost.pop(number, None)
        self._advance(1)

    def _end_rest(self, end: BatchEnds) -> None:
        """Answer all lines that have no answer with why they have none."""
        with self._plan.input.open("rb") as file:
            for line in lines(file, max_bytes=self._plan.max_line_bytes):
                if line.number not in self._journal:
                    fault = Fault(str(end), code=end.code, status=504, custom_id=_custom_id(line))
                    self._answer_fault(line.number, fault)

    def _living_workers(self) -> Sequence[WorkerInfo]:
        if time.monotonic() - self._workers_at >= REGISTRY_TTL_S:
            self._workers = self._client.workers()
            self._workers_at = time.monotonic()
        return self._workers

    def _is_known(self, model: str) -> bool:
        return model == self._plan.model or model in self._plan.known_models

    def _sleep(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            time.sleep(min(left, SUPERVISE_EVERY_S))
            self._supervise()


def _custom_id(line: RawLine) -> str:
    return head_of(line)[0] or ""


@contextmanager
def _own_fault(number: int, custom_id: Callable[[], str]) -> Iterator[None]:
    """Make a bug of ours the fault of its line: it is no reason to lose the answers of the others."""
    try:
        yield
    except (Fault, RerankqError, OSError):
        raise
    except Exception:
        logger.exception("unexpected error in line %d", number)
        raise Fault("internal error", code="internal_error", status=500, custom_id=custom_id()) from None


def is_served(model: str, workers: Sequence[WorkerInfo], settings: Settings) -> bool:
    """Whether the deployment has a model at the moment, or lists it."""
    full = catalogue.canonical(model, settings.conf_dir)
    listed = {catalogue.canonical(name, settings.conf_dir) for name in settings.models}
    return bool(full in listed or serving(full, workers) or serving(model, workers))


def known_models(names: Iterable[str], workers: Sequence[WorkerInfo], settings: Settings) -> frozenset[str]:
    """Pick the models that the deployment has at the moment, as jobs name them."""
    return frozenset(name for name in _named(names, workers, settings) if is_served(name, workers, settings))


def unknown_models(names: Iterable[str], workers: Sequence[WorkerInfo], settings: Settings) -> frozenset[str]:
    """Pick the models that the deployment does not have at the moment; names of hosted models are the default's."""
    return frozenset(name for name in _named(names, workers, settings) if not is_served(name, workers, settings))


def _named(names: Iterable[str], workers: Sequence[WorkerInfo], settings: Settings) -> set[str]:
    profiles = catalogue.profiles(settings.conf_dir)
    bare = {split_model(name, profiles)[0] for name in names}
    found = {model_for(name, workers, listed=settings.models, conf_dir=settings.conf_dir) for name in bare}
    return {name for name in found if name is not None}
