"""`celery -A rerankq_worker.tasks worker`, typed by hand: what it takes from the settings, and how it refuses."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from forked_processes import run_program

from rerankq import Client, ModelUnknown, Ranking
from rerankq.broker.celery_app import INTERACTIVE, TASK, make_app, queue
from rerankq.client.routing import suffix_of
from rerankq.settings import Settings


@pytest.fixture
def celery(settings: Settings) -> Iterator[Any]:
    app = make_app(settings)
    yield app
    app.close()


def asked(celery: Any, what: str, workers: int = 1) -> list[Any]:
    """What so many workers answer; they receive no control command before they are connected to the broker."""
    for _ in range(60):
        answers = getattr(celery.control.inspect(timeout=1, limit=workers), what)() or {}
        if len(answers) == workers:
            return list(answers.values())
    pytest.fail("not all workers answered")


def test_pool_slots_and_queues_come_from_the_settings(start_worker: Callable, celery: Any):
    start_worker(RERANKQ_CONCURRENCY="5")
    (stats,) = asked(celery, "stats")
    assert "thread" in stats["pool"]["implementation"]
    assert stats["pool"]["max-concurrency"] == 5
    assert (stats["engine"]["model"], stats["engine"]["device"]) == ("stub", "none")
    (queues,) = asked(celery, "active_queues")
    assert {one["name"] for one in queues} == {"rerankq.interactive", "rerankq.bulk"}


def refusal(tmp_path: Path, **env: str) -> tuple[int, str]:
    command = ["-m", "celery", "-A", "rerankq_worker.tasks", "worker", "-l", "WARNING"]
    here = {"PATH": "/usr/bin:/bin", "C_FORCE_ROOT": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    done = run_program(command, here, tmp_path)
    return done.returncode, done.stdout + done.stderr


def test_a_model_that_cannot_be_loaded_ends_the_worker_with_one_line(redis_url: str, tmp_path: Path):
    status, said = refusal(tmp_path, RERANKQ_BROKER_URL=redis_url, RERANKQ_MODEL=str(tmp_path / "no-such-model"))
    assert status == 1
    assert "the worker cannot start" in said
    assert "no-such-model" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, "RERANKQ_BROKER_URL is not set"),
        ({"RERANKQ_BROKER_URL": "amqp://nowhere"}, "RERANKQ_LEDGER_URL: is not set"),
        ({"RERANKQ_BROKER_URL": "redis://127.0.0.1:1/0", "RERANKQ_MODEL": "stub"}, "does not answer"),
        ({"RERANKQ_BROKER_URL": "redis://x", "RERANKQ_CONCURRENCY": "1", "RERANKQ_LEASE_S": "0"}, "RERANKQ_LEASE_S: "),
    ],
)
def test_invalid_settings_end_the_worker_without_a_traceback(tmp_path: Path, env: dict[str, str], words: str):
    status, said = refusal(tmp_path, **env)
    assert status == 1
    assert words in said
    assert "Traceback" not in said


def test_a_second_model_is_served_beside_the_first(redis_url: str, start_worker: Callable, celery: Any):
    first = start_worker(RERANKQ_MODEL="stub")
    start_worker(RERANKQ_MODEL="stub:1e-6", RERANKQ_DEFAULT_MODEL="stub")
    queues = {one["name"] for answer in asked(celery, "active_queues", workers=2) for one in answer}
    suffixed = {name + suffix_of("stub:1e-6", "stub") for name in ("rerankq.interactive", "rerankq.bulk")}
    assert queues == {"rerankq.interactive", "rerankq.bulk"} | suffixed
    with Client(Settings(broker_url=redis_url, default_model="stub")) as client:
        for model, name in [(None, "stub"), ("stub", "stub"), ("stub:1e-6", "stub:1e-6")]:
            for priority in ("interactive", "bulk"):
                ranking = client.rerank("q", ["x", "y"], timeout=30, model=model, priority=priority)
                assert ranking.model.name == name
        with pytest.raises(ModelUnknown, match="stub:2"):
            client.submit({"query": "q", "chunks": ["x"], "model": "stub:2"})
        first.stop()
        assert client.rerank("q2", ["x"], timeout=30, model="stub:1e-6").model.name == "stub:1e-6"


def test_a_listed_model_is_accepted_while_no_worker_for_it_is_alive(redis_url: str, start_worker: Callable):
    with Client(Settings(broker_url=redis_url, default_model="stub", models=["stub:1e-6"])) as client:
        ids = [client.submit({"query": f"{name}", "chunks": ["x"], "model": name}) for name in ("stub:1e-6", None)]
        with pytest.raises(ModelUnknown):
            client.submit({"query": "q", "chunks": ["x"], "model": "stub:2"})
        assert [client.status(one).state for one in ids] == ["queued", "queued"]
        start_worker(RERANKQ_MODEL="stub:1e-6", RERANKQ_DEFAULT_MODEL="stub")
        assert client.result(ids[0], timeout=30).model.name == "stub:1e-6"
        assert client.status(ids[1]).state == "queued", "no worker serves the default"


def test_malformed_messages_are_dropped_and_use_no_slot(client: Client, start_worker: Callable, celery: Any):
    worker = start_worker(RERANKQ_CONCURRENCY="3")
    for _ in range(8):
        for task, args, kwargs in [
            (TASK, ("never submitted",), {}),
            (TASK, (), {}),
            (TASK, (1, 2, 3), {"colour": "red"}),
            (TASK, ({"a": []},), {}),
            ("no.such.task", (), {}),
        ]:
            celery.send_task(task, args=args, kwargs=kwargs, queue=queue(INTERACTIVE))
    known = {"task": TASK, "id": "x", "lang": "py"}
    with celery.connection_for_write() as connection, connection.Producer() as producer:
        for headers, body in [(None, "no task"), (None, "{"), (None, "[]"), (known, "no task"), (known, "{")] * 4:
            address = {"exchange": "rerankq", "routing_key": INTERACTIVE}
            producer.publish(body, content_type="application/json", headers=headers, **address)
    ids = [client.submit({"query": f"q {number}", "chunks": ["x"]}) for number in range(20)]
    assert all(isinstance(one, Ranking) for _, one in client.as_completed(ids, timeout=40))
    assert worker.process.poll() is None


def test_every_job_shows_in_the_events_and_no_doorbell_is_recorded_on_redis(
    client: Client, start_worker: Callable, celery: Any, redis_url: str
):
    start_worker()
    kinds = ("task-received", "task-started", "task-succeeded")
    seen: Counter[tuple[str, str]] = Counter()
    ids = [f"job-{number}" for number in range(60)]
    everything = {(kind, one) for kind in kinds for one in ids}

    ends = time.monotonic() + 30

    def see(event: dict[str, Any]) -> None:
        # Heartbeats come as well, so this is asked every other second at least.
        if event["type"] in kinds:
            seen[event["type"], event["uuid"]] += 1
        receiver.should_stop = seen.keys() >= everything or time.monotonic() > ends

    with celery.connection_for_read() as connection, redis.Redis.from_url(redis_url) as broker:
        receiver = celery.events.Receiver(connection, handlers={"*": see})
        broker.config_set("slowlog-max-len", 100_000)
        broker.config_set("slowlog-log-slower-than", 0)
        try:
            with receiver.consumer_context():
                client.submit_many([{"id": one, "query": "q", "chunks": ["x"]} for one in ids])
                receiver.capture(limit=None, timeout=30)
        finally:
            broker.config_set("slowlog-log-slower-than", -1)
        commands = [entry["command"] for entry in broker.slowlog_get(-1)]
    assert seen == Counter(everything), "each of them once"
    assert any(b"rerankq.bulk" in one or b"rerankq.interactive" in one for one in commands), "this does see commands"
    written = [one for one in commands if b"unacked" in one and one.split()[0] in {b"ZADD", b"HSET", b"ZREM", b"HDEL"}]
    assert written == []
