"""kombu's way to Redis, over connections that we open: kombu reads no URL of ours, and none of its options."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import redis
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis

from .. import urls
from ..connections import opening as connections
from ..urls import Address

logger = logging.getLogger("rerankq")


class QoS(kombu_redis.QoS):  # type: ignore[misc]  # kombu ships no types
    """Looks for no messages that were not acknowledged: our queues write none down."""

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Do nothing. kombu takes a lock for it, which a full server refuses, and a worker could not connect."""


class Channel(kombu_redis.Channel):  # type: ignore[misc]  # kombu ships no types
    """A channel whose two pools lead where the broker's URL says, and that can listen to a server that is full.

    Listening takes no memory, so that jobs drain though nothing can be written. But kombu writes down who listens to
    what, for those who send; and it counts and tidies in transactions, of which a full server refuses every command.
    """

    QoS = QoS

    # Read by kombu to name channels of events and control; which keeps two deployments on one server apart.
    fanout_prefix = True

    def _get_pool(self, asynchronous: bool = False) -> redis.ConnectionPool:
        kind, options = connections.broker(self.connection.url)
        self.keyprefix_fanout: str = self.keyprefix_fanout.format(db=options["db"])
        return redis.ConnectionPool(connection_class=_told(kind, self) if asynchronous else kind, **options)

    def _queue_bind(self, *binding: Any) -> None:
        with _though_full() if self.connection.only_listens else nullcontext():
            super()._queue_bind(*binding)

    def _delete(self, *args: Any, **options: Any) -> None:
        with _though_full():
            super()._delete(*args, **options)

    def _size(self, queue: str) -> int:
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for step in self.priority_steps:
                pipe.llen(self._q_for_pri(queue, step))
            return sum(pipe.execute())


@contextmanager
def _though_full() -> Iterator[None]:
    """Go on where the server's memory is full."""
    try:
        yield
    except redis.ResponseError as error:
        # From inside a script, Redis 6.2 says so in words alone.
        if not isinstance(error, redis.OutOfMemoryError) and "OOM" not in str(error):
            raise
        logger.warning("the broker's memory is full: %s", error)


def _told(kind: type[redis.Connection], channel: Channel) -> type[redis.Connection]:
    """Make connections whose end takes their sockets out of the channel's event loop, as kombu's own do."""

    class Told(kind):  # type: ignore[valid-type, misc]  # a class that is a value
        def disconnect(self, *args: Any, **options: Any) -> None:
            super().disconnect(*args, **options)
            if channel._registered:
                channel._on_connection_disconnect(self)

    return Told


class Transport(kombu_redis.Transport):  # type: ignore[misc]  # kombu ships no types
    """kombu's transport for one URL of ours. Made by :func:`transport_to`."""

    Channel = Channel
    # So that kombu leaves the URL that it is shown as it is.
    can_parse_url = True
    # Whoever sends must not go on without having written down where to: kombu would drop what it sends.
    only_listens = False
    url: ClassVar[str] = ""

    def as_uri(self, _: str, include_password: bool = False, mask: str = "**") -> str:  # noqa: ARG002  # kombu's names
        """Write the URL to be shown; with its password for Flower, whose own connections count messages."""
        return as_flower_reads(urls.read(self.url, urls.REDIS)) if include_password else urls.masked(self.url)


_numbers = itertools.count(1)


@functools.cache
def transport_to(url: str) -> str:
    """Name the transport for a URL, to kombu; the name holds nothing of the URL, since workers tell it to Flower."""
    kind = type("Transport", (Transport,), {"url": url, "__module__": __name__})
    name = f"rerankq-{next(_numbers)}"
    TRANSPORT_ALIASES[name] = lambda: kind
    return name


def as_flower_reads(address: Address) -> str:
    """Write an address the way that Flower 2 takes it apart; of several sentinels it knows one.

    >>> as_flower_reads(urls.read("unix://:s;ecret@/run/redis.sock?db=3"))
    'redis+socket://:s%3Becret@/run/redis.sock?virtual_host=3'
    """
    if address.scheme == "unix":
        return f"redis+socket://{urls.encoded(address)}{address.path}?virtual_host={address.database}"
    scheme = address.scheme.replace("sentinels", "sentinel")
    return f"{scheme}://{urls.encoded(address)}/{address.database}"
