"""How much a key may: requests, pairs and tokens in a minute, and calls at a time, counted over all gateways in Redis.

Counted in the ledger's Redis: without it nothing could be ranked either, so a call that cannot be counted is answered
503, and neither let through nor refused for its caller's fault.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from math import ceil
from typing import Any, NamedTuple

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from ..connections import ledger_async
from ..contract import Chunk
from ..errors import BrokerUnavailable, JobTooLarge, RateLimited, RerankqError
from ..ledger import reraise_cancelled, translated
from .keys import KeyLimits

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
# Seconds after a question that was not answered for which no other call waits for an answer of its own.
BELIEVED_AWAY_S = 1.0
_NO_ANSWER = "the rates of keys were not answered in time"
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
# Of what a key may send in a minute, the share that the lines of its batches leave to its calls.
LEFT_TO_CALLS = 0.25


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


class _Cost(NamedTuple):
    """So much of something that a key may have ``limit`` of in a minute."""

    what: str
    limit: int
    amount: int


def _costs(key: KeyLimits, *, requests: int = 0, pairs: int = 0, tokens: int = 0) -> list[_Cost]:
    """List what of it is limited.

    Raises:
        JobTooLarge: if it is more than a whole minute's.
    """
    found = []
    for what, limit, amount in (
        ("requests", key.requests_per_minute, requests),
        ("pairs", key.pairs_per_minute, pairs),
        ("tokens", key.tokens_per_minute, tokens),
    ):
        if limit is not None and amount:
            if amount > limit:
                raise JobTooLarge(f"{amount} {what}; this key may send {limit} a minute", field="documents")
            found.append(_Cost(what, limit, amount))
    return found


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
        # When Redis last answered, and when it last did not.
        self._answered_at = self._away_at = float("-inf")
        # Set while no renewal is under way: it would take a place again that is given back meanwhile.
        self._renewed = asyncio.Event()
        self._renewed.set()
        self._renewing = asyncio.create_task(self._renew_repeatedly())

    async def spend_request(self, key: KeyLimits | None) -> None:
        """Count a request.

        Raises:
            RateLimited: if it is one too many; says when the next may come.
        """
        if key is not None:
            await self._spend(key, _costs(key, requests=1))

    async def spend_pairs(self, key: KeyLimits | None, *, pairs: int, tokens: int) -> None:
        """Count the pairs of calls, and their tokens (:func:`tokens_in`), before they are ranked: both or neither.

        Raises:
            RateLimited: if they are too many for now; says when they may come.
            JobTooLarge: if they are more than a whole minute's.
        """
        if key is not None:
            await self._spend(key, _costs(key, pairs=pairs, tokens=tokens))

    async def spend_line(self, key: KeyLimits, *, pairs: int, tokens: int) -> float:
        """Count a line of a batch if a share of its key's rates is left to calls then.

        Answers seconds: 0 = it is counted; else when to ask again.

        Raises:
            JobTooLarge: if it is more than a whole minute's.
        """
        refused = await self._count(key, _costs(key, pairs=pairs, tokens=tokens), left_over=LEFT_TO_CALLS)
        return 0.0 if refused is None else refused[1]

    async def _spend(self, key: KeyLimits, costs: Sequence[_Cost]) -> None:
        refused = await self._count(key, costs)
        if refused is not None:
            cost, wait_s = refused
            raise RateLimited(f"this key may send {cost.limit} {cost.what} a minute", retry_after_s=wait_s)

    async def _count(
        self, key: KeyLimits, costs: Sequence[_Cost], *, left_over: float = 0.0
    ) -> tuple[_Cost, float] | None:
        """Count all *costs*, or none: answers then what is too much, and after how many seconds it may come."""
        with _within_limits():
            async with asyncio.timeout(ANSWER_WITHIN_S):
                if len(costs) > 1 or left_over:
                    # Looked at first: what is refused for its tokens must not use up pairs.
                    for cost in costs:
                        room = min(cost.limit, cost.amount + int(left_over * cost.limit))
                        if not await self._limiter.test(_item(cost), key.name, cost.what, cost=room):
                            return cost, await self._wait_s(key, cost, room)
                for cost in costs:
                    if not await self._limiter.hit(_item(cost), key.name, cost.what, cost=cost.amount):
                        return cost, await self._wait_s(key, cost, cost.amount)
        return None

    async def _wait_s(self, key: KeyLimits, cost: _Cost, room: int) -> float:
        counts = await self._storage.get_sliding_window(_item(cost).key_for(key.name, cost.what), MINUTE_S)
        return max(1.0, wait_for_room_s(cost.limit, room, counts))

    @asynccontextmanager
    async def place(self, key: KeyLimits | None, *, within_s: float) -> AsyncIterator[None]:
        """Hold one of the places of a key's calls; wait for it in turn, at most *within_s* seconds.

        Raises:
            RateLimited: if there was none in that time.
            BrokerUnavailable: if Redis said nothing in that time.
        """
        if key is None or key.concurrent is None:
            yield
            return
        place, began = secrets.token_hex(8), time.monotonic()
        try:
            async with asyncio.timeout(within_s):
                await self._wait_for_place(key.name, key.concurrent, place)
        except TimeoutError:
            if self._answered_at < began:
                raise BrokerUnavailable(_NO_ANSWER) from None
            said = f"this key may have {key.concurrent} calls at a time; none of them ended within {within_s:g} s"
            raise RateLimited(said, retry_after_s=within_s) from None
        try:
            yield
        finally:
            self._leave(key.name, place)

    async def _wait_for_place(self, name: str, limit: int, place: str) -> None:
        async with self._lines[name]:
            if time.monotonic() - self._away_at < BELIEVED_AWAY_S:
                # Not each in turn: the last of a long line would wait for all that the others waited.
                raise BrokerUnavailable(_NO_ANSWER)
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
            await self._renewed.wait()
            await self._ask(self._redis.zrem(_places(name), place))
        except RerankqError as error:
            logger.info("a place of key %s is free in %g s only: %s", name, PLACE_HELD_S, error)
        self._freed[name].set()

    async def _ask(self, answer: Any) -> Any:
        try:
            with _within_limits():
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    answered = await answer
        except BrokerUnavailable:
            self._away_at = time.monotonic()
            raise
        self._answered_at = time.monotonic()
        return answered

    async def _renew_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(PLACE_HELD_S / 3)
            await self._renew_all()

    async def _renew_all(self) -> None:
        self._renewed.clear()
        try:
            for name, held in list(self._held.items()):
                if held:
                    try:
                        await self._ask(self._renew(keys=[_places(name)], args=[PLACE_HELD_S, *held]))
                    except RerankqError as error:
                        logger.info("the places of key %s are not renewed: %s", name, error)
        finally:
            self._renewed.set()

    async def aclose(self) -> None:
        """Give back what is held, and close the connections."""
        self._renewing.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=ANSWER_WITHIN_S)
        with suppress(Exception):
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await self._redis.aclose()


def _item(cost: _Cost) -> RateLimitItemPerMinute:
    return RateLimitItemPerMinute(cost.limit)


def _places(name: str) -> str:
    return f"{KEY_PREFIX}:places:{name}"


@contextmanager
def _within_limits() -> Iterator[None]:
    try:
        with reraise_cancelled(), translated():
            yield
    except TimeoutError:
        raise BrokerUnavailable(_NO_ANSWER) from None
