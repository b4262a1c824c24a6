"""What each kind of server is asked, and what is read from its reply."""

import json
from datetime import UTC, datetime
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rerank_server import SHAPES

from rerankq.catalogue import INSTRUCTED, DialectName
from rerankq_worker.fusion.normalise import normalise_sigmoid
from rerankq_worker.remote.call_queue import BULK_EVERY, CallQueue
from rerankq_worker.remote.dialects import DIALECTS, ReplyMalformed, RerankRequest, body_of, read_reply
from rerankq_worker.remote.logits import logits_of
from rerankq_worker.remote.rates import TokenBucket
from rerankq_worker.remote.retrying import Refused, Transient, failure_of, message_in, pause_s, retry_after_s
from rerankq_worker.remote.splitting import split

COHERE = {"model": "m", "query": "q", "documents": ["one", "two"], "top_n": 2}
WITHOUT_DOCUMENTS = {**COHERE, "return_documents": False}
# By dialect and whether logits are asked for: the whole body.
BODIES: dict[tuple[str, bool], dict[str, Any]] = {
    ("cohere", False): COHERE,
    ("dashscope", False): {
        "model": "m",
        "input": {"query": "q", "documents": ["one", "two"]},
        "parameters": {"top_n": 2, "return_documents": False},
    },
    ("infinity", False): {
        "model": "m",
        "query": "q",
        "documents": ["one", "two"],
        "raw_scores": False,
        "return_documents": False,
    },
    ("infinity", True): {
        "model": "m",
        "query": "q",
        "documents": ["one", "two"],
        "raw_scores": True,
        "return_documents": False,
    },
    ("jina", False): WITHOUT_DOCUMENTS,
    ("localai", False): COHERE,
    ("siliconflow", False): WITHOUT_DOCUMENTS,
    ("tei", False): {
        "query": "q",
        "texts": ["one", "two"],
        "raw_scores": False,
        "truncate": True,
        "return_text": False,
    },
    ("tei", True): {
        "query": "q",
        "texts": ["one", "two"],
        "raw_scores": True,
        "truncate": True,
        "return_text": False,
    },
    ("vllm", False): {**COHERE, "truncate_prompt_tokens": 512},
    ("vllm", True): {**COHERE, "truncate_prompt_tokens": 512, "use_activation": False},
    ("voyage", False): {
        "model": "m",
        "query": "q",
        "documents": ["one", "two"],
        "top_k": 2,
        "truncation": True,
        "return_documents": False,
    },
    ("xinference", False): {**WITHOUT_DOCUMENTS, "return_len": True},
}
SCORES = [0.25, 0.75, 0.5]


def read(reply: Any, *, dialect: DialectName = "jina", texts: int = 3, probabilities: bool = True) -> list[float]:
    content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    return read_reply(DIALECTS[dialect], content, {}, texts=texts, probabilities=probabilities).scores


def results(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"results": [{"index": index, "relevance_score": score} for index, score in pairs]}


def test_every_dialect_of_the_catalogue_is_spoken_and_tested():
    assert set(DIALECTS) == set(get_args(DialectName)) == set(SHAPES) == {dialect for dialect, _ in BODIES}


@pytest.mark.parametrize(("dialect", "raw"), BODIES)
def test_a_request_has_exactly_the_fields_of_its_dialect(dialect: DialectName, raw: bool):
    request = RerankRequest("m", "q", ("one", "two"), raw, 512)
    assert json.loads(body_of(DIALECTS[dialect], request, {})) == BODIES[dialect, raw]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_instruction_is_sent_where_the_dialect_has_a_field_for_it(dialect: DialectName):
    plain, told = (
        json.loads(body_of(DIALECTS[dialect], RerankRequest("m", "q", ("one",), False, 512, instruction=said), {}))
        for said in ("", "find causes")
    )
    if dialect == "dashscope":
        assert told.pop("parameters") == {**plain.pop("parameters"), "instruct": "find causes"}
    elif dialect in INSTRUCTED:
        assert told.pop("instruction") == "find causes"
    assert told == plain
    assert bool(DIALECTS[dialect].instruction) == (dialect in INSTRUCTED)


def test_a_jobs_instruction_goes_before_that_of_the_catalogue():
    for dialect, parameters in [("vllm", {"instruction": "own"}), ("dashscope", {"parameters": {"instruct": "own"}})]:
        for said, found in [("", "own"), ("find causes", "find causes")]:
            request = RerankRequest("m", "q", ("one",), False, 512, instruction=said)
            body = json.loads(body_of(DIALECTS[dialect], request, parameters))
            assert body.get("instruction", body.get("parameters", {}).get("instruct")) == found


def test_parameters_of_the_catalogue_are_merged_into_the_request():
    request = RerankRequest("m", "q", ("one",), False, 512)
    body = json.loads(body_of(DIALECTS["dashscope"], request, {"parameters": {"instruct": "x"}, "more": [1]}))
    assert body["parameters"] == {"top_n": 1, "return_documents": False, "instruct": "x"}
    assert body["more"] == [1]


@pytest.mark.parametrize("dialect", SHAPES)
def test_the_reply_of_each_dialect_gives_scores_in_the_order_of_the_texts_and_tokens(dialect: DialectName):
    reply, headers = SHAPES[dialect](SCORES)
    found = read_reply(DIALECTS[dialect], json.dumps(reply).encode(), headers, texts=3, probabilities=True)
    # Cohere counts searches, not tokens.
    assert found == (SCORES, 0 if dialect == "cohere" else 79)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"", "not JSON"),
        (b'{"results": [{"index": 0, "relev', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"null", "no list results"),
        ([], "no list results"),
        ({"data": []}, "no list results"),
        ({"results": None}, "no list results"),
        ({"results": {"0": 0.5}}, "no list results"),
        ({"results": [0.1, 0.2, 0.3]}, "a result is no object"),
        (results((0, 0.1), (1, 0.2)), "1 of 3 texts have no score, the first of them index 2"),
        (results(), "3 of 3 texts have no score"),
        (results((0, 0.1), (1, 0.2), (2, 0.3), (2, 0.3)), "index 2 is there twice"),
        (results((0, 0.1), (1, 0.2), (1, 0.3)), "index 1 is there twice"),
        (results((0, 0.1), (1, 0.2), (3, 0.3)), "index 3 is out of range: 3 texts"),
        (results((0, 0.1), (1, 0.2), (-1, 0.3)), "index -1 is out of range"),
        (results((0, 0.1), (1, 0.2), (10**30, 0.3)), "out of range"),
        (results((0, 0.1), (1, 0.2), ("2", 0.3)), "no whole number as its index"),
        (results((0, 0.1), (1, 0.2), (2.0, 0.3)), "no whole number as its index"),
        (results((0, 0.1), (True, 0.2), (2, 0.3)), "no whole number as its index"),
        (results((0, 0.1), (1, 0.2), (None, 0.3)), "no whole number as its index"),
        (results((0, 0.1), (1, None), (2, 0.3)), "index 1 has no number as its relevance_score"),
        (results((0, 0.1), (1, "0.2"), (2, 0.3)), "index 1 has no number"),
        (results((0, 0.1), (1, True), (2, 0.3)), "index 1 has no number"),
        (results((0, 0.1), (1, [0.2]), (2, 0.3)), "index 1 has no number"),
        ({"results": [{"index": 0}, {"index": 1}, {"index": 2}]}, "index 0 has no number"),
        (results((0, 0.1), (1, float("nan")), (2, 0.3)), "index 1 scores nan"),
        (results((0, 0.1), (1, float("inf")), (2, 0.3)), "index 1 scores inf"),
        (results((0, 0.1), (1, 10**400), (2, 0.3)), "index 1 scores inf"),
        (results((0, 0.1), (1, 4.5), (2, 0.3)), "index 1 scores 4.5, which is no probability"),
        (results((0, 0.1), (1, -0.5), (2, 0.3)), "index 1 scores -0.5, which is no probability"),
    ],
)
def test_a_reply_without_exactly_one_finite_score_for_each_text_is_malformed(reply: Any, said: str):
    with pytest.raises(ReplyMalformed, match=said.replace("[", r"\[")):
        read(reply)


def test_a_list_as_the_reply_is_checked_as_closely():
    assert read(
        [{"index": 1, "score": -4.0}, {"index": 0, "score": 3}], dialect="tei", texts=2, probabilities=False
    ) == [
        3,
        -4,
    ]
    with pytest.raises(ReplyMalformed, match="1 of 2 texts"):
        read([{"index": 1, "score": -4.0}], dialect="tei", texts=2, probabilities=False)
    with pytest.raises(ReplyMalformed, match="no list of results"):
        read({"error": "x"}, dialect="tei")


@given(st.integers(0, 6).flatmap(lambda texts: st.tuples(st.just(texts), st.lists(st.integers(-1, 7), max_size=8))))
def test_scores_are_read_if_and_only_if_the_indices_are_those_of_the_texts(given_: tuple[int, list[int]]):
    texts, indices = given_
    reply = results(*((index, 0.5) for index in indices))
    if sorted(indices) == list(range(texts)):
        assert read(reply, texts=texts) == [0.5] * texts
    else:
        with pytest.raises(ReplyMalformed):
            read(reply, texts=texts)


@pytest.mark.parametrize(
    "usage", [None, {}, {"total_tokens": None}, {"total_tokens": -1}, {"total_tokens": True}, [], 7]
)
def test_odd_usage_counts_no_tokens_and_fails_nothing(usage: Any):
    reply = {**results((0, 0.5)), "usage": usage}
    found = read_reply(DIALECTS["jina"], json.dumps(reply).encode(), {}, texts=1, probabilities=True)
    assert found == ([0.5], 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_sigmoid_gives_a_probability_back(probabilities: list[float]):
    logits = logits_of(probabilities, probabilities=True)
    assert np.isfinite(logits).all()
    # A logit is kept in float32: within half a unit of its last place, of which the sigmoid makes a quarter at most.
    np.testing.assert_allclose(normalise_sigmoid(logits), probabilities, rtol=4e-6, atol=1.2e-16)
    order = np.argsort(probabilities, kind="stable")
    assert (np.diff(logits[order]) >= 0).all(), "a higher probability never has a lower logit"


def test_logits_are_taken_as_they_are():
    assert logits_of([3.5, -11.25, 0], probabilities=False).tolist() == [3.5, -11.25, 0]
    assert np.isfinite(logits_of([1e300, -1e300], probabilities=False)).all()


@given(
    sizes=st.lists(st.integers(0, 50), max_size=40),
    most=st.integers(1, 12),
    chars=st.one_of(st.just(float("inf")), st.integers(1, 60)),
)
def test_texts_are_split_into_requests_within_the_limits_each_once_in_order(sizes, most, chars):
    parts = split(sizes, max_documents=most, max_chars=chars)
    assert [at for part in parts for at in part] == list(range(len(sizes)))
    for part in parts:
        assert 1 <= len(part) <= most
        assert len(part) == 1 or sum(sizes[at] for at in part) <= chars
    if chars == float("inf"):
        assert len(parts) == -(-len(sizes) // most), "no more requests than needed"
        assert max(map(len, parts), default=0) - min(map(len, parts), default=0) <= len(parts)


@pytest.mark.parametrize(
    ("status", "transient"),
    [
        *((status, False) for status in (301, 308, 400, 401, 403, 404, 413, 422)),
        *((status, True) for status in (408, 424, 425, 429, 500, 502, 503, 504, 529, 599)),
    ],
)
def test_throttling_and_faults_of_the_server_are_tried_again_and_nothing_else(status: int, transient: bool):
    failure = failure_of(status, b'{"message": "why"}', "3")
    assert isinstance(failure, Transient if transient else Refused)
    assert str(failure).startswith(f"HTTP {status}: ")
    assert getattr(failure, "trouble", "") == (
        f"HTTP {status}, no API key was sent: set api_key_env" if status in {401, 403} else ""
    )
    if isinstance(failure, Transient):
        assert (failure.kind, failure.retry_after_s) == (f"HTTP {status}", 3.0)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"message": "no credit"}', "no credit"),
        (b'{"detail": "no credit"}', "no credit"),
        (b'{"error": "no credit", "error_type": "Validation"}', "no credit"),
        (b'{"error": {"message": "no credit", "type": "x"}}', "no credit"),
        (b'{"code": "InvalidApiKey", "message": "no credit", "request_id": "1"}', "no credit"),
        (b'{"detail": [{"loc": ["body", "documents"], "msg": "too many", "input": ["secret text"]}]}', "too many"),
        (b"plain\n words", "plain words"),
        (b"\xff\xfe", "\ufffd"),
        (b"", ""),
        (b"null", ""),
        (b'{"a": 1}', ""),
        (b"[" * 100_000, "["),
    ],
)
def test_the_words_of_an_error_are_found_in_every_form(body: bytes, said: str):
    found = message_in(body)
    assert said in found
    assert len(found) <= 301
    assert "secret text" not in found


def test_a_key_that_the_server_repeats_is_not_in_the_error():
    for filler in (0, 290, 296):
        said = b'{"message": "' + b"x" * filler + b' wrong key sk-123"}'
        assert "sk-" not in str(failure_of(401, said, None, secret="sk-123")), "nor is a part of it, where it is cut"


def test_a_refused_key_is_said_to_be_that_of_its_setting():
    refused = failure_of(401, b"no", None, secret="sk-123", api_key_env="JINA_API_KEY")
    assert isinstance(refused, Refused)
    assert str(refused) == "HTTP 401: no (the API key of JINA_API_KEY was sent)"
    assert refused.trouble == "HTTP 401, the API key of JINA_API_KEY was sent"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("7", 7.0),
        ("0.25", 0.25),
        ("-3", 0.0),
        ("nan", None),
        ("inf", None),
        ("later", None),
        ("Sat, 28 Nov 2026 12:00:30 GMT", 30.0),
        ("Sat, 28 Nov 2026 11:00:00 GMT", 0.0),
        ("Sat, 99 Nov 2026 11:00:00 GMT", None),
        ("Sat, 28 Nov 2026 12:00:00 +99999999999999999999", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None):
    assert retry_after_s(header, now=datetime(2026, 11, 28, 12, tzinfo=UTC)) == seconds


@given(st.integers(1, 10_000), st.one_of(st.none(), st.floats(0, 1e6)), st.floats(0, 1))
def test_a_pause_is_never_shorter_than_the_server_asks_and_grows_to_a_limit(failures, asked, jitter):
    pause = pause_s(failures, asked, jitter=jitter)
    assert pause >= (asked or 0)
    assert 0.25 <= pause <= max(30.0, asked or 0)


@given(st.floats(0.5, 600), st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_a_bucket_lets_no_more_through_than_its_rate_and_a_burst(rate: float, pauses: list[float]):
    now, bucket = 0.0, TokenBucket.per_minute(rate, now=0.0)
    for spent, pause in enumerate(pauses, 1):
        now += max(pause, bucket.wait_s(now, need=1))
        bucket = bucket.after(now, 1)
        assert spent <= bucket.capacity + now * rate / 60 + 1e-6


def test_tokens_spent_beyond_the_rate_hold_back_what_follows():
    bucket = TokenBucket.per_minute(6_000, now=0.0).after(0.0, 1_100)
    assert bucket.wait_s(0.0) == pytest.approx(10.0)
    assert bucket.wait_s(10.1) == 0.0


class Waiting:
    def __init__(self, name: str, priority: Any = "interactive", tenant: str = "", job: str = "") -> None:
        self.name, self.priority, self.tenant, self.job = name, priority, tenant, job or name


def order(*calls: Waiting) -> list[str]:
    queue: CallQueue[Waiting] = CallQueue()
    for call in calls:
        queue.add(call)
    assert len(queue) == len(calls)
    return [queue.next().name for _ in calls]


def test_tenants_and_the_jobs_of_a_tenant_take_turns():
    large = [Waiting(f"large {at}", tenant="x", job="large") for at in range(3)]
    assert order(*large, Waiting("small", tenant="x"), Waiting("other", tenant="y")) == [
        "large 0", "other", "small", "large 1", "large 2",
    ]  # fmt: skip


def test_bulk_waits_for_interactive_calls_and_is_not_stopped_by_them():
    found = order(
        *(Waiting("bulk", "bulk", job=f"b{at}") for at in range(2)),
        *(Waiting("urgent", job=f"i{at}") for at in range(25)),
    )
    assert [at for at, name in enumerate(found) if name == "bulk"] == [BULK_EVERY - 1, 2 * BULK_EVERY - 1]


def test_a_call_that_is_sent_again_goes_before_the_others_of_its_job():
    queue: CallQueue[Waiting] = CallQueue()
    for name in ("a", "b"):
        queue.add(Waiting(name, job="one"))
    queue.add(Waiting("again", job="one"), first=True)
    assert [queue.next().name for _ in range(3)] == ["again", "a", "b"]
    with pytest.raises(IndexError):
        queue.next()
