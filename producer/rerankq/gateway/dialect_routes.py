"""The paths of the dialects: a request to a call, the reply to a response."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import cache
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from ..contract import Chunk
from . import failures
from .bodies import json_object
from .call_options import options_of
from .callers import Caller, caller_of
from .dialects import PATHS, choose
from .dialects.dialect import with_explanation
from .dialects.fields import parsed
from .metrics import record_of
from .openapi import operation
from .ranker import CallerGone, Ranker, unless_gone
from .rates import Rates, tokens_in
from .rerank_call import RerankCall, RerankReply


def ranker_of(request: Request) -> Ranker:
    """Find the application's ranker."""
    ranker: Ranker = request.app.state.ranker
    return ranker


async def spend(request: Request, caller: Caller, calls: Sequence[tuple[str, Sequence[Chunk]]]) -> None:
    """Count the pairs and tokens of calls, each a query with its chunks, before they are ranked.

    Raises:
        RateLimited: if they are more than their caller's key may send for now.
        JobTooLarge: if they are more than it may ever send at once.
    """
    if caller.key is not None:
        rates: Rates = request.app.state.rates
        pairs = sum(len(chunks) for _, chunks in calls)
        tokens = sum(tokens_in(query, chunks) for query, chunks in calls)
        await rates.spend_pairs(caller.key, pairs=pairs, tokens=tokens)


def dialect_of(path: str) -> str:
    """Name the dialect of a path, as metrics do where a request is refused unread.

    >>> dialect_of("/v2/rerank"), dialect_of("/v1/jobs/a"), dialect_of("/nothing")
    ('cohere', 'native', 'other')
    """
    if path in PATHS:
        return PATHS[path][0].name
    return "native" if path.startswith("/v1/jobs") else "other"


async def rerank(request: Request, caller: Annotated[Caller, Depends(caller_of)]) -> Response:
    """Rank documents for a query, in the dialect of the path and body."""
    options = caller.allowed(options_of(request.headers))
    ranker, record = ranker_of(request), record_of(request)
    left_s = record.began + ranker.time_of(options) - time.monotonic()
    await ranker.refuse_if_full(options, within_s=max(0.0, left_s))
    # Where the path names the model.
    body = {**await json_object(request), **request.path_params}
    dialect = choose(request.scope["route"].path, body)
    record.dialect, record.tenant = dialect.name, options.tenant
    asked = parsed(dialect.request, body)
    call = dialect.call_of(asked)
    calls = [call] if isinstance(call, RerankCall) else call.calls
    await spend(request, caller, [(one.query, one.documents) for one in calls])
    try:
        ranking = ranker.rank(call, options, began=record.began)
        reply = record.reply = await unless_gone(request, ranking, closing=ranker.closing)
    except CallerGone:
        return Response(status_code=failures.CALLER_GONE)
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


@cache
def router() -> APIRouter:
    """Build the paths of all dialects, once for all applications of a process: none differs by its settings."""
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
            openapi_extra=operation(path, dialects),
        )
    return found
