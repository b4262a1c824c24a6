"""A real worker whose scores come from another server, by a real HTTP server: from a job to its ranking."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rerank_server import WAIT_S, Answer, Held, RerankServer, score_of

from rerankq import Client, JobCancelled, JobFailed
from rerankq.doctor.checks import checks
from rerankq.doctor.collect import collect
from rerankq.settings import Settings

CHUNKS = [f"chunk {at}" for at in range(9)]
KEY = "sk-of-this-test"


@pytest.fixture
def server() -> Iterator[RerankServer]:
    with RerankServer() as running:
        yield running


@pytest.fixture
def start_remote(start_worker: Callable, server: RerankServer, tmp_path: Path) -> Callable:
    """Start a worker of the server's model, which takes four texts a request."""

    def start(**fields: object):
        usual = {"dialect": server.dialect, "url": server.url, "model": "m", "score": "probability"}
        limits = {"max_length": 512, "max_documents": 4, "api_key_env": "TEST_RERANK_KEY", "aliases": ["short"]}
        lines = [f"{name} = {value!r}" for name, value in {**usual, **limits, **fields}.items()]
        (tmp_path / "models.toml").write_text("[models]\n[remote.test]\n" + "\n".join(lines).replace("'", '"') + "\n")
        return start_worker(
            RERANKQ_MODEL="remote:test", RERANKQ_CONF_DIR=str(tmp_path), TEST_RERANK_KEY=KEY, RERANKQ_LEASE_S="2"
        )

    return start


def by_score(chunks: list[str]) -> list[str]:
    return sorted(chunks, key=lambda text: -score_of(text))


# One with a flat list, one with a nested one, one with the usual; tests/worker has them all.
@pytest.mark.parametrize("dialect", ["tei", "dashscope", "cohere"])
def test_a_ranking_is_in_the_order_of_the_served_scores(
    dialect: str, server: RerankServer, start_remote: Callable, client: Client
):
    server.dialect = dialect
    start_remote()
    ranking = client.rerank("q", CHUNKS, fusion="model", return_text=True, timeout=60)
    assert [chunk.text for chunk in ranking.chunks] == by_score(CHUNKS)
    assert [chunk.scores["model"] for chunk in ranking.chunks] == pytest.approx(
        sorted(map(score_of, CHUNKS), reverse=True), rel=1e-5
    )
    assert (ranking.model.name, ranking.usage.pairs, ranking.usage.cached_pairs) == ("remote:test", 9, 0)
    assert ranking.usage.tokens == (0 if dialect == "cohere" else 3 * 79)
    assert not any(chunk.truncated for chunk in ranking.chunks)
    assert sorted(len(asked.texts) for asked in server.asked) == [3, 3, 3]
    assert {asked.headers["authorization"] for asked in server.asked} == {f"Bearer {KEY}"}


def test_scores_that_are_known_are_not_asked_for_again(server: RerankServer, start_remote: Callable, client: Client):
    start_remote()
    client.rerank("q", CHUNKS, fusion="model", timeout=60)
    asked = len(server.asked)
    again = client.rerank("q", [*CHUNKS, "new"], fusion="default", timeout=60)
    assert again.usage.cached_pairs == 9
    assert [one.texts for one in server.asked[asked:]] == [["new"]]
    assert {chunk.index: chunk.cached for chunk in again.chunks} == {**dict.fromkeys(range(9), True), 9: False}


def test_an_outage_is_waited_for_and_shown_by_the_doctor(
    server: RerankServer, start_remote: Callable, client: Client, settings: Settings, wait_until: Callable
):
    start_remote()
    server.next += [Answer(503, b"words of the server")] * 1_000
    waiting = client.submit({"query": "q", "chunks": CHUNKS})

    def wrong() -> list[str]:
        return [finding.said for finding in checks(collect(settings)) if "gets no scores" in finding.said]

    wait_until(wrong)
    host = server.url.split("/")[2]
    assert wrong() == [f"gets no scores from {host} (jina: m): HTTP 503; its jobs wait or fail"]
    assert client.status(waiting).state == "running"
    server.next.clear()
    assert len(client.result(waiting, timeout=60).chunks) == 9
    assert client.status(waiting).attempts == 1, "its lease was kept"
    wait_until(lambda: not wrong())


def test_an_outage_beyond_the_limit_fails_the_job_with_its_reason(
    server: RerankServer, start_remote: Callable, client: Client
):
    start_remote(retry_for_s=0.3)
    server.next += [Answer(503, b'{"detail": "overloaded"}')] * 1_000
    with pytest.raises(JobFailed, match=r"remote:test: .* does not answer: HTTP 503: overloaded"):
        client.rerank("q", CHUNKS, timeout=60)


def test_a_refusal_fails_its_job_alone_and_the_key_is_in_no_log(
    server: RerankServer, start_remote: Callable, client: Client
):
    worker = start_remote()
    server.next.append(Answer(401, f'{{"detail": "wrong key {KEY}"}}'.encode()))
    with pytest.raises(JobFailed, match=r"HTTP 401: wrong key \*\*\*"):
        client.rerank("q", ["a"], timeout=60)
    assert len(client.rerank("q", CHUNKS, timeout=60).chunks) == 9
    assert KEY not in worker.log.read_text()


def test_a_cancelled_job_breaks_its_request_off(server: RerankServer, start_remote: Callable, client: Client):
    start_remote()
    held = Held()
    server.next.append(held)
    job = client.submit({"query": "q", "chunks": ["a"]})
    assert held.arrived.wait(WAIT_S)
    client.cancel(job)
    assert held.broken_off.wait(WAIT_S)
    with pytest.raises(JobCancelled):
        client.result(job, timeout=60)


def test_a_worker_that_is_killed_while_it_waits_for_the_server_loses_nothing(
    server: RerankServer, start_remote: Callable, client: Client
):
    first = start_remote()
    held = Held()
    server.next.append(held)
    job = client.submit({"query": "q", "chunks": CHUNKS})
    assert held.arrived.wait(WAIT_S)
    first.kill()
    start_remote()
    assert len(client.result(job, timeout=60).chunks) == 9


def test_a_worker_that_is_stopped_hands_back_what_the_server_has_not_answered(
    server: RerankServer, start_remote: Callable, client: Client, wait_until: Callable
):
    worker = start_remote()
    helds = [Held(), Held(), Held()]
    server.next += helds
    job = client.submit({"query": "q", "chunks": CHUNKS})
    assert helds[0].arrived.wait(WAIT_S)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    wait_until(lambda: client.status(job).state == "queued")
    stopping.join(60)
    assert worker.process.returncode == 0
    start_remote()
    assert len(client.result(job, timeout=60).chunks) == 9


def test_a_job_may_name_the_model_by_its_alias(
    server: RerankServer, start_remote: Callable, redis_url: str, tmp_path: Path
):
    start_remote()
    with Client(Settings(broker_url=redis_url, conf_dir=tmp_path)) as client:
        for name in ("short", "remote:test"):
            assert client.rerank("q", ["a"], model=name, timeout=60).model.name == "remote:test"
