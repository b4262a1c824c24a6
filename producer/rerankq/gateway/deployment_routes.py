"""What a deployment is doing, what it can be asked for, and its dead jobs."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from .. import __version__, catalogue
from ..contract import DeadJob, Fusion, State
from ..errors import NotAllowed
from ..ledger.calls import WaitingQueue
from ..ledger.registry import WorkerInfo
from .callers import Caller, caller_of
from .job_routes import client_of

routes = APIRouter(prefix="/v1", tags=["deployment"])
Sender = Annotated[Caller, Depends(caller_of)]


def operator_of(caller: Sender) -> Caller:
    """Say who calls, if it may see the whole deployment.

    Raises:
        NotAllowed: if the gateway has keys, and this one is no operator's.
    """
    if caller.key is not None and not caller.operator:
        raise NotAllowed("the deployment and its dead jobs are of all tenants: they need the key of an operator")
    return caller


Operator = Annotated[Caller, Depends(operator_of)]


class Answer(BaseModel):
    """An answer of these paths."""

    model_config = ConfigDict(protected_namespaces=())


class Worker(Answer):
    """A worker that is alive. Counts are since it started."""

    id: str
    model: str = Field(description="Full name of its model.")
    aliases: list[str] = Field(description="Other names of the model.")
    queues: list[str] = Field(description="Queues that it serves.")
    device: str
    version: str
    age_s: float = Field(description="Seconds since its last sign of life.")
    pairs_per_s: float = Field(description="Pairs per second while its device was busy.")
    max_length: int = Field(description="Tokens of a pair that its model reads; 0 if it does not say.")
    jobs: int = Field(description="Jobs that it ranked.")
    pairs: int = Field(description="Pairs of these jobs.")
    cached_pairs: int = Field(description="Of these, from the score cache.")


class Waiting(Answer):
    """Jobs that wait in a queue."""

    name: str
    jobs: int
    pairs: int
    tenants: int
    oldest_s: float | None = Field(description="Seconds since the oldest was accepted.")
    workers: int = Field(description="Living workers that serve the queue.")


class Deployment(Answer):
    """What runs, what waits, and who works."""

    version: str = Field(description="Of the gateway.")
    default_model: str = Field(description="Full name of the model for jobs that name none.")
    running: int = Field(description="Jobs that workers are ranking.")
    waiting_jobs: int
    waiting_pairs: int
    oldest_s: float | None = Field(description="Seconds since the oldest waiting job was accepted.")
    dead: int = Field(description="Jobs that were set aside because they crashed their workers.")
    queues: list[Waiting]
    workers: list[Worker]


class Profile(Answer):
    """A fusion profile."""

    name: str
    description: str
    fusion: Fusion


class Profiles(Answer):
    """All fusion profiles."""

    profiles: list[Profile]


class DeadJobs(Answer):
    """The dead jobs, the longest dead first, without their texts."""

    jobs: list[DeadJob]
    total: int


class DeadJobState(Answer):
    """A dead job after something was done to it."""

    job_id: str
    state: State | Literal["dropped"]


@routes.get("/deployment")
async def read_deployment(request: Request, caller: Operator) -> Deployment:  # noqa: ARG001
    """Say what runs, what waits, and who works."""
    client = client_of(request)
    default_model, _ = await client.serving()
    workers = await client.workers()
    load = await client.load()
    ages = [queue.oldest_s for queue in load.queues if queue.oldest_s is not None]
    return Deployment(
        version=__version__,
        default_model=default_model,
        running=load.running,
        waiting_jobs=sum(queue.jobs for queue in load.queues),
        waiting_pairs=sum(queue.pairs for queue in load.queues),
        oldest_s=max(ages, default=None),
        dead=load.dead,
        queues=[_waiting(queue, workers) for queue in load.queues],
        workers=[Worker.model_validate(worker, from_attributes=True) for worker in sorted(workers)],
    )


def _waiting(queue: WaitingQueue, workers: list[WorkerInfo]) -> Waiting:
    serving = sum(queue.name in worker.queues for worker in workers)
    return Waiting(**queue._asdict(), workers=serving)


@routes.get("/fusion-profiles")
async def read_profiles(request: Request, caller: Sender) -> Profiles:  # noqa: ARG001
    """List the fusion profiles with their numbers."""
    conf_dir = client_of(request).settings.conf_dir
    described = catalogue.descriptions(conf_dir)
    return Profiles(
        profiles=[
            Profile(name=name, description=described.get(name, ""), fusion=fusion)
            for name, fusion in catalogue.profiles(conf_dir).items()
        ]
    )


# Of dead jobs in one answer: their histories take some kilobytes each.
MAX_DEAD = 500


@routes.get("/dead")
async def list_dead(
    request: Request,
    caller: Operator,  # noqa: ARG001
    limit: Annotated[int, Query(ge=1, le=MAX_DEAD, description="Jobs to answer at most.")] = 100,
) -> DeadJobs:
    """List the dead jobs with their histories, the longest dead first, without any of their texts."""
    found = await client_of(request).dead()
    # A label has the query's first words.
    return DeadJobs(jobs=[job.model_copy(update={"label": ""}) for job in found[:limit]], total=len(found))


@routes.get("/dead/{job_id}")
async def read_dead(
    request: Request,
    job_id: str,
    caller: Operator,  # noqa: ARG001
    payload: Annotated[bool, Query(description="Answer the job with all its texts, too.")] = False,
) -> DeadJob:
    """Show why a job is dead; with its texts only if they are asked for."""
    return await client_of(request).dead_job(job_id, payload=payload)


@routes.post("/dead/{job_id}/retry")
async def retry_dead(request: Request, job_id: str, caller: Operator) -> DeadJobState:  # noqa: ARG001
    """Queue a dead job again, to be run alone."""
    client = client_of(request)
    await client.dead_job(job_id)  # raises what is to be said if it is not dead
    return DeadJobState(job_id=job_id, state=await client.retry_dead(job_id))


@routes.delete("/dead/{job_id}")
async def drop_dead(request: Request, job_id: str, caller: Operator) -> DeadJobState:  # noqa: ARG001
    """Forget a dead job and its texts."""
    client = client_of(request)
    await client.dead_job(job_id)
    await client.drop_dead(job_id)
    return DeadJobState(job_id=job_id, state="dropped")
