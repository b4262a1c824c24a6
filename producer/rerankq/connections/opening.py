"""Every connection to Redis, for every role, is opened here: to which server, with which limits, when it is closed.

Three rules hold for all of them, synchronous or not, whatever kind of URL they come from:

- a connection on which an answer is late or incomplete is closed, so that the next command cannot read the answer of
  the last one;
- opening one, its handshake included, has a limit of its own;
- behind Sentinel it leads to the master that the sentinels name, and is closed as soon as that is another server.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import ReadOnlyError, ResponseError
from redis.exceptions import TimeoutError as TooLate
from redis.retry import Retry

from .. import urls
from ..urls import Address
from .sentinel import Master

# Seconds: to connect, for each answer of the handshake, and for an answer of the ledger. What hangs longer is down.
CONNECT_S = 3.0
ANSWER_S = 10.0
# Seconds for an answer of the cache: a broken cache must not cost every job a timeout.
CACHE_ANSWER_S = 0.5
# Seconds for an answer of the broker. A worker that stops waits for one.
BROKER_ANSWER_S = 5.0
# Seconds without an answer after which the server is pinged. kombu gives up a BRPOP this long after its one second.
BROKER_HEALTH_S = 3
HEALTH_S = 30
SUBSCRIPTION_HEALTH_S = 5
# Pings without an answer after which a subscription counts as dead.
UNANSWERED = 2
# So often a command is sent again, soon, after a lost connection: every script may run twice. Not after a slow answer.
TRIES = 3
# Connections of one pool; further callers wait for one.
CONNECTIONS = 64


class NoSuchDatabase(ResponseError):
    """Raised when a server has no database of the number in a role's URL; says which setting to change."""


# What the roles open -------------------------------------------------------------------------------------------------


class Pooled(redis.Redis):
    """A client over a pool. Subscriptions get connections of their own, so that they take none from the pool."""

    subscriptions: redis.ConnectionPool

    def pubsub(self, **options: Any) -> Subscription:
        """Make a subscription that notices a server that went silent."""
        return Subscription(self.subscriptions, **options)

    def close(self) -> None:
        """Close all connections."""
        super().close()
        self.subscriptions.disconnect()


class Subscription(redis.client.PubSub):
    """Receives messages; raises a lost connection when the server left several health checks in a row unanswered."""

    def check_health(self) -> None:
        """Ping the server if it is time to, unless too many pings are unanswered."""
        if self.health_check_response_counter >= UNANSWERED:
            self.health_check_response_counter = 0
            if self.connection is not None:
                self.connection.disconnect()
            raise LostConnection("the server does not answer")
        super().check_health()


def ledger(url: str) -> redis.Redis:
    """Open a pool of connections for the ledger; connects on first use."""
    defaults = {"timeout": ANSWER_S, "max_connections": CONNECTIONS, "health_check_interval": HEALTH_S}
    retry = Retry(_backoff(), TRIES, (LostConnection,))
    return _pooled("ledger", url, defaults, {"retry": retry}, ANSWER_S)


def ledger_async(url: str) -> redis.asyncio.Redis:
    """As :func:`ledger`, for asyncio."""
    address = urls.read(url, urls.REDIS)
    defaults = {"timeout": None, "max_connections": CONNECTIONS // 4, "health_check_interval": HEALTH_S}
    options = _options("ledger", address, defaults, ANSWER_S, POOLED)
    retry = AsyncRetry(_backoff(), TRIES, (LostConnection,))
    pool = redis.asyncio.BlockingConnectionPool(connection_class=_kind(address, ASYNC), retry=retry, **options)
    return redis.asyncio.Redis.from_pool(pool)


def listening(url: str) -> AbstractConnection:
    """Make one unconnected connection to subscribe on: no read timeout, health check or reconnect of its own."""
    address = urls.read(url, urls.REDIS)
    options = _options("ledger", address, {}, ANSWER_S, ())
    options |= {"socket_timeout": None, "health_check_interval": 0, "retry_on_timeout": False}
    connection: AbstractConnection = _kind(address, ASYNC)(retry=AsyncRetry(NoBackoff(), 0), **options)
    return connection


def cache(url: str) -> redis.Redis:
    """Open a pool of connections for the score cache; connects on first use."""
    defaults = {"timeout": CACHE_ANSWER_S, "max_connections": CONNECTIONS, "socket_connect_timeout": CACHE_ANSWER_S}
    return _pooled("cache", url, defaults, {}, CACHE_ANSWER_S)


def broker(url: str) -> tuple[type[redis.Connection], dict[str, Any]]:
    """Choose how kombu connects to Redis: the connections' class and the pool's options.

    Nothing is retried silently: kombu sends doorbells in batches, and must not send a batch twice without knowing.
    """
    address = urls.read(url, urls.REDIS)
    defaults = {"client_name": "rerankq", "health_check_interval": BROKER_HEALTH_S, "max_connections": 10}
    options = _options("broker", address, defaults, BROKER_ANSWER_S, ("max_connections",))
    # Each channel keeps two.
    options |= {"retry_on_timeout": False, "max_connections": max(10, options["max_connections"])}
    return _kind(address, SYNC), options


def _pooled(role: str, url: str, defaults: Mapping[str, Any], musts: Mapping[str, Any], answer_s: float) -> redis.Redis:
    address = urls.read(url, urls.REDIS)
    options = {**_options(role, address, defaults, answer_s, POOLED), **musts}
    pool = redis.BlockingConnectionPool(connection_class=_kind(address, SYNC), **options)  # type: ignore[no-untyped-call]
    client = Pooled(connection_pool=pool)
    client.auto_close_connection_pool = True
    alone = {name: value for name, value in options.items() if name not in {"timeout", "max_connections"}}
    alone |= {"health_check_interval": SUBSCRIPTION_HEALTH_S}
    client.subscriptions = redis.ConnectionPool(connection_class=_kind(address, SYNC), **alone)
    return client


# Options of a pool only, not of its connections.
POOLED = ("timeout", "max_connections")


def _options(
    role: str, address: Address, defaults: Mapping[str, Any], answer_s: float, pooled: tuple[str, ...]
) -> dict[str, Any]:
    """Write redis-py's options: the role's defaults, overridden by the URL's, overridden by the fixed ones."""
    given = {name: value for name, value in address.options.items() if name in pooled or name not in POOLED}
    options: dict[str, Any] = {"socket_connect_timeout": CONNECT_S, "socket_timeout": answer_s, **defaults, **given}
    options |= {"role": role, "db": address.database, "username": address.username, "password": address.password}
    # RESP3 would switch redis-py's own check for unread answers off; and answers are read as bytes.
    options |= {"protocol": 2, "decode_responses": False}
    if address.scheme == "unix":
        options.pop("socket_keepalive", None)
        return options | {"path": address.path}
    options |= {"socket_keepalive_options": _keepalive(), "socket_keepalive": options.get("socket_keepalive", True)}
    if address.master:
        return options | {"master": Master.of(address)}
    host, port = address.hosts[0]
    return options | {"host": host, "port": port}


def _keepalive() -> dict[int, int]:
    """Give up a peer that vanished after half a minute, or after 10 s if something was sent to it."""
    wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 10_000}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(base=0.02, cap=0.5)


# The connections themselves -------------------------------------------------------------------------------------------


class _WithRole:
    """Every connection of ours: knows which role's URL it is opened for."""

    def __init__(self, *, role: str, **options: Any) -> None:
        super().__init__(**options)
        self._role = role

    def _no_database(self, error: ResponseError) -> ResponseError:
        if "DB index" not in str(error):
            return error
        said = f"the server has no database {self.db}"  # type: ignore[attr-defined]
        setting = f"RERANKQ_{self._role.upper()}_URL"
        return NoSuchDatabase(f"{setting}: {said}: name one that it has, or raise `databases` in its redis.conf")


class _Connection(_WithRole):
    """A synchronous connection."""

    _sock: Any

    def connect_check_health(self, *args: Any, **options: Any) -> None:
        """Connect, with a limit for each step of the handshake."""
        if self._sock:
            return
        try:
            super().connect_check_health(*args, **options)  # type: ignore[misc]
        except ResponseError as error:
            raise self._no_database(error) from error
        if self._sock:
            self._sock.settimeout(self.socket_timeout)  # type: ignore[attr-defined]

    def _connect(self) -> Any:
        opened = super()._connect()  # type: ignore[misc]
        opened.settimeout(min(CONNECT_S, self.socket_timeout or CONNECT_S))  # type: ignore[attr-defined]
        return opened

    def read_response(self, *args: Any, **options: Any) -> Any:
        """Read an answer; if it cannot be read whole, the connection is closed.

        redis-py leaves a subscription's connection open then, and waits for the rest of a message for ever.
        """
        options["disconnect_on_error"] = True
        if options.get("timeout", 0) is None:
            del options["timeout"]
        return super().read_response(*args, **options)  # type: ignore[misc]


class _AsyncConnection(_WithRole):
    """A connection of asyncio."""

    async def connect_check_health(self, *args: Any, **options: Any) -> None:
        """Connect, with a limit for all of it."""
        if self.is_connected:  # type: ignore[attr-defined]
            return
        try:
            async with asyncio.timeout(2 * CONNECT_S):
                await super().connect_check_health(*args, **options)  # type: ignore[misc]
        except TimeoutError:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise TooLate("Timeout connecting to server") from None
        except ResponseError as error:
            raise self._no_database(error) from error


class _FollowsMaster:
    """Leads to the master that the sentinels name when it connects."""

    def __init__(self, *, master: Master, **options: Any) -> None:
        super().__init__(**options)
        self._master = master


class _Following(_FollowsMaster, _Connection):
    def _connect(self) -> Any:
        self.host, self.port = self._master.address()
        opened = super()._connect()
        self._master.watch(self)
        return opened

    def read_response(self, *args: Any, **options: Any) -> Any:
        """Read an answer; a master that became a replica is a lost one."""
        try:
            return super().read_response(*args, **options)
        except ReadOnlyError:
            self.disconnect()  # type: ignore[attr-defined]
            raise LostConnection("the master is a replica now") from None


class _AsyncFollowing(_FollowsMaster, _AsyncConnection):
    async def _connect(self) -> None:
        self.host, self.port = await self._master.address_async()
        await super()._connect()  # type: ignore[misc]
        self._master.watch(self)

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read an answer; a master that became a replica is a lost one."""
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        except ReadOnlyError:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise LostConnection("the master is a replica now") from None


class Plain(_Connection, redis.Connection):
    """To a host."""


class Encrypted(_Connection, redis.SSLConnection):
    """To a host, with TLS."""


class Local(_Connection, redis.UnixDomainSocketConnection):
    """To a Unix socket."""


class Watched(_Following, redis.Connection):
    """To a master."""


class EncryptedWatched(_Following, redis.SSLConnection):
    """To a master, with TLS."""


class AsyncPlain(_AsyncConnection, redis.asyncio.Connection):
    """To a host."""


class AsyncEncrypted(_AsyncConnection, redis.asyncio.SSLConnection):
    """To a host, with TLS."""


class AsyncLocal(_AsyncConnection, redis.asyncio.UnixDomainSocketConnection):
    """To a Unix socket."""


class AsyncWatched(_AsyncFollowing, redis.asyncio.Connection):
    """To a master."""


class AsyncEncryptedWatched(_AsyncFollowing, redis.asyncio.SSLConnection):
    """To a master, with TLS."""


SYNC: dict[str, Any] = {
    "redis": Plain, "rediss": Encrypted, "unix": Local, "sentinel": Watched, "sentinels": EncryptedWatched,
}  # fmt: skip
ASYNC: dict[str, Any] = {
    "redis": AsyncPlain, "rediss": AsyncEncrypted, "unix": AsyncLocal,
    "sentinel": AsyncWatched, "sentinels": AsyncEncryptedWatched,
}  # fmt: skip


def _kind(address: Address, kinds: Mapping[str, Any]) -> Any:
    return kinds[address.scheme]
