"""The awaitable client against a real Redis; a stand-in plays the worker."""

import asyncio
import gc
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as runs
from hypothesis import strategies as st

import rerankq
from rerankq import AsyncClient, RerankJob
from rerankq.client import completions as waiting
from rerankq.client import loop_connections
from rerankq.client.completions import CompletionListener
from rerankq.connections import opening as connections
from rerankq.ledger import LedgerLimits, connect_async, subscription
from rerankq.ledger.runner import AsyncLedger
from rerankq.settings import Settings

pytestmark = pytest.mark.slow

NEVER_S = 1e6
T = TypeVar("T")


@pytest.fixture
def only_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reading but after a word of the ledger: what arrives was pushed."""
    monkeypatch.setattr(waiting, "READ_AGAIN_S", NEVER_S)
    monkeypatch.setattr(waiting, "FIRST_READ_S", NEVER_S)


def jobs(count: int, **fields: Any) -> list[RerankJob]:
    return [RerankJob(query=f"question {number}", chunks=["x", "y"], **fields) for number in range(count)]


def completions_of(client: AsyncClient) -> CompletionListener:
    return client._here().completions


def run(work: Callable[[AsyncClient], Coroutine[Any, Any, Any]], settings: Settings) -> Any:
    async def main() -> Any:
        async with AsyncClient(settings) as client, asyncio.timeout(60):
            return await work(client)

    result = asyncio.run(main())
    gc.collect()  # a connection that was left open shows in the test that left it
    return result


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  # what is waited for happens in Redis
            await asyncio.sleep(0.005)


def scripts_run(worker) -> int:
    return worker.redis.info("commandstats")["cmdstat_evalsha"]["calls"]


def subscribed(worker) -> int:
    return len(worker.redis.pubsub_channels("*:job:*"))


def test_all_methods_await(settings: Settings, worker):
    async def work(client: AsyncClient) -> None:
        one, *more = await client.submit_many(jobs(4))
        assert (await client.status(one)).state == "queued"
        worker.finish(one, more[0])
        assert (await client.result(one, timeout=20)).job_id == one
        assert await client.cancel(more[1]) == "cancelled"
        got = {job_id: answer async for job_id, answer in client.as_completed(more[:2], timeout=20)}
        assert [type(got[job_id]).__name__ for job_id in more[:2]] == ["Ranking", "JobCancelled"]
        await client.forget(one, *more)
        assert [(await client.status(job_id)).state for job_id in (one, more[2])] == ["unknown", "queued"]
        reranking = asyncio.create_task(client.rerank("why?", ["because"], tenant="t"))
        await until(lambda: worker.redis.zcard("rerankq:sent:rerankq.interactive:t"))
        worker.finish(worker.redis.zrange("rerankq:sent:rerankq.interactive:t", 0, -1)[0].decode())
        assert len((await reranking).chunks) == 1
        assert await client.workers() == []

    run(work, settings)


def test_a_ledger_that_hangs_does_not_hold_up_whoever_waits_with_a_timeout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rerankq.client.asynchronous.LAST_READ_S", 0.05)

    async def work(client: AsyncClient) -> None:
        with pytest.raises(rerankq.JobTimedOut):
            await client.result("any", timeout=0.05)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        run(work, Settings(broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0"))


# Pushed, and never missed


@pytest.mark.usefixtures("only_pushed")
def test_a_ranking_is_pushed_not_polled_for(settings: Settings, worker):
    async def work(client: AsyncClient) -> None:
        (job_id,) = await client.submit_many(jobs(1))
        result = asyncio.create_task(client.result(job_id))
        await until(lambda: subscribed(worker))
        await asyncio.sleep(0.3)  # long enough for the one reading after the subscription
        before = scripts_run(worker)
        await asyncio.sleep(0.3)
        assert scripts_run(worker) == before, "waiting costs the server nothing"
        worker.finish(job_id)
        assert (await result).job_id == job_id

    run(work, settings)


MOMENTS = ["before expecting", "before subscribing", "after subscribing", "before reading", "after reading"]


@pytest.mark.usefixtures("only_pushed")
@pytest.mark.parametrize("moment", MOMENTS)
def test_no_ending_is_missed_between_subscribing_and_reading(
    settings: Settings, worker, monkeypatch: pytest.MonkeyPatch, moment: str
):
    ids: list[str] = []

    def now(this: str) -> None:
        if this == moment and ids:
            worker.finish(ids.pop())

    def hook(name: str, before: str, after: str) -> None:
        method = getattr(CompletionListener, name)

        async def hooked(self: CompletionListener, *given: object) -> None:
            now(before)
            await method(self, *given)
            now(after)

        monkeypatch.setattr(CompletionListener, name, hooked)

    hook("_subscribe", "before subscribing", "after subscribing")
    hook("_read_batches", "before reading", "after reading")

    async def work(client: AsyncClient) -> None:
        (job_id,) = await client.submit_many(jobs(1))
        ids.append(job_id)
        now("before expecting")
        assert (await client.result(job_id, timeout=20)).job_id == job_id
        assert not ids

    run(work, settings)


@pytest.mark.usefixtures("only_pushed")
@runs(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(delays=st.lists(st.integers(0, 40), min_size=1, max_size=40), kills=st.lists(st.integers(0, 40), max_size=3))
def test_every_waiter_is_answered_whenever_jobs_end_and_connections_break(
    settings: Settings, worker, delays: list[int], kills: list[int]
):
    """Delays are in event-loop turns."""

    async def after(turns: int, do: Callable[[], object]) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        do()

    async def work(client: AsyncClient) -> None:
        worker.redis.flushall()
        ids = await client.submit_many(jobs(len(delays)))
        async with asyncio.TaskGroup() as group:
            results = [group.create_task(client.result(job_id)) for job_id in ids]
            for job_id, turns in zip(ids, delays, strict=True):
                group.create_task(after(turns, lambda job_id=job_id: worker.finish(job_id)))
            for turns in kills:
                group.create_task(after(turns, lambda: worker.redis.client_kill_filter(_type="pubsub")))
        assert [result.result().job_id for result in results] == ids

    run(work, settings)


@pytest.mark.usefixtures("only_pushed")
def test_thousands_wait_on_one_connection(settings: Settings, worker):
    async def work(client: AsyncClient) -> None:
        ids = await client.submit_many(jobs(3_000))
        async with asyncio.TaskGroup() as group:
            results = [group.create_task(client.result(job_id)) for job_id in ids]
            await until(lambda: subscribed(worker) == 3_000)
            assert len(worker.redis.client_list(_type="pubsub")) == 1
            for start in range(0, 3_000, 500):
                await asyncio.to_thread(worker.finish, *ids[start : start + 500])
        assert [result.result().job_id for result in results] == ids
        await until(lambda: not subscribed(worker))

    run(work, settings)


@pytest.mark.usefixtures("only_pushed")
def test_all_waiters_of_one_job_are_answered_and_may_come_and_go(settings: Settings, worker):
    async def work(client: AsyncClient) -> None:
        (job_id,) = await client.submit_many(jobs(1))
        results = [asyncio.create_task(client.result(job_id)) for _ in range(10)]
        await until(lambda: subscribed(worker))
        for result in results[:9]:
            result.cancel()
            await asyncio.wait([result])
        assert subscribed(worker) == 1
        late = asyncio.create_task(client.result(job_id))
        worker.finish(job_id)
        assert (await results[9]).job_id == (await late).job_id == job_id
        # And again, when nobody has waited for a while.
        assert (await client.result(job_id)).job_id == job_id

    run(work, settings)


# Outages


@pytest.mark.usefixtures("only_pushed")
def test_a_killed_subscription_is_opened_again(settings: Settings, worker):
    async def work(client: AsyncClient) -> None:
        ids = await client.submit_many(jobs(30))
        results = [asyncio.create_task(client.result(job_id)) for job_id in ids]
        await until(lambda: subscribed(worker) == 30)
        for number in range(3):
            (before,) = [each["id"] for each in worker.redis.client_list(_type="pubsub")]
            worker.redis.client_kill_filter(_type="pubsub")
            if number == 1:
                worker.finish(*ids[:10])  # while nobody listens
            await until(
                lambda before=before: (
                    [each["id"] for each in worker.redis.client_list(_type="pubsub")] not in ([], [before])
                )
            )
        await until(lambda: subscribed(worker) == 20)
        worker.finish(*ids[10:])
        assert [ranking.job_id for ranking in await asyncio.gather(*results)] == ids

    run(work, settings)


def test_waiting_survives_a_restart_of_the_server(restartable_redis, make_worker):
    settings = Settings(broker_url=restartable_redis.url)

    async def work(client: AsyncClient) -> None:
        worker = make_worker(settings)
        ids = await client.submit_many(jobs(50))
        results = [asyncio.create_task(client.result(job_id)) for job_id in ids]
        await until(lambda: subscribed(worker) == 50)
        worker.finish(*ids[:20])
        await asyncio.to_thread(restartable_redis.kill)
        await asyncio.sleep(0.6)  # long enough for a try that fails
        await asyncio.to_thread(restartable_redis.start)
        await asyncio.to_thread(worker.finish, *ids[20:40])
        await until(lambda: subscribed(worker) == 10)
        await asyncio.to_thread(worker.finish, *ids[40:])
        assert [ranking.job_id for ranking in await asyncio.gather(*results)] == ids
        # And the client goes on.
        (one,) = await client.submit_many([RerankJob(query="after", chunks=["x"])])
        assert (await client.status(one)).state == "queued"

    run(work, settings)


def test_a_deadline_passes_without_any_message_of_a_worker(settings: Settings, worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "READ_AGAIN_S", 0.05)

    async def work(client: AsyncClient) -> None:
        (job_id,) = await client.submit_many(jobs(1, deadline_s=0.1))
        with pytest.raises(rerankq.JobExpired):
            await client.result(job_id)

    run(work, settings)


def test_readings_go_on_however_busy_the_client_is(settings: Settings, worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "READ_AGAIN_S", 0.05)

    async def work(client: AsyncClient) -> None:
        quiet, *busy = await client.submit_many(jobs(2))
        completions = completions_of(client)
        expired = asyncio.create_task(client.result(quiet))
        await until(lambda: subscribed(worker))
        worker.redis.hset(f"rerankq:job:{quiet}", "deadline", "1.0")
        while not expired.done():
            # Never a moment without something to do.
            future = completions.expect(busy[0])
            await asyncio.sleep(0)
            completions.drop(busy[0], future)
        with pytest.raises(rerankq.JobExpired):
            await expired

    run(work, settings)


def test_an_idle_subscription_outlives_the_patience_for_answers(
    settings: Settings, worker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "ANSWER_S", 0.1)
    monkeypatch.setattr(waiting, "READ_AGAIN_S", NEVER_S)

    async def work(client: AsyncClient) -> None:
        (job_id,) = await client.submit_many(jobs(1))
        result = asyncio.create_task(client.result(job_id))
        await until(lambda: subscribed(worker))
        before = [each["id"] for each in worker.redis.client_list(_type="pubsub")]
        await asyncio.sleep(0.5)
        assert [each["id"] for each in worker.redis.client_list(_type="pubsub")] == before
        worker.finish(job_id)
        await result

    run(work, settings)


def test_a_ranking_that_cannot_be_read_fails_its_own_job_alone(settings: Settings, worker):
    async def work(client: AsyncClient) -> None:
        ids = await client.submit_many(jobs(3))
        worker.finish(*ids)
        worker.redis.hset(f"rerankq:job:{ids[1]}", "ranking", "{}")
        answers = await asyncio.gather(*(client.result(one) for one in ids), return_exceptions=True)
        assert [type(answer).__name__ for answer in answers] == ["Ranking", "JobFailed", "Ranking"]
        got = {job_id: answer async for job_id, answer in client.as_completed(ids)}
        assert isinstance(got[ids[1]], rerankq.JobFailed)

    run(work, settings)


def test_a_bug_in_reading_raises_for_all_waiters(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    async def broken(self: CompletionListener) -> None:
        raise ZeroDivisionError

    async def work(client: AsyncClient) -> None:
        (job_id,) = await client.submit_many(jobs(1))
        with monkeypatch.context() as patched:
            patched.setattr(CompletionListener, "_read_batches", broken)
            with pytest.raises(rerankq.BrokerUnavailable, match="ZeroDivisionError"):
                await client.result(job_id)
        with pytest.raises(rerankq.JobTimedOut):  # the next one finds a listener that works
            await client.result(job_id, timeout=0.1)

    run(work, settings)


# The event loop


@asynccontextmanager
async def counting_turns() -> AsyncIterator[list[int]]:
    """Count how often the event loop lets others run."""
    turns = [0]

    async def count() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    yield turns
    counter.cancel()


def test_bulk_work_gives_the_event_loop_back_between_any_two_jobs(
    settings: Settings, worker, monkeypatch: pytest.MonkeyPatch
):
    # Without patience at all, each piece of work shows as a turn of the loop.
    monkeypatch.setattr("rerankq.ledger.runner.WORK_S", 0.0)

    async def work(client: AsyncClient) -> None:
        await client.submit(jobs(1)[0])
        async with counting_turns() as turns:
            ids = await client.submit_many(jobs(400, tenant="bulk"))
        assert turns[0] >= 400
        worker.finish(*ids)
        async with counting_turns() as turns:
            assert len([one async for one in client.as_completed(ids)]) == 400
        assert turns[0] >= 400

    run(work, settings)


def test_nothing_of_the_client_waits_inside_the_event_loop(settings: Settings, worker, monkeypatch: pytest.MonkeyPatch):
    """Whatever the ledger takes long to answer, others run meanwhile: none of it is a blocking call."""

    async def work(client: AsyncClient) -> None:
        ids = await client.submit_many(jobs(3))
        await client.status(ids[0])
        for ask in (
            lambda: client.status(ids[0]),
            lambda: client.submit(RerankJob(query="more", chunks=["x"])),
            lambda: client.cancel(ids[1]),
            lambda: client.forget(ids[2]),
            client.workers,
        ):
            worker.redis.execute_command("CLIENT", "PAUSE", 100, "ALL")
            async with counting_turns() as turns:
                await ask()
            assert turns[0] > 20
        async with counting_turns() as turns:
            await client.aclose()
        assert turns[0] > 1

    run(work, settings)


def test_thousands_may_submit_at_once_over_a_few_connections(settings: Settings, worker):
    async def work(client: AsyncClient) -> None:
        ids = await asyncio.gather(*(client.submit(one) for one in jobs(2_000)))
        assert len(set(ids)) == 2_000
        ours = [each for each in worker.redis.client_list() if each["db"] == worker.redis.client_info()["db"]]
        assert len(ours) < 25

    run(work, settings)


@pytest.fixture
def named(settings: Settings) -> Settings:
    """Settings by which the connections of a client can be told from others."""
    return Settings(broker_url=settings.broker, ledger_url=f"{settings.ledger}?client_name=tested")


def none_connected(worker) -> bool:
    ends_at = time.monotonic() + 10
    while connected(worker) and time.monotonic() < ends_at:
        time.sleep(0.01)
    return not connected(worker)


def connected(worker) -> int:
    return len([each for each in worker.redis.client_list() if each["name"] == "tested"])


# How a program may end an event loop.


def bare(main: Coroutine[Any, Any, T]) -> T:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


def with_generators_closed(main: Coroutine[Any, Any, T]) -> T:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


ENDINGS = {"asyncio.run": asyncio.run, "bare": bare, "generators closed": with_generators_closed}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_client_serves_one_event_loop_after_another_and_leaves_nothing_open_in_any(
    named: Settings, worker, ending: str
):
    client = AsyncClient(named)

    async def way(number: int) -> str:
        job_id = await client.submit(RerankJob(query=f"loop {number}", chunks=["x"]))
        worker.finish(job_id)
        return (await client.result(job_id, timeout=20)).job_id

    gc.disable()  # nothing is to be left to it
    try:
        assert len({ENDINGS[ending](way(number)) for number in range(8)}) == 8
        # The last loop's connections, where nobody said that it would end.
        assert connected(worker) <= 3 if ending == "bare" else none_connected(worker)
    finally:
        gc.enable()
    asyncio.run(client.aclose())
    assert none_connected(worker)
    gc.collect()


def test_a_client_in_use_when_its_event_loop_ends_serves_the_next(named: Settings, worker):
    client = AsyncClient(named)

    async def way(number: int) -> str:
        job_id = await client.submit(RerankJob(query=f"loop {number}", chunks=["x"]))
        never = (await client.submit_many(jobs(1, id="never")))[0]
        waiting_for_ever = asyncio.create_task(client.result(never))
        coming = client.as_completed([never])
        waiting_too = asyncio.create_task(anext(coming))
        worker.finish(job_id)
        assert (await client.result(job_id, timeout=20)).job_id == job_id
        assert not waiting_for_ever.done()
        assert not waiting_too.done()
        return job_id

    assert len({asyncio.run(way(number)) for number in range(8)}) == 8
    assert none_connected(worker)
    gc.collect()


def test_a_garbage_collected_client_is_closed(named: Settings, worker):
    async def main() -> None:
        client = AsyncClient(named)
        await client.status("a")
        assert connected(worker)
        del client
        gc.collect()
        await until(lambda: connected(worker) == 0)

    asyncio.run(main())
    gc.collect()


def test_two_event_loops_share_a_client_at_once(named: Settings, worker):
    client = AsyncClient(named)

    async def way(thread: int) -> int:
        for number in range(40):
            job_id = await client.submit(RerankJob(query=f"thread {thread}, {number}", chunks=["x"]))
            worker.finish(job_id)
            assert (await client.result(job_id, timeout=20)).job_id == job_id
        return 40

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda thread: asyncio.run(way(thread)), range(4))) == 160
    assert none_connected(worker)
    gc.collect()


def test_closing_in_one_event_loop_ends_the_waiting_in_another(named: Settings, worker):
    client = AsyncClient(named)
    waits = threading.Event()

    async def waiter() -> None:
        (job_id,) = await client.submit_many(jobs(1))
        waiting = asyncio.create_task(client.result(job_id))
        await until(lambda: subscribed(worker))
        waits.set()
        await waiting

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asyncio.run, waiter())
        assert waits.wait(30)
        asyncio.run(client.aclose())
        with pytest.raises(rerankq.ClientClosed):
            waiting.result(30)
    assert none_connected(worker)
    gc.collect()


ASYNC_CALLS: dict[str, Callable[[AsyncClient], Any]] = {
    "submit": lambda client: client.submit(jobs(1)[0]),
    "submit_many": lambda client: client.submit_many([]),
    "submission": lambda client: client.submission(),
    "result": lambda client: client.result("a", timeout=1),
    "as_completed": lambda client: client.as_completed(["a"]),
    "status": lambda client: client.status("a"),
    "cancel": lambda client: client.cancel("a"),
    "forget": lambda client: client.forget(),
    "dead": lambda client: client.dead(),
    "dead_job": lambda client: client.dead_job("a"),
    "retry_dead": lambda client: client.retry_dead("a"),
    "drop_dead": lambda client: client.drop_dead("a"),
    "rerank": lambda client: client.rerank("q", ["x"]),
    "workers": lambda client: client.workers(),
    "registered_workers": lambda client: client.registered_workers(),
    "backlog": lambda client: client.backlog(),
    "load": lambda client: client.load(),
    "recent_workers": lambda client: client.recent_workers(),
    "serving": lambda client: client.serving(),
}


def test_a_closed_client_says_so_in_every_method(settings: Settings):
    assert set(ASYNC_CALLS) == {name for name in vars(AsyncClient) if not name.startswith("_")} - {"aclose"}

    async def work(client: AsyncClient) -> None:
        await client.status("a")
        await client.aclose()
        for call in ASYNC_CALLS.values():
            with pytest.raises(rerankq.ClientClosed, match="the client is closed"):  # noqa: PT012  # some await
                called = call(client)
                if asyncio.iscoroutine(called):
                    await called
        with pytest.raises(rerankq.ClientClosed):
            await client.__aenter__()
        await client.aclose()

    run(work, settings)


def test_every_call_has_a_limit_whatever_the_ledger_does_and_so_has_closing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop_connections, "ANSWER_WITHIN_S", 0.3)
    monkeypatch.setattr(loop_connections, "CLOSE_S", 0.3)

    async def work(client: AsyncClient) -> None:
        # More than there are turns: whoever stands in line behind those that hang does not wait for each of them.
        many = [client.status(f"{number}") for number in range(200)]
        others = [client.submit(jobs(1)[0]), client.cancel("a"), client.forget("a"), client.workers(), client.dead()]
        started = time.monotonic()
        ends = await asyncio.gather(*many, *others, return_exceptions=True)
        assert {type(end) for end in ends} == {rerankq.BrokerUnavailable}
        assert time.monotonic() - started < 15
        waiting = [asyncio.create_task(client.status("a")), asyncio.create_task(client.result("a"))]
        await asyncio.sleep(0)
        await client.aclose()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(end) for end in ends} == {rerankq.ClientClosed}

    with socket.create_server(("127.0.0.1", 0), backlog=500) as silent:
        run(work, Settings(broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0"))


def test_a_rerank_keeps_its_timeout_though_the_ledger_hangs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rerankq.client.asynchronous.LAST_READ_S", 0.05)

    async def work(client: AsyncClient) -> None:
        with pytest.raises(rerankq.JobTimedOut):
            await client.rerank("q", ["x"], timeout=0.1)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        run(work, Settings(broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0"))


@pytest.mark.parametrize("turns", [0, 1, 5, 20, 60, 150])
def test_a_cancelled_submission_stops_and_sends_doorbells_for_accepted_jobs(settings: Settings, worker, turns: int):
    large = [RerankJob(query=f"question {number}", chunks=["x" * 20_000]) for number in range(2_000)]

    async def work(client: AsyncClient) -> None:
        submitting = asyncio.create_task(client.submit_many(large))
        for _ in range(turns):
            await asyncio.sleep(0)
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting

    run(work, settings)
    accepted = len(worker.redis.keys("rerankq:job:*"))
    assert accepted < 2_000
    with redis.Redis.from_url(settings.broker) as broker:
        assert broker.llen("rerankq:rerankq.interactive") == min(accepted, settings.doorbell_window)


def test_as_completed_stopped_midway_leaves_nothing_subscribed(settings: Settings, worker):
    async def work(client: AsyncClient) -> None:
        ids = await client.submit_many(jobs(10))
        worker.finish(ids[0])
        coming = client.as_completed(ids)
        assert (await anext(coming))[0] == ids[0]
        await coming.aclose()
        await until(lambda: not subscribed(worker))
        assert completions_of(client)._waiters == {}

    run(work, settings)


def test_waiting_raises_at_once_if_the_ledger_was_never_reached():
    async def work(client: AsyncClient) -> None:
        started = time.monotonic()
        with pytest.raises(rerankq.BrokerUnavailable, match="does not answer"):
            await client.result("a")
        with pytest.raises(rerankq.BrokerUnavailable, match="does not answer"):
            await anext(client.as_completed(["a"]))
        assert time.monotonic() - started < 20

    run(work, Settings(broker_url="redis://127.0.0.1:1/0"))


def test_jobs_that_were_submitted_before_an_outage_are_waited_for_though_none_was_read_yet(
    restartable_redis, make_worker, caplog: pytest.LogCaptureFixture
):
    settings = Settings(broker_url=restartable_redis.url)

    async def work(client: AsyncClient) -> None:
        worker = make_worker(settings)
        one, *others = await client.submit_many(jobs(3))
        await asyncio.to_thread(restartable_redis.kill)
        result = asyncio.create_task(client.result(one))
        completed = asyncio.create_task(dict_of(client.as_completed(others)))
        await until(lambda: result.done() or "waiting for 3 jobs, trying again" in caplog.text)
        await asyncio.to_thread(restartable_redis.start)
        await asyncio.to_thread(worker.finish, one, *others)
        assert (await result).job_id == one
        assert {job_id: ranking.job_id for job_id, ranking in (await completed).items()} == {
            job_id: job_id for job_id in others
        }

    async def dict_of(completed: Any) -> dict[str, Any]:
        return {job_id: outcome async for job_id, outcome in completed}

    run(work, settings)


def test_the_listener_closes_while_the_server_is_away(settings: Settings):
    async def main() -> None:
        away = "redis://127.0.0.1:1/0"
        completions = CompletionListener(
            AsyncLedger(connect_async(away)), partial(subscription, away), LedgerLimits.of(settings)
        )
        future = completions.expect("a")
        await completions.close()
        with pytest.raises(rerankq.BrokerUnavailable):
            await future
        completions.drop("a", future)

    asyncio.run(main())


# A peer that hangs


class Mute:
    """A way to a Redis on which, from a word of the client's on, no answer comes back any more; b"" = from the start.

    What was muted stays so, as a lost flow does. ``reads`` off: nothing is even taken any more, the client's window
    fills. ``spares`` is a word that a flow which says it is not muted for.
    """

    def __init__(self, url: str, word: bytes, *, reads: bool = True) -> None:
        self.word, self.reads, self.muted = word, reads, 0
        self._to = urlsplit(url)
        self._stops: list[Callable[[], None]] = []

    async def __aenter__(self) -> "Mute":
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        secret, at, _ = self._to.netloc.rpartition("@")
        self.url = self._to._replace(netloc=f"{secret}{at}127.0.0.1:{port}").geturl()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for stop in self._stops:
            stop()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._stops.append(writer.close)
        there, back = await asyncio.open_connection(self._to.hostname, self._to.port)
        self._stops.append(back.close)
        mute = asyncio.Event()

        async def up() -> None:
            while self.reads or not mute.is_set():
                if self.word == b"" and not mute.is_set():
                    self.muted += 1
                    mute.set()
                    continue
                said = await reader.read(65_536)
                if not said:
                    return
                if self.word and self.word in said and not mute.is_set():
                    self.muted += 1
                    mute.set()
                if not mute.is_set():
                    back.write(said)
            await asyncio.Event().wait()

        async def down() -> None:
            while said := await there.read(65_536):
                if not mute.is_set():
                    writer.write(said)

        with suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(up(), down())


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can wait for."""
    for name, seconds in {
        "OPEN_S": 0.2,
        "SEND_S": 0.2,
        "SILENCE_S": 0.2,
        "CHECK_S": 0.05,
        "PING_AFTER_S": 0.05,
    }.items():
        monkeypatch.setattr(waiting, name, seconds)
    monkeypatch.setattr(waiting, "TRY_AGAIN_S", 0.05)


# Where the connection on which endings are told goes dumb.
STAGES = {
    "accepted": b"",
    "authenticating": b"AUTH",
    "naming itself": b"SETINFO",
    "subscribing": b"\r\nSUBSCRIBE\r\n",
    "subscribed": b"PING",
    "leaving": b"UNSUBSCRIBE",
}


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("stage", STAGES)
def test_jobs_are_read_while_the_connection_for_completions_hangs(
    settings: Settings, worker, monkeypatch: pytest.MonkeyPatch, stage: str
):
    monkeypatch.setattr(waiting, "READ_AGAIN_S", 0.1)

    async def work(client: AsyncClient) -> None:
        waited, left = await client.submit_many(jobs(2))
        async with Mute(settings.ledger, STAGES[stage]) as mute:
            monkeypatch.setattr(completions_of(client), "_connect", lambda: subscription(mute.url))
            result = asyncio.create_task(client.result(waited))
            if stage == "leaving":
                await until(lambda: subscribed(worker))
                with pytest.raises(rerankq.JobTimedOut):
                    await client.result(left, timeout=0.01)
            await until(lambda: mute.muted)
            worker.finish(waited)
            assert (await result).job_id == waited
            # And that connection is given up, not waited for.
            more = asyncio.create_task(client.result(left))
            await until(lambda: mute.muted > 2 or (stage == "leaving" and mute.muted))
            worker.finish(left)
            assert (await more).job_id == left

    run(work, settings)


@pytest.mark.usefixtures("only_pushed", "soon")
@pytest.mark.parametrize("stage", STAGES)
def test_a_completion_connection_that_hangs_is_replaced(
    settings: Settings, worker, monkeypatch: pytest.MonkeyPatch, stage: str
):
    async def work(client: AsyncClient) -> None:
        ids = await client.submit_many(jobs(2))
        async with Mute(settings.ledger, STAGES[stage]) as mute:
            monkeypatch.setattr(
                completions_of(client),
                "_connect",
                lambda: subscription(mute.url if mute.muted < 2 else settings.ledger),
            )
            result = asyncio.create_task(client.result(ids[0]))
            if stage == "leaving":
                while mute.muted < 2:  # one that leaves while nothing is open says nothing
                    await until(lambda: subscribed(worker) or mute.muted == 2)
                    with pytest.raises(rerankq.JobTimedOut):
                        await client.result(ids[1], timeout=0.05)
                    await asyncio.sleep(0.05)  # nor does one that is back at once
            await until(lambda: mute.muted == 2 and subscribed(worker))
            await asyncio.sleep(0.2)  # long enough for the one reading after the subscription
            worker.finish(ids[0])
            assert (await result).job_id == ids[0]

    run(work, settings)


@pytest.mark.usefixtures("only_pushed", "soon")
def test_a_server_that_stops_reading_does_not_block_the_listener(
    settings: Settings, worker, monkeypatch: pytest.MonkeyPatch
):
    """Thousands of channels do not fit into what the system takes for a peer that takes nothing."""

    async def work(client: AsyncClient) -> None:
        (job_id,) = await client.submit_many(jobs(1))
        async with Mute(settings.ledger, b"\r\nSUBSCRIBE\r\n", reads=False) as mute:
            monkeypatch.setattr(
                completions_of(client), "_connect", lambda: subscription(settings.ledger if mute.muted else mute.url)
            )
            monkeypatch.setattr(waiting, "SILENCE_S", NEVER_S)  # not by its silence: by what it does not take
            many = [completions_of(client).expect(f"{number:0128}") for number in range(60_000)]
            result = asyncio.create_task(client.result(job_id))
            await until(lambda: mute.muted and subscribed(worker))
            for number, future in enumerate(many):
                completions_of(client).drop(f"{number:0128}", future)
            worker.finish(job_id)
            assert (await result).job_id == job_id

    run(work, settings)


@pytest.mark.parametrize("stage", STAGES)
def test_closing_does_not_wait_for_a_peer_that_hangs(
    settings: Settings, worker, monkeypatch: pytest.MonkeyPatch, stage: str
):
    if stage in {"subscribed", "leaving"}:
        monkeypatch.setattr(waiting, "PING_AFTER_S", 0.0)

    async def main() -> None:
        client = AsyncClient(settings)
        (job_id,) = await client.submit_many(jobs(1))
        async with Mute(settings.ledger, b"PING" if stage == "leaving" else STAGES[stage]) as mute:
            monkeypatch.setattr(completions_of(client), "_connect", lambda: subscription(mute.url))
            result = asyncio.create_task(client.result(job_id))
            await until(lambda: mute.muted)
            started = asyncio.get_running_loop().time()
            await client.aclose()
            assert asyncio.get_running_loop().time() - started < waiting.OPEN_S / 2
            with pytest.raises(rerankq.ClientClosed):
                await result

    asyncio.run(main())
    gc.collect()


@pytest.mark.usefixtures("soon")
def test_the_listener_is_idle_while_nobody_waits(settings: Settings, worker, monkeypatch: pytest.MonkeyPatch):
    async def work(client: AsyncClient) -> None:
        (job_id,) = await client.submit_many(jobs(1))
        calls: list[int] = []

        def counted():
            calls.append(1)
            return subscription("redis://127.0.0.1:1/0")

        monkeypatch.setattr(completions_of(client), "_connect", counted)
        with pytest.raises(rerankq.JobTimedOut):
            await client.result(job_id, timeout=0.3)
        await asyncio.sleep(0.3)  # for what was under way at that moment
        sought, asked = len(calls), scripts_run(worker)
        assert sought
        await asyncio.sleep(1)
        assert (len(calls), scripts_run(worker)) == (sought, asked)

    run(work, settings)


# With the shorter pause the connection has failed often enough to be logged before a reader has failed once.
@pytest.mark.parametrize("try_again_s", [0.05, 0.001], ids=["readers fail first", "readers fail last"])
def test_an_outage_is_logged_once_and_so_is_its_end(
    restartable_redis,
    make_worker,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    try_again_s: float,
):
    monkeypatch.setattr(waiting, "TRY_AGAIN_S", try_again_s)
    settings = Settings(broker_url=restartable_redis.url)

    async def work(client: AsyncClient) -> None:
        worker = make_worker(settings)
        ids = await client.submit_many(jobs(20))
        results = [asyncio.create_task(client.result(job_id)) for job_id in ids]
        await until(lambda: subscribed(worker) == 20)
        await asyncio.to_thread(restartable_redis.kill)
        await asyncio.sleep(3)  # long enough for many a try
        await asyncio.to_thread(restartable_redis.start)
        await asyncio.to_thread(worker.finish, *ids)
        await asyncio.gather(*results)

    with caplog.at_level("WARNING", logger="rerankq"):
        run(work, settings)
    said = [record.getMessage() for record in caplog.records if "not sent" not in record.getMessage()]
    assert len(said) == 2, said
    assert "waiting for 20 jobs, trying again" in said[0]
    assert "the ledger answers again" in said[1]


def test_a_user_without_rights_to_the_channels_still_gets_the_rankings(
    settings: Settings, worker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(waiting, "READ_AGAIN_S", 0.05)
    worker.redis.acl_setuser(
        "reader", enabled=True, passwords=["+pw"], keys=["*"], channels=[], commands=["+@all"], reset=True
    )
    try:
        restricted = settings.ledger.replace("redis://:", "redis://reader:").replace(
            settings.ledger.split("@")[0].rsplit(":", 1)[1], "pw"
        )

        async def work(client: AsyncClient) -> None:
            (job_id,) = await client.submit_many(jobs(1))
            monkeypatch.setattr(completions_of(client), "_connect", partial(subscription, restricted))
            result = asyncio.create_task(client.result(job_id))
            await asyncio.sleep(0.2)
            worker.finish(job_id)
            assert (await result).job_id == job_id

        run(work, settings)
    finally:
        worker.redis.acl_deluser("reader")
