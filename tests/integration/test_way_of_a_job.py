"""The whole way of a job with the bundled model in float32: what comes out is what the model says, and only that."""

import asyncio
import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import redis

from rerankq import (
    AsyncClient,
    Client,
    JobCancelled,
    JobExpired,
    JobRejected,
    JobTooLarge,
    JobUnknown,
    ModelUnknown,
    Ranking,
    RerankJob,
)
from rerankq.broker.celery_app import make_app
from rerankq.catalogue import profiles
from rerankq.local.embedded import EmbeddedRedis
from rerankq.settings import Settings
from rerankq_worker.engine import load

TIDES = ["Bread rises when yeast makes gas.", "The moon's gravity raises the tides twice a day.", "Tides of fashion."]
WORDS = "moon tide sea bread yeast oven gravity light river stone paper engine queue score rank chunk".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def deployment(worker_process: Callable) -> Iterator[tuple[Settings, Any]]:
    """A Redis and a worker with the bundled model, for all tests of this file."""
    with EmbeddedRedis() as server:
        worker = worker_process(server.url, RERANKQ_MODEL="bundled", RERANKQ_DTYPE="float32", RERANKQ_RUNTIME="torch")
        try:
            yield Settings(broker_url=server.url), worker
        finally:
            worker.stop()


@pytest.fixture
def client(deployment: tuple[Settings, Any]) -> Iterator[Client]:
    with Client(deployment[0]) as client:
        yield client


@pytest.fixture(scope="module")
def model() -> Any:
    """The same model, alone: the oracle."""
    return load("bundled", dtype="float32", runtime="torch")


def text(chooser: random.Random, most: int) -> str:
    return " ".join(chooser.choices(WORDS, k=chooser.randint(1, most)))


def logits_of(ranking: Ranking) -> np.ndarray:
    return np.array([chunk.model_logit for chunk in sorted(ranking.chunks, key=lambda chunk: chunk.index)])


def test_the_chunk_that_answers_is_ranked_first_and_its_score_is_made_of_its_signals(client: Client):
    ranking = client.rerank("why do tides rise?", TIDES, timeout=60)
    best = ranking.chunks[0]
    assert [best.index, best.id, best.rank] == [1, "1", 1]
    assert best.score == pytest.approx(0.7 * best.scores["model"] + 0.3 * best.scores["token"])
    assert best.scores["model"] == pytest.approx(1 / (1 + np.exp(-best.model_logit)))
    assert ranking.model.name == "bundled"
    assert ranking.usage.pairs == 3
    assert ranking.usage.tokens > 0


def test_an_equal_job_is_answered_from_the_ledger_and_other_jobs_from_the_cache(client: Client):
    chunks = ["Rivers carry stones.", "Stones carry rivers."]
    first = client.rerank("what do rivers carry?", chunks, timeout=60)
    assert client.rerank("what do rivers carry?", chunks, timeout=60) == first
    again = client.rerank("what do rivers carry?", [*chunks, "Rivers carry boats."], timeout=60)
    assert again.usage.cached_pairs == 2
    assert [chunk.cached for chunk in sorted(again.chunks, key=lambda chunk: chunk.index)] == [True, True, False]
    refreshed = client.rerank("what do rivers carry?", chunks, timeout=60, cache="refresh")
    assert refreshed.usage.cached_pairs == 0
    np.testing.assert_allclose(logits_of(refreshed), logits_of(first), atol=1e-5)


def test_a_truncated_pair_is_flagged_even_when_its_score_comes_from_the_cache(client: Client):
    chunks = ["short", "long " * 2_000]
    first = client.rerank("how long?", chunks, timeout=60)
    again = client.rerank("how long?", chunks, timeout=60, top_k=2)
    for ranking in (first, again):
        assert {chunk.index: chunk.truncated for chunk in ranking.chunks} == {0: False, 1: True}
        assert ranking.usage.truncated_pairs == 1
    assert again.usage.cached_pairs == 2


def test_eight_producers_at_once_get_the_rankings_that_they_would_get_alone(client: Client, model: Any):
    chooser = random.Random(7)
    jobs = [
        RerankJob(
            query=f"{text(chooser, 6)} {number}",
            chunks=[text(chooser, 12) for _ in range(chooser.randint(5, 20))],
            fusion="model",
            priority=chooser.choice(["interactive", "bulk"]),
        )
        for number in range(40)
    ]
    with ThreadPoolExecutor(8) as producers:
        ids = [one for part in producers.map(client.submit_many, [jobs[at::8] for at in range(8)]) for one in part]
    jobs = [job for at in range(8) for job in jobs[at::8]]
    rankings = dict(client.as_completed(ids, timeout=120))
    for one, job in zip(ids, jobs, strict=True):
        expected = model.score([(job.query, chunk.model_text) for chunk in job.chunks])
        np.testing.assert_allclose(logits_of(rankings[one]), expected, atol=1e-5)
        scores = [chunk.score for chunk in rankings[one].chunks]
        assert scores == sorted(scores, reverse=True)


def test_malformed_jobs_are_refused_by_name_and_their_neighbours_are_ranked(client: Client):
    good = {"query": "which is fine?", "chunks": TIDES}
    refused: list[tuple[dict[str, Any] | str, type[Exception], str]] = [
        ({"query": " ", "chunks": TIDES}, JobRejected, "query"),
        ({"query": "q", "chunks": []}, JobRejected, "chunks"),
        ({"query": "q", "chunks": ["x"] * 100_000}, JobTooLarge, "chunks"),
        ({"query": "q", "chunks": ["x" * 20_000_000]}, JobTooLarge, "job"),
        ({"query": "q\ud800", "chunks": TIDES}, JobRejected, "query"),
        ({"query": "q", "chunks": ["\udfff"]}, JobRejected, "chunks.0.text"),
        ({"query": "q", "chunks": TIDES, "min_score": float("nan")}, JobRejected, "min_score"),
        ({"query": "q", "chunks": TIDES, "model": "no/such-model"}, ModelUnknown, "model"),
        ({"query": "q", "chunks": TIDES, "colour": "red"}, JobRejected, "colour"),
        ({"query": "q", "chunks": TIDES, "fusion": "no-such-profile"}, JobRejected, "fusion"),
        ({"query": "q", "chunks": TIDES, "long_chunks": "window"}, JobRejected, "long_chunks"),
        ('{"query": "q", ', JobRejected, "JSON"),
    ]
    for job, kind, field in refused:
        with pytest.raises(kind, match=field):
            client.submit(job)
        assert client.rerank(**good, cache="refresh", timeout=60).chunks[0].index in {0, 1, 2}


def test_a_chunk_of_ten_megabytes_is_ranked_beside_its_neighbours(client: Client):
    ranking = client.rerank("what is long?", ["tide " * 2_000_000, *TIDES], timeout=120, fusion="model")
    assert len(ranking.chunks) == 4
    assert [chunk.index for chunk in ranking.chunks if chunk.truncated] == [0]


def test_a_score_that_is_not_a_number_counts_as_missing(client: Client):
    chunks = [{"text": one, "vector_score": score} for one, score in zip(TIDES, [0.5, float("nan"), None], strict=True)]
    ranking = client.rerank("why tides?", chunks, timeout=60, fusion={"weights": {"model": 0.5, "vector": 0.5}})
    missing = {chunk.index: chunk.missing for chunk in ranking.chunks}
    assert missing == {0: [], 1: ["vector"], 2: ["vector"]}
    assert all(np.isfinite(chunk.score) for chunk in ranking.chunks)


def test_top_k_min_score_text_and_metadata_are_honoured(client: Client):
    chunks = [{"text": one, "id": f"c{at}", "metadata": {"page": at}} for at, one in enumerate(TIDES)]
    ranking = client.rerank("why do tides rise?", chunks, timeout=60, top_k=1, return_text=True)
    assert [(chunk.id, chunk.text, chunk.metadata) for chunk in ranking.chunks] == [("c1", TIDES[1], {"page": 1})]
    assert client.rerank("why do tides rise?", TIDES, timeout=60, min_score=1e9).chunks == []


def test_a_job_with_few_chunks_may_stay_unscored(client: Client):
    ranking = client.rerank("why?", TIDES, timeout=60, skip_at_or_below=3)
    assert ranking.skipped
    assert [chunk.index for chunk in ranking.chunks] == [0, 1, 2]
    assert [chunk.model_logit for chunk in ranking.chunks] == [None] * 3
    assert ranking.usage.pairs == 0


def test_every_profile_ranks(client: Client):
    chunks = [
        {"text": one, "vector_score": 0.3 * at, "keyword_score": 2.0 * at, "pagerank": at, "tags": {"sea": at}}
        for at, one in enumerate(TIDES)
    ]
    for name in profiles():
        ranking = client.rerank("why tides?", chunks, timeout=60, fusion=name, query_tags={"sea": 1})
        assert sorted(chunk.index for chunk in ranking.chunks) == [0, 1, 2], name
        assert all(chunk.scores for chunk in ranking.chunks), name


def test_a_lost_cache_slows_jobs_down_and_fails_none(client: Client, deployment: tuple[Settings, Any]):
    with redis.Redis.from_url(deployment[0].cache) as scores:
        scores.flushdb()
        # Keys of another type: every command on them is refused.
        for key in range(3):
            scores.set(f"rerankq:noise:{key}", b"")
        first = client.rerank("does it hold?", TIDES, timeout=60)
        (key,) = scores.scan_iter("rerankq:scores:*")
        scores.delete(key)
        scores.set(key, b"not a hash")
    again = client.rerank("does it hold?", TIDES, timeout=60, top_k=3)
    assert again.usage.cached_pairs == 0
    np.testing.assert_allclose(logits_of(again), logits_of(first), atol=1e-5)


def test_the_async_client_awaits_many_jobs_without_blocking_its_loop(deployment: tuple[Settings, Any]):
    async def ask() -> tuple[list[Ranking], int]:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0)
                beats += 1

        async with AsyncClient(deployment[0]) as client:
            beating = asyncio.create_task(beat())
            asked = [client.rerank(f"why tides, {number}?", TIDES, timeout=60) for number in range(40)]
            rankings = await asyncio.gather(*asked)
            beating.cancel()
        return rankings, beats

    rankings, beats = asyncio.run(ask())
    assert [len(ranking.chunks) for ranking in rankings] == [3] * 40
    assert beats > 1_000, "the loop turned while jobs were submitted and awaited"


def test_an_ended_job_can_be_forgotten(client: Client):
    one = client.submit({"query": "forget me", "chunks": TIDES})
    client.result(one, timeout=60)
    client.forget(one)
    assert client.status(one).state == "unknown"
    with pytest.raises(JobUnknown):
        client.result(one, timeout=5)


def test_cancelled_and_expired_jobs_raise_how_they_ended(client: Client, deployment: tuple[Settings, Any]):
    deployment[1].send(signal.SIGSTOP)  # so that nothing is claimed meanwhile
    try:
        cancelled = client.submit({"query": "cancel me", "chunks": TIDES})
        expired = client.submit({"query": "too late", "chunks": TIDES, "deadline_s": 0.05})
        assert client.cancel(cancelled) == "cancelled"
        with pytest.raises(JobCancelled):
            client.result(cancelled, timeout=5)
        threading.Event().wait(0.1)
        assert client.status(expired).state == "expired"
        with pytest.raises(JobExpired):
            client.result(expired, timeout=5)
    finally:
        deployment[1].send(signal.SIGCONT)


def test_flower_is_told_the_query_and_never_a_chunk(client: Client, deployment: tuple[Settings, Any]):
    events: list[dict[str, Any]] = []

    def receive(event: dict[str, Any]) -> None:
        events.append(event)
        receiver.should_stop = event["type"] == "task-succeeded"

    app = make_app(deployment[0])
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": receive})

        def listen() -> None:
            with contextlib.suppress(TimeoutError):
                receiver.capture(limit=None, timeout=10, wakeup=True)

        listening = threading.Thread(target=listen)
        listening.start()
        threading.Event().wait(1.5)
        client.rerank("what does Flower show?", ["a secret chunk text", *TIDES], timeout=60)
        listening.join()
    by_type = {event["type"]: event for event in events if event["type"].startswith("task-")}
    assert by_type["task-received"]["args"] == '"what does Flower show?" 4 chunks, bundled'
    assert "ranked" in by_type["task-succeeded"]["result"]
    assert "secret" not in str(events)
    app.close()
