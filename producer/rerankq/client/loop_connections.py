"""A client's connections for one event loop: they belong to the loop that made them, and end with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from redis.exceptions import RedisError

from ..errors import BrokerUnavailable, ClientClosed
from ..ledger import LedgerLimits, connect_async, subscription
from ..ledger.runner import AsyncLedger
from ..settings import Settings
from .completions import CompletionListener

# Calls of one client at once: fewer than connections, so that waiting for jobs always finds one.
CALLS_AT_ONCE = 12
# Seconds that an answer of the ledger may take, whatever hangs.
ANSWER_WITHIN_S = 30.0
# Seconds to close in: for submissions under way, and for the connections.
CLOSE_S = 3.0


class Connections:
    """A client's connections for one event loop, and the limits on their use.

    There are fewer calls at once than connections, so that waiting for jobs always finds one. No call may take longer
    than ``ANSWER_WITHIN_S``; if the ledger hangs, calls that wait for others fail after that time too.
    """

    def __init__(self, settings: Settings, limits: LedgerLimits) -> None:
        self.loop = asyncio.get_running_loop()
        self.ledger = AsyncLedger(connect_async(settings.ledger))
        self.completions = CompletionListener(self.ledger, partial(subscription, settings.ledger), limits)
        self.asking = asyncio.Lock()
        self.under_way: set[asyncio.Task[list[str]]] = set()
        self._turns = asyncio.Semaphore(CALLS_AT_ONCE)
        self._limits: set[asyncio.Timeout] = set()
        self._hangs = False
        self._closed = False
        # Closed with the event loop: asyncio.run, and whoever ends a loop as it does, closes generators last.
        self._ending = self._close_at_the_end()
        with suppress(StopIteration):
            self._ending.__anext__().__await__().send(None)
        _OPEN.add(self)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Ask the ledger inside.

        Raises:
            BrokerUnavailable: if it takes too long; ClientClosed, if the client is closed meanwhile.
        """
        came_at = self.loop.time()
        async with self._turns:
            if self._closed:
                raise ClientClosed("the client was closed meanwhile")
            if self._hangs and self.loop.time() - came_at > ANSWER_WITHIN_S:
                raise BrokerUnavailable(f"the ledger has not answered other calls for {ANSWER_WITHIN_S:g} s")
            limit = asyncio.timeout(ANSWER_WITHIN_S)
            self._limits.add(limit)
            try:
                async with limit:
                    yield
                self._hangs, self.completions.reached = False, True
            except TimeoutError:
                self._hangs = True
                if self._closed:
                    raise ClientClosed("the client was closed meanwhile") from None
                raise BrokerUnavailable(f"the ledger has not answered within {ANSWER_WITHIN_S:g} s") from None
            except BrokerUnavailable:
                self._hangs = True
                raise
            finally:
                self._limits.discard(limit)

    async def close(self) -> None:
        """Wait a little for submissions under way, end the other calls, and close, whatever hangs."""
        if self.under_way:
            await asyncio.wait(self.under_way, timeout=CLOSE_S)
        self._closed = True
        for limit in self._limits:
            limit.reschedule(self.loop.time())
        await self.completions.close()
        with suppress(RedisError, OSError):
            async with asyncio.timeout(CLOSE_S):
                await self.ledger.redis.aclose()
        _OPEN.discard(self)

    def close_from_elsewhere(self) -> None:
        """Close, from another thread or event loop, or when its own has ended; not waited for."""
        if self.loop.is_closed():
            self._drop()
            return
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._close_soon)

    def _close_soon(self) -> None:
        self._closing = self.loop.create_task(self.close())

    def _drop(self) -> None:
        """Close the sockets of an event loop that was closed with them open: it can no longer do so itself."""
        _OPEN.discard(self)
        pool: Any = self.ledger.redis.connection_pool
        for connection in (*pool._available_connections, *pool._in_use_connections, *self.completions.connections):
            writer, connection._writer, connection._reader = connection._writer, None, None
            if writer is None:
                continue
            socket = getattr(writer.transport, "_sock", None)
            with suppress(RuntimeError):
                writer.transport.abort()
            if socket is not None:
                socket.close()
                writer.transport._sock = None
        self.completions.abandon()

    async def _close_at_the_end(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self.close()


# Kept until they are closed: their tasks must not be collected under way.
_OPEN: set[Connections] = set()
