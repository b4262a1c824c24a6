"""What a client decides without asking anybody: what a job becomes, what an end means, what a round trip holds."""

import asyncio
import json
from typing import Any

import pytest

from rerankq import JobFailed, JobRejected, JobTooLarge, JobUnknown, RerankJob, catalogue
from rerankq.client import asynchronous as client
from rerankq.client.asynchronous import AsyncClient, outcome, seconds_of
from rerankq.client.routing import Route
from rerankq.client.submission import Submission, prepare, refuse_too_large
from rerankq.contract import JobStatus
from rerankq.identity import job_of
from rerankq.ledger import JobSnapshot, LedgerLimits, NewJob
from rerankq.ledger.lease_policy import LeasePolicy
from rerankq.settings import Settings

PLACE = Route("full/name", ("w", "x"), ".full")


def settings(**fields: Any) -> Settings:
    return Settings(broker_url="redis://nobody:1/0", **fields)


def job(chunks: int = 2, **fields: Any) -> RerankJob:
    return RerankJob(query="why?", chunks=["because"] * chunks, **fields)


# What a job becomes


def test_a_job_carries_its_models_full_name_and_its_fusion_in_numbers():
    entered = prepare(job(model="short", fusion="default"), PLACE, settings())
    written = job_of(entered.payload)
    assert (written.model, written.fusion) == ("full/name", catalogue.resolve("default", None))
    assert job_of(prepare(job(), PLACE, settings()).payload).model is None, "it is for whatever is the default then"


def test_a_prepared_job_carries_all_that_the_ledger_needs_beside_its_payload():
    entered = prepare(job(3, priority="bulk", deadline_s=7, tenant="t", id="mine"), PLACE, settings())
    assert entered._replace(content="", label="", payload=b"") == NewJob(
        *("mine", "", "rerankq.bulk.full", "t", "bulk", 3, 7, "", "full/name", b"", ("w", "x"))
    )


def test_the_size_limits_are_inclusive():
    size = len(prepare(job(), PLACE, settings()).payload)
    assert prepare(job(), PLACE, settings(max_job_bytes=size, max_chunks=2)).pairs == 2
    with pytest.raises(JobTooLarge, match=f"at most {size - 1} are allowed"):
        prepare(job(), PLACE, settings(max_job_bytes=size - 1))
    for chunks in (["x"] * 2, ("x",) * 2):
        with pytest.raises(JobTooLarge, match="at most 1 are allowed"):
            refuse_too_large({"query": "q", "chunks": chunks}, settings(max_chunks=1))


def test_escaped_json_is_measured_by_its_decoded_size():
    escaped = json.dumps({"query": "é" * 100, "chunks": ["x"]})
    limits = settings(max_job_bytes=len(escaped) // 3 + 1)
    refuse_too_large(escaped, limits)
    with pytest.raises(JobTooLarge):
        refuse_too_large(escaped + " " * limits.max_job_bytes, limits)


def test_an_instruction_is_refused_where_living_workers_take_none():
    told = job(instruction="find causes")
    served = PLACE._replace(weights=("w",))
    with pytest.raises(JobRejected, match=rf"^instruction: the model {served.model!r} takes none"):
        prepare(told, served, settings())
    for place in (served._replace(takes_instruction=True), served._replace(weights=())):
        assert b'"instruction":"find causes"' in prepare(told, place, settings()).payload


def test_windows_are_refused_while_no_worker_supports_them():
    with pytest.raises(JobRejected, match="not available yet"):
        prepare(job(long_chunks="window"), PLACE, settings())


def test_ledger_limits_are_those_of_the_settings():
    numbers = {"result_ttl_s": 11, "doorbell_window": 12, "max_queued_pairs": 13, "max_attempts": 14, "lease_s": 15}
    told = settings(**numbers)
    assert LedgerLimits.of(told) == LedgerLimits(channel=told.channel, **numbers)


def test_a_worker_counts_as_alive_for_three_leases_and_for_ten_seconds_at_least():
    assert (LeasePolicy(8).alive_for_s, LeasePolicy(1).alive_for_s) == (24, 10)


# What an end means


@pytest.mark.parametrize("state", ["done", "unknown"])
def test_an_ended_job_without_a_ranking_or_an_error_is_unknown(state: str):
    assert type(outcome(JobSnapshot(JobStatus(job_id="a", state=state), "", None))) is JobUnknown


def test_an_error_without_a_message_shows_the_state():
    error = outcome(JobSnapshot(JobStatus(job_id="a", state="failed"), "", None))
    assert (type(error), str(error)) == (JobFailed, "job a: failed")


def test_a_timeout_below_zero_is_zero_and_an_infinite_one_is_no_limit():
    assert (seconds_of(-1), seconds_of(2), seconds_of(float("inf")), seconds_of(10**400)) == (0, 2, None, None)


def test_a_rerank_waits_for_the_rest_of_its_timeout_after_submitting(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(client.time, "monotonic", lambda: clock[0])
    waited = []

    async def submit(self: AsyncClient, job: Any) -> str:
        clock[0] += 3
        return "a"

    async def result(self: AsyncClient, job_id: str, timeout: float) -> None:  # noqa: ASYNC109  # the contract's name
        waited.append((job_id, timeout))

    async def main() -> None:
        async with AsyncClient(settings()) as asynchronous:
            await asynchronous.rerank("why?", ["because"], timeout=10)

    monkeypatch.setattr(AsyncClient, "submit", submit)
    monkeypatch.setattr(AsyncClient, "result", result)
    asyncio.run(main())
    assert waited == [("a", 7)]


# What a round trip holds


def round_trips(count: int, payload: bytes) -> list[int]:
    trips = []

    async def entered(_: Any) -> NewJob:
        return prepare(job(), PLACE, settings())._replace(payload=payload)

    async def accepted(entries: list[NewJob]) -> list[str]:
        trips.append(len(entries))
        return [entry.id for entry in entries]

    async def main() -> list[str]:
        submission = Submission(entered, lambda entries: asyncio.create_task(accepted(entries)))
        await submission.add([{}] * count)
        return await submission.end()

    assert len(asyncio.run(main())) == count
    return trips


def test_a_round_trip_of_a_bulk_submission_is_bounded_in_jobs_and_in_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rerankq.client.submission.SUBMIT_AT_ONCE", 4)
    monkeypatch.setattr("rerankq.client.submission.SUBMIT_BYTES", 1_000)
    assert round_trips(10, b"x") == [4, 4, 2]
    assert round_trips(7, b"x" * 400) == [3, 3, 1]
