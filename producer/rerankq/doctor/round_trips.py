"""Try every operation of producers and workers once, each within a time limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from ..broker.celery_app import make_app, round_trip
from ..connections import opening as connections
from ..errors import BrokerUnavailable
from ..ledger import calls
from ..ledger.keys import completion_channel
from ..ledger.limits import LedgerLimits
from ..ledger.runner import AsyncLedger, Ledger, translated
from ..settings import Settings
from ..urls import masked

# Seconds for each round trip; all run at once.
WITHIN_S = 8.0
# Seconds for an answer within one of them.
ANSWER_S = 5.0
PROBE_ID = "rerankq-doctor"


class RoundTrip(NamedTuple):
    """A round trip that was tried; ``fault`` is empty if it worked, ``refused`` if this user lacks the permission."""

    role: str
    path: str
    fault: str = ""
    refused: bool = False


def try_all(settings: Settings, roles: Iterable[str]) -> list[RoundTrip]:
    """Try every round trip of these roles, on keys that nothing else uses; leave nothing behind."""
    wanted = set(roles)
    paths = [one for one in _paths(settings) if one[0] in wanted]
    trips: list[RoundTrip | None] = [None] * len(paths)

    def run(at: int) -> None:
        role, path, attempt = paths[at]
        trips[at] = RoundTrip(role, path, *_fault(attempt))

    threads = [threading.Thread(target=run, args=(at,), daemon=True) for at in range(len(paths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    late = f"no answer within {WITHIN_S:g} s"
    return [trip or RoundTrip(role, path, late) for trip, (role, path, _) in zip(trips, paths, strict=True)]


def _paths(settings: Settings) -> Sequence[tuple[str, str, Callable[[], object]]]:
    return [
        (
            "broker",
            f"a Celery message over {masked(settings.broker)}",
            lambda: round_trip(settings, ANSWER_S),
        ),
        ("ledger", "a script", lambda: ask(settings)),
        ("ledger", "a script with asyncio", lambda: asyncio.run(ask_async(settings))),
        ("ledger", "a write", lambda: write(settings)),
        ("ledger", "a message to workers", lambda: receive(settings)),
        ("ledger", "a message to waiters", lambda: asyncio.run(receive_async(settings))),
        ("cache", "a ping", lambda: ping(settings)),
    ]


def _fault(attempt: Callable[[], object]) -> tuple[str, bool]:
    try:
        attempt()
    except Exception as error:  # noqa: BLE001  # whatever a library raises is the fault
        # Of our own error only the cause: the finding says already that there was no answer.
        message = str(error.__cause__ or error) if isinstance(error, BrokerUnavailable) else str(error)
        return message or type(error).__name__, "permission" in message.lower()
    return "", False


def ask(settings: Settings) -> None:
    """Run a script."""
    with connections.ledger(settings.ledger) as redis:
        Ledger(redis).ask(calls.snapshot(PROBE_ID, LedgerLimits.of(settings)))


def write(settings: Settings) -> None:
    """Write a record and remove it: a server may answer reads and refuse writes."""
    with connections.ledger(settings.ledger) as redis:
        Ledger(redis).try_to_write(f"{PROBE_ID}-writes")


async def ask_async(settings: Settings) -> None:
    """Run a script over an asyncio connection."""
    async with connections.ledger_async(settings.ledger) as redis:
        await AsyncLedger(redis).ask(calls.snapshot(PROBE_ID, LedgerLimits.of(settings)))


def receive(settings: Settings) -> None:
    """Receive a message as workers receive cancellations."""
    channel = completion_channel(settings.channel, PROBE_ID)
    with translated(), connections.ledger(settings.ledger) as redis, closing(redis.pubsub()) as subscription:
        subscription.subscribe(channel)
        _expect("subscribe", subscription.get_message(timeout=ANSWER_S))
        redis.publish(channel, "")
        _expect("message", subscription.get_message(timeout=ANSWER_S))


def _expect(kind: str, message: Any) -> None:
    if message is None or message["type"] != kind:
        raise BrokerUnavailable(f"no message within {ANSWER_S:g} s")


async def receive_async(settings: Settings) -> None:
    """Receive a message as clients that wait for rankings do."""
    channel = completion_channel(settings.channel, f"{PROBE_ID}-waiting")
    connection = connections.listening(settings.ledger)
    try:
        async with asyncio.timeout(ANSWER_S), connections.ledger_async(settings.ledger) as redis:
            await connection.connect()  # type: ignore[no-untyped-call]  # of redis-py
            await connection.send_command("SUBSCRIBE", channel)
            await connection.read_response()
            await redis.publish(channel, "")
            await connection.read_response()
    except TimeoutError:
        raise BrokerUnavailable(f"no message within {ANSWER_S:g} s") from None
    finally:
        await connection.disconnect(nowait=True)


def ping(settings: Settings) -> None:
    """Ping the cache: producers have no other permission there."""
    with connections.cache(settings.cache) as redis:
        redis.ping()


def workers_that_answer(settings: Settings, most: int) -> set[str] | None:
    """Ask all workers for their ids through the broker; None if this user may not."""
    with closing(make_app(settings)) as app:
        try:
            answers = app.control.inspect(timeout=3, limit=most).stats() or {}
        except Exception:  # noqa: BLE001  # the round trip reports it
            return None
    named = [stats.get("engine", {}).get("worker") for stats in answers.values() if isinstance(stats, dict)]
    return {name for name in named if isinstance(name, str)}
