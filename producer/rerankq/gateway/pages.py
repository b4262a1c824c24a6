"""The pages: the playground at ``/``, the deployment at ``/deployment``, and the files that they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import NamedTuple

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..identity import digest
from ..local import demo

FOLDER = "playground"
# What a browser may do with the pages: load what this server has, and talk to it; no inline code, no frames around it,
# and no text that becomes markup (trusted types).
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Asked for each time, and answered by 304: pages and scripts of two versions never meet.
    "Cache-Control": "no-cache",
}
TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGES: Mapping[str, str] = {"/": "index.html", "/deployment": "deployment.html"}

# Public, also where keys are asked for: the pages hold no data.
routes = APIRouter(include_in_schema=False)


class Document(NamedTuple):
    """What is answered, under which type, and its entity tag."""

    body: bytes
    media_type: str
    etag: str


@cache
def documents() -> dict[str, Document]:
    """Read the files of the pages, by name, and the sample."""
    found = {}
    for file in (resources.files(__package__) / FOLDER).iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in TYPES:
            found[file.name] = _document(file.read_bytes(), TYPES[suffix])
    found["sample.json"] = _document(sample(), "application/json")
    return found


def sample() -> bytes:
    """Write the shipped sample as jobs: each question with all chunks in the order and with the scores of BM25."""
    jobs = demo.jobs_of(demo.read_sample())
    return to_json([job.model_dump(mode="json", exclude_defaults=True) for job in jobs])


def _document(body: bytes, media_type: str) -> Document:
    return Document(body, media_type, f'"{digest(body)}"')


def _answer(request: Request, name: str) -> Response:
    found = documents().get(name)
    if found is None:
        raise HTTPException(404, "Not Found")
    headers = {**HEADERS, "ETag": found.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")}
    if found.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(found.body, headers=headers, media_type=found.media_type)


async def page(request: Request) -> Response:
    """Answer a page."""
    return _answer(request, PAGES[request.scope["route"].path])


async def part(request: Request, name: str) -> Response:
    """Answer a file that the pages load."""
    return _answer(request, name)


for _path in PAGES:
    routes.add_api_route(_path, page, methods=["GET", "HEAD"], name=f"page {_path}")
routes.add_api_route(f"/{FOLDER}/{{name}}", part, methods=["GET", "HEAD"], name="part of a page")
