"""Who is to be told of a job's end: kept in the ledger, taken by one gateway at a time."""

from __future__ import annotations

from typing import NamedTuple

from ..contract import State
from .calls import Call
from .limits import LedgerLimits


class Taken(NamedTuple):
    """A delivery that is due. ``token`` proves who holds it; ``record`` is as it was added or reported."""

    job_id: str
    name: str
    token: str
    record: str


class Listed(NamedTuple):
    """A webhook of a job; ``next_at``: when it is tried next, seconds since the epoch, None = not any more."""

    name: str
    record: str
    next_at: float | None


def add(job_id: str, name: str, record: str, limits: LedgerLimits, *, look_s: float) -> Call[State]:
    """Have a URL told when the job has ended; answers its state now.

    *name* tells the URLs of a job apart; a record of the same name is replaced. A job that has not ended is looked at
    every *look_s* seconds, in case its end is not noted.
    """
    args = (job_id, name, record, look_s, limits.result_ttl_s, limits.channel)
    return Call("webhook_add", args, _text)  # type: ignore[arg-type]  # the scripts write no other states


def take(limits: LedgerLimits, *, lease_s: float, look_s: float, limit: int) -> Call[list[Taken]]:
    """Take at most *limit* deliveries that are due, for *lease_s* seconds."""

    def read(answer: object) -> list[Taken]:
        parts = iter([_text(part) for part in _list(answer)])
        return [Taken(*four) for four in zip(parts, parts, parts, parts, strict=True)]

    return Call("webhook_take", (lease_s, look_s, limit, limits.result_ttl_s, limits.channel), read)


def report(taken: Taken, record: str, *, wait_s: float | None, keep_s: int) -> Call[bool]:
    """Say what became of a delivery: its record now, and when it is tried again; None: not any more.

    Answers whether it was still ours. The records of a job of which none waits are kept for *keep_s* seconds.
    """
    args = (taken.job_id, taken.name, taken.token, record, "" if wait_s is None else wait_s, keep_s)
    return Call("webhook_report", args, bool)


def list_of(job_id: str) -> Call[list[Listed]]:
    """List the webhooks of a job."""

    def read(answer: object) -> list[Listed]:
        parts = iter([_text(part) for part in _list(answer)])
        return [
            Listed(name, record, float(next_at) if next_at else None)
            for name, record, next_at in zip(parts, parts, parts, strict=True)
        ]

    return Call("webhook_list", (job_id,), read)


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
