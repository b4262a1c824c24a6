"""Paths as people get them by pasting: ``//rerank``, ``/v1/v1/rerank``, ``/v1/rerank/v1/rerank``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .dialects import MOUNTS, PATHS

if TYPE_CHECKING:  # the command line, which reads paths too, does without
    from starlette.types import ASGIApp, Receive, Scope, Send

#: Where models are listed; below the prefixes of dialects, too.
DISCOVERY = frozenset(
    {
        *("/models", "/v1/models", "/info", "/v1/info", "/api/tags", "/api/show", "/health", "/infinity/models"),
        "/v1/cluster/auth",
    }
)
_ONE_MODEL = re.compile(r"(/v1)?/models/.+|(/deepinfra)?(/v1)?/inference/.+")
_FIXED = frozenset(path for path in PATHS if "{" not in path) | DISCOVERY
_SLASHES = re.compile("/{2,}")
# What stands before a path that we know when a base URL already had a path: versions, paths of rerank, and the paths
# below which providers keep their APIs.
_NOISE = re.compile(r"(/(v\d+|rerank|reranking|openai|api|projects/[^/]+|retrieval(/[^/]+)*|nv-rerank[^/]*))*")


def canonical_path(path: str) -> str:
    """Say which of our paths is meant; one that is no dialect's loses the slashes that are too many.

    >>> canonical_path("//rerank"), canonical_path("/v1/v1/rerank"), canonical_path("/v1/rerank/v1/rerank/")
    ('/rerank', '/v1/rerank', '/v1/rerank')
    >>> canonical_path("/v1/v2/rerank"), canonical_path("/tei/v1/models"), canonical_path("/rerank/info")
    ('/v2/rerank', '/v1/models', '/info')
    >>> canonical_path("/v1/jobs//"), canonical_path("/other/rerank")
    ('/v1/jobs', '/other/rerank')
    """
    if path in _FIXED:
        return path
    parts = [part for part in path.split("/") if part]
    prefix = f"/{parts.pop(0)}" if parts and parts[0] in MOUNTS else ""
    for at in range(len(parts)):
        before, rest = "".join(f"/{part}" for part in parts[:at]), "/" + "/".join(parts[at:])
        if _NOISE.fullmatch(before):
            if _is_ours(prefix + rest):
                return prefix + rest
            # Models are the same for every dialect.
            if prefix and _is_ours(rest) and rest not in PATHS:
                return rest
    # The prefix of a provider in front of the prefix of a dialect: /projects/x/cohere/v2/rerank.
    for at, part in enumerate(parts[1:], 1):
        if not prefix and part in MOUNTS and _NOISE.fullmatch("".join(f"/{one}" for one in parts[:at])):
            return canonical_path("/" + "/".join(parts[at:]))
    single = _SLASHES.sub("/", path)
    return single.removesuffix("/") or single


def _is_ours(path: str) -> bool:
    return path in _FIXED or bool(_ONE_MODEL.fullmatch(path))


class PastedPaths:
    """Middleware that routes a request by its canonical path, a slash at its end or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http":
            path = canonical_path(scope["path"])
            # Not redirected: that would lead to whatever host the request names, and clients send no body again.
            path = path.removesuffix("/") or "/"
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)
