"""The score cache against a dict, one round trip each way; failures of its server slow jobs down and fail none."""

import logging
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rerankq.local.embedded import EmbeddedRedis
from rerankq_worker.cache import CIRCUIT_OPEN_S, ScoreCache, connect, score_fingerprint
from rerankq_worker.engine import text_hash

QUERY = text_hash("why tides?")
HASHES = [text_hash(f"chunk {number}") for number in range(8)]
KEY = f"rerankq:scores:fp:{QUERY.hex()}"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def flags(*values: int) -> np.ndarray:
    return np.array(values, np.bool_)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


@pytest.fixture
def scores(redis_url: str) -> Iterator[ScoreCache]:
    with connect(redis_url) as client:
        yield ScoreCache(client, ttl_s=60)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What connections of this process send: an entry for each write to a socket."""
    packets: list[object] = []
    send = redis.connection.AbstractConnection.send_packed_command

    def send_and_count(self: object, command: object, *args: object, **kwargs: object) -> object:
        packets.append(command)
        return send(self, command, *args, **kwargs)

    monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", send_and_count)
    return packets


@st.composite
def writes(draw: st.DrawFn) -> tuple[list[int], np.ndarray, np.ndarray]:
    chosen = draw(st.lists(st.integers(0, len(HASHES) - 1), max_size=6))
    logits = [draw(st.floats(width=32)) for _ in chosen]
    # Whether a pair is cut depends on its texts alone: the same at every write.
    return chosen, np.array(logits, np.float32), np.array([at % 3 == 0 for at in chosen], np.bool_)


@given(everything=st.lists(writes(), max_size=5), asked=st.lists(st.integers(0, len(HASHES) - 1), max_size=10))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_cache_returns_what_was_written_last(redis_url_each_version: str, everything: list, asked: list[int]):
    with connect(redis_url_each_version) as client:
        client.flushdb()
        scores, twin = ScoreCache(client, ttl_s=60), {}
        for chosen, logits, cut in everything:
            scores.write("fp", QUERY, [HASHES[at] for at in chosen], logits, cut)
            twin |= {at: logit for at, logit in zip(chosen, logits, strict=True) if np.isfinite(logit)}
        known = scores.read("fp", QUERY, [HASHES[at] for at in asked])
    assert known.mask.tolist() == [at in twin for at in asked]
    assert known.truncated.tolist() == [at in twin and at % 3 == 0 for at in asked]
    assert known.logits[known.mask].tobytes() == b"".join(twin[at].tobytes() for at in asked if at in twin)


def test_reading_and_writing_cost_one_round_trip_each(scores: ScoreCache, sent: list[object]):
    scores.read("fp", QUERY, HASHES)
    sent.clear()
    scores.write("fp", QUERY, HASHES, np.arange(8, dtype=np.float32), flags(*[1] * 8))
    assert len(sent) == 1
    scores.read("fp", QUERY, HASHES)
    assert len(sent) == 2
    scores.read("fp", QUERY, [])
    scores.write("fp", QUERY, HASHES[:1], floats(np.nan), flags(0))
    assert len(sent) == 2, "nothing to read or to remember costs nothing"


def test_scores_are_stored_under_the_contracts_key_and_fields(scores: ScoreCache, server: redis.Redis, redis_url: str):
    scores.write("fp", QUERY, HASHES[:3], floats(1.5, np.nan, -2), flags(0, 0, 0))
    assert server.keys("*") == [KEY.encode()]
    assert server.hgetall(KEY) == {HASHES[0]: floats(1.5).tobytes(), HASHES[2]: floats(-2).tobytes()}
    assert 0 < server.ttl(KEY) <= 60


def test_the_truncation_flag_is_stored_in_the_same_key_as_the_score(scores: ScoreCache, server: redis.Redis):
    scores.write("fp", QUERY, HASHES[:2], floats(1, 2), flags(1, 0))
    scores.write("fp", QUERY, HASHES[2:3], floats(3), flags(0))
    assert server.keys("*") == [KEY.encode()], "one key, so that no eviction or expiry takes one without the other"
    known = scores.read("fp", QUERY, HASHES[:4])
    assert known.mask.tolist() == [True, True, True, False]
    assert known.truncated.tolist() == [True, False, False, False]


def test_the_truncation_flag_is_ignored_without_a_score(scores: ScoreCache, server: redis.Redis):
    scores.write("fp", QUERY, HASHES[:2], floats(1, 2), flags(1, 1))
    server.hdel(KEY, HASHES[0])
    known = scores.read("fp", QUERY, HASHES[:2])
    assert known.mask.tolist() == known.truncated.tolist() == [False, True]


def test_a_refreshed_score_of_a_whole_pair_clears_the_truncation_flag(scores: ScoreCache, server: redis.Redis):
    scores.write("fp", QUERY, HASHES[:3], floats(1, 2, 3), flags(1, 1, 1))
    scores.write("fp", QUERY, HASHES[:3], floats(4, np.nan, 6), flags(0, 0, 1))
    known = scores.read("fp", QUERY, HASHES[:3])
    assert known.logits.tolist() == [4, 2, 6]
    assert known.truncated.tolist() == [False, True, True]
    assert server.hlen(KEY) == 5


def test_a_client_that_decodes_replies_opens_the_circuit_and_fails_no_job(
    redis_url: str, caplog: pytest.LogCaptureFixture
):
    clock = Clock()
    with redis.Redis.from_url(redis_url, decode_responses=True) as decoding, redis.Redis.from_url(redis_url) as raw:
        scores = ScoreCache(decoding, ttl_s=60, clock=clock)
        # Neither what is no UTF-8 nor what is, four letters as it happens, is taken for a logit.
        for logit in (floats(-1.5), np.frombuffer(b"abcd", "<f4")):
            scores.write("fp", QUERY, HASHES[:1], logit, flags(0))
            assert raw.hget(KEY, HASHES[0]) == logit.tobytes()
            assert not scores.read("fp", QUERY, HASHES[:1]).mask.any()
            clock.now += CIRCUIT_OPEN_S
        assert ScoreCache(raw, ttl_s=60).read("fp", QUERY, HASHES[:1]).mask.all()
    assert "computing without it" in caplog.text


@pytest.mark.parametrize("foreign", [b"", b"abc", b"abcde", np.float32(np.nan).tobytes(), np.float32(np.inf).tobytes()])
def test_values_that_are_not_finite_float32_count_as_unknown(scores: ScoreCache, server: redis.Redis, foreign: bytes):
    scores.write("fp", QUERY, HASHES[:2], floats(1, 2), flags(0, 0))
    server.hset(KEY, HASHES[0], foreign)
    known = scores.read("fp", QUERY, HASHES[:2])
    assert known.mask.tolist() == [False, True]
    assert known.logits[1] == 2


def test_a_key_of_another_type_affects_no_other_key(scores: ScoreCache, server: redis.Redis):
    server.set(KEY, b"no hash")
    assert not scores.read("fp", QUERY, HASHES[:1]).mask.any()
    scores.write("fp", QUERY, HASHES[:1], floats(1), flags(0))
    scores.write("other", QUERY, HASHES[:1], floats(1), flags(0))
    assert scores.read("other", QUERY, HASHES[:1]).mask.all()


def test_a_full_cache_still_serves_reads_and_accepts_writes_once_it_has_memory(
    scores: ScoreCache, server: redis.Redis, caplog: pytest.LogCaptureFixture
):
    scores.write("fp", QUERY, HASHES[:1], floats(1), flags(0))
    server.config_set("maxmemory", 1)
    try:
        for _ in range(20):
            scores.write("fp", QUERY, HASHES[1:2], floats(2), flags(1))
            assert scores.read("fp", QUERY, HASHES[:2]).mask.tolist() == [True, False]
    finally:
        server.config_set("maxmemory", 0)
    assert len([one for one in caplog.records if one.levelno == logging.WARNING]) == 1, "many jobs, one warning"
    scores.write("fp", QUERY, HASHES[1:2], floats(2), flags(1))
    assert scores.read("fp", QUERY, HASHES[:2]).truncated.tolist() == [False, True]


def test_a_cache_at_its_memory_cap_evicts_whole_queries(scores: ScoreCache, server: redis.Redis):
    server.config_set("maxmemory-policy", "allkeys-lfu")
    server.config_set("maxmemory", server.info("memory")["used_memory"] + 500_000)
    chunks = [text_hash(str(number)) for number in range(500)]
    try:
        for query in range(60):
            cut = np.ones(500, np.bool_)
            scores.write("fp", text_hash(f"q{query}"), chunks, np.full(500, query, np.float32), cut)
        seen = [scores.read("fp", text_hash(f"q{query}"), chunks) for query in range(60)]
    finally:
        server.config_set("maxmemory", 0)
        server.config_set("maxmemory-policy", "noeviction")
    known = [one for one in seen if one.mask.any()]
    assert 0 < len(known) < 60
    assert all(one.mask.all() and one.truncated.all() for one in known), "a query's scores are forgotten together"


def test_the_circuit_stays_open_for_a_while_after_a_refused_connection(
    sent: list[object], caplog: pytest.LogCaptureFixture
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else answers here
        clock = Clock()
        scores = ScoreCache(connect(f"redis://127.0.0.1:{taken.getsockname()[1]}/0"), ttl_s=60, clock=clock)
        for _ in range(50):
            assert not scores.read("fp", QUERY, HASHES).mask.any()
            scores.write("fp", QUERY, HASHES[:1], floats(1), flags(0))
        assert len(caplog.records) == 1, "one connection attempt"
        clock.now += CIRCUIT_OPEN_S
        scores.read("fp", QUERY, HASHES)
        assert len(caplog.records) == 2, "and one more when the circuit closes"


def test_a_server_that_hangs_costs_one_timeout_and_is_used_again_when_it_is_back():
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as other:
        clock = Clock()
        with connect(f"{server.url}?socket_timeout=0.2") as client:
            scores = ScoreCache(client, ttl_s=60, clock=clock)
            scores.write("fp", QUERY, HASHES[:1], floats(1), flags(0))
            number = other.info("server")["process_id"]
            os.kill(number, signal.SIGSTOP)
            try:
                assert not scores.read("fp", QUERY, HASHES[:1]).mask.any()
            finally:
                os.kill(number, signal.SIGCONT)
            assert not scores.read("fp", QUERY, HASHES[:1]).mask.any(), "the circuit is open"
            clock.now += CIRCUIT_OPEN_S
            assert scores.read("fp", QUERY, HASHES[:1]).mask.all()


def test_everything_that_changes_a_logit_changes_the_fingerprint():
    base = {"engine": "weights", "max_length": 512, "query_max_tokens": 128, "long_chunks": "truncate", "rule": "1"}
    others = [
        {"engine": "other"}, {"max_length": 256}, {"query_max_tokens": 64}, {"long_chunks": "window"}, {"rule": "2"},
        {"instruction": "judge by it"}, {"instruction": "judge by it not"},
    ]  # fmt: skip
    prints = [score_fingerprint(changed.pop("engine"), **changed) for changed in [base | one for one in ({}, *others)]]
    assert len(set(prints)) == len(prints)
    assert score_fingerprint(base.pop("engine"), **base, instruction="") == prints[0]


def test_similar_texts_have_different_hashes():
    texts = ["", " ", "a", "A", "a ", "é", "e\u0301", "\ud800", "\x00"]
    hashes = sorted(text_hash(text) for text in texts)
    assert all(one != other and len(one) == 16 for one, other in pairwise(hashes))


def test_many_threads_share_one_cache(scores: ScoreCache):
    def work(number: int) -> bool:
        query = text_hash(f"query {number % 4}")
        for _ in range(20):
            scores.write("fp", query, HASHES, np.full(8, number % 4, np.float32), flags(*[0] * 8))
            known = scores.read("fp", query, HASHES)
            if not (known.mask.all() and (known.logits == number % 4).all()):
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))
