"""The Celery app, configured by our settings only, and its connections to the broker."""

from __future__ import annotations

import logging
import os
import ssl
import uuid
from contextlib import closing
from queue import Empty
from typing import Any

from celery import Celery
from celery.loaders.app import AppLoader
from kombu import Connection, Exchange, Queue

from .. import urls
from ..connections.opening import BROKER_ANSWER_S, BROKER_HEALTH_S, CONNECT_S
from ..errors import BrokerUnavailable
from ..settings import Settings
from ..urls import Address

logger = logging.getLogger("rerankq")

TASK = "rerankq.rerank"
INTERACTIVE = "rerankq.interactive"
BULK = "rerankq.bulk"
# The priority of doorbells that overtake the others, and of the others. kombu keeps a list in Redis for each, and a
# worker reads the first one first. Brokers of other kinds ignore it.
AHEAD, IN_LINE = 5, 0
# What kombu puts before each of its keys in Redis.
KEY_PREFIX = "rerankq:"
# A broker's reply code for an unknown queue.
NOT_FOUND = "404"
# Seconds between RabbitMQ's heartbeats; a worker that misses two connects again. Otherwise it would receive nothing for
# minutes if the network loses its connection without closing it.
AMQP_HEARTBEAT_S = 10


def queue(name: str, *, no_ack: bool = False) -> Queue:
    """Make a queue of ours, routed by its name; *no_ack* for consumers that do not acknowledge."""
    return Queue(name, exchange=Exchange("rerankq", type="direct"), routing_key=name, no_ack=no_ack)


def queue_key(name: str) -> str:
    """Name the list in Redis that holds a queue's messages."""
    return f"{KEY_PREFIX}{name}"


class NoConfiguration(AppLoader):  # type: ignore[misc]  # Celery ships no types
    """Reads no configuration: not the module that ``CELERY_CONFIG_MODULE`` names either."""

    def read_configuration(self, env: str = "") -> dict[str, Any]:  # noqa: ARG002  # Celery's name
        """Answer that there is none."""
        return {}


class App(Celery):  # type: ignore[misc]  # Celery ships no types
    """A Celery app that is configured by our settings only.

    Celery prefers environment variables (``CELERY_BROKER_URL`` and the like) to an app's own configuration. A program
    that imports us may have set those for an app of its own.
    """

    # Django's would close that program's connections to its database after our tasks.
    builtin_fixups: frozenset[str] = frozenset()

    def __init__(self, url: str) -> None:
        self.address = urls.read(url)
        self._to = _kombu_connection(url, self.address)
        # The URL in the configuration is one to be shown: `celery inspect conf` does.
        super().__init__("rerankq", broker=_shown(url, self.address), set_as_current=False, loader=NoConfiguration)

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
    """Choose the transport for an address, and the options that kombu gets."""
    if address.scheme in urls.AMQP:
        vhost = urls.quoted(address.vhost)
        return {"url": f"{address.scheme}://{urls.encoded(address)}/{vhost}"}
    # Here, not at the top: a program that imports this package may never connect.
    from .transport import transport_to  # noqa: PLC0415

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
        # kombu's fair default would let a bulk backlog delay interactive doorbells.
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
    """Write the options of TLS: for RabbitMQ's library, or for Flower's own connections to Redis."""
    given = {name: value for name, value in address.options.items() if name.startswith("ssl_")}
    if address.scheme != "amqps":
        return {"ssl_cert_reqs": "required", **given}
    required = ssl.VerifyMode[f"CERT_{given.pop('ssl_cert_reqs', 'required').upper()}"]
    # py-amqp verifies a server's name only if it is given one.
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
        "global_keyprefix": KEY_PREFIX,
        "queue_order_strategy": "priority",
        "priority_steps": [IN_LINE, AHEAD],
        "socket_timeout": address.options.get("socket_timeout", BROKER_ANSWER_S),
        "socket_connect_timeout": address.options.get("socket_connect_timeout", CONNECT_S),
        "health_check_interval": address.options.get("health_check_interval") or BROKER_HEALTH_S,
    }


def forget_celerys_environment() -> None:
    """Drop the variables that Celery's command line takes for its options; for programs of ours only.

    Every option of every command has a variable: ``CELERY_WORKER_POOL`` would run prefork, whatever the app says.
    """
    for name in [name for name in os.environ if name.startswith("CELERY_")]:
        del os.environ[name]


def round_trip(settings: Settings, timeout_s: float) -> None:
    """Send a message to a temporary queue over kombu's connections, receive it, and remove the queue.

    Raises:
        BrokerUnavailable, or an error of the broker's library: if it does not come back.
    """
    # A name that the rights of producers in conf/redis-acl.conf cover.
    name, text = f"{BULK}.doctor-{uuid.uuid4().hex}", uuid.uuid4().hex
    # RabbitMQ has an exchange without a name that leads to every queue.
    exchange = Exchange("" if urls.parts_of(settings.broker).scheme in urls.AMQP else "rerankq")
    own = Queue(name, exchange, routing_key=name, durable=False, auto_delete=True, no_ack=True)
    with closing(make_app(settings)) as app, app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)
        queue = connection.SimpleQueue(own)
        try:
            queue.put(text)
            if queue.get(timeout=timeout_s).payload != text:
                raise BrokerUnavailable("the message that came back is not the one that was sent")
        except Empty:
            raise BrokerUnavailable(f"the message did not come back within {timeout_s:g} s") from None
        finally:
            # The consumer first: RabbitMQ notifies a consumer whose queue is deleted, and kombu raises that.
            queue.close()
            queue.queue.delete()


def reach(settings: Settings) -> None:
    """Connect to the broker once.

    Raises:
        An error of the broker's library: if it does not answer.
    """
    with closing(make_app(settings)) as app, _connection_with_limits(app) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)


def _connection_with_limits(app: Celery) -> Connection:
    connection = app.connection_for_write()
    if connection.transport.driver_type == "amqp":
        # py-amqp waits for answers without limit; Redis's limits come with its connections.
        limits = {"read_timeout": BROKER_ANSWER_S, "write_timeout": BROKER_ANSWER_S}
        connection.transport_options = {**connection.transport_options, **limits}
    return connection
