"""The native API: submit jobs, wait for them, follow them, cancel them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..client.asynchronous import AsyncClient
from ..contract import ENDED, JobStatus, Ranking, RerankJob, parse_job
from ..errors import BrokerUnavailable, JobRejected, JobTimedOut, JobUnknown, QueueFull, RerankqError
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

# What a job's id begins with that was made of an idempotency key.
KEY_PREFIX = "key-"
# The id of a stream's last event: browsers name it when they connect again, and are told then that there is no more.
LAST_EVENT = "ended"

Sender = Annotated[Caller, Depends(caller_of)]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]


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


def job_from(body: dict[str, Any], caller: Caller, *idempotency_key: str) -> RerankJob:
    """Read a job: its tenant and priority within what the caller may; its id from an idempotency key, if there is one.

    Raises:
        JobRejected: naming the field.
        NotAllowed: if it names another tenant than its caller's.
    """
    fields = {name: value for name, value in body.items() if name != "webhook"}
    if idempotency_key and fields.get("id") is None:
        fields["id"] = f"{KEY_PREFIX}{digest('idempotency', caller.name, *idempotency_key)}"
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
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit a job: 202 once it is written down, and with it who is to be told of its end (`webhook`)."""
    client = client_of(request)
    await ranker_of(request).refuse_if_full(AT_ONCE)
    body = await json_object(request)
    key = () if idempotency_key is None else (idempotency_key,)
    job, webhook = job_from(body, caller, *key), await webhooks_of(request).read(body.get("webhook"))
    await spend(request, caller, [(job.query, job.chunks)])
    (job_id,) = await _submitted(client, [job], named_by_key=bool(key))
    if webhook is None:
        state = (await client.status(job_id)).state
    else:
        state = await webhooks_of(request).add(job_id, webhook)
    accepted = Accepted(job_id=job_id, state=state, links=links_of(job_id))
    return JSONResponse(accepted.model_dump(), 202, {"Location": accepted.links.self, "X-Rerankq-Job": job_id})


@routes.post("/batch", status_code=202)
async def submit_batch(request: Request, caller: Sender, idempotency_key: IdempotencyKey = None) -> Response:
    """Submit several jobs: none is accepted if one is malformed. An idempotency key names them by their places."""
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
            key = () if idempotency_key is None else (idempotency_key, str(at))
            made.append(job_from(fields, caller, *key))
            told.append(await webhooks.read(fields.get("webhook")) or for_all)
        except JobRejected as error:
            raise JobRejected(str(error), field=f"jobs.{at}") from None
    await spend(request, caller, [(job.query, job.chunks) for job in made])
    ids = await _submitted(client_of(request), made, named_by_key=idempotency_key is not None)
    for one, webhook in zip(ids, told, strict=True):
        if webhook is not None:
            await webhooks.add(one, webhook)
    # Some may have ended long ago: equal jobs are one.
    found = await asyncio.gather(*(client_of(request).status(one) for one in ids))
    return JSONResponse(
        {
            "jobs": [
                Accepted(job_id=one.job_id, state=one.state, links=links_of(one.job_id)).model_dump() for one in found
            ]
        },
        202,
    )


async def _submitted(client: AsyncClient, jobs: Sequence[RerankJob], *, named_by_key: bool) -> list[str]:
    try:
        return await client.submit_many(jobs)
    except JobRejected as error:
        if named_by_key and error.field == "id" and KEY_PREFIX in str(error):
            said = "was used before, for a job with other content"
            raise JobRejected(said, field="Idempotency-Key", accepted=error.accepted) from None
        raise


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
    found = await webhooks_of(request).of_job(job_id)
    # They outlive their job.
    if caller.tenant is not None or not found:
        await status_for(request, job_id, caller)
    return Response(WebhookList(job_id=job_id, webhooks=found).model_dump_json(), media_type="application/json")


async def refuse_ended(last_event_id: Annotated[str | None, Header()] = None) -> None:
    """Answer 204 to whoever has seen the last event: browsers connect again and again otherwise."""
    if last_event_id == LAST_EVENT:
        raise HTTPException(204)


@routes.get("/{job_id}/events", response_class=EventSourceResponse, dependencies=[Depends(refuse_ended)])
async def follow(request: Request, job_id: str, status: Known) -> AsyncIterator[ServerSentEvent]:
    """Follow a job by server-sent events: `state`, `progress`, and at its end `ranking` or `error`.

    Whoever connects again is told how far the job is; after the last event, by its `Last-Event-ID`, 204.
    """
    client, ranker = client_of(request), ranker_of(request)
    with ranker.waiters.waiting(job_id):
        ending = asyncio.create_task(client.result(job_id))
        stopping = asyncio.create_task(ranker.closing.wait())
        try:
            before: JobStatus | None = None
            ended = False
            while not (ended or stopping.done()):
                ended = ending.done()
                # An outage of the ledger only delays.
                with suppress(BrokerUnavailable, QueueFull):
                    status = await client.status(job_id)
                    for event in changes(before, status):
                        yield event
                    before = status
                if not ended:
                    await asyncio.wait({ending, stopping}, timeout=LOOK_EVERY_S)
            if ended and not isinstance(ending.exception(), BrokerUnavailable):
                yield last_event(ending)
        finally:
            ending.cancel()
            stopping.cancel()


def changes(before: JobStatus | None, now: JobStatus) -> Iterator[ServerSentEvent]:
    """Tell what is new in a job's status; *before* None: the follower knows nothing yet.

    >>> [event.event for event in changes(None, JobStatus(job_id="j", state="running", pairs_done=3, pairs_total=9))]
    ['state', 'progress']
    """
    if before is None or now.state != before.state:
        yield ServerSentEvent(event="state", data={"job_id": now.job_id, "state": now.state})
    if now.pairs_done != (before.pairs_done if before is not None else 0):
        yield ServerSentEvent(event="progress", data={"pairs_done": now.pairs_done, "pairs_total": now.pairs_total})


def last_event(ending: asyncio.Task[Ranking]) -> ServerSentEvent:
    """Tell a job's ranking, or why there is none."""
    try:
        return ServerSentEvent(event="ranking", data=to_jsonable_python(ending.result()), id=LAST_EVENT)
    except RerankqError as error:
        told = {"error": str(error), "error_type": type(error).__name__}
        return ServerSentEvent(event="error", data=told, id=LAST_EVENT)


@routes.delete("/{job_id}")
async def cancel(request: Request, job_id: str, status: Known) -> Response:  # noqa: ARG001 - it is the caller's
    """Cancel a job, for everybody who submitted the same content."""
    state = await client_of(request).cancel(job_id)
    return JSONResponse({"job_id": job_id, "state": state})
