"""Which server is the master, as its sentinels say; its connections are closed when it is replaced."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as LostConnection
from redis.retry import Retry

from ..urls import Address

# Seconds between checks of which server is the master, and checks without a connection to it after which they end.
CHECK_EVERY_S = 1.0
IDLE_CHECKS = 5
# Seconds for a sentinel to answer in, before the next one is asked; redis-py would try a dead one again and again.
LIMITS: dict[str, Any] = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0, "retry": Retry(NoBackoff(), 0)}


class Master:
    """A master by its name, as its sentinels know it; and the connections to it, which are closed when it is replaced.

    A server that hangs closes nothing by itself, so a connection to a master that was replaced for hanging would wait
    for its timeout, or for ever. So the sentinels are asked every second, as long as there is a connection.
    """

    _known: ClassVar[dict[tuple[Any, ...], Master]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, name: str, sentinels: tuple[tuple[str, int], ...], options: Mapping[str, Any]) -> None:
        self.name = name
        # The one that answered last is asked first.
        self._sentinels = list(sentinels)
        self._options = dict(options)
        self._connections: weakref.WeakSet[Any] = weakref.WeakSet()
        self._watching: threading.Thread | None = None

    @classmethod
    def of(cls, address: Address) -> Master:
        """Give the one that all roles of this process share."""
        options = {name: value for name, value in address.options.items() if name.startswith("ssl_")}
        key = (address.master, address.hosts, address.tls, repr(sorted(options.items())))
        with cls._lock:
            if key not in cls._known:
                cls._known[key] = cls(address.master, address.hosts, {"ssl": True, **options} if address.tls else {})
            return cls._known[key]

    def address(self) -> tuple[str, int]:
        """Ask the sentinels, one after the other, over connections that do not stay."""
        asked: Any = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]  # of redis-py
            list(self._sentinels), sentinel_kwargs={**LIMITS, **self._options}
        )
        try:
            with self._in_short():
                address: tuple[str, int] = asked.discover_master(self.name)
                self._answered(asked.sentinels[0])
                return address
        finally:
            for sentinel in asked.sentinels:
                sentinel.close()

    async def address_async(self) -> tuple[str, int]:
        """As :meth:`address`, awaited."""
        asked: Any = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]  # of redis-py
            list(self._sentinels),
            sentinel_kwargs={**LIMITS, **self._options, "retry": AsyncRetry(NoBackoff(), 0)},
        )
        try:
            with self._in_short():
                address: tuple[str, int] = await asked.discover_master(self.name)
                self._answered(asked.sentinels[0])
                return address
        finally:
            for sentinel in asked.sentinels:
                await sentinel.aclose()

    def watch(self, connection: Any) -> None:
        """Close this connection when the master is another server."""
        with self._lock:
            self._connections.add(connection)
            if self._watching is None or not self._watching.is_alive():
                self._watching = threading.Thread(target=self._watch, name="rerankq-master", daemon=True)
                self._watching.start()

    def drop_left_behind(self, master: tuple[str, int]) -> int:
        """Close the connections to other servers; answers how many there were. Their readers notice at once."""
        with self._lock:
            connections = [one for one in self._connections if not _leads_to(one, master)]
        return sum(_shut_down(one) for one in connections)

    def _watch(self) -> None:
        idle = 0
        while True:
            time.sleep(CHECK_EVERY_S)
            # Without a master there is nothing to compare with.
            with contextlib.suppress(Exception):
                self.drop_left_behind(self.address())
            with self._lock:
                idle = 0 if any(_socket_of(one) is not None for one in self._connections) else idle + 1
                if idle >= IDLE_CHECKS:
                    self._watching = None
                    return

    def _answered(self, sentinel: Any) -> None:
        named = sentinel.connection_pool.connection_kwargs
        first = (named["host"], named["port"])
        self._sentinels.sort(key=lambda one: one != first)

    @contextmanager
    def _in_short(self) -> Iterator[None]:
        # redis-py's message holds every option of every connection.
        try:
            yield
        except (redis.sentinel.MasterNotFoundError, redis.asyncio.sentinel.MasterNotFoundError):
            raise LostConnection(f"no sentinel that answers knows a living master {self.name!r}") from None


def _leads_to(connection: Any, master: tuple[str, int]) -> bool:
    if (connection.host, connection.port) == master:
        return True
    # Sentinels may differ in how they call it: by name, or by number.
    return bool(connection.port == master[1] and _numbers(connection.host) & _numbers(master[0]))


def _numbers(host: str) -> set[Any]:
    try:
        return {found[4][0] for found in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _socket_of(connection: Any) -> Any:
    """Find the socket of a connection of either kind, None where it is closed."""
    writer = getattr(connection, "_writer", None)
    if writer is not None:
        return writer.transport.get_extra_info("socket")
    return getattr(connection, "_sock", None)


def _shut_down(connection: Any) -> bool:
    """Shut a connection's socket down, from whatever thread; whoever owns the connection then closes it."""
    opened = _socket_of(connection)
    if opened is None:
        return False
    try:
        # Not by TLS's own method, which would detach the socket from its reader.
        if isinstance(opened, socket.socket):
            socket.socket.shutdown(opened, socket.SHUT_RDWR)
        else:
            opened.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True


def _after_fork_in_child() -> None:
    """Leave connections and watching threads to the parent."""
    Master._lock = threading.Lock()
    for master in Master._known.values():
        master._connections, master._watching = weakref.WeakSet(), None


os.register_at_fork(after_in_child=_after_fork_in_child)
