"""What a webhook is told, how that is signed, and when it is tried again. Pure functions."""

from __future__ import annotations

import hashlib
import hmac
import random
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json, to_json, to_jsonable_python

from ...contract import Ranking, State
from ...identity import digest

SIGNATURE = "X-Rerankq-Signature"
DELIVERY = "X-Rerankq-Delivery"
# Bytes: a larger ranking is not sent along, it is to be fetched by its link.
MAX_RANKING_BYTES = 262_144
# Seconds: before the second try, the longest before a try, and how far a receiver may ask to be left alone.
FIRST_WAIT_S, MAX_WAIT_S, MAX_ASKED_WAIT_S = 1.0, 900.0, 3_600.0


class Record(BaseModel):
    """A webhook as the ledger keeps it; times are seconds since the epoch.

    ``body`` is what is told, once a try has failed: the job itself may be forgotten before the next. ``ended_at``: when
    it was found that the job had ended.
    """

    model_config = ConfigDict(frozen=True)

    url: str
    secret: str | None = None
    added_at: float
    ended_at: float | None = None
    state: str = "pending"
    attempts: int = 0
    error: str | None = None
    body: str | None = None


def name_of(url: str) -> str:
    """Name a URL among the webhooks of a job."""
    return digest(url)


def body_of(
    job_id: str,
    state: State,
    *,
    ended_at: float | None,
    ranking: Ranking | None = None,
    error: str | None = None,
    error_type: str | None = None,
) -> bytes:
    """Write what is told of a job's end.

    ``id`` names the ending: whatever is told twice has the same one. The ranking is left out if it is large.
    """
    told: Any = None if ranking is None else to_jsonable_python(ranking, inf_nan_mode="null")
    if told is not None and len(to_json(told)) > MAX_RANKING_BYTES:
        told = None
    return to_json(
        {
            "id": f"evt_{digest(job_id, state, repr(ended_at))}",
            "type": f"job.{state}",
            "job_id": job_id,
            "state": state,
            "ended_at": ended_at,
            "ranking": told,
            "error": error,
            "error_type": error_type,
            "links": {"self": f"/v1/jobs/{job_id}"},
        }
    )


def event_id(body: bytes) -> str:
    """Read the ``id`` of what :func:`body_of` wrote."""
    return str(from_json(body)["id"])


def signature(secret: str, body: bytes, *, at: int) -> str:
    """Sign a body: HMAC-SHA256 over the time, a dot and the body.

    >>> signature("whsec", b"{}", at=1_700_000_000)[:30]
    't=1700000000,v1=7d44587dddbaf4'
    """
    signed = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256)
    return f"t={at},v1={signed.hexdigest()}"


def wait_after(attempts: int, *, asked_s: float | None = None, chance: float | None = None) -> float:
    """Say how many seconds to wait after so many failed tries: twice as long each time, give or take a quarter.

    Not less than the receiver asked for, within ``MAX_ASKED_WAIT_S``.

    >>> [wait_after(tries, chance=0.5) for tries in (1, 2, 5, 100)]
    [1.0, 2.0, 16.0, 900.0]
    """
    spread = 0.75 + 0.5 * (random.random() if chance is None else chance)  # noqa: S311 - no secret
    wait = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempts - 1, 20)) * spread
    return max(wait, min(asked_s or 0.0, MAX_ASKED_WAIT_S))
