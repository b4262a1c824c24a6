"""A stand-in for workers, for tests of the producer's side."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from rerankq.contract import ModelName, RankedChunk, Ranking
from rerankq.identity import job_of
from rerankq.ledger import Claim, calls, connect
from rerankq.ledger.limits import LedgerLimits
from rerankq.ledger.runner import Ledger
from rerankq.settings import Settings


class StandIn:
    """Plays the worker: claims jobs and says how they ended, when a test wants it."""

    def __init__(self, settings: Settings) -> None:
        self.limits = LedgerLimits.of(settings)
        self.ledger = Ledger(connect(settings.ledger))
        self.redis = self.ledger.redis

    def claim(self, job_id: str) -> Claim:
        claim = self.ledger.ask(calls.claim(job_id, "stand-in", self.limits))
        assert isinstance(claim, Claim), claim
        return claim

    def finish(self, *job_ids: str) -> None:
        claims = self.ledger.ask_all([calls.claim(one, "stand-in", self.limits) for one in job_ids])
        ends = [calls.complete(one.id, one.fence, ranking_of(one), self.limits) for one in claims]
        assert set(self.ledger.ask_all(ends)) <= {"done"}

    def fail(self, job_id: str, why: str, error_type: str = "JobFailed") -> None:
        call = calls.fail(job_id, self.claim(job_id).fence, error_type, why, self.limits)
        assert self.ledger.ask(call) == "failed"

    def register(self, model: str, fingerprint: str = "f", suffix: str = "", **more: object) -> None:
        queues = [f"rerankq.{priority}{suffix}" for priority in ("interactive", "bulk")]
        info = {"model": model, "fingerprint": fingerprint, "queues": queues, **more}
        self.ledger.ask(calls.beat(f"worker of {model}", json.dumps(info), forget_after_s=60))

    def state(self, job_id: str) -> str:
        return self.ledger.ask(calls.snapshot(job_id, self.limits)).status.state


def ranking_of(claim: Claim) -> Ranking:
    """The chunks in their own order."""
    job = job_of(claim.payload)
    return Ranking(
        job_id=claim.id,
        model=ModelName(name="stand-in", fingerprint="f"),
        chunks=[
            RankedChunk(id=name, index=at, rank=at + 1, score=1 / (at + 1)) for at, name in enumerate(job.chunk_names())
        ],
    )


@pytest.fixture
def settings(redis_url: str) -> Settings:
    return Settings(broker_url=redis_url)


@pytest.fixture
def make_worker() -> Iterator[Callable[[Settings], StandIn]]:
    with ExitStack() as stack:

        def make(settings: Settings) -> StandIn:
            stand_in = StandIn(settings)
            stack.callback(stand_in.redis.close)
            return stand_in

        yield make


@pytest.fixture
def worker(make_worker: Callable[[Settings], StandIn], settings: Settings) -> StandIn:
    return make_worker(settings)
