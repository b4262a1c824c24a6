"""Wait for thousands of jobs over one connection: subscribe first, read second, read again now and then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from typing import Any

from redis.exceptions import RedisError

from .contract import ENDED
from .errors import BrokerUnavailable, RerankqError
from .ledger import AsyncLedger, Look, Terms, calls

logger = logging.getLogger("rerankq")

# Seconds between readings of all that is waited for: pub/sub forgets what was said while we were away.
READ_AGAIN_S = 3.0
# Rankings read in one round trip: bounds what is held at once, a ranking can weigh megabytes.
READ_AT_ONCE = 64


class Ears:
    """Hears when jobs end. Belongs to one event loop; two of its tasks serve all who wait.

    A job's channel is subscribed to before the job is read, so no ending slips between the two. An outage of the
    ledger only delays: everything is subscribed to and read again.
    """

    def __init__(self, ledger: AsyncLedger, terms: Terms) -> None:
        self._ledger = ledger
        self._terms = terms
        self._waiters: dict[str, set[asyncio.Future[Look]]] = defaultdict(set)
        self._to_hear: set[str] = set()
        self._to_leave: set[str] = set()
        self._to_read: set[str] = set()
        self._wake = asyncio.Event()
        self._pubsub: Any = None
        self._heard_once = False
        self._reading: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    def expect(self, job_id: str) -> asyncio.Future[Look]:
        """Make a future of the job's end, or of its being unknown. Give it back with :meth:`drop`."""
        future: asyncio.Future[Look] = asyncio.get_running_loop().create_future()
        if not self._waiters[job_id]:
            self._to_leave.discard(job_id)
            self._to_hear.add(job_id)
        else:
            self._to_read.add(job_id)
        self._waiters[job_id].add(future)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        self._wake.set()
        return future

    def drop(self, job_id: str, future: asyncio.Future[Look]) -> None:
        """Stop waiting."""
        future.cancel()
        waiters = self._waiters.get(job_id)
        if waiters is not None:
            waiters.discard(future)
            if not waiters:
                self._leave(job_id)

    async def close(self) -> None:
        """Stop listening; whoever still waits is cancelled."""
        for job_id, waiters in list(self._waiters.items()):
            for future in list(waiters):
                self.drop(job_id, future)
        for running in (self._reading, self._listening):
            # Python 3.11's wait_for, inside redis-py, can swallow a cancellation: ask until it is heard.
            while running is not None and not running.done():
                running.cancel()
                await asyncio.wait([running], timeout=0.1)
        await self._hang_up()

    def _leave(self, job_id: str) -> None:
        self._waiters.pop(job_id, None)
        self._to_hear.discard(job_id)
        self._to_read.discard(job_id)
        self._to_leave.add(job_id)
        self._wake.set()

    async def _read(self) -> None:
        """Subscribe, unsubscribe and read, in batches, until closed."""
        while True:
            try:
                async with asyncio.timeout(READ_AGAIN_S):
                    await self._wake.wait()
            except TimeoutError:
                self._to_read |= self._waiters.keys() - self._to_hear
            self._wake.clear()
            try:
                await self._subscribe()
                await self._read_batches()
                self._heard_once = True
            except (RedisError, RerankqError, OSError) as error:
                await self._start_over(error)

    async def _subscribe(self) -> None:
        if self._pubsub is None:
            self._pubsub = self._ledger.redis.pubsub(ignore_subscribe_messages=False)
            # A subscription of our own: redis-py does not listen on a connection that has none.
            await self._pubsub.subscribe(f"{self._terms.channel}:ears")
            self._listening = asyncio.create_task(self._listen(self._pubsub))
        hear, self._to_hear = self._to_hear, set()
        leave, self._to_leave = self._to_leave - hear, set()
        try:
            for names, say in ((leave, self._pubsub.unsubscribe), (hear, self._pubsub.subscribe)):
                channels = [self._channel(job_id) for job_id in names]
                for at in range(0, len(channels), 500):
                    await say(*channels[at : at + 500])
        except BaseException:
            self._to_hear |= hear
            raise

    async def _read_batches(self) -> None:
        while self._to_read:
            batch = [self._to_read.pop() for _ in range(min(len(self._to_read), READ_AT_ONCE))]
            looks = await self._ledger.ask_all([calls.look(job_id, self._terms, with_ranking=True) for job_id in batch])
            for job_id, look in zip(batch, looks, strict=True):
                if isinstance(look, RerankqError):
                    raise look
                if look.status.state in ENDED or look.status.state == "unknown":
                    self._resolve(job_id, look)

    def _resolve(self, job_id: str, look: Look) -> None:
        for future in self._waiters.get(job_id, ()):
            if not future.done():
                future.set_result(look)
        self._leave(job_id)

    async def _listen(self, pubsub: Any) -> None:
        prefix = self._channel("").encode()
        try:
            async for message in pubsub.listen():
                channel = message["channel"]
                # "subscribe": the confirmation. From here on nothing is missed, so this is the time to read.
                if message["type"] in {"subscribe", "message"} and channel.startswith(prefix):
                    job_id = channel.removeprefix(prefix).decode()
                    if job_id in self._waiters:
                        self._to_read.add(job_id)
                        self._wake.set()
        except (RedisError, OSError) as error:
            logger.info("lost the ledger's channel, subscribing again: %s", error)
        if self._pubsub is pubsub:
            self._pubsub = None
            self._to_hear |= self._waiters.keys()
            self._wake.set()

    async def _start_over(self, error: Exception) -> None:
        if not self._heard_once:
            # Never reached: more likely a wrong URL than an outage. Say so instead of waiting for ever.
            down = BrokerUnavailable(f"the ledger does not answer: {error}")
            for job_id, waiters in list(self._waiters.items()):
                for future in waiters:
                    if not future.done():
                        future.set_exception(down)
                self._leave(job_id)
            return
        logger.info("the ledger does not answer, trying again: %s", error)
        await self._hang_up()
        self._to_hear |= self._waiters.keys()
        await asyncio.sleep(0.5)
        self._wake.set()

    async def _hang_up(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if self._listening is not None:
            self._listening.cancel()
        if pubsub is not None:
            with contextlib.suppress(RedisError, OSError):
                await pubsub.aclose()

    def _channel(self, job_id: str) -> str:
        return f"{self._terms.channel}:job:{job_id}"
