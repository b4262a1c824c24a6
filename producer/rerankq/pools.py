"""Pools of connections to Redis, by its URL: to one address, or to whom Sentinel says is the master at the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as LostConnection
from redis.retry import Retry

from .settings import database_of, master_of, sentinels_of

Pool = TypeVar("Pool", bound=redis.ConnectionPool | redis.asyncio.ConnectionPool)

# Seconds for a sentinel to answer in, before the next one is asked; redis-py would try a dead one again and again.
PATIENCE: dict[str, Any] = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0, "retry": Retry(NoBackoff(), 0)}


def open_pool(kind: type[Pool], url: str, **options: Any) -> Pool:
    """Make a pool whose connections lead to the URL's Redis; connects on first use."""
    named = urlsplit(url)
    if named.scheme != "sentinel":
        pool: Pool = kind.from_url(url, **options)  # type: ignore[assignment]  # typed as its base
        return pool
    if issubclass(kind, redis.asyncio.ConnectionPool):
        managed: Any = redis.asyncio.sentinel.SentinelManagedConnection
        master: Any = AsyncMaster(url)
    else:
        managed, master = redis.sentinel.SentinelManagedConnection, Master(url)
    options |= {"connection_class": managed, "connection_pool": master, "db": database_of(url)}
    options |= {key: unquote(word) for key in ("username", "password") if (word := getattr(named, key))}
    return kind(**options)


class Master:
    """What redis-py's connections ask where to go, instead of its own pool of Sentinel's, which queues no callers."""

    is_master = True
    check_connection = False

    def __init__(self, url: str) -> None:
        self.service_name = master_of(url)
        self._sentinels = sentinels_of(url)

    def get_master_address(self) -> tuple[str, int]:
        """Ask the sentinels, one after the other, over connections that do not stay."""
        asked: Any = redis.sentinel.Sentinel(self._sentinels, sentinel_kwargs=PATIENCE)  # type: ignore[no-untyped-call]
        with closing(asked), self._in_short():
            address: tuple[str, int] = asked.discover_master(self.service_name)
            return address

    @contextmanager
    def _in_short(self) -> Iterator[None]:
        # redis-py's words hold every option of every connection.
        try:
            yield
        except (redis.sentinel.MasterNotFoundError, redis.asyncio.sentinel.MasterNotFoundError):
            raise LostConnection(f"no sentinel that answers knows a living master {self.service_name!r}") from None


class AsyncMaster(Master):
    """As :class:`Master`, awaited."""

    async def get_master_address(self) -> tuple[str, int]:  # type: ignore[override]  # its connections await it
        """Ask the sentinels, one after the other, over connections that do not stay."""
        asked: Any = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]  # of redis-py
            self._sentinels, sentinel_kwargs={**PATIENCE, "retry": AsyncRetry(NoBackoff(), 0)}
        )
        try:
            with self._in_short():
                address: tuple[str, int] = await asked.discover_master(self.service_name)
                return address
        finally:
            for sentinel in asked.sentinels:
                await sentinel.aclose()
