"""The names of a job: its payload as it is stored, the payload's digest, its id, its label."""

from __future__ import annotations

import hashlib
import json
import secrets

from pydantic_core import PydanticSerializationError

from .contract import RerankJob, parse_job
from .errors import JobRejected

# A job's fields that do not change its ranking; they live beside the payload, not in it.
_BESIDE_THE_PAYLOAD = {"id", "deadline_s", "priority"}


def payload_of(job: RerankJob) -> bytes:
    """Write the part of a job that decides its ranking, as compact JSON with a fixed order of fields.

    Raises:
        JobRejected: if it cannot be written as JSON.
    """
    try:
        return job.model_dump_json(exclude=_BESIDE_THE_PAYLOAD, exclude_defaults=True).encode()
    except PydanticSerializationError as error:
        raise JobRejected(f"cannot be written as JSON: {error}") from None


def job_of(payload: bytes) -> RerankJob:
    """Read back what :func:`payload_of` wrote.

    Raises:
        JobRejected: if it is not a well-formed job; what it holds is not quoted.
    """
    return parse_job(payload)


def digest(*parts: str | bytes) -> str:
    """Hash parts so that no two lists of parts run together: BLAKE2b, 128 bits, as 32 hex digits.

    >>> digest("ab", "c") == digest("a", "bc")
    False
    """
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        hasher.update(len(raw).to_bytes(8, "big"))
        hasher.update(raw)
    return hasher.hexdigest()


def job_id(job: RerankJob, content: str) -> str:
    """Name a job: the caller's id, else (cache not ``use``) a random one, else its content's with the model's name.

    It does not depend on weights: submitted before the first worker runs, or while weights are replaced, a job has
    the same id.
    """
    if job.id is not None:
        return job.id
    return content if job.cache == "use" else secrets.token_hex(16)


def label_of(job: RerankJob, *, model: str) -> str:
    """Describe a job shortly for Flower and logs: no chunk's text, and short enough for Flower to show it whole.

    >>> label_of(RerankJob(query="why do tides rise and fall twice a day?", chunks=["x"]), model="m")
    '"why do tides rise and…" 1 chunk, m'
    """
    query = " ".join(job.query.split())
    first = query if len(query) <= 24 else f"{query[:24].rsplit(' ', 1)[0]}…"
    count = len(job.chunks)
    return f"{json.dumps(first, ensure_ascii=False)} {count} chunk{'s' if count != 1 else ''}, {model}"
