"""Celery, as a messenger: doorbells that name jobs. A message may be lost or doubled; the ledger is the truth."""

from __future__ import annotations

import atexit
import logging
import os
import ssl
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from queue import Empty
from typing import Any

from celery import Celery
from celery.loaders.app import AppLoader
from kombu import Connection, Exchange, Queue

from . import urls
from .connections import BROKER_ANSWER_S, BROKER_HEALTH_S, CONNECT_S
from .errors import BrokerUnavailable
from .ledger.calls import Bell, Counted
from .outage import Outage
from .settings import Settings
from .urls import Address

logger = logging.getLogger("rerankq")

TASK = "rerankq.rerank"
INTERACTIVE = "rerankq.interactive"
BULK = "rerankq.bulk"
# The priority of bells that overtake the others, and of those. kombu keeps a list in Redis for each; a worker looks
# into the first one first. Brokers of other kinds take all as they come.
AHEAD, IN_LINE = 5, 0
# What a broker replies of a queue that it does not hold.
NOT_FOUND = "404"
# Seconds between RabbitMQ's signs of life; a worker that hears none twice connects anew. Otherwise it would be deaf for
# minutes where the network loses its connection and closes nothing.
AMQP_HEARTBEAT_S = 10


def queue(name: str, *, no_ack: bool = False) -> Queue:
    """Make a queue of ours, routed by its name; *no_ack* for whoever listens to it without acknowledging."""
    return Queue(name, exchange=Exchange("rerankq", type="direct"), routing_key=name, no_ack=no_ack)


class NothingRead(AppLoader):  # type: ignore[misc]  # Celery ships no types
    """Reads no configuration: not the module that ``CELERY_CONFIG_MODULE`` names either."""

    def read_configuration(self, env: str = "") -> dict[str, Any]:  # noqa: ARG002  # Celery's name
        """Answer that there is none."""
        return {}


class App(Celery):  # type: ignore[misc]  # Celery ships no types
    """A Celery app that our settings alone steer.

    Celery prefers what the environment says (``CELERY_BROKER_URL`` and its kin) to what an app was given. Whoever
    imports us may have set those for an app of its own.
    """

    # Django's would close that program's connections to its database after our tasks.
    builtin_fixups: frozenset[str] = frozenset()

    def __init__(self, url: str) -> None:
        self.address = urls.read(url)
        self._to = _kombu_connection(url, self.address)
        # The URL in the configuration is one to be shown: `celery inspect conf` does.
        super().__init__("rerankq", broker=_shown(url, self.address), set_as_current=False, loader=NothingRead)

    def connection_for_read(self, url: str | None = None, **options: Any) -> Connection:
        """Make a connection to our broker, unless a URL says otherwise."""
        return self._connection(url, **options) if url else self._connection(**{**self._to, **options})

    def connection_for_write(self, url: str | None = None, **options: Any) -> Connection:
        """Make a connection to our broker, unless a URL says otherwise."""
        return self.connection_for_read(url, **options)

    def connection(self, hostname: str | None = None, **options: Any) -> Connection:
        """Make a connection to our broker, unless a URL says otherwise."""
        given = {name: value for name, value in options.items() if value is not None}
        return self.connection_for_read(hostname, **given)

    def _get_backend(self) -> Any:
        # Here, not at the top: producers never ask, and it takes a while to import.
        from celery.backends.base import DisabledBackend  # noqa: PLC0415

        return DisabledBackend(app=self)


def _kombu_connection(url: str, address: Address) -> dict[str, Any]:
    """Say which transport leads to an address, and what kombu is told of it."""
    if address.scheme in urls.AMQP:
        vhost = urls.quoted(address.vhost)
        return {"url": f"{address.scheme}://{urls.encoded(address)}/{vhost}"}
    # Here, not at the top: who only imports this package may never connect.
    from .broker_transport import transport_to  # noqa: PLC0415

    return {"url": urls.masked(url), "transport": transport_to(url)}


def _shown(url: str, address: Address) -> str:
    """Write a broker's URL without its password, in a form that kombu can read."""
    if address.scheme == "unix":
        return f"redis+socket://{address.path}?virtual_host={address.database}"
    if address.scheme in urls.SENTINEL:
        return f"sentinel://{urls.encoded(address, password=False)}/{address.database}"
    return urls.masked(url)


def make_app(settings: Settings) -> Celery:
    """Build the Celery app as producers and Flower need it: no torch, no result backend."""
    app = App(settings.broker)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        broker_transport_options=_transport_options(app.address),
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_default_queue=INTERACTIVE,
        task_default_exchange="rerankq",
        task_default_routing_key=INTERACTIVE,
        # kombu's fair default would let a bulk backlog delay interactive bells.
        task_queues=[queue(INTERACTIVE), queue(BULK)],
        worker_send_task_events=True,
        event_queue_prefix="rerankq.events",
        control_exchange="rerankq.control",
        event_exchange="rerankq.events",
        **_amqp_conf(app.address),
    )
    if app.address.scheme in urls.TLS:
        app.conf.broker_use_ssl = _tls(app.address)
    return app


def _tls(address: Address) -> dict[str, Any]:
    """Write how TLS is spoken: for RabbitMQ's library, or for Flower's own connections to Redis."""
    given = {name: value for name, value in address.options.items() if name.startswith("ssl_")}
    if address.scheme != "amqps":
        return {"ssl_cert_reqs": "required", **given}
    required = ssl.VerifyMode[f"CERT_{given.pop('ssl_cert_reqs', 'required').upper()}"]
    # py-amqp verifies a server's name where it is told one, and not otherwise.
    named = given.pop("ssl_check_hostname", True) and required != ssl.CERT_NONE
    options = {name.removeprefix("ssl_"): value for name, value in given.items()}
    return {"cert_reqs": required, **({"server_hostname": address.hosts[0][0]} if named else {}), **options}


def _amqp_conf(address: Address) -> dict[str, Any]:
    if address.scheme not in urls.AMQP:
        return {}
    settings = {
        "connect_timeout": "broker_connection_timeout",
        "heartbeat": "broker_heartbeat",
        "login_method": "broker_login_method",
    }
    given = {settings[name]: value for name, value in address.options.items() if name in settings}
    return {"broker_heartbeat": AMQP_HEARTBEAT_S, **given}


def _transport_options(address: Address) -> dict[str, Any]:
    if address.scheme in urls.AMQP:
        return {}
    # The connections take their options from the URL; kombu reads these for its timers, and Flower reads some.
    return {
        **({"master_name": address.master} if address.master else {}),
        "global_keyprefix": "rerankq:",
        "queue_order_strategy": "priority",
        "priority_steps": [IN_LINE, AHEAD],
        "socket_timeout": address.options.get("socket_timeout", BROKER_ANSWER_S),
        "socket_connect_timeout": address.options.get("socket_connect_timeout", CONNECT_S),
        "health_check_interval": address.options.get("health_check_interval") or BROKER_HEALTH_S,
    }


def forget_celerys_environment() -> None:
    """Drop what Celery's command line would take for its options; for programs, whose environment is theirs alone.

    Every option of every command has a variable: ``CELERY_WORKER_POOL`` would run prefork, whatever the app says.
    """
    for name in [name for name in os.environ if name.startswith("CELERY_")]:
        del os.environ[name]


def __getattr__(name: str) -> Any:
    # For `celery -A rerankq.broker flower`: built when asked for, so that importing this module needs no settings.
    if name == "app":
        forget_celerys_environment()
        return make_app(Settings())
    raise AttributeError(name)


def round_trip(settings: Settings, timeout_s: float) -> None:
    """Send a message to a queue of one's own, over kombu's connections, take it back, and remove the queue.

    Raises:
        BrokerUnavailable, or whatever the broker's library raises: if it does not come back.
    """
    # A name that the rights of producers in conf/redis-acl.conf cover.
    name, word = f"{BULK}.doctor-{uuid.uuid4().hex}", uuid.uuid4().hex
    # RabbitMQ has an exchange without a name that leads to every queue.
    exchange = Exchange("" if urls.parts_of(settings.broker).scheme in urls.AMQP else "rerankq")
    own = Queue(name, exchange, routing_key=name, durable=False, auto_delete=True, no_ack=True)
    with closing(make_app(settings)) as app, app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)
        queue = connection.SimpleQueue(own)
        try:
            queue.put(word)
            if queue.get(timeout=timeout_s).payload != word:
                raise BrokerUnavailable("another message came back than was sent")
        except Empty:
            raise BrokerUnavailable(f"the message did not come back within {timeout_s:g} s") from None
        finally:
            # The consumer first: RabbitMQ tells one whose queue is deleted, and kombu raises that.
            queue.close()
            queue.queue.delete()


def _connection_with_limits(app: Celery) -> Connection:
    connection = app.connection_for_write()
    if connection.transport.driver_type == "amqp":
        # py-amqp waits for an answer without end; Redis's own limits come with its connections.
        limits = {"read_timeout": BROKER_ANSWER_S, "write_timeout": BROKER_ANSWER_S}
        connection.transport_options = {**connection.transport_options, **limits}
    return connection


class Bells:
    """Ring doorbells from a thread of its own: no caller waits for the broker, and bells travel in batches.

    A bell that cannot be rung is only late: the job is in the ledger, and a worker's sweeper rings for it.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._begin()
        _ALL.add(self)

    def _begin(self) -> None:
        self._bells: deque[Bell] = deque()
        self._publishing = threading.Lock()
        self._wanted = threading.Condition()
        self._ringing = 0
        self._closed = False
        self._outage = Outage()
        self._thread: threading.Thread | None = None

    def ring(self, bells: Iterable[Bell]) -> None:
        """Ring soon; after :meth:`close` too, by a new thread."""
        with self._wanted:
            self._bells.extend(bells)
            if self._bells and (self._thread is None or not self._thread.is_alive()):
                self._closed = False
                # A script that submits and ends must still ring.
                atexit.register(self.close)
                self._thread = threading.Thread(target=self._run, name="rerankq-bells", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # the interpreter ends, or the system has no more threads
                    logger.warning("%d bells not rung, the sweeper will: %s", len(self._bells), error)
                    self._bells.clear()
                    self._thread = None
            self._wanted.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all bells are out; answers whether they are."""
        with self._wanted:
            return self._wanted.wait_for(lambda: not self._bells and not self._ringing, timeout_s)

    def close(self, timeout_s: float = 5) -> None:
        """Ring what is left, for at most *timeout_s*, and stop."""
        atexit.unregister(self.close)
        thread = self._thread
        if thread is not None:
            self.flush(timeout_s)
            with self._wanted:
                self._closed, self._thread = True, None
                self._wanted.notify_all()
            thread.join(timeout_s)
        self._app.close()

    def _run(self) -> None:
        with self._publishing:
            connection = _connection_with_limits(self._app)
        while batch := self._next():
            for pause_s in (0.2, 1, 3, 10, None):
                try:
                    with self._publishing:
                        self._publish(batch, connection)
                    if (lasted_s := self._outage.works(time.monotonic())) is not None:
                        logger.warning("the broker takes bells again, after %.0f s", lasted_s)
                    break
                except Exception as error:  # noqa: BLE001  # whatever the broker's library raises, the job is safe
                    connection.release()
                    connection = _connection_with_limits(self._app)
                    if pause_s is None or self._closing(pause_s):
                        if self._outage.fails(time.monotonic()):
                            logger.warning("%d bells not rung, the sweeper will: %s", len(batch), error)
                        break
            with self._wanted:
                self._ringing = 0
                self._wanted.notify_all()
        connection.release()

    def _closing(self, pause_s: float) -> bool:
        with self._wanted:
            return self._wanted.wait_for(lambda: self._closed, pause_s)

    def _next(self) -> list[Bell]:
        with self._wanted:
            self._wanted.wait_for(lambda: self._bells or self._closed)
            batch = [self._bells.popleft() for _ in range(min(len(self._bells), 200))]
            self._ringing = len(batch)
            return batch

    def _publish(self, batch: list[Bell], connection: Connection) -> None:
        # A doubled bell does no harm, so a batch that failed midway is simply rung again.
        with connection.Producer(auto_declare=False) as producer, producer.batch():
            for bell in batch:
                self._app.send_task(
                    TASK,
                    args=(bell.id,),
                    task_id=bell.id,
                    queue=queue(bell.queue),
                    producer=producer,
                    ignore_result=True,
                    argsrepr=bell.label or bell.id,
                    priority=AHEAD if bell.ahead else IN_LINE,
                    kwargsrepr="{}",
                    retry=False,
                )
            if connection.transport.driver_type == "amqp":
                # Answered once all before it has arrived: what a network swallows looks as if it were sent.
                producer.channel.basic_qos(0, 0, False)


class MessageCounts:
    """Count the messages that the broker holds, in a thread of its own: a broker that hangs holds up nobody else."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection: Connection | None = None
        self._counting: threading.Thread | None = None
        self._found = Counted()

    def ask(self, queues: Sequence[str], at: float) -> None:
        """Begin to count, unless a count is under way; *at* is the ledger's time."""
        if self._counting is None or not self._counting.is_alive():
            self._counting = threading.Thread(
                target=self._count, args=(queues, at), name="rerankq-message-counts", daemon=True
            )
            self._counting.start()

    def take(self) -> Counted:
        """Take what was counted since this was asked last; no messages of no queue where nothing was."""
        found, self._found = self._found, Counted()
        return found

    def _count(self, queues: Sequence[str], at: float) -> None:
        try:
            self._found = Counted(at, {name: self._messages(name) for name in queues})
        except Exception as error:  # noqa: BLE001  # whatever the broker's library raises, they are counted another time
            logger.info("messages not counted: %s", error)
            self._hang_up()

    def _messages(self, name: str) -> int:
        if self._connection is None:
            self._connection = _connection_with_limits(self._app)
            self._connection.ensure_connection(max_retries=1)
        try:
            # kombu looks for a queue in Redis under a name without our prefix; there, declaring one changes nothing.
            passive = self._connection.transport.driver_type != "redis"
            return int(self._connection.default_channel.queue_declare(name, passive=passive).message_count)
        except self._connection.channel_errors as error:
            if str(getattr(error, "reply_code", "")) != NOT_FOUND:
                raise
            # RabbitMQ closes a channel on which a queue is asked for that is not there.
            self._hang_up()
            return 0

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.release()


# Seconds that a fork waits for a batch of bells that is on its way.
FORK_WAITS_S = 1.0

_ALL: weakref.WeakSet[Bells] = weakref.WeakSet()
_held: list[threading.Lock] = []


def _before_fork() -> None:
    """Let no ringing be under way: a child would inherit the locks of the moment, the import system's among them."""
    _held.extend(bells._publishing for bells in list(_ALL) if bells._publishing.acquire(timeout=FORK_WAITS_S))


def _after_fork() -> None:
    while _held:
        _held.pop().release()


def _after_fork_in_child() -> None:
    """Begin anew: the thread stayed with the parent, which rings the bells that came along."""
    _held.clear()
    for bells in list(_ALL):
        bells._begin()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
