"""How a client waits, by a clock that goes on at once to what comes next: hours take no time."""

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

from rerankq import BrokerUnavailable
from rerankq.client import completions as waiting
from rerankq.client.completions import CompletionListener
from rerankq.contract import JobStatus
from rerankq.ledger import JobSnapshot, LedgerLimits


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock moves only while nothing is to be done, and then at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        select = self._selector.select

        def skip(timeout: float | None) -> Any:
            self.now += timeout or 0
            return select(0)

        self._selector.select = skip

    def time(self) -> float:
        return self.now


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(work())


class Connection:
    """The way to a server that confirms what is subscribed to, and answers questions after so many seconds or never."""

    is_connected = True

    def __init__(self, answers_after_s: float | None = 0) -> None:
        self.answers_after_s = answers_after_s
        self.answers: asyncio.Queue[list[Any]] = asyncio.Queue()
        self.said: list[str] = []

    async def connect(self) -> None: ...

    async def disconnect(self, nowait: bool = False) -> None: ...

    async def send_command(self, command: str, *channels: str, check_health: bool) -> None:
        self.said.append(command)
        for channel in channels:
            self.answers.put_nowait([command.lower().encode(), channel.encode(), 1])
        if command == "PING" and self.answers_after_s is not None:
            asyncio.get_running_loop().call_later(self.answers_after_s, self.answers.put_nowait, [b"pong", b""])

    async def read_response(self) -> list[Any]:
        return await self.answers.get()


class StandInLedger:
    """A ledger in which every job waits; *away* is asked before each answer."""

    def __init__(self, away: Callable[[], bool] = lambda: False) -> None:
        self.away = away
        self.asked_at: list[float] = []

    async def ask_all(self, wanted: list[Any]) -> list[JobSnapshot]:
        self.asked_at.append(asyncio.get_running_loop().time())
        if self.away():
            raise BrokerUnavailable("away")
        return [JobSnapshot(JobStatus(job_id="a", state="queued"), "", None)] * len(wanted)


async def wait(connections: list[Connection], seconds: float, ledger: StandInLedger | None = None) -> list[Connection]:
    """Wait for a job that does not end, over one connection after the other; answer those that were opened."""
    opened: list[Connection] = []

    def dial() -> Connection:
        opened.append(connections[min(len(opened), len(connections) - 1)])
        return opened[-1]

    completions = CompletionListener(ledger or StandInLedger(), dial, LedgerLimits("tests"))
    future = completions.expect("a")
    await asyncio.sleep(seconds)
    assert not future.done()
    completions.drop("a", future)
    await completions.close()
    return opened


def test_a_connection_that_answers_is_kept_however_long_no_job_ends():
    async def work() -> None:
        answering = Connection()
        assert await wait([answering], 100) == [answering]
        every_s = 100 / answering.said.count("PING")
        assert waiting.PING_AFTER_S <= every_s <= waiting.PING_AFTER_S + 2 * waiting.CHECK_S

    run(work)


def test_a_connection_that_answers_late_is_kept_until_it_is_silent_for_too_long():
    async def work() -> None:
        late = Connection(waiting.SILENCE_S - 2 * waiting.CHECK_S)
        assert await wait([late], 100) == [late]
        dead, good = Connection(None), Connection()
        at_least_s = waiting.PING_AFTER_S + waiting.SILENCE_S
        assert await wait([dead, good], at_least_s - waiting.CHECK_S) == [dead]
        assert await wait([dead, good], at_least_s + 4 * waiting.CHECK_S) == [dead, good]
        assert "SUBSCRIBE" in good.said, "and hears of what is waited for"

    run(work)


def test_a_suspended_process_does_not_count_its_own_pause_as_the_servers_silence():
    async def work() -> None:
        loop = asyncio.get_running_loop()
        connection = Connection(2 * waiting.CHECK_S)

        async def suspended_every_few_seconds() -> None:
            for _ in range(20):
                await asyncio.sleep(3.3)
                loop.now += 3_600

        often = asyncio.create_task(suspended_every_few_seconds())
        assert await wait([connection], 20 * 3_600 + 60) == [connection]
        await often

    run(work)


def test_waited_jobs_are_read_every_few_seconds_and_at_growing_intervals_while_the_ledger_is_away():
    async def work() -> None:
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        ledger = StandInLedger(away=lambda: 30 < loop.time() - began_at < 60)
        await wait([Connection()], 100, ledger)
        times = [at - began_at for at in ledger.asked_at]
        assert times[0] == 0, "as soon as no ending can be missed any more"
        usual = [after - before for before, after in pairwise(times) if after < 30 or before > 62]
        assert usual[1:] == pytest.approx([waiting.READ_AGAIN_S] * len(usual[1:]), abs=0.5)
        away = [at for at in times if 30 < at < 60]
        pauses = [after - before for before, after in pairwise(away)]
        assert pauses[:5] == pytest.approx([0.5, 1, 2, 4, 4], abs=0.3)

    run(work)


def test_the_interval_of_readings_begins_anew_after_an_outage():
    async def work() -> None:
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        ledger = StandInLedger(away=lambda: 10 < (loop.time() - began_at) % 50 < 30)
        await wait([Connection()], 100, ledger)
        second = [at - began_at for at in ledger.asked_at if 60 < at - began_at < 80]
        assert second[1] - second[0] == pytest.approx(0.5, abs=0.3)

    run(work)


class DroppedConnection(Connection):
    """Confirms what is subscribed to, and is lost a second later."""

    async def read_response(self) -> list[Any]:
        async with asyncio.timeout(1):
            return await self.answers.get()


def test_a_connection_that_received_something_is_replaced_at_once_however_often(caplog: pytest.LogCaptureFixture):
    async def work() -> None:
        opened = await wait([DroppedConnection() for _ in range(1_000)], 60)
        assert 50 <= len(opened) <= 61

    run(work)
    assert caplog.messages == [], "rankings came meanwhile"
