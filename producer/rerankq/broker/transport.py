"""kombu's transport for Redis over connections that we open: kombu reads neither our URLs nor their options."""

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
    """Restores no unacknowledged messages: our queues do not store any."""

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Do nothing. kombu takes a lock for it, which a full server refuses, and a worker could not connect."""


class Channel(kombu_redis.Channel):  # type: ignore[misc]  # kombu ships no types
    """A channel whose two pools follow the broker's URL, and that can consume from a server whose memory is full.

    Consuming takes no memory, so jobs drain although nothing can be written. But kombu stores the bindings of
    consumers, for those who publish, and it counts and deletes in transactions, which a full server refuses.
    """

    QoS = QoS

    # Read by kombu to name channels of events and control; which keeps two deployments on one server apart.
    fanout_prefix = True

    def _get_pool(self, asynchronous: bool = False) -> redis.ConnectionPool:
        kind, options = connections.broker(self.connection.url)
        self.keyprefix_fanout: str = self.keyprefix_fanout.format(db=options["db"])
        return redis.ConnectionPool(connection_class=_registered_with(kind, self) if asynchronous else kind, **options)

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
        # From inside a script, Redis 6.2 gives no error type, only the text.
        if not isinstance(error, redis.OutOfMemoryError) and "OOM" not in str(error):
            raise
        logger.warning("the broker's memory is full: %s", error)


def _registered_with(kind: type[redis.Connection], channel: Channel) -> type[redis.Connection]:
    """Make connections that leave the channel's event loop when they are closed, as kombu's own do."""

    class Registered(kind):  # type: ignore[valid-type, misc]  # a class that is a value
        def disconnect(self, *args: Any, **options: Any) -> None:
            super().disconnect(*args, **options)
            if channel._registered:
                channel._on_connection_disconnect(self)

    return Registered


class Transport(kombu_redis.Transport):  # type: ignore[misc]  # kombu ships no types
    """kombu's transport for one URL of ours. Made by :func:`transport_to`."""

    Channel = Channel
    # So that kombu does not change the URL that it is given.
    can_parse_url = True
    # A publisher must not go on without stored bindings: kombu would drop its messages.
    only_listens = False
    url: ClassVar[str] = ""

    def as_uri(self, _: str, include_password: bool = False, mask: str = "**") -> str:  # noqa: ARG002  # kombu's names
        """Write the URL to show; with its password for Flower, whose own connections count messages."""
        return as_flower_reads(urls.read(self.url, urls.REDIS)) if include_password else urls.masked(self.url)


_numbers = itertools.count(1)


@functools.cache
def transport_to(url: str) -> str:
    """Register the transport for a URL with kombu; its name holds nothing of the URL, since Flower shows it."""
    kind = type("Transport", (Transport,), {"url": url, "__module__": __name__})
    name = f"rerankq-{next(_numbers)}"
    TRANSPORT_ALIASES[name] = lambda: kind
    return name


def as_flower_reads(address: Address) -> str:
    """Write an address as Flower 2 parses it; of several sentinels it knows one.

    >>> as_flower_reads(urls.read("unix://:s;ecret@/run/redis.sock?db=3"))
    'redis+socket://:s%3Becret@/run/redis.sock?virtual_host=3'
    """
    if address.scheme == "unix":
        return f"redis+socket://{urls.encoded(address)}{address.path}?virtual_host={address.database}"
    scheme = address.scheme.replace("sentinels", "sentinel")
    return f"{scheme}://{urls.encoded(address)}/{address.database}"
