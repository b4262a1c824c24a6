"""A scorer over a real HTTP server: scores, the cache, limits, failures, and how jobs share the calls."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import redis
from rerank_server import SHAPES, WAIT_S, Answer, Held, RerankServer, Reset, score_of

from rerankq.catalogue import RemoteCard
from rerankq.errors import JobCancelled, JobFailed
from rerankq_worker.cache import ScoreCache
from rerankq_worker.engine import EngineClosed
from rerankq_worker.fusion.normalise import normalise_sigmoid
from rerankq_worker.remote import retrying, sending
from rerankq_worker.remote.remote_scorer import RemoteScorer, fingerprint_of
from rerankq_worker.remote.sending import RequestSender
from rerankq_worker.scoring import Scored, ScoreOptions
from rerankq_worker.work import Work

TEXTS = [f"text {at}" for at in range(7)]
BYPASS = ScoreOptions(cache="bypass")
ONCE = {"retry_for_s": 0}
KEY = "sk-very-secret"


class Scoring:
    """Scorers over servers, with one cache; ended together."""

    def __init__(self, cache: ScoreCache, stack: ExitStack) -> None:
        self.cache, self._stack = cache, stack
        self.senders: list[RequestSender] = []

    def server(self, dialect: str = "jina", **options: Any) -> RerankServer:
        return self._stack.enter_context(RerankServer(dialect, **options))

    def scorer(
        self, server: RerankServer, *, clock: Callable[[], float] = time.monotonic, **fields: Any
    ) -> RemoteScorer:
        card = server.card(**fields)
        sender = RequestSender(card, name="remote:test", api_key=KEY, jitter=lambda: 0.0, clock=clock)
        self._stack.callback(sender.close, WAIT_S)
        self.senders.append(sender)
        return RemoteScorer(card, sender, self.cache, name="remote:test")


@pytest.fixture
def scoring(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scoring]:
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    with redis.Redis.from_url(redis_url) as connection, ExitStack() as stack:
        yield Scoring(ScoreCache(connection, ttl_s=60), stack)


def score(scorer: RemoteScorer, texts: list[str] = TEXTS, options: ScoreOptions = BYPASS, query: str = "q") -> Scored:
    return scorer.score(query, texts, options, Work())


def probabilities(texts: list[str]) -> list[float]:
    return [score_of(text) for text in texts]


@pytest.mark.parametrize("dialect", SHAPES)
def test_scores_of_every_dialect_come_back_as_logits_of_their_texts(scoring: Scoring, dialect: str):
    server = scoring.server(dialect)
    found = score(scoring.scorer(server))
    np.testing.assert_allclose(normalise_sigmoid(found.logits), probabilities(TEXTS), rtol=1e-5)
    (asked,) = server.asked
    assert (asked.path, asked.query, asked.texts) == ("/v1/rerank", "q", TEXTS)
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.headers["content-type"] == "application/json"
    assert found.tokens == (0 if dialect == "cohere" else 79)
    assert not found.cached.any()
    assert not found.truncated.any()


def test_logits_of_a_server_are_taken_as_they_are(scoring: Scoring):
    server = scoring.server("tei", score=lambda text: 10 * score_of(text) - 8)
    found = score(scoring.scorer(server, score="logit"))
    np.testing.assert_allclose(found.logits, [10 * score_of(text) - 8 for text in TEXTS], rtol=1e-6)
    assert server.asked[0].body["raw_scores"] is True


def test_texts_are_split_by_the_limits_of_the_server(scoring: Scoring):
    server = scoring.server()
    found = score(scoring.scorer(server, max_documents=3))
    assert sorted(len(asked.texts) for asked in server.asked) == [1, 3, 3]
    np.testing.assert_allclose(normalise_sigmoid(found.logits), probabilities(TEXTS), rtol=1e-5)
    assert found.tokens == 3 * 79
    server.asked.clear()
    # Six characters of a text, and one of the query with each.
    score(scoring.scorer(server, max_request_chars=14))
    assert sorted(len(asked.texts) for asked in server.asked) == [1, 2, 2, 2]


def test_texts_are_cut_to_what_the_server_takes_and_flagged(scoring: Scoring):
    server = scoring.server()
    found = score(scoring.scorer(server, max_text_chars=4), ["long text", "four", "日本語です"])
    assert server.asked[0].texts == ["long", "four", "日本語で"]
    assert found.truncated.tolist() == [True, False, True]
    found = score(scoring.scorer(server, max_query_chars=2), ["a"], query="query")
    assert (server.asked[1].query, found.truncated.tolist()) == ("qu", [True])
    scorer = scoring.scorer(server, max_text_chars=4, max_query_chars=2)
    found = score(scorer, ["      a text", "      b"], query="    q")
    assert (server.asked[2].query, server.asked[2].texts) == ("q", ["a te", "b"]), "what is left is not blank"
    assert found.truncated.tolist() == [True, False]


def test_equal_texts_of_a_job_are_sent_once(scoring: Scoring):
    server = scoring.server()
    found = score(scoring.scorer(server), ["a", "b", "a", "a"])
    assert server.asked[0].texts == ["a", "b"]
    assert found.logits[0] == found.logits[2] == found.logits[3]


def test_blank_texts_are_not_sent_and_have_no_score(scoring: Scoring):
    server = scoring.server()
    found = score(scoring.scorer(server), ["", "a", " \n"])
    assert server.asked[0].texts == ["a"]
    assert np.isnan(found.logits).tolist() == [True, False, True]
    assert np.isnan(score(scoring.scorer(server), [" "]).logits).all()
    assert len(server.asked) == 1


def test_known_scores_are_not_asked_for_again(scoring: Scoring):
    server = scoring.server()
    scorer = scoring.scorer(server, max_text_chars=6)
    first = score(scorer, ["a", "b", "cut here"], ScoreOptions())
    work = Work()
    again = scorer.score("q", ["b", "new", "a", "cut here"], ScoreOptions(), work)
    assert server.asked[1].texts == ["new"]
    assert again.cached.tolist() == [True, False, True, True]
    assert again.truncated.tolist() == [False, False, False, True]
    assert again.logits[[2, 0, 3]].tolist() == first.logits.tolist(), "equal, not almost"
    assert work.pairs_done == 4
    assert score(scorer, ["a", "b"], ScoreOptions()).cached.all()
    assert not score(scorer, ["a", "b"], ScoreOptions(cache="refresh")).cached.any()
    assert not score(scorer, ["a"], ScoreOptions(), query="other").cached.any()
    assert len(server.asked) == 4


CARD = RemoteCard(
    dialect="jina", url="http://h/rerank", model="m", score="probability", max_length=512, max_documents=10
)


@pytest.mark.parametrize(
    "other",
    [
        {"dialect": "cohere"},
        {"url": "http://h2/rerank"},
        {"url": "https://h/rerank"},
        {"model": "n"},
        {"revision": "2"},
        {"score": "logit"},
        {"max_text_chars": 100},
        {"max_query_chars": 100},
        {"parameters": {"a": 1}},
    ],
    ids=str,
)
def test_scores_of_another_server_or_model_have_another_fingerprint(other: dict[str, Any]):
    assert fingerprint_of(CARD.model_copy(update=other)) != fingerprint_of(CARD)


@pytest.mark.parametrize(
    "other",
    [
        {"api_key_env": "X"},
        {"max_documents": 3},
        {"max_request_chars": 3},
        {"concurrency": 9},
        {"requests_per_minute": 3.0},
        {"timeout_s": 3.0},
        {"retry_for_s": 3.0},
        {"max_length": 100},
    ],
    ids=str,
)
def test_limits_and_keys_that_change_no_score_leave_the_fingerprint(other: dict[str, Any]):
    assert fingerprint_of(CARD.model_copy(update=other)) == fingerprint_of(CARD)


def test_cached_scores_of_different_servers_never_mix(scoring: Scoring):
    one, two = scoring.server(), scoring.server(score=lambda text: 1 - score_of(text))
    first, second = scoring.scorer(one), scoring.scorer(two)
    score(first, options=ScoreOptions())
    found = score(second, options=ScoreOptions())
    assert not found.cached.any()
    np.testing.assert_allclose(normalise_sigmoid(found.logits), [1 - score_of(text) for text in TEXTS], rtol=1e-5)


def test_an_instruction_is_sent_and_has_scores_of_its_own(scoring: Scoring):
    server = scoring.server("vllm")
    scorer = scoring.scorer(server, takes_instruction=True)
    assert scorer.takes_instruction
    for instruction in ("", "find causes", "find effects", "find causes"):
        score(scorer, options=ScoreOptions(instruction=instruction))
    assert [asked.body.get("instruction") for asked in server.asked] == [None, "find causes", "find effects"]


def test_a_jobs_maximum_length_counts_where_the_server_can_be_told(scoring: Scoring):
    vllm, jina = scoring.server("vllm"), scoring.server("jina")
    for options in (ScoreOptions(), ScoreOptions(max_length=64), ScoreOptions(max_length=10_000)):
        score(scoring.scorer(vllm), ["a"], options)
        score(scoring.scorer(jina), ["a"], options)
    assert [asked.body["truncate_prompt_tokens"] for asked in vllm.asked] == [512, 64], "the third one was known"
    assert len(jina.asked) == 1


@pytest.mark.parametrize(
    "failure",
    [
        Answer(429, b'{"message": "slow down"}'),
        Answer(500, b"oops"),
        Answer(502, b"<html>"),
        Answer(503),
        Answer(529),
        Answer(424, b'{"error": "backend", "error_type": "Backend"}'),
        Reset(),
        Answer(200, b'{"results": [{"index": 0,'),
        Answer(200, b'{"results": [', promised=5_000),
        Answer(200, b"{}"),
    ],
    ids=["429", "500", "502", "503", "529", "424", "reset", "cut JSON", "cut connection", "no results"],
)
def test_a_request_that_fails_is_sent_again(scoring: Scoring, failure: Any):
    server = scoring.server()
    server.next += [failure, failure]
    found = score(scoring.scorer(server))
    np.testing.assert_allclose(normalise_sigmoid(found.logits), probabilities(TEXTS), rtol=1e-5)
    assert len(server.asked) == 3
    assert scoring.senders[0].stats().failures == 2


@pytest.mark.parametrize("status", [429, 503])
def test_no_request_is_sent_before_the_server_asks_for_it(scoring: Scoring, status: int):
    server = scoring.server()
    scorer = scoring.scorer(server, concurrency=1)
    server.next.append(Answer(status, headers={"Retry-After": "0.3"}))
    with ThreadPoolExecutor() as jobs:
        # The second job's calls wait, too: it is the same server.
        list(jobs.map(lambda query: score(scorer, query=query), ["a", "b"]))
    assert min(asked.at for asked in server.asked[1:]) - server.asked[0].at >= 0.3


def test_a_server_that_asks_for_more_patience_than_allowed_fails_the_job_at_once(scoring: Scoring):
    server = scoring.server()
    server.next.append(Answer(429, b'{"message": "quota"}', {"Retry-After": "3600"}))
    scorer, (sender,) = scoring.scorer(server), scoring.senders
    with pytest.raises(JobFailed, match=r"does not answer: HTTP 429: quota \(one try; it asks to wait 3600 s\)"):
        score(scorer)
    with pytest.raises(JobFailed, match=r"does not answer: HTTP 429 \(not tried; it asks to wait 3600 s\)"):
        score(scorer)
    assert len(server.asked) == 1
    assert sender.stats().trouble == "HTTP 429"


def test_nonsense_asked_of_everybody_is_over_some_day(scoring: Scoring):
    server, now = scoring.server(), [0.0]
    scorer = scoring.scorer(server, clock=lambda: now[0])
    server.next.append(Answer(503, headers={"Retry-After": "1e300"}))
    with pytest.raises(JobFailed, match=r"it asks to wait 1e\+300 s"):
        score(scorer)
    now[0] = retrying.LONGEST_ASKED_S + 1
    assert np.isfinite(score(scorer).logits).all()


def test_an_outage_fails_the_job_after_the_stated_time_and_says_why(scoring: Scoring):
    server = scoring.server()
    server.next += [Answer(503, b'{"detail": "overloaded"}')] * 1_000
    with pytest.raises(JobFailed, match=r"^remote:test: 127.0.0.1:\d+ does not answer: HTTP 503: overloaded \(\d+ tr"):
        score(scoring.scorer(server, retry_for_s=0.2))
    assert len(server.asked) > 1
    stats = scoring.senders[0].stats()
    assert (stats.trouble, stats.calls) == ("HTTP 503", 0)
    server.next.clear()
    score(scoring.scorer(server))
    assert scoring.senders[1].stats().trouble == ""


def test_trouble_says_nothing_once_nobody_asks_any_more(scoring: Scoring, wait_until: Callable):
    server, now = scoring.server(), [0.0]
    scorer, (sender,) = scoring.scorer(server, clock=lambda: now[0], **ONCE), scoring.senders
    server.next.append(Answer(401, b"x" * 100_000))
    with pytest.raises(JobFailed, match="refused a request: HTTP 401: no API key was sent"):
        score(scorer)
    assert sender.stats().trouble == "HTTP 401, no API key was sent: set api_key_env"
    now[0] += sending.TROUBLE_S
    wait_until(lambda: sender.stats().trouble == "")  # who waits is answered a moment before its call counts as ended


def test_trouble_is_over_with_the_first_reply(scoring: Scoring, caplog: pytest.LogCaptureFixture):
    server = scoring.server()
    scorer = scoring.scorer(server)
    server.next += [Answer(503, b"words of the server")] * 3
    with caplog.at_level(logging.WARNING, "rerankq"):
        score(scorer)
    assert scoring.senders[0].stats().trouble == ""
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "remote:test does not answer, trying again: HTTP 503"
    assert said[1].startswith("remote:test answers again")
    assert len(said) == 2, "once an outage"


def test_a_server_that_cannot_be_reached_is_named(scoring: Scoring):
    server = scoring.server()
    with RerankServer() as gone:
        url = gone.url
    with pytest.raises(JobFailed, match=r"does not answer: ConnectError"):
        score(scoring.scorer(server, url=url, **ONCE))


def test_a_slow_server_is_given_up_after_the_requests_own_limit(scoring: Scoring):
    server, held = scoring.server(), Held()
    server.next.append(held)
    found = score(scoring.scorer(server, timeout_s=0.2))
    assert held.broken_off.wait(WAIT_S)
    assert len(server.asked) == 2
    assert np.isfinite(found.logits).all()
    server.next.append(Held())
    with pytest.raises(JobFailed, match=r"no answer within 0\.2 s \(one try\)"):
        score(scoring.scorer(server, timeout_s=0.2, **ONCE))


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, b'{"message": "invalid request: documents"}', "HTTP 400: invalid request: documents"),
        (401, b'{"detail": "Invalid API key sk-very-secret"}', r"HTTP 401: Invalid API key \*\*\*"),
        (402, b'{"detail": "no balance"}', "HTTP 402: no balance"),
        (404, b'{"error": {"message": "no such model"}}', "HTTP 404: no such model"),
        (422, b'{"detail": [{"loc": ["body"], "msg": "Field required", "input": "text 0"}]}', "body: Field required"),
        (307, b"", "redirects are not followed"),
    ],
)
def test_a_refused_request_fails_the_job_with_the_servers_words(scoring: Scoring, status: int, body: bytes, said: str):
    server = scoring.server()
    server.next.append(Answer(status, body, {"Location": "http://127.0.0.1:1/"}))
    with pytest.raises(JobFailed, match=f"^remote:test: 127.0.0.1:[0-9]+ refused a request: .*{said}"):
        score(scoring.scorer(server))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "reply",
    [
        lambda scores: {"results": [{"index": at, "relevance_score": s} for at, s in enumerate(scores)][1:]},
        lambda scores: {"results": [{"index": 0, "relevance_score": s} for s in scores]},
        lambda scores: {"results": [{"index": at + 1, "relevance_score": s} for at, s in enumerate(scores)]},
        lambda scores: {"results": [{"index": at, "relevance_score": None} for at, _ in enumerate(scores)]},
        lambda scores: {"results": [{"index": at, "relevance_score": float("nan")} for at, _ in enumerate(scores)]},
        lambda scores: {"results": [{"index": at, "relevance_score": 7.0} for at, _ in enumerate(scores)]},
    ],
    ids=["one missing", "repeated", "out of range", "null", "NaN", "no probability"],
)
def test_a_malformed_reply_is_never_taken_for_scores(scoring: Scoring, reply: Callable[[list[float]], Any]):
    server = scoring.server()
    server.next += [reply] * 10
    with pytest.raises(JobFailed, match=r"its reply makes no sense: .* \(3 tries"):
        score(scoring.scorer(server), options=ScoreOptions())
    assert len(server.asked) == 3, "a server that always answers so is not asked for ever"
    server.next.clear()
    assert not score(scoring.scorer(server), options=ScoreOptions()).cached.any(), "nothing of it was stored"


def test_a_reply_of_any_length_does_not_fill_the_memory(scoring: Scoring, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sending, "REPLY_BYTES", 10_000)
    monkeypatch.setattr(sending, "REPLY_BYTES_PER_TEXT", 10)
    server = scoring.server()
    server.next.append(Answer(200, b" " * 100_000))
    with pytest.raises(JobFailed, match="its reply is too long: more than 10010 bytes"):
        score(scoring.scorer(server, **ONCE), ["a"])


def test_a_request_that_is_too_large_is_halved(scoring: Scoring):
    server = scoring.server()
    too_large = Answer(413, b'{"error": "batch size 7 > maximum allowed batch size 4", "error_type": "Validation"}')
    server.next += [too_large]
    found = score(scoring.scorer(server))
    assert sorted(len(asked.texts) for asked in server.asked) == [3, 4, 7]
    np.testing.assert_allclose(normalise_sigmoid(found.logits), probabilities(TEXTS), rtol=1e-5)
    server.next += [too_large]
    with pytest.raises(JobFailed, match="HTTP 413: batch size"):
        score(scoring.scorer(server), ["a"])


def test_scores_that_were_paid_for_are_kept_when_a_later_call_of_the_job_fails(scoring: Scoring):
    server = scoring.server()
    scorer = scoring.scorer(server, max_documents=4, concurrency=1)
    held = Held()
    server.next += [held]
    failed = []

    def fail() -> None:
        with pytest.raises(JobFailed, match="HTTP 400"):
            score(scorer, options=ScoreOptions())
        failed.append(True)

    thread = threading.Thread(target=fail)
    thread.start()
    assert held.arrived.wait(WAIT_S)
    server.next.append(Answer(400))
    held.let_go.set()
    thread.join(WAIT_S)
    assert failed
    assert score(scorer, options=ScoreOptions()).cached.sum() == 4


def test_calls_of_several_jobs_run_at_the_same_time_up_to_the_limit(scoring: Scoring):
    server = scoring.server()
    two_at_once = threading.Barrier(2)
    now, most, lock = 0, 0, threading.Lock()

    def enter() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        two_at_once.wait(WAIT_S)
        with lock:
            now -= 1

    server.every = enter
    scorer = scoring.scorer(server, concurrency=2)
    with ThreadPoolExecutor(6) as jobs:
        list(jobs.map(lambda at: score(scorer, query=str(at)), range(6)))
    assert (most, len(server.asked)) == (2, 6)


def test_interactive_jobs_go_before_bulk(scoring: Scoring, wait_until: Callable[..., None]):
    server, held = scoring.server(), Held()
    scorer, sender = scoring.scorer(server, concurrency=1), scoring.senders[0]
    server.next.append(held)
    with ThreadPoolExecutor(3) as jobs:
        jobs.submit(score, scorer, query="first")
        assert held.arrived.wait(WAIT_S)
        jobs.submit(score, scorer, TEXTS, replace(BYPASS, priority="bulk"), "bulk")
        wait_until(lambda: sender.stats().waiting == 1)
        jobs.submit(score, scorer, query="urgent")
        wait_until(lambda: sender.stats().waiting == 2)
        held.let_go.set()
    assert [asked.query for asked in server.asked] == ["first", "urgent", "bulk"]


def test_a_rate_is_kept(scoring: Scoring):
    server = scoring.server()
    # One at once, and then one every 0.1 s.
    scorer = scoring.scorer(server, requests_per_minute=600, max_documents=1, concurrency=7)
    score(scorer)
    times = sorted(asked.at for asked in server.asked)
    # Ten may go at once: a second of the rate.
    assert len(times) == 7
    slow = scoring.scorer(server, requests_per_minute=300, max_documents=1, concurrency=20)
    server.asked.clear()
    began = time.monotonic()
    score(slow, [str(at) for at in range(8)])
    assert max(asked.at for asked in server.asked) - began >= 3 / 5 - 0.001, "five at once, then one every 0.2 s"


def test_a_cancelled_job_breaks_its_calls_off(scoring: Scoring, wait_until: Callable[..., None]):
    server, held = scoring.server(), Held()
    scorer = scoring.scorer(server, max_documents=4, concurrency=1)
    server.next.append(held)
    work, raised = Work(), []

    def run() -> None:
        with pytest.raises(JobCancelled):
            scorer.score("q", TEXTS, BYPASS, work)
        raised.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    assert held.arrived.wait(WAIT_S)
    work.cancel()
    thread.join(WAIT_S)
    assert raised
    assert held.broken_off.wait(WAIT_S), "the request under way was broken off"
    score(scorer, ["a"], query="next")
    assert [asked.query for asked in server.asked] == ["q", "next"], "its other call was never sent"
    wait_until(lambda: scoring.senders[0].stats().waiting == 0)


def test_equal_pairs_of_jobs_in_flight_are_asked_for_once(scoring: Scoring, wait_until: Callable[..., None]):
    server, held = scoring.server(), Held()
    scorer = scoring.scorer(server)
    server.next.append(held)
    second, third = Work(), Work()
    with ThreadPoolExecutor(4) as jobs:
        first = jobs.submit(score, scorer, ["a", "b"], ScoreOptions())
        assert held.arrived.wait(WAIT_S)
        both = jobs.submit(scorer.score, "q", ["b", "c", "b"], ScoreOptions(), second)
        stopped = jobs.submit(scorer.score, "q", ["a"], ScoreOptions(), third)
        urgent = jobs.submit(score, scorer, ["a"], ScoreOptions(tenant="other"))
        assert np.isfinite(urgent.result(WAIT_S).logits).all(), "another tenant's job waits for no call but its own"
        wait_until(lambda: second.pairs_done == 2)
        third.cancel()
        with pytest.raises(JobCancelled):
            stopped.result(WAIT_S)
        held.let_go.set()
    assert sorted(asked.texts for asked in server.asked) == [["a"], ["a", "b"], ["c"]]
    logits = both.result().logits
    assert (logits[0], second.pairs_done) == (logits[2], 3)
    assert logits[0] == first.result().logits[1]


def test_a_pair_is_asked_for_again_where_the_job_that_asked_for_it_stops(scoring: Scoring):
    server, held, work = scoring.server(), Held(), Work()
    scorer = scoring.scorer(server)
    server.next.append(held)
    with ThreadPoolExecutor(2) as jobs:
        stopped = jobs.submit(scorer.score, "q", TEXTS, ScoreOptions(), work)
        assert held.arrived.wait(WAIT_S)
        other = jobs.submit(score, scorer, [*TEXTS[:2], "own"], ScoreOptions())
        while len(server.asked) < 2:
            time.sleep(0.001)
        work.cancel()
        with pytest.raises(JobCancelled):
            stopped.result(WAIT_S)
        np.testing.assert_allclose(
            normalise_sigmoid(other.result(WAIT_S).logits), probabilities([*TEXTS[:2], "own"]), rtol=1e-5
        )
    assert [asked.texts for asked in server.asked] == [TEXTS, ["own"], TEXTS[:2]]


def test_a_cancelled_job_sends_nothing(scoring: Scoring):
    server, work = scoring.server(), Work()
    work.cancel()
    with pytest.raises(JobCancelled):
        scoring.scorer(server).score("q", TEXTS, BYPASS, work)
    assert server.asked == []


def test_progress_is_told_call_by_call(scoring: Scoring, wait_until: Callable[..., None]):
    server, held, work = scoring.server(), Held(), Work()
    scorer = scoring.scorer(server, max_documents=4, concurrency=1)
    server.next += [lambda scores: SHAPES["jina"](scores)[0], held]
    thread = threading.Thread(target=scorer.score, args=("q", TEXTS, BYPASS, work))
    thread.start()
    assert held.arrived.wait(WAIT_S)
    wait_until(lambda: work.pairs_done == 4)
    held.let_go.set()
    thread.join(WAIT_S)
    assert work.pairs_done == 7


def test_a_worker_that_stops_gives_its_jobs_back(scoring: Scoring):
    server, held = scoring.server(), Held()
    scorer, sender = scoring.scorer(server, concurrency=1), scoring.senders[0]
    server.next.append(held)
    with ThreadPoolExecutor(2) as jobs:
        waiting = [jobs.submit(score, scorer, query=query) for query in ("a", "b")]
        assert held.arrived.wait(WAIT_S)
        began = time.monotonic()
        sender.close(WAIT_S)
        for one in waiting:
            with pytest.raises(EngineClosed):
                one.result(WAIT_S)
    assert not sender.alive
    assert time.monotonic() - began < WAIT_S
    with pytest.raises(EngineClosed):
        score(scorer)


def test_the_key_is_in_no_log_and_in_no_error(scoring: Scoring, caplog: pytest.LogCaptureFixture):
    server = scoring.server()
    with caplog.at_level(logging.DEBUG):
        server.next += [Answer(500, f"key {KEY}".encode()), Answer(401, f"key {KEY}".encode())]
        with pytest.raises(JobFailed) as failed:
            score(scoring.scorer(server))
        score(scoring.scorer(server))
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(failed.value)
    assert "***" in str(failed.value)
    assert KEY not in "".join(f"{record.getMessage()} {record.exc_text}" for record in caplog.records)
