"""The OpenAPI document: the schemas of the dialects, which FastAPI does not see, as components."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from .dialects import PATHS, Dialect

_REF = "#/components/schemas/{model}"


class Failure(BaseModel):
    """An error, in the words of every dialect at once. ``field`` names the field that is wrong."""

    message: str
    detail: str
    error: str
    error_type: str
    code: str
    field: str | None = None
    job_id: str | None = None


_FAILURES = {
    "401": "No key, or none that is known.",
    "404": "No worker serves the model, and the deployment does not list it.",
    "413": "The request is larger than the deployment allows.",
    "422": "The request is wrong; `field` names the field.",
    "429": "Too much waits already, or the key's rate is used up; `Retry-After` says when to come back.",
    "503": "No worker serves the model at the moment, or the queue cannot be reached.",
    "504": "No ranking in time; the job was cancelled.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
_TOLD = {
    "X-Rerankq-Job": ("The job's id.", "string"),
    "X-Rerankq-Status": ("`ranked`, or `degraded`: the first stage's order.", "string"),
    "X-Rerankq-Cached-Pairs": ("Pairs whose score came from the cache.", "integer"),
    "X-Rerankq-Truncated": ("Documents that were longer than the model reads.", "integer"),
    "Server-Timing": ("Milliseconds: queued, tokenise, inference, total.", "string"),
}


def described(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Wrap an application's OpenAPI document, so that it has the dialects' schemas."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {}).setdefault("schemas", {}).update(_schemas()[1])
        return document

    return openapi


def failing(*statuses: str) -> dict[int | str, dict[str, Any]]:
    """Describe the errors of an operation."""
    schema = _schemas()[0][Failure, "serialization"]
    return {
        status: {
            "description": _FAILURES[status],
            "content": {"application/json": {"schema": schema}},
            **({"headers": _RETRY_AFTER} if status in {"429", "503", "504"} else {}),
        }
        for status in statuses
    }


def operation(path: str, dialects: tuple[Dialect[Any], ...]) -> dict[str, Any]:
    """Describe the bodies that a path of some dialects takes and answers."""
    names, _ = _schemas()
    asked = [names[dialect.request, "validation"] for dialect in dialects]
    answered = [names[dialect.response, "serialization"] for dialect in dialects]
    named = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}] if "{" in path else []
    return {
        **({"parameters": named} if named else {}),
        "requestBody": {"required": True, "content": {"application/json": {"schema": _any_of(asked)}}},
        "responses": {
            "200": {
                "description": "Ranked.",
                "headers": {
                    name: {"description": text, "schema": {"type": kind}} for name, (text, kind) in _TOLD.items()
                },
                "content": {"application/json": {"schema": _any_of(answered)}},
            },
            **failing(*_FAILURES),
        },
    }


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Write the schema of a body that FastAPI does not see, with what it refers to in its place."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).removeprefix("#/$defs/")
            return whole(parts[name]) if name in parts else {key: whole(one) for key, one in value.items()}
        return [whole(one) for one in value] if isinstance(value, list) else value

    found: dict[str, Any] = whole(schema)
    return found


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    different = [schema for at, schema in enumerate(schemas) if schema not in schemas[:at]]
    return different[0] if len(different) == 1 else {"anyOf": different}


@cache
def _schemas() -> tuple[dict[tuple[Any, JsonSchemaMode], dict[str, Any]], dict[str, Any]]:
    """Make the schema of each model, and the components that they refer to."""
    models: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {(Failure, "serialization"): None}
    for dialect in dict.fromkeys(dialect for dialects in PATHS.values() for dialect in dialects):
        models[dialect.request, "validation"] = None
        models[dialect.response, "serialization"] = None
    references, components = models_json_schema(list(models), ref_template=_REF)
    return dict(references), components["$defs"]
