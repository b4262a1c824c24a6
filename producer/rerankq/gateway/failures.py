"""Errors as responses: a body that the clients of every dialect can read."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..errors import BrokerUnavailable, RerankqError

logger = logging.getLogger("rerankq.gateway")

# As nginx logs a caller that hung up; nobody reads it.
CALLER_GONE = 499

# Seconds after which to try again where there is no queue to say when: an outage, a worker that is not there.
OUTAGE_RETRY_S = 5.0
# As Text Embeddings Inference names kinds of errors.
_ERROR_TYPES = {401: "unauthorized", 403: "unauthorized", 429: "overloaded", 503: "unhealthy", 504: "overloaded"}


def failure(
    status: int,
    message: str,
    *,
    kind: str = "",
    field: str = "",
    retry_after_s: float | None = None,
    more: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """Answer an error. Cohere's clients read ``message``, Jina's and Xinference's ``detail``, TEI's the other two."""
    body = {
        "message": message,
        "detail": message,
        "error": message,
        "error_type": _ERROR_TYPES.get(status, "validation" if status < 500 else "backend"),
        "code": kind,
        **({"field": field} if field else {}),
        **(more or {}),
    }
    told = dict(headers or {})
    if retry_after_s is not None:
        told["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    return Response(to_json(body), status, told, media_type="application/json")


def of_error(error: RerankqError) -> Response:
    """Answer an error of ours, with the status that it knows."""
    job_id = getattr(error, "job_id", "")
    more = {"job_id": job_id} if job_id else {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is None and error.http_status == 503:
        retry_after_s = OUTAGE_RETRY_S
    return failure(
        error.http_status,
        # Where the ledger is, is nobody's business out there.
        "the queue cannot be reached; try again" if isinstance(error, BrokerUnavailable) else str(error),
        kind=type(error).__name__,
        field=getattr(error, "field", ""),
        retry_after_s=retry_after_s,
        more={**more, "accepted": error.accepted} if error.accepted else more,
    )


def no_key(*, presented: bool) -> Response:
    """Answer a request that needs a key, and has none that is known."""
    said = "this API key is not known here" if presented else "an API key is needed: Authorization: Bearer KEY"
    return failure(401, said, kind="KeyUnknown", headers={"WWW-Authenticate": "Bearer"})


async def on_error(_: Request, error: Exception) -> Response:
    """Answer an error of ours."""
    assert isinstance(error, RerankqError)  # noqa: S101 - registered for this type
    # Outages, lateness and ends are told elsewhere, and once; here they would come with every call.
    if error.http_status >= 500 and error.http_status not in {503, 504}:
        logger.warning("%s: %s", type(error).__name__, error)
    return of_error(error)


async def on_http_exception(_: Request, error: Exception) -> Response:
    """Answer what the framework raises: no such path, wrong method, too large."""
    assert isinstance(error, HTTPException)  # noqa: S101
    if error.status_code < 400:
        return Response(status_code=error.status_code, headers=error.headers)
    if error.status_code == 413:
        return failure(413, "the body is too large", kind="BodyTooLarge", field="body")
    return failure(error.status_code, str(error.detail), headers=dict(error.headers or {}))


async def on_invalid_request(_: Request, error: Exception) -> Response:
    """Answer a request whose parameters are wrong, naming them."""
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    return failure(422, f"{field}: {first['msg']}", kind="RequestInvalid", field=field)


async def on_hang_up(_: Request, __: Exception) -> Response:
    """Answer a caller that closed its connection before its body had come."""
    return Response(status_code=CALLER_GONE)


async def on_unexpected(_: Request, error: Exception) -> Response:
    """Answer a bug of ours without its details."""
    logger.error("unexpected error", exc_info=error)
    return failure(500, "internal error", kind="InternalError")
