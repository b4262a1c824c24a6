"""Whoever reaches the broker can put anything into a queue: it stops no worker, takes no slot, and is not repeated."""

import base64
import json
from collections.abc import Callable
from typing import Any

import redis

from rerankq import Client, Ranking, RerankJob
from rerankq.settings import Settings

TEXT = "words that no log may show"
HEADERS = {"task": "rerankq.rerank", "id": "x", "lang": "py", "argsrepr": TEXT, "kwargsrepr": "{}"}
PROPERTIES = {
    "correlation_id": "x",
    "reply_to": "r",
    "delivery_mode": 2,
    "delivery_info": {"exchange": "rerankq", "routing_key": "rerankq.interactive"},
    "priority": 0,
    "body_encoding": "base64",
    "delivery_tag": "t",
}
MISSING = object()


def message(body: bytes = b'[["x"],{},{}]', **parts: Any) -> bytes:
    """A message as kombu writes it, with some parts otherwise or missing."""
    whole = {
        "body": base64.b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": HEADERS,
        "properties": PROPERTIES,
    } | {name.replace("_", "-"): value for name, value in parts.items()}
    return json.dumps({name: value for name, value in whole.items() if value is not MISSING}).encode()


NO_ENVELOPE = [b"[]", b"nonsense", b"\xff\xfe\x00", b"", b"3", b"null", b'"x"', b"{}", b"[" * 100_000, b"x" * 5_000_000]
BODIES = [
    b"[]",
    b"{}",
    b"nope",
    b"7",
    b"null",
    b"[null,null,null]",
    b'["x",{},{}]',
    b'[["x"],{"a":1},{}]',
    b"[[3],{},{}]",
]
BODIES += [
    b'[[{"a":[1]}],{},{}]',
    b'[["\\ud800"],{},{}]',
    b'[["x"],{},[1]]',
    b"[" * 50_000,
    b"[[" + b"1," * 100_000 + b"1],{},{}]",
]
BODIES += [b'[["x"],{},{"chain":[{"task":"rerankq.rerank","args":["y"]}],"callbacks":3,"chord":"x"}]']
ODD_HEADERS: list[Any] = [MISSING, None, [1], "x", {}, {"task": "rerankq.rerank"}, {"task": []}, {"task": "os.system"}]
ODD_HEADERS += [HEADERS | {"id": odd} for odd in (7, ["x"], None, "x" * 100_000)]
ODD_HEADERS += [HEADERS | {"eta": odd} for odd in ("2099-01-01T00:00:00", "soon", 5)]
ODD_HEADERS += [HEADERS | odd for odd in ({"expires": "never"}, {"timelimit": "x"}, {"compression": {}}, {"group": {}})]
ODD_HEADERS += [HEADERS | {"stamped_headers": 3, "stamps": 4}, HEADERS | {"retries": "many"}, HEADERS | {"shadow": {}}]
ODD_PROPERTIES: list[Any] = [MISSING, None, {}, [], {"delivery_tag": "t"}]
ODD_PROPERTIES += [PROPERTIES | {"delivery_info": odd} for odd in (None, [], {"routing_key": []})]
ODD_PROPERTIES += [
    PROPERTIES | {"body_encoding": "rot13"},
    PROPERTIES | {"delivery_tag": ["t"]},
    PROPERTIES | {"reply_to": 3},
]
HOSTILE = [
    *NO_ENVELOPE,
    *(message(body) for body in BODIES),
    *(message(headers=odd) for odd in ODD_HEADERS),
    *(message(properties=odd) for odd in ODD_PROPERTIES),
    *(message(content_type=odd) for odd in ("application/x-python-serialize", "application/x-yaml", 3, None)),
    *(message(content_encoding=odd) for odd in ("klingon", "binary", None)),
    *(
        message(body=json.dumps({"task": "rerankq.rerank", "id": 3, "args": 3}).encode(), headers=odd)
        for odd in ({}, None)
    ),
    json.dumps(json.loads(message()) | {"body": ["x"]}).encode(),
    json.dumps(json.loads(message()) | {"body": "$$$é"}).encode(),
]


def test_a_large_message_is_dropped_before_it_is_parsed(
    client: Client, start_worker: Callable, settings: Settings, wait_until: Callable
):
    worker = start_worker()
    # It would be a doorbell, with more in its headers than Celery reads.
    large = message(headers=HEADERS | {"more": "x" * 1_000_000})
    with redis.Redis.from_url(settings.broker) as broker:
        for queue in ("rerankq.interactive", "rerankq.bulk"):
            broker.lpush(f"rerankq:{queue}", large)
    dropped = "dropped a message that is no doorbell: it is larger than 65536 bytes"
    wait_until(lambda: worker.log.read_text().count(dropped) == 2)
    assert isinstance(client.rerank("q", ["a"], fusion="model", timeout=60), Ranking)
    assert worker.process.poll() is None


def test_messages_of_any_kind_stop_no_worker_and_cost_no_slot(
    client: Client, start_worker: Callable, settings: Settings
):
    # Two slots for interactive jobs, one for bulk: each kind of message, four times, would have them all.
    worker = start_worker(RERANKQ_CONCURRENCY="3")
    with redis.Redis.from_url(settings.broker) as broker:
        for queue in ("rerankq.interactive", "rerankq.bulk"):
            for hostile in HOSTILE:
                broker.lpush(f"rerankq:{queue}", *[hostile] * 4)
        jobs = [
            RerankJob(id=f"{priority}-{at}", query="q", chunks=["a"], fusion="model", priority=priority)
            for priority in ("interactive", "bulk")
            for at in range(8)
        ]
        ended = dict(client.as_completed(client.submit_many(jobs), timeout=60))
        assert all(isinstance(answer, Ranking) for answer in ended.values())
        assert worker.process.poll() is None
        assert broker.hlen("rerankq:unacked") == 0, "what was dropped does not come again"
    said = worker.log.read_text()
    assert said.count("dropped a message that is no doorbell") > 4 * len(NO_ENVELOPE + BODIES)
    assert TEXT not in said
    assert "SecurityWarning" not in said
