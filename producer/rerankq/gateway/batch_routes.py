"""Files and batches over HTTP, in the form that OpenAI and Voyage use."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from .. import catalogue
from ..batches.requests import DEFAULT_ENDPOINT, Fault, route_of
from ..errors import JobRejected
from .batch_store import BATCH_ID, BatchObject, BatchStore, StoredBatch
from .bodies import json_object
from .call_options import PREFIX, options_of
from .callers import Caller, caller_of
from .dialects.fields import parsed
from .file_store import (
    FILE_ID,
    LONGEST_SIGNATURE,
    FileObject,
    FileRefused,
    FileStore,
    FileUnknown,
    StoreUnavailable,
    new_id,
    not_lines,
)
from .openapi import schema_of

# Seconds of a batch's window, and of a file's life.
MIN_WINDOW_S, MAX_WINDOW_S = 60, 30 * 86_400
MIN_FILE_LIFE_S, MAX_FILE_LIFE_S = 3_600, 365 * 86_400
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
# Room for what multipart adds to a file.
MULTIPART_BYTES = 1 << 20
_UNITS = {"m": 60, "h": 3_600, "d": 86_400}

Sender = Annotated[Caller, Depends(caller_of)]
Limit = Annotated[int, Query(ge=1, le=10_000)]


class OutputLife(BaseModel):
    """How long the files with a batch's answers are kept, in OpenAI's form."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=MIN_FILE_LIFE_S, le=MAX_FILE_LIFE_S)


class BatchRequest(BaseModel):
    """Body of a request for a batch."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    input_file_id: str
    endpoint: str = DEFAULT_ENDPOINT
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    output_expires_after: OutputLife | None = None
    request_params: dict[str, JsonValue] | None = Field(
        None, description="Fields for the bodies of all lines that do not name them, as Voyage takes them."
    )

    @field_validator("endpoint")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            route_of(value)
        except Fault as fault:
            raise ValueError(str(fault)) from None
        return value

    @field_validator("completion_window")
    @classmethod
    def _a_time(cls, value: str) -> str:
        window_s(value)
        return value

    @field_validator("metadata")
    @classmethod
    def _small(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and len(value) > MAX_METADATA:
            raise ValueError(f"expected at most {MAX_METADATA} entries")
        for name, text in (value or {}).items():
            if len(name) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE:
                raise ValueError(
                    f"expected names of at most {MAX_METADATA_KEY} characters, texts of at most {MAX_METADATA_VALUE}"
                )
        return value


def window_s(text: str) -> int:
    """Read a completion window in seconds.

    >>> window_s("24h"), window_s("7d")
    (86400, 604800)
    """
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not MIN_WINDOW_S <= seconds <= MAX_WINDOW_S:
        raise ValueError("expected a time such as 24h, from 1m to 30d")
    return seconds


class Page(BaseModel):
    """What the lists have in common."""

    object: Literal["list"] = "list"
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class FileList(Page):
    """A list of files."""

    data: list[FileObject]


class BatchList(Page):
    """A list of batches."""

    data: list[BatchObject]


class FileDeleted(BaseModel):
    """A file that was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


def files_of(request: Request) -> FileStore:
    """Find the application's files."""
    files: FileStore = request.app.state.files
    return files


def batches_of(request: Request) -> BatchStore:
    """Find the application's batches."""
    batches: BatchStore = request.app.state.batches
    return batches


def owner_of(caller: Caller) -> str | None:
    """Say whose a caller's files and batches are; None: everybody's who may see all."""
    return caller.tenant


async def upload(request: Request, caller: Sender) -> Response:
    """Upload a file of requests: multipart, with `file` and `purpose` (batch)."""
    settings = request.app.state.settings
    async with _received(request) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise JobRejected("expected a multipart upload with a file", field="file")
        if purpose != "batch":
            raise JobRejected("expected batch", field="purpose")
        what = not_lines(await file.read(LONGEST_SIGNATURE))
        if what:
            raise JobRejected(f"is {what}; expected lines of JSON in UTF-8", field="file")
        await file.seek(0)
        if file.size is not None and file.size > settings.max_file_bytes:
            raise FileRefused(f"{file.size} bytes; at most {settings.max_file_bytes} are allowed")
        expires_at = _expiry(form.get("expires_after[seconds]"))
        made = await asyncio.to_thread(
            files_of(request).write,
            new_id("file-"),
            iter(lambda: file.file.read(1 << 20), b""),
            filename=(file.filename or "batch.jsonl")[:255],
            purpose=purpose,
            owner=owner_of(caller),
            expires_at=expires_at,
        )
    return JSONResponse(made.model_dump())


@asynccontextmanager
async def _received(request: Request) -> AsyncIterator[FormData]:
    try:
        form = await request.form(max_files=1, max_fields=20)
    except OSError as error:  # what is large is in a temporary file meanwhile
        raise StoreUnavailable(f"the upload cannot be kept: {error.strerror}") from error
    try:
        yield form
    finally:
        await form.close()


def _expiry(seconds: Any) -> int | None:
    if seconds is None:
        return None
    if (
        isinstance(seconds, str)
        and re.fullmatch("[0-9]{1,12}", seconds)
        and MIN_FILE_LIFE_S <= int(seconds) <= MAX_FILE_LIFE_S
    ):
        return int(time.time()) + int(seconds)
    said = f"expected seconds, from {MIN_FILE_LIFE_S} to {MAX_FILE_LIFE_S}"
    raise JobRejected(said, field="expires_after[seconds]")


def _cursor(after: str | None, pattern: re.Pattern[str]) -> str | None:
    if after and not pattern.fullmatch(after):
        raise JobRejected("expected an id, as last_id of the page before", field="after")
    return after or None


def _ends(data: list[Any]) -> dict[str, Any]:
    return {"first_id": data[0].id if data else None, "last_id": data[-1].id if data else None}


async def list_files(  # noqa: PLR0917 - the parameters of its path
    request: Request,
    caller: Sender,
    purpose: str | None = None,
    after: str | None = None,
    limit: Limit = 1_000,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List files, the newest first."""
    data, more = await asyncio.to_thread(
        files_of(request).page,
        owner_of(caller),
        purpose=purpose,
        after=_cursor(after, FILE_ID),
        limit=limit,
        oldest_first=order == "asc",
    )
    return JSONResponse(FileList(data=data, has_more=more, **_ends(data)).model_dump())


async def read_file(request: Request, file_id: str, caller: Sender) -> Response:
    """Say what a file is."""
    return JSONResponse((await asyncio.to_thread(files_of(request).read, file_id, owner_of(caller))).model_dump())


async def read_content(request: Request, file_id: str, caller: Sender) -> Response:
    """Download a file."""
    path = await asyncio.to_thread(files_of(request).content, file_id, owner_of(caller))
    if not path.is_file():
        raise FileUnknown(f"there is no file {file_id}")
    return FileResponse(path, media_type="application/jsonl")


async def delete_file(request: Request, file_id: str, caller: Sender) -> Response:
    """Delete a file. A batch that has begun with it goes on."""
    await asyncio.to_thread(files_of(request).delete, file_id, owner_of(caller))
    return JSONResponse(FileDeleted(id=file_id).model_dump())


async def create_batch(request: Request, caller: Sender) -> Response:
    """Begin a batch over an uploaded file: its lines are ranked as bulk jobs.

    The headers X-Rerankq-… hold for all its lines.
    """
    asked = parsed(BatchRequest, await json_object(request))
    options = caller.allowed(options_of(request.headers))
    if isinstance(options.fusion, str):
        _require_profile(request, options.fusion)
    content = await asyncio.to_thread(files_of(request).content, asked.input_file_id, owner_of(caller))
    now = int(time.time())
    batch = BatchObject(
        id=new_id("batch_"),
        endpoint=asked.endpoint,
        input_file_id=asked.input_file_id,
        completion_window=asked.completion_window,
        created_at=now,
        expires_at=now + window_s(asked.completion_window),
        metadata=asked.metadata,
        request_params=asked.request_params,
    )
    headers = {name: request.headers[PREFIX + name] for name in _KEPT_HEADERS if PREFIX + name in request.headers}
    stored = StoredBatch(
        batch=batch,
        owner=owner_of(caller),
        tenant=options.tenant,
        output_life_s=asked.output_expires_after.seconds if asked.output_expires_after is not None else None,
        key=caller.key.limits if caller.key is not None else None,
        headers={PREFIX + name: value for name, value in headers.items()},
    )
    await asyncio.to_thread(batches_of(request).add, stored, content)
    return _batch(batch)


def _require_profile(request: Request, name: str) -> None:
    try:
        catalogue.resolve(name, request.app.state.settings.conf_dir)
    except JobRejected as error:
        raise JobRejected(str(error).removeprefix(f"{error.field}: "), field=f"{PREFIX}Fusion") from None


# Of the options of a call those that mean something for a batch.
_KEPT_HEADERS = ("Fusion", "Cache", "Explain")


def _batch(batch: BatchObject) -> Response:
    return Response(batch.model_dump_json(), media_type="application/json")


async def list_batches(
    request: Request,
    caller: Sender,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """List batches, the newest first."""
    cursor = _cursor(after, BATCH_ID)
    listing = asyncio.to_thread(batches_of(request).page, owner_of(caller), after=cursor, limit=limit)
    data, more = await listing
    return Response(BatchList(data=data, has_more=more, **_ends(data)).model_dump_json(), media_type="application/json")


async def read_batch(request: Request, batch_id: str, caller: Sender) -> Response:
    """Say how far a batch is."""
    return _batch(await asyncio.to_thread(batches_of(request).read, batch_id, owner_of(caller)))


async def cancel_batch(request: Request, batch_id: str, caller: Sender) -> Response:
    """Cancel a batch: what is answered until then stays, and can be downloaded."""
    return _batch(await asyncio.to_thread(batches_of(request).cancel, batch_id, owner_of(caller)))


@cache
def router(max_file_bytes: int) -> APIRouter:
    """Build the paths of files and batches, once for a size; an upload may be larger than other bodies."""
    uploads = APIRouter(tags=["batches"], max_body_size=max_file_bytes + MULTIPART_BYTES)
    uploads.add_api_route(
        "/v1/files", upload, methods=["POST"], response_model=FileObject, openapi_extra={"requestBody": _UPLOAD}
    )
    found = APIRouter(tags=["batches"])
    found.include_router(uploads)
    found.add_api_route("/v1/files", list_files, methods=["GET"], response_model=FileList)
    found.add_api_route("/v1/files/{file_id}", read_file, methods=["GET"], response_model=FileObject)
    found.add_api_route("/v1/files/{file_id}/content", read_content, methods=["GET"], response_class=Response)
    found.add_api_route("/v1/files/{file_id}", delete_file, methods=["DELETE"], response_model=FileDeleted)
    body = {"required": True, "content": {"application/json": {"schema": schema_of(BatchRequest)}}}
    found.add_api_route(
        "/v1/batches", create_batch, methods=["POST"], response_model=BatchObject, openapi_extra={"requestBody": body}
    )
    found.add_api_route("/v1/batches", list_batches, methods=["GET"], response_model=BatchList)
    found.add_api_route("/v1/batches/{batch_id}", read_batch, methods=["GET"], response_model=BatchObject)
    found.add_api_route("/v1/batches/{batch_id}/cancel", cancel_batch, methods=["POST"], response_model=BatchObject)
    return found


_UPLOAD = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": ["batch"]},
                },
            }
        }
    },
}
