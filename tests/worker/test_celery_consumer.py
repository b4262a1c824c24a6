"""What is overridden of Celery's consumer and of kombu's channels: what it decides, without a broker."""

import itertools
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import WorkerShutdown
from one_worker import QUEUES, request

from rerankq.broker import make_app
from rerankq.settings import Settings
from rerankq_worker import celery_consumer
from rerankq_worker.celery_consumer import BulkConsumer, SafeConsumer, give_slots_back, worker_queue
from rerankq_worker.worker import WorkerProcess


def receive(worker: Any, *requests: SimpleNamespace, consumer: Any = None) -> None:
    """Do as the program does when Celery says that a message was received."""
    for one in requests:
        worker.take_slot(one.id, one.delivery_info["routing_key"])
        if consumer is not None:
            consumer.update_bulk()


def consumer_of(worker: Any, **parts: Any) -> Any:
    """A consumer that Celery did not start."""
    made = object.__new__(SafeConsumer)
    made.app = SimpleNamespace(process=WorkerProcess(worker), **parts.pop("app", {}))
    for name, part in parts.items():
        setattr(made, name, part)
    return made


class Pool:
    """A pool of threads that end when a test says so."""

    def __init__(self) -> None:
        self.futures: dict[str, Future] = {}

    def on_apply(self, target: Any, args: tuple[str, str], **_: Any) -> SimpleNamespace:
        self.futures[args[1]] = Future()
        return SimpleNamespace(f=self.futures[args[1]])

    def start(self, *names: str) -> None:
        for name in names:
            self.on_apply(None, ("rerankq.rerank", name), callback=None)


def test_slots_are_taken_by_messages_and_given_back_by_the_end_of_their_threads(worker: Any):
    pool = Pool()
    give_slots_back(pool, WorkerProcess(worker))
    receive(worker, request("a"), request("b", QUEUES[1]), request("c", QUEUES[1]))
    pool.start("a", "b", "c")
    assert worker.slots.taken == 3
    assert not worker.slots.available(bulk=True)
    assert worker.slots.available(bulk=False)
    pool.futures["b"].set_result(None)
    assert worker.slots.available(bulk=True)
    pool.futures["c"].set_exception(ValueError("a body that is no JSON"))
    pool.futures["a"].cancel()
    assert worker.slots.taken == 0


def test_a_thread_that_ends_before_there_is_a_worker_gives_no_slot_back():
    pool = Pool()
    give_slots_back(pool, WorkerProcess())
    pool.start("a")
    pool.futures["a"].set_result(None)


def test_events_are_sent_together_and_a_timer_that_was_lost_is_made_again(monkeypatch):
    asked: list[Any] = []
    hub = SimpleNamespace(call_soon=lambda ask: ask(), call_later=lambda delay, _: asked.append(delay))
    consumer = consumer_of(None, hub=hub)
    now = 100.0
    with monkeypatch.context() as patched:
        patched.setattr(celery_consumer.time, "monotonic", lambda: now)
        for _ in range(10):
            consumer.on_send_event_buffered()
        assert asked == [celery_consumer.EVENTS_EVERY_S]
        now += celery_consumer.EVENTS_EVERY_S  # the timer never fired: its connection was lost
        consumer.on_send_event_buffered()
    assert len(asked) == 2


@pytest.mark.parametrize(("broker", "no_ack"), [("redis://x/0", True), ("unix:///x", True), ("amqp://x", False)])
def test_doorbells_are_acknowledged_only_where_a_broker_would_else_send_them_all(broker: str, no_ack: bool):
    assert worker_queue("rerankq.bulk", broker).no_ack is no_ack


def test_a_slot_that_becomes_free_wakes_the_consumer(worker: Any):
    woken: list[Any] = []
    channel = SimpleNamespace(basic_qos=lambda *_: None)
    consumer = consumer_of(
        worker, pool=Pool(), call_soon=woken.append, task_consumer=SimpleNamespace(queues=[], channel=channel)
    )
    BulkConsumer(consumer).start(consumer)
    receive(worker, request("a", QUEUES[1]), request("b", QUEUES[1]), request("c"))
    worker.give_slot_back("c")
    assert woken == [], "a slot was available before"
    worker.give_slot_back("a")
    assert woken == [consumer.update_bulk]
    woken[0]()


class PushingConsumer:
    """A consumer of RabbitMQ: while the broker confirms that it is withdrawn, or is not, messages arrive."""

    channel = object()  # without the quality of service of Redis's

    def __init__(self) -> None:
        self.consumes, self.busy, self.arriving = True, False, []

    def consuming_from(self, _: str) -> bool:
        return self.consumes

    def change(self, consumes: bool) -> None:
        assert not self.busy, "kombu's own tables would change under it"
        self.busy = True
        while self.arriving:
            self.arriving.pop()()
        self.consumes, self.busy = consumes, False

    def consume(self) -> None:
        self.change(True)

    def cancel(self) -> None:
        self.change(False)


def test_messages_that_arrive_while_the_bulk_consumer_is_withdrawn_do_not_disturb_that(worker: Any):
    bulk = PushingConsumer()
    consumer = consumer_of(worker, bulk_consumer=bulk)
    worker.on_free_slot = consumer.update_bulk
    bulk.arriving = [
        lambda: receive(worker, request("c", QUEUES[1]), consumer=consumer),
        lambda: receive(worker, request("d"), consumer=consumer),
    ]
    receive(worker, request("a", QUEUES[1]), request("b", QUEUES[1]), consumer=consumer)
    assert not bulk.consumes
    # And while it is resumed, one ends and one arrives.
    bulk.arriving = [
        lambda: worker.give_slot_back("a"),
        lambda: receive(worker, request("e", QUEUES[1]), consumer=consumer),
    ]
    worker.give_slot_back("b")
    worker.give_slot_back("c")
    assert bulk.consumes == worker.slots.available(bulk=True)
    for name in "de":
        worker.give_slot_back(name)
    assert bulk.consumes


def test_a_lost_connection_to_rabbitmq_drops_that_of_events_instead_of_closing_it_politely():
    ended: list[str] = []
    events = SimpleNamespace(
        transport=SimpleNamespace(driver_type="amqp"),
        collect=lambda: ended.append("collected"),
        connection_errors=(OSError,),
        channel_errors=(),
    )
    # Of late acknowledgements, of which there are none; Celery warns where it is not set.
    conf = {"worker_cancel_long_running_tasks_on_connection_loss": True}
    app = {"conf": SimpleNamespace(**conf, worker_enable_prefetch_count_reduction=False)}
    consumer = consumer_of(None, app=app, connection=None, event_dispatcher=SimpleNamespace(connection=events))
    consumer.on_connection_error_after_connected(OSError("too many heartbeats missed"))
    assert ended == ["collected"]


def test_sigquit_stops_the_worker_in_a_hurry_and_withdraws_the_bulk_consumer(worker: Any, monkeypatch):
    stopped, bulk = [], PushingConsumer()
    monkeypatch.setattr(worker, "begin_to_stop", lambda *, hurry: stopped.append(hurry))
    consumer = consumer_of(worker, bulk_consumer=bulk, connection=None, connection_errors=(), channel_errors=())
    with pytest.raises(WorkerShutdown) as raised:
        consumer.cancel_active_requests()
    assert (stopped, bulk.consumes, raised.value.code) == ([True], False, 1)


def test_a_broker_that_is_away_is_tried_every_few_seconds_however_long(monkeypatch: pytest.MonkeyPatch):
    slept, tried_after = [0.0], []
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda seconds: slept.append(slept[-1] + seconds))
    app = make_app(Settings(broker_url="redis://127.0.0.1:1/0"))
    connection = app.connection_for_read()

    def away() -> None:
        tried_after.append(slept[-1])
        if len(tried_after) < 30:
            raise ConnectionRefusedError

    monkeypatch.setattr(connection, "_connection_factory", away)
    consumer = object.__new__(SafeConsumer)
    consumer.app, consumer.first_connection_attempt, consumer.broker_connection_retry_attempt = app, False, 0
    assert consumer.ensure_connected(connection) is connection
    pauses = [after - before for before, after in itertools.pairwise(tried_after)]
    assert len(pauses) == 29
    assert 0 < min(pauses) <= max(pauses) <= 3
