"""Doorbells are sent from a thread of their own, in batches; at worst they are late, and they block nobody."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import redis

from rerankq import broker
from rerankq.broker.celery_app import BULK, INTERACTIVE, TASK, make_app
from rerankq.broker.doorbells import DoorbellSender, MessageCounts
from rerankq.ledger import Counted, Doorbell
from rerankq.settings import Settings


def doorbells_for(count: int, queue: str = BULK) -> list[Doorbell]:
    return [Doorbell(f"job-{number}", queue, f'"question {number}" 2 chunks, m') for number in range(count)]


@pytest.fixture
def doorbells(settings: Settings) -> Iterator[DoorbellSender]:
    doorbells = DoorbellSender(make_app(settings))
    yield doorbells
    doorbells.close(timeout_s=1)


@pytest.fixture
def messages(redis_url: str) -> Iterator[Callable[[str], list[dict]]]:
    with redis.Redis.from_url(redis_url) as connection:
        yield lambda queue: [json.loads(raw) for raw in reversed(connection.lrange(f"rerankq:{queue}", 0, -1))]


def test_doorbells_arrive_in_order_as_messages_that_name_jobs(doorbells: DoorbellSender, messages: Callable):
    doorbells.send(doorbells_for(1_000))
    assert doorbells.flush(30)
    heard = messages(BULK)
    assert [message["headers"]["id"] for message in heard] == [doorbell.id for doorbell in doorbells_for(1_000)]
    headers = heard[7]["headers"]
    assert (headers["task"], headers["argsrepr"], headers["kwargsrepr"]) == (TASK, '"question 7" 2 chunks, m', "{}")
    assert headers["ignore_result"]


def test_each_queue_gets_its_own_doorbells(doorbells: DoorbellSender, messages: Callable):
    other = "rerankq.interactive.other-model"
    doorbells.send([*doorbells_for(2), *doorbells_for(3, INTERACTIVE), *doorbells_for(1, other)])
    assert doorbells.flush(30)
    assert [len(messages(queue)) for queue in (BULK, INTERACTIVE, other)] == [2, 3, 1]


def test_every_key_in_the_broker_begins_with_our_name(doorbells: DoorbellSender, redis_url: str):
    doorbells.send(doorbells_for(3))
    assert doorbells.flush(30)
    with redis.Redis.from_url(redis_url) as connection:
        assert all(key.startswith(b"rerankq") for key in connection.keys("*"))


def test_doorbells_sent_during_an_outage_arrive_after_it(
    doorbells: DoorbellSender, messages: Callable, monkeypatch: pytest.MonkeyPatch
):
    publish, failures = doorbells._publish, [OSError("away"), ConnectionResetError("away again")]

    def fails_first(*args: object) -> None:
        if failures:
            raise failures.pop()
        publish(*args)

    monkeypatch.setattr(doorbells, "_publish", fails_first)
    doorbells.send(doorbells_for(5))
    assert doorbells.flush(30)
    assert len(messages(BULK)) == 5
    assert not failures


def test_doorbells_that_cannot_be_sent_are_logged_once_and_given_up(caplog: pytest.LogCaptureFixture):
    doorbells = DoorbellSender(make_app(Settings(broker_url="redis://127.0.0.1:1/0")))
    doorbells.send(doorbells_for(5))
    assert not doorbells.flush(0.05), "sending does not wait for the broker"
    with doorbells._wanted:
        doorbells._wanted.wait_for(lambda: doorbells._sending, 10)
        # As closing does, but with the thread still ours to look at.
        thread, doorbells._closed = doorbells._thread, True
        doorbells._wanted.notify_all()
    thread.join(20)
    assert not thread.is_alive()
    assert caplog.text.count("5 doorbells not sent, a sweeper will") == 1
    doorbells.close()


def test_a_long_outage_of_the_broker_is_logged_once_and_so_is_its_end(
    doorbells: DoorbellSender, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def away(*_: object) -> None:
        raise OSError("away")

    with monkeypatch.context() as patched:
        patched.setattr(doorbells, "_publish", away)
        patched.setattr(doorbells, "_closing", lambda pause_s: True)  # no second try
        doorbells.send(doorbells_for(1_000))
        assert doorbells.flush(30)
    doorbells.send(doorbells_for(1))
    assert doorbells.flush(30)
    said = [record.getMessage() for record in caplog.records]
    assert [words.split(",")[0] for words in said] == ["200 doorbells not sent", "the broker takes doorbells again"]


def test_a_submission_does_not_fail_where_no_thread_can_be_started(
    doorbells: DoorbellSender, monkeypatch: pytest.MonkeyPatch
):
    """As at the end of the interpreter."""

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        doorbells.send(doorbells_for(3))
    assert doorbells.flush(1)
    doorbells.send(doorbells_for(1))
    assert doorbells.flush(30)


def test_a_sender_may_be_closed_twice_and_sends_after_closing(doorbells: DoorbellSender, messages: Callable):
    doorbells.send([])
    doorbells.close()
    doorbells.close()
    assert doorbells._thread is None
    doorbells.send(doorbells_for(1))
    doorbells.close()
    assert len(messages(BULK)) == 1


def test_a_thread_that_died_is_replaced(doorbells: DoorbellSender, messages: Callable):
    doorbells._thread = threading.Thread(target=str)
    doorbells._thread.start()
    doorbells._thread.join()
    doorbells.send(doorbells_for(2))
    assert doorbells.flush(30)
    assert len(messages(BULK)) == 2


def test_many_threads_send_doorbells_at_once(doorbells: DoorbellSender, messages: Callable):
    senders = [threading.Thread(target=doorbells.send, args=([doorbell],)) for doorbell in doorbells_for(64)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert doorbells.flush(30)
    assert {message["headers"]["id"] for message in messages(BULK)} == {doorbell.id for doorbell in doorbells_for(64)}


@pytest.fixture
def counts(settings: Settings) -> Iterator[MessageCounts]:
    counts = MessageCounts(make_app(settings))
    yield counts
    counts._close()


def counted(counts: MessageCounts, *queues: str) -> Counted:
    counts.ask(queues, at=7.0)
    counts._counting.join(30)
    return counts.take()


def test_messages_are_counted_by_queue_whether_they_overtake_or_not(doorbells: DoorbellSender, counts: MessageCounts):
    assert counted(counts, BULK, INTERACTIVE) == Counted(7.0, {BULK: 0, INTERACTIVE: 0}), "none has been declared yet"
    doorbells.send([*doorbells_for(5), *doorbells_for(2, INTERACTIVE), Doorbell("lost", BULK, "label", ahead=True)])
    assert doorbells.flush(30)
    assert counted(counts, BULK, INTERACTIVE) == Counted(7.0, {BULK: 6, INTERACTIVE: 2})
    assert counts.take().messages == {}, "what was counted is taken once"


def test_a_broker_that_does_not_answer_counts_as_unknown_and_blocks_nobody(redis_url: str):
    away = MessageCounts(make_app(Settings(broker_url="redis://127.0.0.1:1/0", ledger_url=redis_url)))
    assert counted(away, BULK) == Counted()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hangs = MessageCounts(make_app(Settings(broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0")))
        hangs.ask([BULK], at=1.0)
        first = hangs._counting
        hangs.ask([BULK], at=2.0)
        assert hangs._counting is first, "one at a time"
        assert hangs.take() == Counted()
    first.join(60)
    assert not first.is_alive()


def test_a_key_of_another_type_is_not_counted_as_an_empty_queue(counts: MessageCounts, redis_url: str):
    with redis.Redis.from_url(redis_url) as connection:
        connection.set(f"rerankq:{BULK}", "not a list")
    assert counted(counts, BULK) == Counted()


def test_rabbitmq_gets_no_options_of_redis():
    app = make_app(Settings(broker_url="amqp://guest@host//", ledger_url="redis://host"))
    assert app.conf.broker_transport_options == {}
    redis_options = make_app(Settings(broker_url="redis://host")).conf.broker_transport_options
    assert redis_options["global_keyprefix"] == "rerankq:"


def test_rabbitmqs_heartbeat_is_seconds_unless_the_url_sets_it():
    def heartbeat(url: str) -> object:
        return make_app(Settings(broker_url=url, ledger_url="redis://host")).conf.broker_heartbeat

    assert heartbeat("amqp://guest@host//") == 10
    assert heartbeat("amqp://guest@host//?heartbeat=33") == 33


class AmqpConnection:
    """A connection to RabbitMQ whose network swallows what is sent, or does not."""

    connection_errors = (OSError,)

    def __init__(self, *, swallows: bool) -> None:
        self.transport, self.channel, self.transport_options = SimpleNamespace(driver_type="amqp"), self, {}
        self._swallows = swallows

    def Producer(self, *, auto_declare: bool) -> "nullcontext[AmqpConnection]":  # noqa: N802  # kombu's names
        return nullcontext(self)

    def batch(self) -> "nullcontext[None]":
        return nullcontext()

    def basic_qos(self, *_: object) -> None:
        assert self.transport_options["read_timeout"] > 0, "its answer is not waited for without end"
        if self._swallows:
            raise TimeoutError

    def release(self) -> None:
        pass


def test_doorbells_lost_on_the_way_to_rabbitmq_are_sent_again():
    ways = [AmqpConnection(swallows=False), AmqpConnection(swallows=True)]
    sent: list[tuple[object, str]] = []
    doorbells = DoorbellSender(
        SimpleNamespace(
            connection_for_write=lambda: ways[-1] if len(ways) == 1 else ways.pop(),
            send_task=lambda _, *, task_id, producer, **__: sent.append((producer, task_id)),
            close=lambda: None,
        )
    )
    swallowing = ways[-1]
    doorbells.send(doorbells_for(2))
    assert doorbells.flush(30)
    doorbells.close()
    assert [name for way, name in sent if way is swallowing] == ["job-0", "job-1"]
    assert [name for way, name in sent if way is not swallowing] == ["job-0", "job-1"]


def test_celery_keeps_no_results_and_accepts_only_json(settings: Settings):
    conf = make_app(settings).conf
    assert conf.task_ignore_result
    assert conf.result_backend is None
    assert conf.accept_content == ["json"]


def test_the_app_for_flower_is_built_when_it_is_asked_for(redis_url: str):
    code = "import sys, rerankq.broker as b; assert b.app.main == 'rerankq'; assert 'torch' not in sys.modules"
    environment = {"RERANKQ_BROKER_URL": redis_url, "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = broker.no_such_name


def test_doorbells_that_are_out_for_publishing_are_sent_when_the_interpreter_ends(
    doorbells: DoorbellSender, messages: Callable, monkeypatch: pytest.MonkeyPatch
):
    at_the_end: list[Callable] = []
    monkeypatch.setattr("atexit.register", at_the_end.append)
    doorbells.send(doorbells_for(3))
    (ended,) = at_the_end
    ended()
    assert len(messages(BULK)) == 3
