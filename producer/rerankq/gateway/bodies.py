"""Request bodies: JSON in, models out, errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from ..errors import JobRejected

Model = TypeVar("Model", bound=BaseModel)


async def json_object(request: Request) -> dict[str, Any]:
    """Read a request's body as a JSON object.

    Raises:
        JobRejected: if it is none.
    """
    raw = await request.body()
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


def parsed(model: type[Model], body: Mapping[str, Any]) -> Model:
    """Read a body as a model.

    Raises:
        JobRejected: naming the first fields that are wrong, and what was expected.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        said = [
            (".".join(str(part) for part in fault["loc"]), fault["msg"].removeprefix("Value error, "))
            for fault in faults[:5]
        ]
        rest = "".join(f"; {place}: {message}" for place, message in said[1:])
        raise JobRejected(said[0][1] + rest, field=said[0][0] or "body") from None
