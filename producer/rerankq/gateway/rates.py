"""How much a key may: requests, pairs and tokens in a minute, and calls at a time, counted over all gateways in Redis.

Counted in the ledger's Redis: without it nothing could be ranked either, so a call that cannot be counted is answered
503, and neither let through nor refused for its caller's fault.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from math import ceil
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from ..connections import ledger_async
from ..contract import Chunk
from ..errors import BrokerUnavailable, JobTooLarge, RateLimited, RerankqError
from ..ledger import reraise_cancelled, translated
from .keys import ApiKey

logger = logging.getLogger("rerankq.gateway")

MINUTE_S = 60
# What all keys of the gateway in Redis begin with.
KEY_PREFIX = "rerankq:gateway"
# Seconds for an answer.
ANSWER_WITHIN_S = 3.0
# Seconds after which the places of a gateway that died are free again; its own renews them three times as often.
PLACE_HELD_S = 15.0
# Seconds between tries for a place that other gateways hold.
TRY_EVERY_S = 0.2
# Bytes of UTF-8 to a token, about, in Chinese as in English.
BYTES_PER_TOKEN = 4

_TAKE = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), ARGV[1])
redis.call('PEXPIRE', KEYS[1], math.ceil(tonumber(ARGV[3]) * 1000))
return 1
"""
_RENEW = """
local time = redis.call('TIME')
local until_s = tonumber(time[1]) + tonumber(time[2]) / 1000000 + tonumber(ARGV[1])
for at = 2, #ARGV do redis.call('ZADD', KEYS[1], until_s, ARGV[at]) end
redis.call('PEXPIRE', KEYS[1], math.ceil(tonumber(ARGV[1]) * 1000))
return #ARGV - 1
"""


def tokens_in(query: str, chunks: Sequence[Chunk]) -> int:
    """Estimate the tokens of a call before any work is done: its texts' bytes, the query's with each chunk.

    >>> tokens_in("four", [Chunk(text="eight888"), Chunk(text="四")])
    5
    """
    size = sum(len(chunk.model_text.encode("utf-8", "replace")) for chunk in chunks)
    return ceil((size + len(chunks) * len(query.encode("utf-8", "replace"))) / BYTES_PER_TOKEN)


def wait_for_room_s(amount: int, cost: int, counts: tuple[int, float, int, float]) -> float:
    """Seconds until *cost* more are within *amount* in a sliding minute, if nothing else comes.

    *counts*: of the minute before and its time to live in seconds, of the current minute and its own, which is two
    minutes at first. The minute before counts by the part of it that is still within 60 seconds.

    >>> [wait_for_room_s(10, 1, counts) for counts in ((0, 0, 10, 120), (10, 30, 0, 90), (0, 0, 9, 90))]
    [60.0, 0.0, 0.0]
    >>> wait_for_room_s(10, 10, (10, 30, 0, 90))
    24.0
    """
    before, before_ttl_s, current, current_ttl_s = counts
    left = amount - cost - current
    if left < 0:
        # The current minute has to end, and then to grow old enough itself.
        until_next = max(0.0, current_ttl_s - MINUTE_S)
        return until_next + wait_for_room_s(amount, cost, (current, MINUTE_S, 0, 0))
    if not before:
        return 0.0
    # As the library rounds: what is begun of a count does not count.
    return max(0.0, before_ttl_s - (left + 1) * MINUTE_S / before)


class Rates:
    """The rates of keys and the places of their calls, in the ledger's Redis, over connections of its own.

    Raises (every method): BrokerUnavailable if Redis does not answer.
    """

    def __init__(self, ledger_url: str) -> None:
        self._redis = ledger_async(ledger_url)
        # Its own URL is not used: the connections are ours, with their limits, TLS and Sentinel.
        self._storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=f"{KEY_PREFIX}:rate",
            connection_pool=self._redis.connection_pool,  # type: ignore[arg-type]
        )
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)
        self._take: Any = self._redis.register_script(_TAKE)
        self._renew: Any = self._redis.register_script(_RENEW)
        # Whose turn it is, in the order in which they came.
        self._lines: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._freed: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._held: defaultdict[str, set[str]] = defaultdict(set)
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewing = asyncio.create_task(self._renew_repeatedly())

    async def spend_request(self, key: ApiKey | None) -> None:
        """Count a request.

        Raises:
            RateLimited: if it is one too many; says when the next may come.
        """
        if key is not None:
            await self._spend(key, "requests", key.requests_per_minute, 1)

    async def spend_pairs(self, key: ApiKey | None, *, pairs: int, tokens: int) -> None:
        """Count the pairs of calls, and their tokens (:func:`tokens_in`), before they are ranked.

        Raises:
            RateLimited: if they are too many for now; says when they may come.
            JobTooLarge: if they are more than a whole minute's.
        """
        if key is not None:
            await self._spend(key, "pairs", key.pairs_per_minute, pairs)
            await self._spend(key, "tokens", key.tokens_per_minute, tokens)

    async def _spend(self, key: ApiKey, what: str, limit: int | None, cost: int) -> None:
        if limit is None or cost == 0:
            return
        if cost > limit:
            raise JobTooLarge(f"{cost} {what}; this key may send {limit} a minute", field="documents")
        item = RateLimitItemPerMinute(limit)
        name = (key.name, what)
        with _within_limits():
            async with asyncio.timeout(ANSWER_WITHIN_S):
                if await self._limiter.hit(item, *name, cost=cost):
                    return
                counter = item.key_for(*name)
                counts = await self._storage.get_sliding_window(counter, MINUTE_S)
        wait_s = wait_for_room_s(limit, cost, counts)
        raise RateLimited(f"this key may send {limit} {what} a minute", retry_after_s=max(1.0, wait_s))

    @asynccontextmanager
    async def place(self, key: ApiKey | None, *, within_s: float) -> AsyncIterator[None]:
        """Hold one of the places of a key's calls; wait for it in turn, at most *within_s* seconds.

        Raises:
            RateLimited: if there was none in that time.
        """
        if key is None or key.concurrent is None:
            yield
            return
        place = secrets.token_hex(8)
        try:
            async with asyncio.timeout(within_s):
                await self._wait_for_place(key.name, key.concurrent, place)
        except TimeoutError:
            said = f"this key may have {key.concurrent} calls at a time; none of them ended within {within_s:g} s"
            raise RateLimited(said, retry_after_s=within_s) from None
        try:
            yield
        finally:
            self._leave(key.name, place)

    async def _wait_for_place(self, name: str, limit: int, place: str) -> None:
        async with self._lines[name]:
            freed = self._freed[name]
            while True:
                freed.clear()
                try:
                    taken = await self._ask(self._take(keys=[_places(name)], args=[place, limit, PLACE_HELD_S]))
                except asyncio.CancelledError:
                    # It may have been taken.
                    self._leave(name, place)
                    raise
                if taken:
                    self._held[name].add(place)
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(TRY_EVERY_S):
                        await freed.wait()

    def _leave(self, name: str, place: str) -> None:
        """Give a place back, beside the caller's own end."""
        self._held[name].discard(place)
        task = asyncio.create_task(self._free(name, place))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _free(self, name: str, place: str) -> None:
        try:
            await self._ask(self._redis.zrem(_places(name), place))
        except RerankqError as error:
            logger.info("a place of key %s is free in %g s only: %s", name, PLACE_HELD_S, error)
        self._freed[name].set()

    async def _ask(self, answer: Any) -> Any:
        with _within_limits():
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await answer

    async def _renew_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(PLACE_HELD_S / 3)
            for name, held in list(self._held.items()):
                if held:
                    try:
                        await self._ask(self._renew(keys=[_places(name)], args=[PLACE_HELD_S, *held]))
                    except RerankqError as error:
                        logger.info("the places of key %s are not renewed: %s", name, error)

    async def aclose(self) -> None:
        """Give back what is held, and close the connections."""
        self._renewing.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=ANSWER_WITHIN_S)
        with suppress(Exception):
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await self._redis.aclose()


def _places(name: str) -> str:
    return f"{KEY_PREFIX}:places:{name}"


@contextmanager
def _within_limits() -> Iterator[None]:
    try:
        with reraise_cancelled(), translated():
            yield
    except TimeoutError:
        raise BrokerUnavailable(f"the rates of keys were not answered within {ANSWER_WITHIN_S:g} s") from None
