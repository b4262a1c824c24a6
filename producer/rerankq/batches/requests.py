"""Lines of a batch: to calls of a dialect, and to lines that answer them. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic_core import from_json, to_json

from ..errors import JobExpired, JobRejected, RerankqError
from ..gateway.dialects import PATHS, Dialect, choose
from ..gateway.dialects.dialect import with_explanation
from ..gateway.dialects.fields import parsed
from ..gateway.paths import canonical_path
from ..gateway.rerank_call import CallOptions, RerankCall, RerankReply, ScoreCall
from ..identity import digest

MAX_CUSTOM_ID = 512
DEFAULT_ENDPOINT = "/v1/rerank"
_BOM = b"\xef\xbb\xbf"
_BLANKS = b" \t\r\n\v\f"


class RawLine(NamedTuple):
    """A line of a file that is not blank; ``number`` counts from 1. ``raw`` None: it was too long to be kept."""

    number: int
    raw: bytes | None


class Fault(Exception):
    """Raised for a line that cannot be answered with a ranking: what its answer says.

    ``field`` names the field of the line that is wrong.
    """

    def __init__(
        self, message: str, *, field: str = "", code: str = "invalid_request", status: int = 422, custom_id: str = ""
    ) -> None:
        super().__init__(message)
        self.field = field
        self.code = code
        self.status = status
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a batch says for all its lines: the path and fields of bodies that name none, and the caller's options."""

    endpoint: str = DEFAULT_ENDPOINT
    body: Mapping[str, Any] = field(default_factory=dict)
    options: CallOptions = field(default_factory=CallOptions)


@dataclass(frozen=True, slots=True)
class Request:
    """A line as a call of a dialect."""

    number: int
    custom_id: str
    dialect: Dialect[Any]
    asked: Any
    call: RerankCall | ScoreCall

    @property
    def calls(self) -> tuple[RerankCall, ...]:
        """The calls with one query each."""
        return (self.call,) if isinstance(self.call, RerankCall) else self.call.calls


def lines(file: IO[bytes], *, max_bytes: int) -> Iterator[RawLine]:
    r"""Yield the lines of a file that are not blank. Ends of lines are \n or \r\n; the last may have none.

    >>> import io
    >>> [(line.number, line.raw) for line in lines(io.BytesIO(b"\xef\xbb\xbfa\r\n\n" + b"x" * 9 + b"\nb"), max_bytes=5)]
    [(1, b'a\r\n'), (3, None), (4, b'b')]
    """
    number = 0
    while raw := file.readline(max_bytes + 1):
        number += 1
        if len(raw) > max_bytes and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(1 << 20)
            yield RawLine(number, None)
            continue
        # Concatenated files have byte order marks in the middle, too.
        raw = raw.removeprefix(_BOM)
        if raw.strip(_BLANKS):
            yield RawLine(number, raw)


def head_of(line: RawLine) -> tuple[str | None, str | None]:
    """Read a line's ``custom_id`` and model alone; None for what it lacks."""
    try:
        found = _object(line)
    except Fault:
        return None, None
    name, body = found.get("custom_id"), found.get("body")
    model = body.get("model") if isinstance(body, dict) else None
    known = isinstance(name, str) and 0 < len(name) <= MAX_CUSTOM_ID
    return name if known else None, model if isinstance(model, str) else None


def request_of(line: RawLine, defaults: Defaults) -> Request:
    """Read a line.

    Raises:
        Fault: naming the field that is wrong, and what was expected.
    """
    found = _object(line)
    custom_id = found.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise Fault(f"expected a text of 1 to {MAX_CUSTOM_ID} characters", field="custom_id")
    try:
        return _request(line.number, custom_id, found, defaults)
    except Fault as fault:
        fault.custom_id = custom_id
        raise
    except RerankqError as error:
        raise fault_of(error, custom_id, within="body") from None


def _request(number: int, custom_id: str, found: Mapping[str, Any], defaults: Defaults) -> Request:
    method = found.get("method") or "POST"
    if method != "POST":
        raise Fault("expected POST", field="method")
    url = defaults.endpoint if found.get("url") is None else found["url"]
    if not isinstance(url, str):
        raise Fault("expected the path of a rerank or score call, for example /v1/rerank", field="url")
    route, named = route_of(url)
    body = found.get("body")
    if not isinstance(body, dict):
        raise Fault("expected an object: the body of the call", field="body")
    whole = {**defaults.body, **body, **named}
    dialect = choose(route, whole)
    asked = parsed(dialect.request, whole)
    return Request(number, custom_id, dialect, asked, dialect.call_of(asked))


def route_of(url: str) -> tuple[str, dict[str, str]]:
    """Find the route of a path, or of a whole URL, and what the path names.

    Raises:
        Fault: if no rerank or score call has that path.

    >>> route_of("https://api.example.org/v1/rerank"), route_of("//rerank"), route_of("/v1/v1/rerank")
    (('/v1/rerank', {}), ('/rerank', {}), ('/v1/rerank', {}))
    """
    try:
        # Two slashes at the beginning come from pasting, as the rest does; no host is meant.
        path = canonical_path(urlsplit(re.sub("^/+", "/", url)).path).rstrip("/")
    except ValueError:
        path = ""
    if path in PATHS and "{" not in path:
        return path, {}
    for route, pattern in _PATTERNS.items():
        match = pattern.fullmatch(path)
        if match:
            return route, match.groupdict()
    raise Fault("expected the path of a rerank or score call, for example /v1/rerank", field="url")


def _pattern(route: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)(?::path)?\}", route)
    return re.compile("".join(f"(?P<{part}>.+)" if at % 2 else re.escape(part) for at, part in enumerate(parts)))


_PATTERNS = {route: _pattern(route) for route in PATHS if "{" in route}


def _object(line: RawLine) -> dict[str, Any]:
    if line.raw is None:
        raise Fault("the line is too long", field="line", code="line_too_long", status=413)
    try:
        found = from_json(line.raw, allow_inf_nan=False)
    except ValueError as error:
        raise Fault(f"not JSON: {error}", field="line") from None
    except RecursionError:
        raise Fault("nested too deeply", field="line") from None
    if not isinstance(found, dict):
        raise Fault(f"expected a JSON object, not {type(found).__name__}", field="line")
    return found


def fault_of(error: RerankqError, custom_id: str, *, within: str = "") -> Fault:
    """Say an error of ours as the fault of a line."""
    place = getattr(error, "field", "") if isinstance(error, JobRejected) else ""
    message = str(error).removeprefix(f"{place}: ") if place else str(error)
    where = ".".join(part for part in (within, place) if part) if place else ""
    code = "batch_expired" if isinstance(error, JobExpired) else type(error).__name__
    return Fault(message, field=where, code=code, status=error.http_status, custom_id=custom_id)


def answer(batch: str, request: Request, reply: RerankReply, options: CallOptions) -> bytes:
    """Write the line that answers a request with its ranking, in the request's own dialect."""
    body = request.dialect.response_of(request.asked, reply)
    if options.explain:
        body = with_explanation(body, reply)
    return _line(
        {
            "id": _line_id(batch, request.number),
            "custom_id": request.custom_id,
            "response": {"status_code": 200, "request_id": reply.job_id, "body": body},
            "error": None,
        }
    )


def answer_fault(batch: str, number: int, fault: Fault) -> bytes:
    """Write the line that says why a line has no ranking: which one, which field, and what was expected."""
    message = f"{fault.field}: {fault}" if fault.field else str(fault)
    told = {"message": message, "detail": message, "error": message, "code": fault.code}
    return _line(
        {
            "id": _line_id(batch, number),
            "custom_id": fault.custom_id or None,
            "response": {"status_code": fault.status, "request_id": "", "body": told},
            "error": {"code": fault.code, "message": message, "param": fault.field or None, "line": number},
        }
    )


def _line_id(batch: str, number: int) -> str:
    return f"batch_req_{digest(batch, str(number))[:24]}"


def _line(fields: Mapping[str, Any]) -> bytes:
    return to_json(fields, inf_nan_mode="null") + b"\n"
