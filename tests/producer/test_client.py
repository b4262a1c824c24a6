"""The blocking client against a real Redis; a stand-in plays the worker."""

import asyncio
import gc
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import redis
from forked_processes import ForkedProcess

import rerankq
from rerankq import AsyncClient, Chunk, Client, JobRejected, RerankJob
from rerankq.client import loop_thread
from rerankq.client.completions import CompletionListener
from rerankq.client.loop_thread import SHARED, LoopThread
from rerankq.client.submission import SUBMIT_AT_ONCE
from rerankq.ledger.runner import AsyncLedger
from rerankq.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as client:
        yield client


def listener_of(client: Client) -> CompletionListener:
    (here,) = client._inner._by_loop.values()
    return here.completions


def job(number: int, **fields) -> RerankJob:
    return RerankJob(query=f"question {number}", chunks=[f"answer {number}", "another"], **fields)


def jobs(count: int, **fields) -> list[RerankJob]:
    return [job(number, **fields) for number in range(count)]


def threads_of_ours() -> set[threading.Thread]:
    """Threads and not their names: one of an earlier client may just be ending."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(("rerankq", "asyncio"))}


# The way of a job


def test_a_job_goes_in_and_its_ranking_comes_out(client: Client, worker):
    job_id = client.submit(job(1))
    assert client.status(job_id).state == "queued"
    assert client.status(job_id).pairs_total == 2
    worker.finish(job_id)
    ranking = client.result(job_id, timeout=20)
    assert [chunk.index for chunk in ranking.chunks] == [0, 1]
    status = client.status(job_id)
    assert (status.state, status.pairs_done, status.attempts) == ("done", 2, 1)
    assert status.submitted_at <= status.started_at <= status.ended_at
    client.forget(job_id)
    assert client.status(job_id).state == "unknown"


@pytest.mark.parametrize("form", [lambda one: one, lambda one: one.model_dump(), lambda one: one.model_dump_json()])
def test_a_job_may_be_a_model_a_mapping_or_json_and_is_the_same_job(client: Client, form: Callable):
    assert client.submit(form(job(1))) == client.submit(job(1))


def test_rerank_takes_plain_strings_and_waits(client: Client, worker, wait_until: Callable):
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.rerank, "why?", ["because", Chunk(text="so", id="second")], 20, tenant="t")
        wait_until(lambda: worker.redis.zcard("rerankq:sent:rerankq.interactive:t"))
        worker.finish(worker.redis.zrange("rerankq:sent:rerankq.interactive:t", 0, -1)[0].decode())
        assert [chunk.id for chunk in waiting.result().chunks] == ["0", "second"]


def test_each_way_to_end_is_an_error_of_its_own(client: Client, worker):
    failed, cancelled, expired, dead, own = (client.submit(one) for one in jobs(5))
    worker.fail(failed, "the model said no")
    client.cancel(cancelled)
    worker.redis.hset(f"rerankq:job:{expired}", "deadline", "1.0")
    worker.redis.hset(f"rerankq:job:{dead}", mapping={"state": "dead", "error_type": "JobDead", "error": "it kills"})
    worker.fail(own, "chunks: too odd", "JobRejected")
    ends = {
        failed: (rerankq.JobFailed, "the model said no"),
        cancelled: (rerankq.JobCancelled, "cancelled"),
        expired: (rerankq.JobExpired, "deadline passed"),
        dead: (rerankq.JobDead, "it kills"),
        own: (rerankq.JobRejected, "too odd"),
        "never-submitted": (rerankq.JobUnknown, "not known"),
    }
    for job_id, (kind, words) in ends.items():
        with pytest.raises(kind, match=words) as caught:
            client.result(job_id, timeout=20)
        assert type(caught.value) is kind
        assert job_id in str(caught.value)
    got = dict(client.as_completed(ends, timeout=20))
    assert {job_id: type(error) for job_id, error in got.items()} == {one: kind for one, (kind, _) in ends.items()}


def test_a_failure_of_a_kind_that_this_version_does_not_know_is_a_job_failed(client: Client, worker):
    job_id = client.submit(job(1))
    worker.fail(job_id, "odd", "Sequence")
    with pytest.raises(rerankq.JobFailed, match="odd"):
        client.result(job_id, timeout=20)


def test_waiting_ends_after_its_timeout_and_the_job_goes_on(client: Client, worker):
    job_id = client.submit(job(1))
    with pytest.raises(rerankq.JobTimedOut, match=job_id):
        client.result(job_id, timeout=0.05)
    with pytest.raises(rerankq.JobTimedOut):
        client.result(job_id, timeout=0)
    worker.finish(job_id)
    assert client.result(job_id, timeout=20).job_id == job_id


def test_a_done_job_is_answered_even_with_a_timeout_of_zero(client: Client, worker):
    job_id = client.submit(job(1))
    worker.finish(job_id)
    assert client.result(job_id, timeout=20).job_id == job_id
    assert client.result(job_id).job_id == job_id


def test_cancelling_says_how_the_job_stands_and_knows_unknown_jobs(client: Client, worker):
    queued, running, done = (client.submit(one) for one in jobs(3))
    worker.claim(running)
    worker.finish(done)
    assert [client.cancel(one) for one in (queued, running, done)] == ["cancelled", "cancelled", "done"]
    with pytest.raises(rerankq.JobUnknown):
        client.cancel("nobody")


def test_forgetting_leaves_what_has_not_ended(client: Client, worker):
    queued, done = (client.submit(one) for one in jobs(2))
    worker.finish(done)
    client.forget(queued, done, "nobody")
    client.forget()
    assert [client.status(one).state for one in (queued, done)] == ["queued", "unknown"]


# as_completed


def test_jobs_come_in_order_of_completion_each_once(client: Client, worker):
    ids = client.submit_many(jobs(6))
    coming = client.as_completed([*ids, *ids, "nobody"], timeout=20)
    first, error = next(coming)
    assert (first, type(error)) == ("nobody", rerankq.JobUnknown)
    for job_id in reversed(ids):
        worker.finish(job_id)
        one, ranking = next(coming)
        assert (one, ranking.job_id) == (job_id, job_id)
    assert list(coming) == []
    assert list(client.as_completed([])) == []


def test_as_completed_says_when_time_is_over_and_keeps_what_came_before(client: Client, worker):
    done, waiting = (client.submit(one) for one in jobs(2))
    worker.finish(done)
    coming = client.as_completed([done, waiting], timeout=1)
    assert next(coming)[0] == done
    with pytest.raises(rerankq.JobTimedOut, match="1 jobs"):
        next(coming)


def test_an_abandoned_as_completed_leaves_no_subscription(client: Client, worker, wait_until: Callable):
    ids = client.submit_many(jobs(20))
    worker.finish(ids[3])
    coming = client.as_completed(ids)
    assert next(coming)[0] == ids[3]
    assert len(worker.redis.pubsub_channels("*:job:*")) > 1
    del coming
    gc.collect()
    wait_until(lambda: not worker.redis.pubsub_channels("*:job:*"))


# Bulk submission


def test_bulk_submission_takes_a_round_trip_per_few_hundred_jobs(
    client: Client, worker, monkeypatch: pytest.MonkeyPatch
):
    trips = []
    ask_all = AsyncLedger.ask_all

    async def counted(self, wanted):
        trips.append(len(wanted))
        return await ask_all(self, wanted)

    monkeypatch.setattr(AsyncLedger, "ask_all", counted)
    ids = client.submit_many(jobs(1_000))
    assert len(set(ids)) == 1_000
    assert trips == [SUBMIT_AT_ONCE] * (1_000 // SUBMIT_AT_ONCE) + [1_000 % SUBMIT_AT_ONCE]
    assert worker.redis.hget("rerankq:backlog", "*") == b"2000"


def test_ids_come_in_the_order_of_the_jobs_and_equal_jobs_have_equal_ids(client: Client):
    ids = client.submit_many([job(1), job(2, id="mine"), job(1), job(3)])
    assert ids == [client.submit(job(1)), "mine", ids[0], client.submit(job(3))]


def test_a_malformed_job_midway_is_named_and_the_jobs_before_it_are_accepted(client: Client):
    good = jobs(700)
    with pytest.raises(rerankq.JobRejected, match="query") as caught:
        client.submit_many([*good[:500], {"query": " ", "chunks": ["x"]}, *good[500:]])
    assert caught.value.accepted == client.submit_many(good[:500])
    assert client.status(client.submit_many(good[:501])[-1]).state == "queued"


def test_a_full_backlog_midway_carries_what_was_accepted_and_when_to_try_again(redis_url: str, worker):
    worker.register("m", pairs_per_s=10)
    with Client(Settings(broker_url=redis_url, max_queued_pairs=900)) as client:
        with pytest.raises(rerankq.QueueFull) as caught:
            client.submit_many(jobs(1_000))
        assert len(caught.value.accepted) == 450
        assert 1 <= caught.value.retry_after_s <= 60
        assert caught.value.retryable
        assert {client.status(one).state for one in caught.value.accepted[-3:]} == {"queued"}


@pytest.mark.parametrize(
    ("pairs_per_s", "after_s"), [(0.5, 4), (0.001, 60), (1e6, 1), (0, 5)], ids=["usual", "slow", "fast", "unknown"]
)
def test_a_full_backlog_says_when_a_job_will_fit_in_within_a_minute(
    redis_url: str, worker, pairs_per_s: float, after_s: float
):
    worker.register("m", pairs_per_s=pairs_per_s)
    with Client(Settings(broker_url=redis_url, max_queued_pairs=10)) as client:
        client.submit_many(jobs(5))
        with pytest.raises(rerankq.QueueFull) as caught:
            client.submit(job(5))
        assert caught.value.retry_after_s == after_s


def test_a_submission_with_several_refused_jobs_names_the_first(client: Client):
    client.submit_many([job(1, id="one"), job(2, id="two")])
    with pytest.raises(rerankq.JobRejected, match="'one'"):
        client.submit_many([job(3, id="one"), job(4, id="two")])


def test_the_registry_is_read_once_for_jobs_that_come_soon_after_each_other(
    client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rerankq.client.asynchronous.REGISTRY_TTL_S", 1e6)
    workers, read = AsyncLedger.workers, []

    async def counted(self: AsyncLedger):
        read.append(1)
        return await workers(self)

    monkeypatch.setattr(AsyncLedger, "workers", counted)
    client.submit(job(1))
    client.submit(job(2))
    assert len(read) == 1


def test_a_worker_that_registered_just_now_is_found_before_its_model_is_refused(
    redis_url: str, worker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rerankq.client.asynchronous.REGISTRY_TTL_S", 1e6)

    async def look() -> list[list[str]]:
        async with AsyncClient(Settings(broker_url=redis_url, model="m")) as client:
            _, before = await client.serving()
            worker.register("m")
            _, after = await client.serving()
        return [[one.model for one in found] for found in (before, after)]

    assert asyncio.run(look()) == [[], ["m"]]


def test_an_outage_midway_carries_what_was_accepted(client: Client, monkeypatch: pytest.MonkeyPatch):
    ask_all, asked = AsyncLedger.ask_all, []

    async def breaks(self, wanted):
        asked.append(wanted)
        if len(asked) == 3:
            raise rerankq.BrokerUnavailable("gone")
        return await ask_all(self, wanted)

    monkeypatch.setattr(AsyncLedger, "ask_all", breaks)
    with pytest.raises(rerankq.BrokerUnavailable) as caught:
        client.submit_many(jobs(2_000))
    assert len(caught.value.accepted) == 2 * SUBMIT_AT_ONCE


def test_a_client_that_is_closed_midway_carries_what_was_accepted(settings: Settings):
    client = Client(settings)

    def closing() -> Iterator[RerankJob]:
        yield from jobs(2 * SUBMIT_AT_ONCE)
        client.close()
        yield job(9_999)

    with pytest.raises(rerankq.ClientClosed) as caught:
        client.submit_many(closing())
    assert len(caught.value.accepted) >= SUBMIT_AT_ONCE
    with Client(settings) as other:
        assert {other.status(one).state for one in caught.value.accepted} == {"queued"}


def test_the_source_of_a_bulk_submission_may_use_the_client_itself(client: Client):
    def chained() -> Iterator[RerankJob]:
        for number in range(3):
            before = client.submit(job(number))
            yield RerankJob(query=f"after {before}", chunks=["x"])

    assert len(client.submit_many(chained())) == 3


def test_an_error_of_the_source_passes_through(client: Client):
    def broken() -> Iterator[RerankJob]:
        yield from jobs(400)
        raise LookupError("no more")

    with pytest.raises(LookupError):
        client.submit_many(broken())
    assert client.status(client.submit(job(0))).state == "queued"


def test_a_slow_source_does_not_keep_others_from_their_results(client: Client, worker):
    done = client.submit(job(99))
    worker.finish(done)
    go_on = threading.Event()

    def slow() -> Iterator[RerankJob]:
        yield job(1)
        assert go_on.wait(30)
        yield job(2)

    with ThreadPoolExecutor() as pool:
        submitting = pool.submit(client.submit_many, slow())
        assert client.result(done, timeout=20).job_id == done
        go_on.set()
        assert len(submitting.result()) == 2


# Models and limits


def test_an_unknown_model_is_refused_and_one_that_just_registered_is_found(client: Client, worker):
    with pytest.raises(rerankq.ModelUnknown, match="other/model"):
        client.submit(job(1, model="other/model"))
    worker.register("other/model", suffix=".other-model", aliases=["other"])
    job_id = client.submit(job(1, model="other/model"))
    assert worker.redis.hget(f"rerankq:job:{job_id}", "queue") == b"rerankq.interactive.other-model"
    assert worker.redis.hget(f"rerankq:job:{client.submit(job(2, model='other'))}", "model") == b"other/model"
    assert [one.model for one in client.workers()] == ["other/model"]


def test_an_id_does_not_depend_on_the_weights_of_workers(client: Client, worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rerankq.client.asynchronous.REGISTRY_TTL_S", 0)
    worker.register("m", fingerprint="old")
    before = client.submit(job(1))
    worker.register("m", fingerprint="new")
    assert client.submit(job(1)) == before


def test_the_same_own_id_with_other_content_is_rejected(client: Client):
    client.submit(job(1, id="mine"))
    assert client.submit(job(1, id="mine", priority="bulk", deadline_s=5)) == "mine"
    with pytest.raises(rerankq.JobRejected, match="mine") as caught:
        client.submit(job(2, id="mine"))
    assert caught.value.field == "id"


def test_limits_are_checked_before_the_work_of_reading_a_job_is_done(redis_url: str, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object) -> None:
        pytest.fail("read a job that is too large by its looks")

    monkeypatch.setattr("rerankq.client.asynchronous.parse_job", never)
    with Client(Settings(broker_url=redis_url, max_job_bytes=1_000)) as client:
        for large in ({"query": "q", "chunks": ["x"] * 100_000}, json.dumps({"query": "q" * 4_000, "chunks": ["x"]})):
            with pytest.raises(rerankq.JobTooLarge, match="at most"):
                client.submit(large)


def test_a_full_server_is_a_queue_full_with_a_time_to_try_again(client: Client, worker):
    worker.redis.config_set("maxmemory", worker.redis.info("memory")["used_memory"])
    try:
        with pytest.raises(rerankq.QueueFull, match="% full") as caught:
            client.submit_many(jobs(10))
        assert caught.value.retry_after_s > 0
        assert caught.value.accepted == []
    finally:
        worker.redis.config_set("maxmemory", 0)
    assert len(client.submit_many(jobs(10))) == 10


def test_the_dead_are_listed_in_order_however_many_round_trips_it_takes(
    client: Client, worker, monkeypatch: pytest.MonkeyPatch
):
    ids = [f"dead-{number}" for number in range(5)]
    for at, one in enumerate(ids):
        worker.redis.hset(f"rerankq:job:{one}", "state", "dead")
        worker.redis.zadd("rerankq:dead", {one: at})
    monkeypatch.setattr("rerankq.client.asynchronous.SUBMIT_AT_ONCE", 2)
    assert [found.job_id for found in client.dead()] == ids


def test_a_server_that_forgot_the_scripts_is_given_them_again(client: Client, worker):
    worker.redis.script_flush()
    ids = client.submit_many(jobs(3))
    worker.redis.script_flush()
    assert {client.status(one).state for one in ids} == {"queued"}


# Settings, outages


def test_a_client_without_a_url_says_how_to_set_one(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RERANKQ_BROKER_URL", raising=False)
    with pytest.raises(rerankq.BrokerUnavailable, match=r"RERANKQ_BROKER_URL.*redis://"):
        Client()


def test_every_method_raises_at_once_if_the_ledger_is_not_there():
    with Client(Settings(broker_url="redis://127.0.0.1:1/0")) as client:
        for ask in (
            lambda: client.submit(job(1)),
            lambda: client.result("a"),
            lambda: list(client.as_completed(["a", "b"])),
            lambda: client.status("a"),
            lambda: client.cancel("a"),
            lambda: client.forget("a"),
        ):
            with pytest.raises(rerankq.BrokerUnavailable):
                ask()


def test_a_broker_that_is_down_never_fails_a_submission(redis_url: str, worker):
    settings = Settings(broker_url="redis://127.0.0.1:1/0", ledger_url=f"{redis_url[:-1]}1")
    client = Client(settings)
    job_id = client.submit(job(1))
    assert worker.state(job_id) == "queued"
    started = time.monotonic()
    client._inner._doorbells.close(timeout_s=0.1)
    client.close()
    assert time.monotonic() - started < 30


def test_a_doorbell_names_the_job_and_holds_little_else(client: Client, worker, wait_until: Callable, redis_url: str):
    job_id = client.submit(RerankJob(query="what is secret?", chunks=["the secret itself"]))
    broker = redis.Redis.from_url(redis_url)
    wait_until(lambda: broker.llen("rerankq:rerankq.interactive"))
    message = json.loads(broker.lindex("rerankq:rerankq.interactive", 0))
    assert message["headers"]["id"] == job_id
    assert message["headers"]["argsrepr"].startswith('"what is secret?" 1 chunk, ')
    assert "secret itself" not in str(message)
    assert len(broker.lindex("rerankq:rerankq.interactive", 0)) < 2_000
    broker.close()


# Threads, processes, endings


def test_many_threads_share_a_client(client: Client, worker):
    def way(number: int) -> str:
        job_id = client.submit(job(number))
        worker.finish(job_id)
        return client.result(job_id, timeout=30).job_id

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(way, range(200)))) == 200


def test_closing_leaves_no_thread(settings: Settings, worker):
    before = threads_of_ours()
    for number in range(2):
        with Client(settings) as client, Client(settings) as other:
            job_id = client.submit(job(number))
            worker.finish(job_id)
            client.result(job_id, timeout=20)
            other.close()
            assert client.result(job_id, timeout=20), "the thread serves the other one on"
            assert threads_of_ours() - before
        client.close()
        assert threads_of_ours() <= before


CALLS: dict[str, Callable[[Client], object]] = {
    "submit": lambda client: client.submit(job(1)),
    "submit_many": lambda client: client.submit_many(jobs(3)),
    "submit_many of nothing": lambda client: client.submit_many([]),
    "result": lambda client: client.result("a", timeout=1),
    "as_completed": lambda client: client.as_completed(["a"]),
    "as_completed of nothing": lambda client: client.as_completed([]),
    "status": lambda client: client.status("a"),
    "cancel": lambda client: client.cancel("a"),
    "forget": lambda client: client.forget("a"),
    "dead": lambda client: client.dead(),
    "dead_job": lambda client: client.dead_job("a"),
    "retry_dead": lambda client: client.retry_dead("a"),
    "drop_dead": lambda client: client.drop_dead("a"),
    "rerank": lambda client: client.rerank("q", ["x"], timeout=1),
    "workers": lambda client: client.workers(),
    "with": lambda client: client.__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("used", [False, True], ids=["never used", "used"])
def test_a_closed_client_says_so_in_every_method(settings: Settings, worker, call: str, used: bool):
    before = threads_of_ours()
    client = Client(settings)
    if used:
        client.status("a")
    client.close()
    with pytest.raises(rerankq.ClientClosed, match="the client is closed"):
        CALLS[call](client)
    assert threads_of_ours() <= before


def test_every_public_method_is_tried_on_a_closed_client():
    public = {name for name in vars(Client) if not name.startswith("_")} - {"close"}
    assert public <= {call.split()[0] for call in CALLS}


def test_closing_ends_the_waiting_of_other_threads(settings: Settings, wait_until: Callable, worker):
    client = Client(settings)
    job_id = client.submit(job(1))
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(client.result, job_id), pool.submit(list, client.as_completed([job_id]))]
        wait_until(lambda: worker.redis.pubsub_channels("*:job:*"))
        wait_until(lambda: sum(len(each) for each in listener_of(client)._waiters.values()) == 2)
        client.close()
        for one in waiting:
            with pytest.raises(rerankq.BrokerUnavailable, match="closed"):
                one.result(20)


def test_as_completed_may_be_dropped_after_closing(settings: Settings, worker):
    with Client(settings) as client:
        ids = client.submit_many(jobs(3))
        worker.finish(ids[0])
        coming = client.as_completed(ids)
        next(coming)
    before = threads_of_ours()
    with pytest.raises(rerankq.ClientClosed):
        list(coming)
    del coming
    gc.collect()
    assert threads_of_ours() <= before


SCRIPT = """
import sys
from rerankq import Client, RerankJob
client = Client()
print(client.submit(RerankJob(query="q", chunks=["x"])))
{more}
"""


def run_forked_script(redis_url: str, more: str) -> subprocess.CompletedProcess[str]:
    """Run it in a forked process, for what is not about how an interpreter ends or what it warns of."""
    code, environment = SCRIPT.format(more=textwrap.dedent(more)), {**os.environ, "RERANKQ_BROKER_URL": redis_url}
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with ForkedProcess(["-c", code], environment | {"RERANKQ_MODEL": "stub"}, text=True, **pipes) as process:
        out, error = process.communicate(timeout=60)
    return subprocess.CompletedProcess(code, process.returncode, out, error)


def run_script(redis_url: str, more: str = "") -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(more=textwrap.dedent(more))
    environment = {**os.environ, "RERANKQ_BROKER_URL": redis_url, "PYTHONDEVMODE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    # What asyncio says of a busy machine: a turn of its loop took a tenth of a second.
    ended.stderr = re.sub(r"^Executing <.* took \d+\.\d+ seconds\n", "", ended.stderr, flags=re.MULTILINE)
    return ended


def test_a_script_that_submits_and_ends_has_sent_its_doorbells(redis_url: str, worker):
    ended = run_script(redis_url)
    assert (ended.returncode, ended.stderr) == (0, "")
    with redis.Redis.from_url(redis_url) as broker:
        assert broker.llen("rerankq:rerankq.interactive") == 1
    assert worker.state(ended.stdout.strip()) == "queued"


def test_ctrl_c_while_waiting_stops_the_waiting(redis_url: str, worker):
    # In a process of its own: a test process that is interrupted takes its neighbours with it.
    more = """
    import os, signal, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)
    job_id = client.submit(RerankJob(query="waited for", chunks=["x"]))
    client.status(job_id)
    (here,) = client._inner._by_loop.values()
    def wait_until(condition):
        while not condition():
            time.sleep(0.01)
    def interrupt():
        wait_until(lambda: job_id in here.completions._waiters)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        client.result(job_id)
    except KeyboardInterrupt:
        wait_until(lambda: job_id not in here.completions._waiters)
        sys.exit(3)
    """
    ended = run_script(redis_url, more)
    assert (ended.returncode, ended.stderr) == (3, "")


def test_a_forked_child_has_a_client_of_its_own_and_the_parents_goes_on(redis_url: str, worker, wait_until: Callable):
    more = """
    import os
    pid = os.fork()
    job = RerankJob(query="child" if pid == 0 else "parent", chunks=["x"])
    job_id = client.submit(job)
    assert client.status(job_id).state == "queued"
    client.cancel(job_id)
    try:
        client.result(job_id, timeout=20)
    except Exception as error:
        assert type(error).__name__ == "JobCancelled", error
    if pid == 0:
        client.close()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    # What the child did to the sockets that it inherited must not have reached ours.
    assert client.status(job_id).state == "cancelled"
    again = client.submit(RerankJob(query="after the child", chunks=["x"]))
    client.cancel(again)
    client.close()
    """
    ended = run_forked_script(redis_url, more)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    with redis.Redis.from_url(redis_url) as broker:
        assert broker.llen("rerankq:rerankq.interactive") == 4, "one doorbell each: before, child, parent, after"


def test_importing_is_light():
    code = "import sys, rerankq; assert not {'numpy', 'torch', 'typer', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("nonsense", [3, None, [], object(), {"query", "chunks"}])
def test_submit_rejects_values_that_cannot_be_a_job(client: Client, nonsense: object):
    with pytest.raises(JobRejected, match="expected a RerankJob, a mapping or JSON, not"):
        client.submit(nonsense)


def test_an_ended_job_is_answered_however_short_the_timeout(client: Client, worker):
    job_id = client.submit(job(1))
    with pytest.raises(rerankq.JobTimedOut):
        client.result(job_id, timeout=0)
    worker.finish(job_id)
    assert len(client.result(job_id, timeout=0).chunks) == 2


def test_an_invalid_id_is_unknown_at_once(client: Client):
    with pytest.raises(rerankq.JobUnknown, match="None"):
        client.result(None)


# A client is given settings, or a URL


def test_a_client_takes_a_url_beside_settings(redis_url: str, worker):
    for make in (
        lambda: Client(redis_url),
        lambda: Client(url=redis_url),
        lambda: Client(Settings(broker_url=redis_url)),
    ):
        with make() as client:
            assert client.status(client.submit(job(1))).state == "queued"


@pytest.mark.parametrize("kind", [Client, rerankq.AsyncClient])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"settings": 7}, "expected Settings or a URL"),
        ({"settings": b"redis://h"}, "expected Settings or a URL"),
        ({"settings": "http://h"}, "RERANKQ_BROKER_URL"),
        ({"url": "nonsense"}, "RERANKQ_BROKER_URL"),
        ({"url": 7}, "expected Settings or a URL"),
        ({"url": "redis://h", "settings": "redis://h"}, "not both"),
    ],
)
def test_a_client_refuses_values_that_are_neither_settings_nor_a_url(kind: type, given: dict[str, object], says: str):
    with pytest.raises(rerankq.SettingsInvalid, match=says):
        kind(**given)


# A timeout is a number of seconds, and kept


@pytest.mark.parametrize("timeout", [float("nan"), "5", True, [], object()])
def test_a_timeout_that_is_not_a_number_is_refused(client: Client, timeout: object):
    for wait in (
        lambda: client.result("a", timeout=timeout),
        lambda: client.as_completed(["a"], timeout=timeout),
        lambda: client.rerank("q", ["x"], timeout=timeout),
    ):
        with pytest.raises(JobRejected) as caught:
            wait()
        assert caught.value.field == "timeout"


@pytest.mark.parametrize("timeout", [1e300, float("inf"), 10**400, None])
def test_a_timeout_may_be_as_long_as_you_like(client: Client, worker, timeout: float):
    job_id = client.submit(job(1))
    worker.finish(job_id)
    assert client.result(job_id, timeout=timeout).job_id == job_id
    assert len(list(client.as_completed([job_id], timeout=timeout))) == 1
    assert client.rerank("question 1", ["answer 1", "another"], timeout=timeout).job_id == job_id


def test_a_timeout_below_zero_counts_as_zero(client: Client, worker):
    job_id = client.submit(job(1))
    with pytest.raises(rerankq.JobTimedOut):
        client.result(job_id, timeout=-5)
    worker.finish(job_id)
    assert client.result(job_id, timeout=-5).job_id == job_id
    with pytest.raises(rerankq.JobUnknown):
        client.result("nobody", timeout=0)


@pytest.mark.parametrize("odd", ["", "\ud800", 7, None, b"a"])
def test_every_method_takes_an_invalid_id_for_an_unknown_job(client: Client, odd: object):
    for call in (
        client.result,
        client.status,
        client.cancel,
        client.forget,
        client.dead_job,
        client.retry_dead,
        client.drop_dead,
    ):
        with pytest.raises(rerankq.JobUnknown):
            call(odd)
    ((found, error),) = client.as_completed([odd], timeout=5)
    assert (found, type(error)) == (odd, rerankq.JobUnknown)


def test_as_completed_refuses_a_single_string(client: Client):
    with pytest.raises(JobRejected, match="several ids"):
        client.as_completed("abc")


def test_a_job_that_ended_while_the_client_was_suspended_is_answered_after_its_timeout(
    client: Client, worker, monkeypatch: pytest.MonkeyPatch
):
    """As after a SIGSTOP: by the time that the client looks, both its time is over and its jobs are done."""
    monkeypatch.setattr("rerankq.client.asynchronous.LAST_READ_S", 20)
    monkeypatch.setattr("rerankq.client.blocking.LAST_READ_S", 20)
    ids = client.submit_many(jobs(150))
    coming = client.as_completed([*ids, client.submit(job(999))], timeout=2)
    worker.finish(ids[0])
    assert next(coming)[0] == ids[0]
    hold = threading.Event()
    SHARED.current.loop.call_soon_threadsafe(hold.wait, 30)
    worker.finish(*ids[1:])
    time.sleep(2.1)  # over the timeout
    hold.set()
    found = [next(coming) for _ in ids[1:]]
    assert sorted(one for one, ranking in found if ranking.job_id == one) == sorted(ids[1:])
    with pytest.raises(rerankq.JobTimedOut, match="1 jobs"):
        next(coming)


# The thread that serves it


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_thread, "CHECK_S", 0.05)
    monkeypatch.setattr(loop_thread, "BLOCKED_CHECKS", 40)
    monkeypatch.setattr("rerankq.client.blocking.SPARE_S", 0.1)
    monkeypatch.setattr("rerankq.client.asynchronous.LAST_READ_S", 0.1)
    monkeypatch.setattr("rerankq.client.blocking.LAST_READ_S", 0.1)


WAITS: dict[str, Callable[[Client], object]] = {
    "result": lambda client: client.result("a", timeout=0.1),
    "as_completed": lambda client: list(client.as_completed(["a"], timeout=0.1)),
    "rerank": lambda client: client.rerank("q", ["x"], timeout=0.1),
}


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("call", WAITS)
def test_a_timeout_is_kept_though_the_event_loop_is_blocked(client: Client, call: str):
    client.status("a")
    hold = threading.Event()
    SHARED.current.loop.call_soon_threadsafe(hold.wait, 30)
    try:
        with pytest.raises(rerankq.JobTimedOut):
            WAITS[call](client)
        with pytest.raises(rerankq.ClientUnusable, match="blocked"):
            client.status("a")
        with pytest.raises(rerankq.ClientUnusable, match="blocked"):
            client.result("a")
    finally:
        hold.set()
    assert client.status("a").state == "unknown"


class Iterating(Future):
    """Work that is not done for long, while the event loop that does it iterates before every check."""

    def __init__(self, thread: loop_thread.LoopThread) -> None:
        super().__init__()
        self._thread, self._checks = thread, 3 * loop_thread.BLOCKED_CHECKS

    def result(self, timeout: float | None = None) -> str:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._thread.loop).result()
        self._checks -= 1
        if self._checks:
            raise TimeoutError
        return "done"


def test_a_long_wait_is_no_blocked_event_loop(client: Client):
    client.status("a")
    assert SHARED.current.wait(Iterating(SHARED.current), None) == "done"


def test_a_timeout_of_the_work_itself_ends_the_wait_for_it(client: Client):
    async def late() -> None:
        raise TimeoutError("of its own")

    client.status("a")
    with pytest.raises(TimeoutError, match="of its own"):
        SHARED.current.wait(SHARED.current.soon(late), 20)


def test_the_event_loop_is_made_where_no_signal_can_interrupt_it(monkeypatch):
    makers, make = [], asyncio.SelectorEventLoop

    def made(selector):
        makers.append(threading.current_thread())
        return make(selector)

    monkeypatch.setattr(asyncio, "SelectorEventLoop", made)
    thread = LoopThread()
    thread.stop()  # nothing to stop yet
    thread.start()
    thread.stop()
    assert not thread.serves
    assert [maker.name for maker in makers] == ["rerankq-client"]


async def idle() -> None:
    """Work whose coroutine says at its end if nobody ever awaited it."""


@pytest.mark.parametrize(("interrupted", "seen"), [(KeyboardInterrupt, KeyboardInterrupt), (RuntimeError, "ended")])
def test_work_that_could_not_be_given_to_the_event_loop_ends_without_a_warning(monkeypatch, interrupted, seen):
    def interrupt(coroutine, loop):
        raise interrupted

    thread = LoopThread()
    thread.start()
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupt)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(rerankq.ClientUnusable if seen == "ended" else seen):
            thread.soon(idle)
        gc.collect()
    thread.stop()
    assert [str(one.message) for one in warned] == []


@pytest.mark.parametrize("at", ["while it winds up", "after it has"])
def test_work_that_comes_when_the_event_loop_ends_ends_without_a_warning(monkeypatch, caplog, at):
    thread, given = LoopThread(), []
    wind_up, close = loop_thread._wind_up, asyncio.SelectorEventLoop.close

    async def winding_up() -> None:
        await wind_up()
        if at == "while it winds up" and not given:
            given.append(thread.soon(idle))

    def closing(loop):
        given.append(thread.soon(idle))
        close(loop)

    monkeypatch.setattr(loop_thread, "_wind_up", winding_up)
    if at == "after it has":
        monkeypatch.setattr(asyncio.SelectorEventLoop, "close", closing)
    thread.start()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        thread.stop()
        gc.collect()
    assert given
    assert [str(one.message) for one in warned] == []
    assert caplog.messages == []
    with pytest.raises(rerankq.ClientUnusable, match="has ended"):
        thread.soon(idle)


def test_an_event_loop_that_cannot_be_made_makes_the_client_unusable(monkeypatch):
    def fails(selector):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(asyncio, "SelectorEventLoop", fails)
    thread = LoopThread()
    with pytest.raises(rerankq.ClientUnusable, match=r"cannot run here: .*Too many open files"):
        thread.start()
    thread.stop()
    assert not thread.serves


@pytest.mark.usefixtures("quick_looks")
def test_waiting_raises_if_the_thread_dies_and_the_next_call_has_a_new_one(client: Client, worker):
    job_id = client.submit(job(1))

    def die() -> None:
        raise SystemExit

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.result, job_id)
        while not listener_of(client)._waiters:
            time.sleep(0.01)
        SHARED.current.loop.call_soon_threadsafe(die)
        with pytest.raises(rerankq.ClientUnusable, match="has ended"):
            waiting.result(20)
    worker.finish(job_id)
    assert client.result(job_id, timeout=20).job_id == job_id


def test_a_blocking_client_is_not_used_by_its_own_thread(client: Client):
    """As from a handler of what it logs: it would wait for itself."""
    client.status("a")
    said = []

    def call() -> None:
        try:
            client.status("a")
        except rerankq.RerankqError as error:
            said.append(error)
        client.close()

    SHARED.current.loop.call_soon_threadsafe(call)
    while not said:
        time.sleep(0.01)
    assert isinstance(said[0], rerankq.ClientUnusable)


def test_a_client_works_inside_a_running_event_loop(client: Client, worker):
    async def main() -> str:
        job_id = client.submit(job(1))
        worker.finish(job_id)
        return client.result(job_id, timeout=20).job_id

    assert asyncio.run(main())


def test_a_client_works_in_a_signals_handler_that_interrupts_its_own_call(redis_url: str, worker):
    # In a process of its own, as whatever is sent a signal in these tests.
    more = """
    import os, signal, threading, time
    job_id = client.submit(RerankJob(query="waited for", chunks=["x"]))
    client.status(job_id)
    (here,) = client._inner._by_loop.values()
    done = []
    def other_call(*_):
        done.append(client.status(job_id).state)
        with Client() as inner:
            done.append(inner.status(job_id).state)
        client.cancel(job_id)
    signal.signal(signal.SIGUSR1, other_call)
    def interrupt():
        while job_id not in here.completions._waiters:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        client.result(job_id, timeout=20)
    except Exception as error:
        assert type(error).__name__ == "JobCancelled", error
    assert done == ["queued", "queued"], done
    """
    ended = run_forked_script(redis_url, more)
    assert ended.returncode == 0, ended.stderr


def test_a_child_forked_while_its_parent_waits_does_not_wait_for_ever(redis_url: str, worker):
    more = """
    import os, signal
    def fork(*_):
        global pid
        pid = os.fork()
    signal.signal(signal.SIGALRM, fork)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    job_id = client.submit(RerankJob(query="waited for", chunks=["x"]))
    try:
        client.result(job_id, timeout=4)
    except Exception as error:
        kind = type(error).__name__
    if pid == 0:
        os._exit(7 if kind == "ClientUnusable" else 1)
    assert kind == "JobTimedOut", kind
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    """
    ended = run_forked_script(redis_url, more)
    assert ended.returncode == 0, ended.stderr


def test_a_client_works_at_the_end_of_the_process_and_raises_when_it_is_too_late(redis_url: str, worker):
    code = """
    import atexit, sys
    def late():
        try:
            client.status("a")
        except Exception as error:
            print("late", type(error).__name__)
    atexit.register(late)  # run after what was registered later
    from rerankq import Client, RerankJob
    client = Client()
    client.status("a")
    def early():
        print("early", client.status(client.submit(RerankJob(query="last", chunks=["x"]))).state)
    atexit.register(early)
    class Last:
        def __del__(self):
            print("finalizing", sys.is_finalizing())
            late()
    last = Last()
    """
    environment = {**os.environ, "RERANKQ_BROKER_URL": redis_url}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout.splitlines() == ["early queued", "late ClientClosed", "finalizing True", "late ClientClosed"], (
        ended.stderr
    )
    assert ended.returncode == 0


GREENLETS = """
import os, sys
def make():
    from rerankq import Client
    return Client()
first = make() if {made!r} != "after" else None
if {made!r} == "used before":
    first.status("a")
from {library_patches}
patch()
import time, threading
made = []
def one(number):
    client = first if {shared} else make()
    began = time.monotonic()
    try:
        client.rerank(f"question {{number}}", ["x"], timeout=1.5)
    except Exception as error:
        made.append((type(error).__name__, time.monotonic() - began < 15))
    if not {shared}:
        client.close()
first = first or make()
threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(3)]
for thread in threads: thread.start()
turns = 0
while len(made) < 3 and turns < 300:
    time.sleep(0.1); turns += 1
assert [kind for kind, soon in made if soon] == ["JobTimedOut"] * 3, made
assert turns > 10, "others run meanwhile"
first.close()
print("good")
"""


@pytest.mark.parametrize("made", ["after", "before", "used before"])
@pytest.mark.parametrize("shared", [False, True], ids=["each its own", "shared"])
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_greenlets_work_and_their_timeouts_are_kept(redis_url: str, library: str, made: str, shared: bool):
    pytest.importorskip(library)
    patches = {"gevent": "gevent.monkey import patch_all as patch", "eventlet": "eventlet import monkey_patch as patch"}
    code = GREENLETS.format(library_patches=patches[library], made=made, shared=shared)
    environment = {**os.environ, "RERANKQ_BROKER_URL": redis_url}
    command = [sys.executable, "-W", "ignore", "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert ended.stdout == "good\n", ended.stdout + ended.stderr


def test_a_client_of_greenlets_begins_while_the_last_one_before_it_is_closed(redis_url: str):
    pytest.importorskip("gevent")
    code = """
    from gevent.monkey import patch_all
    patch_all()
    import threading, time
    from rerankq import Client
    from rerankq.client.loop_thread import SHARED
    for _ in range(5):
        first, second = Client(), Client()
        first.status("a")
        closing = threading.Thread(target=first.close)
        closing.start()
        while SHARED.current is not None:
            time.sleep(0)
        assert second.status("a").state == "unknown"
        closing.join()
        second.close()
    print("good")
    """
    environment = {**os.environ, "RERANKQ_BROKER_URL": redis_url}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "good\n", ended.stdout + ended.stderr


def test_a_client_beside_another_event_loop_of_greenlets_raises_at_once(redis_url: str):
    pytest.importorskip("gevent")
    code = """
    from gevent.monkey import patch_all
    patch_all()
    import asyncio, time
    from rerankq import Client, ClientUnusable
    async def main():
        began = time.monotonic()
        try:
            Client().rerank("q", ["x"], timeout=20)
        except ClientUnusable as error:
            print("another loop" in str(error), time.monotonic() - began < 10)
    asyncio.run(main())
    """
    environment = {**os.environ, "RERANKQ_BROKER_URL": redis_url}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "True True\n", ended.stdout + ended.stderr
