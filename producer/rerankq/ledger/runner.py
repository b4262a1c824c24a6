"""Ask the ledger: run its scripts, one or many per round trip, and translate Redis's answers and errors."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha1
from importlib import resources
from typing import Any, NamedTuple, TypeVar

import redis
import redis.asyncio
from redis.exceptions import NoPermissionError, NoScriptError, OutOfMemoryError, RedisError, ResponseError

from ..connections.opening import NoSuchDatabase
from ..errors import BrokerUnavailable, JobFailed, QueueFull, RerankqError, SettingsInvalid
from . import keys, lease_policy
from .calls import Call
from .lease_policy import LeasePolicy, Server
from .registry import WorkerInfo, workers_of

Answer = TypeVar("Answer")

# Seconds for which reading answers may block the event loop.
WORK_S = 0.002


class Overview(NamedTuple):
    """What the ledger holds: pairs waiting by queue, jobs running and dead, and whether its sweeps keep up.

    ``overdue`` counts leases that ended so long ago that a sweep should have judged them.
    """

    pairs_waiting: int
    by_queue: Mapping[str, int]
    running: int
    dead: int
    overdue: int
    somebody_sweeps: bool


@cache
def prelude() -> str:
    """Read what stands before every script: the keys, the figures of the lease policy, the functions they share."""
    text = (resources.files(__package__) / "scripts" / "prelude.lua").read_text()
    return keys.as_lua() + lease_policy.as_lua() + text


@cache
def source(script: str) -> tuple[str, str]:
    """Read a script's text and its SHA-1, by which Redis knows it."""
    text = prelude() + (resources.files(__package__) / "scripts" / f"{script}.lua").read_text()
    return text, sha1(text.encode(), usedforsecurity=False).hexdigest()


async def yield_to_loop(since: float) -> float:
    """Let the event loop run if *since* is more than ``WORK_S`` ago; answers the time since which it has not run."""
    if time.monotonic() - since < WORK_S:
        return since
    await asyncio.sleep(0)
    return time.monotonic()


@contextmanager
def translated() -> Iterator[None]:
    """Turn Redis's errors into ours: the one border where that happens."""
    try:
        yield
    except NoSuchDatabase as error:
        raise SettingsInvalid(str(error)) from error
    except ResponseError as error:
        raise _refusal(error) from error
    except (RedisError, OSError) as error:
        raise BrokerUnavailable(f"the ledger does not answer: {error}") from error


@contextmanager
def reraise_cancelled() -> Iterator[None]:
    """Raise a cancellation of this task that was swallowed inside: Python 3.11's wait_for, in redis-py, may do so."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    yield
    if task and task.cancelling() > before:
        raise asyncio.CancelledError


def _refusal(error: Exception) -> RerankqError:
    # From inside a script, Redis 6.2 gives no error type, only the text.
    if isinstance(error, OutOfMemoryError) or "OOM" in str(error):
        return QueueFull(f"the ledger's memory is full: {error}", retry_after_s=5)
    return BrokerUnavailable(f"the ledger refused: {error}")


class Ledger:
    """The ledger, asked by a thread that waits for its answers. Safe to share between threads.

    Raises (every method): BrokerUnavailable if Redis does not answer or refuses; QueueFull if its memory is full.
    """

    def __init__(self, client: redis.Redis) -> None:
        self.redis = client

    def ask(self, call: Call[Answer]) -> Answer:
        """Run one call."""
        text, sha = source(call.script)
        with translated():
            try:
                return _read(call, self.redis.evalsha(sha, 0, *call.args))
            except NoScriptError:
                return _read(call, self.redis.eval(text, 0, *call.args))

    def ask_all(self, wanted: Sequence[Call[Answer]]) -> list[Answer | RerankqError]:
        """Run calls in one round trip; what was refused or cannot be read stands as an error in its place."""
        with translated():
            pipe = self.redis.pipeline(transaction=False)
            _fill(pipe, wanted)
            raw = pipe.execute(raise_on_error=False)
            for whole in (False, True):
                again = [at for at, answer in enumerate(raw) if isinstance(answer, NoScriptError)]
                if not again:
                    break
                pipe = self.redis.pipeline(transaction=False)
                loads = _load(pipe, [wanted[at] for at in again], whole=whole)
                answers = pipe.execute(raise_on_error=False)
                for at, answer in zip(again, answers[loads:], strict=True):
                    raw[at] = answer
        return [_answer(call, given) for call, given in zip(wanted, raw, strict=True)]

    def workers(self) -> list[WorkerInfo]:
        """All registered workers, living and lately gone."""
        with translated():
            pipe = self.redis.pipeline(transaction=False)
            pipe.time()
            pipe.hgetall(keys.WORKERS())
            clock, found = pipe.execute()
        return workers_of(_seconds(clock), found)

    def now(self) -> float:
        """Read the ledger's clock, in seconds since the epoch."""
        with translated():
            return _seconds(self.redis.time())

    def overview(self, policy: LeasePolicy) -> Overview:
        """Count what the ledger holds.

        Raises:
            BrokerUnavailable: also if the counts cannot be read, because something else wrote to them.
        """
        with translated():
            pipe = self.redis.pipeline(transaction=False)
            pipe.time()
            pipe.hgetall(keys.BACKLOG())
            pipe.zcard(keys.RUNNING())
            pipe.zcard(keys.DEAD())
            clock, backlog, running, dead = pipe.execute()
            overdue: int = self.redis.zcount(keys.RUNNING(), "-inf", _seconds(clock) - policy.judged_within_s)
        try:
            pairs = {queue.decode(): int(count) for queue, count in backlog.items()}
        except ValueError as error:
            raise BrokerUnavailable(f"{keys.BACKLOG()} is damaged: {error}") from error
        by_queue = {queue: count for queue, count in pairs.items() if queue != "*" and "|" not in queue}
        return Overview(pairs.get("*", 0), by_queue, running, dead, overdue, self._somebody_sweeps())

    def _somebody_sweeps(self) -> bool:
        try:
            with translated():
                return bool(self.redis.exists(keys.SWEEPER()))
        except RerankqError:
            return True  # a producer's user may not read it, which is no fault

    def try_to_write(self, job_id: str) -> None:
        """Write the record of a job that nobody has, and remove it: a server may answer reads and refuse writes."""
        with translated():
            self.redis.set(keys.JOB(job_id), "", px=1_000)
            self.redis.delete(keys.JOB(job_id))

    def server(self) -> Server:
        """Tell servers and their restarts apart."""
        with translated():
            try:
                info = self.redis.info("server")
            except NoPermissionError:
                # Some hosts forbid INFO: then a restart is noticed as an outage alone.
                info = {}
        return Server(str(info.get("run_id", "")), float(info.get("uptime_in_seconds", math.inf)))


class AsyncLedger:
    """As :class:`Ledger`, awaited."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.redis = client

    async def ask(self, call: Call[Answer]) -> Answer:
        """Run one call."""
        text, sha = source(call.script)
        with reraise_cancelled(), translated():
            try:
                return _read(call, await self.redis.evalsha(sha, 0, *call.args))
            except NoScriptError:
                return _read(call, await self.redis.eval(text, 0, *call.args))

    async def ask_all(self, wanted: Sequence[Call[Answer]]) -> list[Answer | RerankqError]:
        """Run calls in one round trip; what was refused or cannot be read stands as an error in its place."""
        with reraise_cancelled(), translated():
            pipe = self.redis.pipeline(transaction=False)
            _fill(pipe, wanted)
            raw = await pipe.execute(raise_on_error=False)
            for whole in (False, True):
                again = [at for at, answer in enumerate(raw) if isinstance(answer, NoScriptError)]
                if not again:
                    break
                pipe = self.redis.pipeline(transaction=False)
                loads = _load(pipe, [wanted[at] for at in again], whole=whole)
                given = await pipe.execute(raise_on_error=False)
                for at, answer in zip(again, given[loads:], strict=True):
                    raw[at] = answer
        answers: list[Answer | RerankqError] = []
        since = time.monotonic()
        for call, given in zip(wanted, raw, strict=True):
            answers.append(_answer(call, given))
            since = await yield_to_loop(since)
        return answers

    async def workers(self) -> list[WorkerInfo]:
        """All registered workers, living and lately gone."""
        with reraise_cancelled(), translated():
            pipe = self.redis.pipeline(transaction=False)
            pipe.time()
            pipe.hgetall(keys.WORKERS())
            clock, found = await pipe.execute()
        return workers_of(_seconds(clock), found)

    async def backlog(self) -> dict[str, int]:
        """Count the pairs that wait: in all queues (``*``), in each, and in each for a tenant (``QUEUE|TENANT``)."""
        with reraise_cancelled(), translated():
            found: Any = await self.redis.hgetall(keys.BACKLOG())
        return {name.decode(errors="replace"): int(count) for name, count in found.items() if count.isdigit()}


def _seconds(clock: tuple[int, int]) -> float:
    return clock[0] + clock[1] / 1e6


def _fill(pipe: Any, wanted: Iterable[Call[Any]]) -> None:
    for call in wanted:
        pipe.evalsha(source(call.script)[1], 0, *call.args)


def _load(pipe: Any, wanted: Sequence[Call[Any]], *, whole: bool) -> int:
    """Fill it with calls whose scripts the server has forgotten, and say how many answers come before theirs.

    Each script once; or (*whole*), where somebody flushes them all the time, with each call.
    """
    if whole:
        for call in wanted:
            pipe.eval(source(call.script)[0], 0, *call.args)
        return 0
    scripts = sorted({call.script for call in wanted})
    for script in scripts:
        pipe.script_load(source(script)[0])
    _fill(pipe, wanted)
    return len(scripts)


def _answer(call: Call[Answer], given: object) -> Answer | RerankqError:
    if isinstance(given, Exception):
        return _refusal(given)
    try:
        return _read(call, given)
    except RerankqError as error:
        return error


def _read(call: Call[Answer], given: object) -> Answer:
    try:
        return call.read(given)
    except (ValueError, TypeError) as error:
        # Anybody who may write to the ledger can damage a record.
        raise JobFailed(f"its record in the ledger cannot be read: {error}") from error
