"""A web service that answers at once: one route submits a job, the other is polled for its ranking.

pip install fastapi uvicorn
RERANKQ_BROKER_URL=redis://localhost:6379/0 uvicorn --app-dir examples polling_backend:app
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from rerankq import AsyncClient, JobStatus, QueueFull, Ranking, RerankJob, RerankqError


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncClient() as app.state.client:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/jobs", status_code=202)
async def submit(job: RerankJob, request: Request) -> dict[str, str]:
    job_id = await request.app.state.client.submit(job)
    return {"job_id": job_id, "ranking": f"/jobs/{job_id}"}


@app.get("/jobs/{job_id}")
async def poll(job_id: str, request: Request, response: Response) -> Ranking | JobStatus:
    client: AsyncClient = request.app.state.client
    status = await client.status(job_id)
    if status.state in {"queued", "running"}:
        response.status_code = 202
        return status
    # The ranking, or the error that says why there is none.
    return await client.result(job_id, timeout=5)


@app.exception_handler(RerankqError)
async def refuse(_: Request, error: RerankqError) -> JSONResponse:
    headers = {"Retry-After": f"{error.retry_after_s:.0f}"} if isinstance(error, QueueFull) else None
    said = {"error": type(error).__name__, "message": str(error), "retryable": error.retryable}
    return JSONResponse(said, error.http_status, headers)
