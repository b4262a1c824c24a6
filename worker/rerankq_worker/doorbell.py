"""What a doorbell looks like. Whoever reaches the broker can put anything into a queue; nothing else is let in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rerankq.broker.celery_app import TASK

# A job's id has at most 128 characters.
LONGEST_ID = 128
LONGEST_SHOWN = 512
# Bytes of a message, before anybody parses it. What a client sends has about a thousand.
LARGEST = 65_536


class NoDoorbell(Exception):
    """Raised when a message is not a doorbell; says why, in none of the message's own words."""


def headers_of(headers: object, payload: object) -> dict[str, Any]:
    """Take from a doorbell's headers what Celery may read; what else they hold would be obeyed, or break it.

    A doorbell is our task, with a job's id as its only argument, and brings nothing to be done afterwards.

    >>> headers_of({"task": "rerankq.rerank", "id": "a", "eta": "2099-01-01"}, [["a"], {}, {"chain": None}])["id"]
    'a'
    >>> headers_of({"task": "rerankq.rerank", "id": "a"}, [])
    Traceback (most recent call last):
    rerankq_worker.doorbell.NoDoorbell: expected [arguments, keyword arguments, rest]

    Raises:
        NoDoorbell: if it is none.
    """
    said = headers if isinstance(headers, Mapping) else {}
    _expect(said.get("task") == TASK, "it names another task, or none")
    ring, shown = said.get("id"), said.get("argsrepr")
    _expect(_is_id(ring), "its own id is none")
    if not (isinstance(payload, list) and len(payload) == 3):
        raise NoDoorbell("expected [arguments, keyword arguments, rest]")
    arguments, named, rest = payload
    _expect(isinstance(arguments, list) and len(arguments) == 1 and _is_id(arguments[0]), "expected one job's id")
    _expect(named == {}, "expected no keyword arguments")
    _expect(isinstance(rest, Mapping) and not any(rest.values()), "it brings more to be done")
    # What Flower shows of it.
    shown = shown[:LONGEST_SHOWN] if isinstance(shown, str) else arguments[0]
    return {"task": TASK, "id": ring, "root_id": ring, "lang": "py", "argsrepr": shown, "kwargsrepr": "{}"}


def sized(message: bytes | str) -> None:
    """Let in what may be a doorbell by its size.

    Raises:
        NoDoorbell: if it is none.
    """
    _expect(len(message) <= LARGEST, f"it is larger than {LARGEST} bytes")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NoDoorbell(otherwise)


def _is_id(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_ID and value.isprintable()
