"""Request bodies: JSON in, errors that say what was expected."""

from __future__ import annotations

from codecs import BOM_UTF8
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from ..errors import JobRejected


async def json_object(request: Request) -> dict[str, Any]:
    """Read a request's body as a JSON object.

    Raises:
        JobRejected: if it is none.
    """
    # Some programs begin every file and body with a byte order mark.
    raw = (await request.body()).removeprefix(BOM_UTF8)
    if not raw.strip():
        raise JobRejected("expected a JSON object, not an empty body", field="body")
    try:
        found = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise JobRejected(f"not JSON: {error}", field="body") from None
    except RecursionError:
        raise JobRejected("nested too deeply", field="body") from None
    if not isinstance(found, dict):
        raise JobRejected(f"expected a JSON object, not {type(found).__name__}", field="body")
    return found
