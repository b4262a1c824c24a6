"""Go every way that producers and workers go, once, there and back, each within a limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from .. import BrokerUnavailable
from ..broker.celery_app import make_app, round_trip
from ..connections import opening as connections
from ..ledger import calls
from ..ledger.keys import completion_channel
from ..ledger.limits import LedgerLimits
from ..ledger.runner import AsyncLedger, Ledger, translated
from ..settings import Settings
from ..urls import masked

# Seconds for each way; all are gone at once.
WITHIN_S = 8.0
# Seconds for the other end of one of them to say something.
ANSWER_S = 5.0
NOBODY = "rerankq-doctor"


class Trip(NamedTuple):
    """A way that was gone. *fault* is empty where it led there and back; *refused*: this user may not go it."""

    role: str
    way: str
    fault: str = ""
    refused: bool = False


def go(settings: Settings, roles: Iterable[str]) -> list[Trip]:
    """Go every way of these roles; on names that nobody has, and nothing is left behind."""
    wanted = set(roles)
    ways = [(role, way, go_it) for role, way, go_it in _ways(settings) if role in wanted]
    trips: list[Trip | None] = [None] * len(ways)

    def one(at: int) -> None:
        role, way, go_it = ways[at]
        trips[at] = Trip(role, way, *_fault(go_it))

    threads = [threading.Thread(target=one, args=(at,), daemon=True) for at in range(len(ways))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    late = f"no answer within {WITHIN_S:g} s"
    return [trip or Trip(role, way, late) for trip, (role, way, _) in zip(trips, ways, strict=True)]


def _ways(settings: Settings) -> Sequence[tuple[str, str, Callable[[], object]]]:
    return [
        (
            "broker",
            f"a message by way of Celery over {masked(settings.broker)}",
            lambda: round_trip(settings, ANSWER_S),
        ),
        ("ledger", "a script", lambda: ask(settings)),
        ("ledger", "a script, by asyncio", lambda: asyncio.run(ask_async(settings))),
        ("ledger", "a write", lambda: write(settings)),
        ("ledger", "a message to workers", lambda: hear(settings)),
        ("ledger", "a message to waiters", lambda: asyncio.run(hear_async(settings))),
        ("cache", "a question", lambda: look_up(settings)),
    ]


def _fault(go_it: Callable[[], object]) -> tuple[str, bool]:
    try:
        go_it()
    except Exception as error:  # noqa: BLE001  # whatever a library raises, it is a fault to tell
        # Of ours the cause alone: that the ledger does not answer is what the line begins with.
        said = str(error.__cause__ or error) if isinstance(error, BrokerUnavailable) else str(error)
        return said or type(error).__name__, "permission" in said.lower()
    return "", False


def ask(settings: Settings) -> None:
    """Run a script."""
    with connections.ledger(settings.ledger) as redis:
        Ledger(redis).ask(calls.snapshot(NOBODY, LedgerLimits.of(settings)))


def write(settings: Settings) -> None:
    """Write a record and remove it again: a server may answer every question and take nothing."""
    with connections.ledger(settings.ledger) as redis:
        Ledger(redis).try_to_write(f"{NOBODY}-writes")


async def ask_async(settings: Settings) -> None:
    """Run a script over the connections of asyncio."""
    async with connections.ledger_async(settings.ledger) as redis:
        await AsyncLedger(redis).ask(calls.snapshot(NOBODY, LedgerLimits.of(settings)))


def hear(settings: Settings) -> None:
    """Hear a message as workers hear cancellations."""
    channel = completion_channel(settings.channel, NOBODY)
    with translated(), connections.ledger(settings.ledger) as redis, closing(redis.pubsub()) as heard:
        heard.subscribe(channel)
        _expect("subscribe", heard.get_message(timeout=ANSWER_S))
        redis.publish(channel, "")
        _expect("message", heard.get_message(timeout=ANSWER_S))


def _expect(kind: str, message: Any) -> None:
    if message is None or message["type"] != kind:
        raise BrokerUnavailable(f"nothing was heard within {ANSWER_S:g} s")


async def hear_async(settings: Settings) -> None:
    """Hear a message as those do who wait for rankings."""
    channel = completion_channel(settings.channel, f"{NOBODY}-waiting")
    line = connections.listening(settings.ledger)
    try:
        async with asyncio.timeout(ANSWER_S), connections.ledger_async(settings.ledger) as redis:
            await line.connect()  # type: ignore[no-untyped-call]  # of redis-py
            await line.send_command("SUBSCRIBE", channel)
            await line.read_response()
            await redis.publish(channel, "")
            await line.read_response()
    except TimeoutError:
        raise BrokerUnavailable(f"nothing was heard within {ANSWER_S:g} s") from None
    finally:
        await line.disconnect(nowait=True)


def look_up(settings: Settings) -> None:
    """Ask the cache for a sign of life: producers may do no more there."""
    with connections.cache(settings.cache) as redis:
        redis.ping()


def heard_through_the_broker(settings: Settings, most: int) -> set[str] | None:
    """Ask all workers who they are, by way of the broker; None where this user may not ask."""
    with closing(make_app(settings)) as app:
        try:
            answers = app.control.inspect(timeout=3, limit=most).stats() or {}
        except Exception:  # noqa: BLE001  # told by the round trip; here nobody was heard, or nobody may ask
            return None
    named = [stats.get("engine", {}).get("worker") for stats in answers.values() if isinstance(stats, dict)]
    return {name for name in named if isinstance(name, str)}
