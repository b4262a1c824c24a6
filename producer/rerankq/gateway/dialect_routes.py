"""The paths of the dialects: a request to a call, the reply to a response."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from .bodies import json_object, parsed
from .call_options import options_of
from .callers import Caller, caller_of
from .dialects import PATHS, choose
from .dialects.dialect import with_explanation
from .openapi import operation
from .ranker import CallerGone, Ranker, unless_gone
from .rerank_call import RerankReply

# As nginx logs a caller that hung up; nobody reads it.
CALLER_GONE = 499


def ranker_of(request: Request) -> Ranker:
    """Find the application's ranker."""
    ranker: Ranker = request.app.state.ranker
    return ranker


async def rerank(request: Request, caller: Annotated[Caller, Depends(caller_of)]) -> Response:
    """Rank documents for a query, in the dialect of the path and body."""
    # Where the path names the model.
    body = {**await json_object(request), **request.path_params}
    dialect = choose(request.scope["route"].path, body)
    asked = parsed(dialect.request, body)
    options = caller.allowed(options_of(request.headers))
    call = dialect.call_of(asked)
    ranker = ranker_of(request)
    try:
        reply = await unless_gone(request, ranker.rank(call, options), closing=ranker.closing)
    except CallerGone:
        return Response(status_code=CALLER_GONE)
    answer = dialect.response_of(asked, reply)
    if options.explain:
        answer = with_explanation(answer, reply)
    return Response(to_json(answer, inf_nan_mode="null"), headers=headers_of(reply), media_type="application/json")


def headers_of(reply: RerankReply) -> dict[str, str]:
    """Tell what the dialects have no room for."""
    times = reply.timings_ms
    spent = {"queued": times.queued, "tokenise": times.tokenise, "inference": times.inference, "total": times.total}
    told = {"X-Rerankq-Warning": "; ".join(reply.warnings)} if reply.warnings else {}
    return {
        **told,
        "X-Rerankq-Job": reply.job_id,
        "X-Rerankq-Status": "degraded" if reply.degraded else "ranked",
        "X-Rerankq-Cached-Pairs": str(reply.cached_pairs),
        "X-Rerankq-Truncated": str(reply.truncated_pairs),
        "Server-Timing": ", ".join(f"{name};dur={ms:.1f}" for name, ms in spent.items()),
    }


def router() -> APIRouter:
    """Build the paths of all dialects."""
    found = APIRouter(tags=["dialects"])
    for path, dialects in PATHS.items():
        names = dict.fromkeys(dialect.name for dialect in dialects)
        found.add_api_route(
            path,
            rerank,
            methods=["POST"],
            name=f"rerank {path}",
            operation_id="rerank" + re.sub(r"\W+", "_", path.replace("{model:path}", "model")),
            summary=f"Rerank: {', '.join(names)}",
            openapi_extra=operation(dialects),
        )
    return found
