"""The native API: submit jobs, wait for them, follow them, cancel them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..client.asynchronous import AsyncClient
from ..contract import ENDED, JobStatus, Ranking, RerankJob, parse_job
from ..errors import JobRejected, JobTimedOut, JobUnknown, RerankqError
from ..identity import digest
from .bodies import json_object
from .callers import Caller, caller_of
from .dialect_routes import ranker_of, spend
from .ranker import CallerGone, unless_gone
from .rerank_call import CallOptions
from .webhooks.delivering import Webhooks, WebhookStatus

# Seconds: of one long poll, and between looks at a job that is followed.
MAX_WAIT_S = 600.0
LOOK_EVERY_S = 0.5
# Whoever submits waits for nothing but the answer that the job is written down.
AT_ONCE = CallOptions(timeout_s=1.0)

Sender = Annotated[Caller, Depends(caller_of)]


class Links(BaseModel):
    """Where a job is to be found."""

    self: str
    events: str
    cancel: str


class Accepted(BaseModel):
    """A job that was accepted."""

    job_id: str
    state: str
    links: Links


class WebhookList(BaseModel):
    """What became of a job's webhooks."""

    job_id: str
    webhooks: list[WebhookStatus]


class JobAnswer(BaseModel):
    """A job's state, and its ranking once it is done, or why there is none."""

    model_config = ConfigDict(protected_namespaces=())

    job_id: str
    state: str
    status: JobStatus
    ranking: Ranking | None = None
    error: str | None = None
    error_type: str | None = None
    links: Links


def links_of(job_id: str) -> Links:
    """Say where a job is to be found."""
    here = f"/v1/jobs/{job_id}"
    return Links(self=here, events=f"{here}/events", cancel=here)


def client_of(request: Request) -> AsyncClient:
    """Find the application's client."""
    return ranker_of(request).client


def webhooks_of(request: Request) -> Webhooks:
    """Find the application's webhooks."""
    webhooks: Webhooks = request.app.state.webhooks
    return webhooks


def job_from(body: dict[str, Any], caller: Caller, idempotency_key: str | None) -> RerankJob:
    """Read a job: its tenant and priority within what the caller may; its id from an idempotency key.

    Raises:
        JobRejected: naming the field.
        NotAllowed: if it names another tenant than its caller's.
    """
    fields = {name: value for name, value in body.items() if name != "webhook"}
    if idempotency_key is not None and fields.get("id") is None:
        fields["id"] = f"key-{digest('idempotency', caller.name, idempotency_key)}"
    fields["tenant"] = caller.tenant_of(named) if isinstance(named := fields.get("tenant") or "", str) else named
    if caller.ceiling == "bulk":
        fields["priority"] = "bulk"
    return parse_job(fields)


routes = APIRouter(prefix="/v1/jobs", tags=["jobs"])


async def status_for(request: Request, job_id: str, caller: Sender) -> JobStatus:
    """Read a job's status.

    Raises:
        JobUnknown: if there is no such job, or it is another tenant's: which of the two is not told.
    """
    status = await client_of(request).status(job_id)
    if status.state == "unknown" or not caller.may_see(status.tenant):
        raise JobUnknown(f"job {job_id} is not known: never submitted, forgotten, or past its time to live")
    return status


Known = Annotated[JobStatus, Depends(status_for)]


@routes.post("", status_code=202, response_model=Accepted)
async def submit(
    request: Request,
    caller: Sender,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Response:
    """Submit a job: 202 once it is written down, and with it who is to be told of its end (`webhook`)."""
    client = client_of(request)
    await ranker_of(request).refuse_if_full(AT_ONCE)
    body = await json_object(request)
    job, webhook = job_from(body, caller, idempotency_key), await webhooks_of(request).read(body.get("webhook"))
    await spend(request, caller, [(job.query, job.chunks)])
    job_id = await client.submit(job)
    if webhook is None:
        state = (await client.status(job_id)).state
    else:
        state = await webhooks_of(request).add(job_id, webhook)
    accepted = Accepted(job_id=job_id, state=state, links=links_of(job_id))
    return JSONResponse(accepted.model_dump(), 202, {"Location": accepted.links.self, "X-Rerankq-Job": job_id})


@routes.post("/batch", status_code=202)
async def submit_batch(request: Request, caller: Sender) -> Response:
    """Submit several jobs: none is accepted if one is malformed."""
    await ranker_of(request).refuse_if_full(AT_ONCE)
    body = await json_object(request)
    jobs = body.get("jobs")
    if not isinstance(jobs, list) or not jobs:
        raise JobRejected("expected a list of jobs", field="jobs")
    webhooks = webhooks_of(request)
    for_all = await webhooks.read(body.get("webhook"))
    made, told = [], []
    for at, fields in enumerate(jobs):
        if not isinstance(fields, dict):
            raise JobRejected("expected a job", field=f"jobs.{at}")
        try:
            made.append(job_from(fields, caller, None))
            told.append(await webhooks.read(fields.get("webhook")) or for_all)
        except JobRejected as error:
            raise JobRejected(str(error), field=f"jobs.{at}") from None
    await spend(request, caller, [(job.query, job.chunks) for job in made])
    ids = await client_of(request).submit_many(made)
    for one, webhook in zip(ids, told, strict=True):
        if webhook is not None:
            await webhooks.add(one, webhook)
    return JSONResponse(
        {"jobs": [Accepted(job_id=one, state="queued", links=links_of(one)).model_dump() for one in ids]}, 202
    )


@routes.get("/{job_id}", response_model=JobAnswer)
async def read(
    request: Request,
    job_id: str,
    caller: Sender,
    wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for the job's end.")] = 0,
) -> Response:
    """Read a job, waiting for its end for some seconds."""
    try:
        answer = await unless_gone(request, _answer(request, job_id, wait, caller), closing=ranker_of(request).closing)
    except CallerGone:
        return Response(status_code=499)
    return Response(answer.model_dump_json(), media_type="application/json", headers={"X-Rerankq-Job": job_id})


async def _answer(request: Request, job_id: str, wait_s: float, caller: Caller) -> JobAnswer:
    client = client_of(request)
    status = await status_for(request, job_id, caller)
    ranking, error = None, None
    if wait_s > 0 or status.state in ENDED:
        try:
            with ranker_of(request).waiters.waiting(job_id):
                ranking = await client.result(job_id, wait_s)
        except JobTimedOut:
            pass
        except RerankqError as found:
            error = found
            if found.http_status == 503:
                raise
        status = await client.status(job_id)
    return JobAnswer(
        job_id=job_id,
        state=status.state,
        status=status,
        ranking=ranking,
        error=str(error) if error else status.error,
        error_type=type(error).__name__ if error else None,
        links=links_of(job_id),
    )


@routes.get("/{job_id}/webhooks", response_model=WebhookList)
async def read_webhooks(request: Request, job_id: str, caller: Sender) -> Response:
    """Say what became of a job's webhooks; those that were given up are kept for a week."""
    if caller.tenant is not None:
        await status_for(request, job_id, caller)
    found = await webhooks_of(request).of_job(job_id)
    return Response(WebhookList(job_id=job_id, webhooks=found).model_dump_json(), media_type="application/json")


@routes.get("/{job_id}/events", response_class=EventSourceResponse)
async def follow(request: Request, job_id: str, status: Known) -> AsyncIterator[ServerSentEvent]:
    """Follow a job by server-sent events: `state`, `progress`, and at its end `ranking` or `error`."""
    client = client_of(request)
    with ranker_of(request).waiters.waiting(job_id):
        ending = asyncio.create_task(client.result(job_id))
        try:
            before: JobStatus | None = None
            while not ending.done():
                status = await client.status(job_id)
                if before is None or status.state != before.state:
                    yield ServerSentEvent(event="state", data={"job_id": job_id, "state": status.state})
                if before is not None and status.pairs_done != before.pairs_done:
                    told = {"pairs_done": status.pairs_done, "pairs_total": status.pairs_total}
                    yield ServerSentEvent(event="progress", data=told)
                before = status
                await asyncio.wait({ending}, timeout=LOOK_EVERY_S)
            yield _last_event(ending)
        finally:
            ending.cancel()


def _last_event(ending: asyncio.Task[Ranking]) -> ServerSentEvent:
    try:
        return ServerSentEvent(event="ranking", data=to_jsonable_python(ending.result()))
    except RerankqError as error:
        return ServerSentEvent(event="error", data={"error": str(error), "error_type": type(error).__name__})


@routes.delete("/{job_id}")
async def cancel(request: Request, job_id: str, status: Known) -> Response:  # noqa: ARG001 - it is the caller's
    """Cancel a job, for everybody who submitted the same content."""
    state = await client_of(request).cancel(job_id)
    return JSONResponse({"job_id": job_id, "state": state})
