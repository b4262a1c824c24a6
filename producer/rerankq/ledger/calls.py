"""Every change of the ledger as a value: a script, its arguments, and how to read the answer.

Built here and run by :class:`~rerankq.ledger.Ledger` or :class:`~rerankq.ledger.AsyncLedger`, so that both sides of
the client share every decision. What the scripts promise is said once, in their first lines.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from pydantic import ValidationError

from ..contract import DeadJob, JobEvent, JobStatus, Priority, Ranking, State
from ..errors import JobFailed
from .limits import LedgerLimits

Answer_co = TypeVar("Answer_co", covariant=True)
Argument = str | bytes | int | float


@dataclass(frozen=True)
class Call(Generic[Answer_co]):
    """One run of one script."""

    script: str
    args: Sequence[Argument]
    read: Callable[[object], Answer_co]


# Seconds; longer than any lease.
FOREVER_S = 1e9


class NewJob(NamedTuple):
    """A job as the ledger takes it; ``weights``: the fingerprints whose stored ranking is still valid."""

    id: str
    content: str
    queue: str
    tenant: str
    priority: Priority
    pairs: int
    deadline_s: float | None
    label: str
    model: str
    payload: bytes
    weights: tuple[str, ...] = ()


class Acceptance(NamedTuple):
    """What became of a submission: ``conflict``, ``full`` and ``memory_full`` refuse, a job's state accepts.

    ``full`` says how many pairs are waiting, ``memory_full`` how full the server's memory would be, in
    percent.
    """

    state: str
    send: bool
    pairs_waiting: int = 0
    memory_percent: int = 0


class Claim(NamedTuple):
    """A job taken for scoring; ``fence`` proves it to the ledger."""

    id: str
    fence: int
    suspect: bool
    priority: Priority
    waited_s: float
    payload: bytes
    refill_window: bool


class Doorbell(NamedTuple):
    """A doorbell to send; *ahead*: it overtakes those that are out already."""

    id: str
    queue: str
    label: str
    ahead: bool = False


class Deferred(NamedTuple):
    """A suspect that was not claimed: the doorbell to send again when its turn comes."""

    doorbell: Doorbell
    priority: Priority


class JobSnapshot(NamedTuple):
    """What the ledger knows of a job."""

    status: JobStatus
    error_type: str
    ranking: Ranking | None


class Retrial(NamedTuple):
    """What became of a dead job that was to be queued again: its state now, and the doorbell to send, if any."""

    state: State
    doorbell: Doorbell | None


class Swept(NamedTuple):
    """What a sweep found; nothing where another sweeper was at work. *overdue*: queues with old doorbells."""

    lapsed: int = 0
    dead: int = 0
    expired: int = 0
    doorbells: int = 0
    overdue: tuple[str, ...] = ()


class Recovered(NamedTuple):
    """What became of the jobs of a worker that ended: queued again unsuspected, as suspects, or dead."""

    unsuspected: int
    suspects: int
    dead: int


class Counted(NamedTuple):
    """How many messages the broker held of each queue, and when it was asked, by the ledger's clock."""

    at: float = 0
    messages: Mapping[str, int] = {}


NOT_COUNTED = Counted()


class WaitingQueue(NamedTuple):
    """What waits in a queue: jobs of so many tenants, their pairs, and the age of the oldest in seconds, if known."""

    name: str
    jobs: int
    pairs: int
    tenants: int
    oldest_s: float | None


class Load(NamedTuple):
    """What the ledger has to do: jobs running, jobs set aside as dead, and the queues in which jobs wait, by name."""

    running: int
    dead: int
    queues: tuple[WaitingQueue, ...]


def submit(new_job: NewJob, limits: LedgerLimits) -> Call[Acceptance]:
    """Accept a job: this write *is* acceptance."""
    args = (
        new_job.id,
        new_job.content,
        new_job.queue,
        new_job.tenant,
        new_job.priority,
        new_job.pairs,
        "" if new_job.deadline_s is None else new_job.deadline_s,
        new_job.label,
        new_job.model,
        new_job.payload,
        limits.max_queued_pairs,
        limits.max_memory_percent,
        limits.doorbell_window,
        *_end(limits),
        ",".join(new_job.weights),
    )

    def read(answer: object) -> Acceptance:
        first, second = _list(answer)
        match _text(first):
            case "full":
                return Acceptance("full", send=False, pairs_waiting=_int(second))
            case "memory_full":
                return Acceptance("memory_full", send=False, memory_percent=_int(second))
            case state:
                return Acceptance(state, send=bool(second))

    return Call("submit", args, read)


def claim(job_id: str, owner: str, limits: LedgerLimits) -> Call[Claim | State]:
    """Take a queued job under a lease; answers the job's state if it cannot be taken.

    The same call asked again (its answer was lost on the way) gives the same claim; a new call for a job that is
    running does not.
    """

    def read(answer: object) -> Claim | State:
        first, *rest = _list(answer)
        if not rest:
            return _state(first)
        fence, suspect, priority, waited, payload, more = rest
        return Claim(
            job_id,
            _int(fence),
            bool(suspect),
            _priority(priority),
            float(_text(waited)),
            _bytes(payload),
            refill_window=bool(more),
        )

    return Call("claim", (*_claim(job_id, owner, limits), 0), read)


def claim_unless_suspect(job_id: str, owner: str, limits: LedgerLimits) -> Call[Claim | Deferred | State]:
    """As :func:`claim`, but a suspect stays queued: the worker decides when to take it."""
    claimed = claim(job_id, owner, limits)

    def read(answer: object) -> Claim | Deferred | State:
        first, *rest = _list(answer)
        if first != b"deferred":
            return claimed.read(answer)
        queue, label, priority = rest
        return Deferred(Doorbell(job_id, _text(queue), _text(label), ahead=True), _priority(priority))

    return Call("claim", (*_claim(job_id, owner, limits), 1), read)


def _claim(job_id: str, owner: str, limits: LedgerLimits) -> tuple[Argument, ...]:
    return job_id, owner, secrets.token_hex(8), limits.lease_s, *_end(limits), limits.doorbell_window


def renew(held: Iterable[tuple[str, int, int]], limits: LedgerLimits) -> Call[list[str]]:
    """Renew leases of ``(id, fence, pairs done)``; answers the ids that are no longer held."""
    flat = [part for lease in held for part in lease]
    return Call("renew", (limits.lease_s, *flat), lambda answer: [_text(job_id) for job_id in _list(answer)])


def isolate(job_id: str, fence: int, owner: str) -> Call[bool]:
    """Note that this job is alone on its worker's device from now on: a death counts against it."""
    return Call("isolate", (job_id, fence, owner), bool)


def complete(job_id: str, fence: int, ranking: Ranking, limits: LedgerLimits) -> Call[State]:
    """Store a ranking; answers ``done``, or the state that refused it."""
    args = (job_id, fence, *_end(limits), ranking.model_dump_json().encode(), ranking.model.fingerprint)
    return Call("complete", args, _state)


def fail(job_id: str, fence: int, error_type: str, error: str, limits: LedgerLimits) -> Call[State]:
    """Store a failure; answers ``failed``, or the state that refused it."""
    return Call("fail", (job_id, fence, *_end(limits), error_type, _printable(error)[:2_000]), _state)


def hand_back(held: Iterable[tuple[str, int]]) -> Call[int]:
    """Queue running jobs again, under no suspicion."""
    return Call("hand_back", [part for lease in held for part in lease], _int)


def reroute(job_id: str, fence: int, queue: str, model: str) -> Call[bool]:
    """Queue a job that was claimed by a worker of another model where its own is served, as if never claimed."""
    return Call("reroute", (job_id, fence, queue, model), bool)


def adopt(moves: Mapping[str, str], *, limit: int = 500) -> Call[int]:
    """Move jobs that wait in queues that no worker serves (keys) to other queues (values); answers how many."""
    return Call("adopt", (limit, *(queue for move in moves.items() for queue in move)), _int)


def cancel(job_id: str, limits: LedgerLimits) -> Call[State]:
    """Cancel a job for everyone who submitted it; answers its state now."""
    return Call("cancel", (job_id, *_end(limits)), _state)


def snapshot(job_id: str, limits: LedgerLimits, *, with_ranking: bool = False) -> Call[JobSnapshot]:
    """Read a job's state, and its ranking where asked for.

    Raises (when read): JobFailed if the ranking is not one that this version can read.
    """

    def read(answer: object) -> JobSnapshot:
        state, done, pairs, created, started, ended, claims, error_type, error, tenant, ranking = _list(answer)
        status = JobStatus(
            job_id=job_id,
            state=_state(state),
            pairs_done=_int(done),
            pairs_total=_int(pairs),
            submitted_at=_time(created),
            started_at=_time(started),
            ended_at=_time(ended),
            attempts=_int(claims),
            error=_text(error) or None,
            tenant=_text(tenant),
        )
        return JobSnapshot(status, _text(error_type), _ranking(job_id, _bytes(ranking)) if ranking else None)

    return Call("snapshot", (job_id, *_end(limits), int(with_ranking)), read)


def forget(job_id: str, limits: LedgerLimits, *, dead: bool = False) -> Call[State]:
    """Drop what is stored of a job that ended but is not dead, or (*dead*) that is; answers the state it was in."""
    return Call("forget", (job_id, *_end(limits), int(dead)), _state)


def dead(first: int = 0, last: int = -1) -> Call[list[str]]:
    """List the ids of dead jobs from position *first* to *last*, the longest dead first; -1 is the last."""
    return Call("dead", (first, last), lambda answer: [_text(job_id) for job_id in _list(answer)])


def load() -> Call[Load]:
    """Count what runs and what waits. Changes nothing; its time grows with the tenants that have jobs waiting."""

    def read(answer: object) -> Load:
        now, running, dead_jobs, *queues = _list(answer)
        waiting = []
        for queue in queues:
            name, jobs, pairs, tenants, oldest = _list(queue)
            age_s = max(0.0, float(_bytes(now)) - float(_bytes(oldest))) if oldest else None
            waiting.append(WaitingQueue(_text(name), _int(jobs), _int(pairs), _int(tenants), age_s))
        return Load(_int(running), _int(dead_jobs), tuple(sorted(waiting)))

    return Call("load", (), read)


def record(job_id: str, *, with_payload: bool = False) -> Call[DeadJob | State]:
    """Read all that is kept of a dead job; answers the state of one that is not dead."""

    def read(answer: object) -> DeadJob | State:
        state, *fields = _list(answer)
        if state != b"dead":
            return _state(state or b"unknown")
        queue, tenant, label, pairs, deaths, created, ended, error, history, payload = fields
        return DeadJob(
            job_id=job_id,
            queue=_text(queue),
            tenant=_text(tenant),
            label=_text(label),
            pairs=_int(pairs),
            deaths=_int(deaths),
            submitted_at=_time(created),
            died_at=_time(ended),
            error=_text(error),
            history=[_event(line) for line in _text(history).splitlines()],
            payload=_text(payload) or None,
        )

    return Call("record", (job_id, int(with_payload)), read)


def retry(job_id: str, limits: LedgerLimits) -> Call[Retrial]:
    """Queue a dead job again: no attempts, its history kept."""

    def read(answer: object) -> Retrial:
        state, send, queue, label = _list(answer)
        return Retrial(_state(state), Doorbell(job_id, _text(queue), _text(label)) if send else None)

    return Call("retry", (job_id, *_end(limits), limits.doorbell_window), read)


def sweep(
    sweeper: str,
    limits: LedgerLimits,
    *,
    watched_s: float = FOREVER_S,
    counted: Counted = NOT_COUNTED,
    grace_s: float = 3,
    limit: int = 500,
) -> Call[Swept]:
    """Judge lapsed leases, expire jobs, and take back doorbells that are out for *grace_s* and that the broker lacks.

    *watched_s* says for how long the sweeper has seen the ledger without a break.
    """
    messages = [part for queue, found in counted.messages.items() for part in (queue, found)]
    watched = min(watched_s, FOREVER_S)
    args = (sweeper, watched, limits.lease_s, limits.max_attempts, *_end(limits), limit, grace_s, counted.at, *messages)

    def read(answer: object) -> Swept:
        numbers = _list(answer)
        lapsed, dead, expired, doorbells = map(_int, numbers[:4] or [0] * 4)
        return Swept(lapsed, dead, expired, doorbells, tuple(map(_text, numbers[4:])))

    return Call("sweep", args, read)


def refill_window(queues: Sequence[str], limits: LedgerLimits, *, most: int = 256) -> Call[list[Doorbell]]:
    """Take the next jobs of the backlog whose doorbells are to be sent, in turn over tenants."""

    def read(answer: object) -> list[Doorbell]:
        parts = iter(_list(answer))
        return [
            Doorbell(_text(job_id), _text(queue), _text(label), bool(ahead))
            for job_id, queue, label, ahead in zip(parts, parts, parts, parts, strict=True)
        ]

    return Call("refill_window", (limits.doorbell_window, most, *queues), read)


def beat(worker: str, info: str, *, forget_after_s: float) -> Call[float]:
    """Register a worker's sign of life; answers the ledger's time."""
    return Call("beat", (worker, info, forget_after_s), lambda answer: float(_text(answer)))


def sign_off(workers: Sequence[str]) -> Call[int]:
    """Take workers that have ended out of the registry; answers how many of them it held."""
    return Call("sign_off", workers, _int)


def recover(worker: str, waiting: Iterable[tuple[str, int]], limits: LedgerLimits) -> Call[Recovered]:
    """Queue again what a worker held whose process has ended for certain, and take it out of the registry.

    The claims in *waiting*, ``(id, fence)``, had only waited: they are no suspects, all others are.
    """
    args = (worker, limits.max_attempts, limits.channel, *(part for claim in waiting for part in claim))
    return Call("recover", args, lambda answer: Recovered(*map(_int, _list(answer))))


def _ranking(job_id: str, text: bytes) -> Ranking:
    try:
        return Ranking.model_validate_json(text)
    except ValidationError as error:
        msg = f"job {job_id}: its ranking was written by another version of rerankq: {error}"
        raise JobFailed(msg) from None


def _event(line: str) -> JobEvent:
    when, _, rest = line.partition(" ")
    event, _, worker = rest.partition(" ")
    return JobEvent(at=float(when), event=event, worker=worker)


def _end(limits: LedgerLimits) -> tuple[int, str]:
    return limits.result_ttl_s, limits.channel


def _priority(value: object) -> Priority:
    return "bulk" if _text(value) == "bulk" else "interactive"


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        msg = f"expected bytes of the ledger, got {type(value).__name__}. This is a bug."
        raise TypeError(msg)
    return value


def _text(value: object) -> str:
    return _bytes(value).decode(errors="replace")


def _int(value: object) -> int:
    return value if isinstance(value, int) else int(_bytes(value) or 0)


def _time(value: object) -> float | None:
    return float(_bytes(value)) if value else None


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _state(value: object) -> State:
    state: State = _text(value)  # type: ignore[assignment]  # the scripts write no other states
    return state
