"""What a call means beside its dialect: its headers, its model's name, and what it gets where there is no ranking."""

import asyncio
import time
from dataclasses import replace

import pytest

from rerankq.contract import Chunk, RankedChunk, Ranking
from rerankq.errors import BrokerUnavailable, JobRejected, JobTimedOut, JobUnknown, NoWorker, QueueFull
from rerankq.gateway.call_options import options_of, split_model
from rerankq.gateway.hosted_models import NO_INSTRUCTION, resolve
from rerankq.gateway.ranker import Ranker
from rerankq.gateway.rerank_call import CallOptions, RerankCall, job_of_call, reply_of
from rerankq.ledger.registry import WorkerInfo
from rerankq.settings import Settings

SETTINGS = Settings(model="bundled", _env_file=None)
WORKER = WorkerInfo("w", "bundled", (), "", ("rerankq.interactive",), 0.0, 0.0)
CALL = RerankCall("q", (Chunk(text="a"), Chunk(text="b")))


def meant(model, **options):
    call, found = resolve(RerankCall("q", (Chunk(text="a"),), model=model), CallOptions(**options), [WORKER], SETTINGS)
    return call.model, found.fusion


@pytest.mark.parametrize(
    ("header", "value"),
    [("Priority", "--5"), ("Priority", "9" * 5_000), ("Priority", "0.5"), ("Tenant", "a b"), ("Tenant", "x" * 129)],
)
def test_a_malformed_header_is_named_with_what_was_expected(header, value):
    with pytest.raises(JobRejected, match=f"^X-Rerankq-{header}: expected ") as refused:
        options_of({f"X-Rerankq-{header}": value})
    assert refused.value.field == f"X-Rerankq-{header}"


def test_an_instruction_is_left_out_with_a_warning_unless_every_worker_of_the_model_takes_one():
    asked, takes = replace(CALL, instruction="find causes"), WORKER._replace(takes_instruction=True)
    for workers, warnings in [([takes, takes], ()), ([takes, WORKER], (NO_INSTRUCTION,)), ([], (NO_INSTRUCTION,))]:
        call, options = resolve(asked, CallOptions(), workers, SETTINGS)
        assert call.warnings == warnings
        job = job_of_call(call, options, job_id="j", timeout_s=60)
        assert job.instruction == ("" if warnings else "find causes")


def test_blanks_round_a_models_name_are_none_of_it():
    assert split_model(" bundled\n", {"rrf"}) == ("bundled", None)
    assert split_model("  ", {"rrf"}) == (None, None)


@pytest.mark.parametrize("model", ["bundled+rrf", "bundled+rrf___Xinference", "bundled-reranker+rrf"])
def test_a_profile_stands_behind_a_models_name_however_that_is_written(model):
    assert meant(model)[1] == "rrf"


@pytest.mark.parametrize(
    "model", ["bundled+none", "bundled+", "+none", "rerank-v3.5+none", "rerank-v3.5+", "bundled+RRF"]
)
def test_an_unknown_profile_behind_the_name_of_a_known_model_is_refused_with_those_that_there_are(model):
    with pytest.raises(JobRejected, match=r"^model: no fusion profile .*; there are default, .*rrf") as refused:
        meant(model)
    assert refused.value.field == "model"


def test_an_unknown_model_with_a_plus_in_its_name_stays_unknown():
    assert meant("org/model+none") == ("org/model+none", None)


def test_an_unknown_profile_in_the_header_is_named_by_it():
    with pytest.raises(JobRejected) as refused:
        meant("bundled", fusion="none")
    assert refused.value.field == "X-Rerankq-Fusion"


def test_documents_that_show_nothing_rank_last_and_the_reply_to_them_alone_has_a_name():
    call = RerankCall("q", (Chunk(text="\u200b\ufeff"), Chunk(text="\x00"), Chunk(text=" ")))
    assert job_of_call(call, CallOptions(), job_id="j", timeout_s=1) is None
    reply = reply_of(call, CallOptions(), Ranking(job_id="", model={"name": "m", "fingerprint": ""}, chunks=[]))
    assert [(document.index, document.score) for document in reply.documents] == [(0, 0.0), (1, 0.0), (2, 0.0)]
    assert reply.id


def test_of_an_endless_document_no_more_is_sent_than_any_model_reads():
    call = RerankCall("q", (Chunk(text="a" * 3_000_000, title="t"), Chunk(text="b")))
    first, second = job_of_call(call, CallOptions(), job_id="j", timeout_s=1).chunks
    assert (len(first.text), first.title, second.text) == (1_000_000, "t", "b")
    ranked = [RankedChunk(id=str(at), index=at, rank=at + 1, score=0.5) for at in range(2)]
    reply = reply_of(call, CallOptions(), Ranking(job_id="j", model={"name": "m", "fingerprint": ""}, chunks=ranked))
    assert reply.truncated_pairs == 1


class Ledger:
    """An AsyncClient of which each method does what a test says."""

    settings = SETTINGS

    def __init__(self, **methods):
        self.cancelled, self.submitted = [], []
        self.__dict__.update(methods)

    async def recent_workers(self):
        return [WORKER]

    async def serving(self, model=None):
        return "bundled", [WORKER]

    async def backlog(self):
        return {}

    async def submit(self, job):
        self.submitted.append(job.id)

    async def result(self, *_):
        await asyncio.Event().wait()

    async def cancel(self, job_id):
        self.cancelled.append(job_id)


def answer_of(ledger, **options):
    """What a call gets, by a ranker of its own."""

    async def rank():
        ranker = Ranker(ledger, timeout_s=0.05)
        try:
            return await ranker.rank(CALL, CallOptions(**options))
        finally:
            await ranker.aclose()

    return asyncio.run(rank())


def test_a_callers_time_runs_from_its_request_whatever_it_waited_for_before_its_ranking():
    async def rank():
        ranker = Ranker(Ledger(), timeout_s=600)
        try:
            await ranker.rank(CALL, CallOptions(), began=time.monotonic() - 600)
        finally:
            await ranker.aclose()

    with pytest.raises(JobTimedOut, match="no ranking within 600 s"):
        asyncio.run(rank())


def test_a_full_queue_refuses_a_call_by_what_is_left_of_its_time():
    async def backlog():
        return {"*": SETTINGS.max_queued_pairs + 100}

    async def serving(model=None):
        return "bundled", [WORKER._replace(pairs_per_s=10.0)]

    async def look(**left):
        await Ranker(Ledger(backlog=backlog, serving=serving), timeout_s=60).refuse_if_full(CallOptions(), **left)

    asyncio.run(look())
    with pytest.raises(QueueFull):
        asyncio.run(look(within_s=5))


async def never(*_):
    await asyncio.Event().wait()


def failing(error):
    async def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("method", ["recent_workers", "serving", "backlog", "submit", "result"])
def test_a_call_is_answered_in_its_time_whatever_of_the_ledger_hangs(method):
    ledger = Ledger(**{method: never})
    with pytest.raises(JobTimedOut) as late:
        answer_of(ledger)
    assert ledger.cancelled == [late.value.job_id]
    assert answer_of(Ledger(**{method: never}), on_timeout="first-stage").degraded


@pytest.mark.parametrize(
    ("error", "why"),
    [(QueueFull("full", retry_after_s=60), "too much waits"), (BrokerUnavailable("gone"), "cannot be reached")],
)
def test_a_call_that_takes_its_first_stage_gets_it_where_it_cannot_be_ranked_at_all(error, why):
    reply = answer_of(Ledger(submit=failing(error)), on_timeout="first-stage")
    assert reply.degraded
    assert reply.model == "bundled"
    assert [document.index for document in reply.documents] == [0, 1]
    assert why in reply.warnings[0]
    with pytest.raises(type(error)):
        answer_of(Ledger(submit=failing(error)))


def test_without_a_worker_a_call_gets_its_first_stage_only_if_it_takes_that():
    async def nobody(_=None):
        return "bundled", []

    assert answer_of(Ledger(serving=nobody), on_timeout="first-stage").degraded
    with pytest.raises(NoWorker):
        answer_of(Ledger(serving=nobody))


def test_a_job_that_the_ledger_has_lost_is_submitted_again():
    rankings = iter([JobUnknown("lost"), Ranking(job_id="j", model={"name": "m", "fingerprint": ""}, chunks=[])])

    async def result(*_):
        found = next(rankings)
        if isinstance(found, JobUnknown):
            raise found
        return found

    ledger = Ledger(result=result)
    assert answer_of(ledger).model == "m"
    first, second = ledger.submitted
    assert first == second


def test_a_job_that_is_lost_again_and_again_is_an_outage():
    with pytest.raises(BrokerUnavailable):
        answer_of(Ledger(result=failing(JobUnknown("lost"))))


def test_a_worker_that_registers_between_two_looks_is_found_by_every_spelling():
    looks = iter([[], [WORKER]])

    async def serving(model):
        if model != "bundled":
            raise NoWorker(model)
        return "bundled", [WORKER]

    async def recent_workers():
        return next(looks)

    async def result(*_):
        return Ranking(job_id="j", model={"name": "bundled", "fingerprint": ""}, chunks=[])

    ledger = Ledger(serving=serving, recent_workers=recent_workers, result=result)

    async def rank():
        return await Ranker(ledger, timeout_s=1).rank(
            RerankCall("q", CALL.documents, model="bundled-reranker"), CallOptions()
        )

    assert asyncio.run(rank()).model == "bundled"
