"""Validate doorbells: any client of the broker can put anything into a queue, and all else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rerankq.broker.celery_app import TASK

# A job's id has at most 128 characters.
LONGEST_ID = 128
LONGEST_SHOWN = 512
# Bytes of a message, before it is parsed. A doorbell of our clients has about a thousand.
LARGEST = 65_536


class NoDoorbell(Exception):
    """Raised when a message is not a doorbell; says why, in none of the message's own words."""


def headers_of(headers: object, payload: object) -> dict[str, Any]:
    """Take from a doorbell's headers what Celery may read; it would obey the others, or fail.

    A doorbell is our task, with a job's id as its only argument, without callbacks, chains or groups.

    >>> headers_of({"task": "rerankq.rerank", "id": "a", "eta": "2099-01-01"}, [["a"], {}, {"chain": None}])["id"]
    'a'
    >>> headers_of({"task": "rerankq.rerank", "id": "a"}, [])
    Traceback (most recent call last):
    rerankq_worker.doorbell.NoDoorbell: expected [arguments, keyword arguments, rest]

    Raises:
        NoDoorbell: if the message is no doorbell.
    """
    given = headers if isinstance(headers, Mapping) else {}
    _expect(given.get("task") == TASK, "expected the task rerankq.rerank")
    message_id, shown = given.get("id"), given.get("argsrepr")
    _expect(_is_id(message_id), "expected an id of at most 128 printable characters")
    if not (isinstance(payload, list) and len(payload) == 3):
        raise NoDoorbell("expected [arguments, keyword arguments, rest]")
    arguments, named, rest = payload
    _expect(isinstance(arguments, list) and len(arguments) == 1 and _is_id(arguments[0]), "expected one job's id")
    _expect(named == {}, "expected no keyword arguments")
    _expect(isinstance(rest, Mapping) and not any(rest.values()), "expected no callbacks, chains or groups")
    # What Flower shows of it.
    shown = shown[:LONGEST_SHOWN] if isinstance(shown, str) else arguments[0]
    return {"task": TASK, "id": message_id, "root_id": message_id, "lang": "py", "argsrepr": shown, "kwargsrepr": "{}"}


def sized(message: bytes | str) -> None:
    """Check the size of a message.

    Raises:
        NoDoorbell: if it is too large for a doorbell.
    """
    _expect(len(message) <= LARGEST, f"it is larger than {LARGEST} bytes")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NoDoorbell(otherwise)


def _is_id(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_ID and value.isprintable()
