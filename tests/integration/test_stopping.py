"""A stopping worker ends in time, whatever hangs, and hands back what it can."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from rerankq import Client, RerankJob
from rerankq.broker.celery_app import make_app
from rerankq.settings import Settings

pytestmark = pytest.mark.slow

DRAIN_S = 1
# Such a worker has six seconds; what is longer is for a busy machine. Before there was a watchdog it took minutes.
ENDS_S = 30
ENV = {"RERANKQ_DRAIN_S": str(DRAIN_S), "RERANKQ_LEASE_S": "30", "RERANKQ_CONCURRENCY": "4"}
# Two seconds of the device for each chunk.
SLOW = {"RERANKQ_MODEL": "stub:0.5", "RERANKQ_MAX_BATCH_TOKENS": "8"}


def job(name: str, *, query: str = "q", chunks: int = 20, words: int = 1) -> RerankJob:
    return RerankJob(id=name, query=query, chunks=[f"{at} " * words for at in range(chunks)], fusion="model")


def statuses(*workers: Any) -> list[int]:
    ends = time.monotonic() + ENDS_S
    return [worker.process.wait(max(0.1, ends - time.monotonic())) for worker in workers]


def test_workers_end_in_time_though_redis_hangs_whatever_they_do_and_however_they_are_stopped(
    start_worker: Callable, restartable_redis: Any, wait_until: Callable
):
    url = restartable_redis.url
    idle = [start_worker(url=url, **ENV) for _ in range(2)]
    with Client(Settings(broker_url=url)) as client:
        client.rerank("q", ["x"], timeout=30)
        busy = [start_worker(url=url, **ENV, **SLOW, RERANKQ_DEFAULT_MODEL="stub") for _ in range(3)]
        ids = client.submit_many([job(f"job-{at}").model_copy(update={"model": "stub:0.5"}) for at in range(12)])
        wait_until(lambda: sum(client.status(one).state == "running" for one in ids) == 12)
        restartable_redis.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(1)  # so that pings, renewals and pops are under way, and hang
            for worker, number in zip([*idle, *busy], ["TERM", "INT", "TERM", "QUIT", "INT"], strict=True):
                worker.process.send_signal(getattr(signal, f"SIG{number}"))
            busy[2].process.send_signal(signal.SIGINT)
            ended = statuses(*idle, *busy)
        finally:
            restartable_redis.process.send_signal(signal.SIGCONT)
    assert set(ended) <= {0, 1, 75}
    assert 75 in ended, "the watchdog was needed"


def test_a_broker_that_hangs_alone_keeps_no_job_from_being_handed_back(
    start_worker: Callable, restartable_redis: Any, redis_url: str, wait_until: Callable
):
    urls = {"RERANKQ_LEDGER_URL": Settings(broker_url=redis_url).ledger, "RERANKQ_CACHE_URL": redis_url}
    worker = start_worker(url=restartable_redis.url, ready=False, **urls, **ENV, **SLOW)
    settings = Settings(broker_url=restartable_redis.url, ledger_url=urls["RERANKQ_LEDGER_URL"], cache_url=redis_url)
    with Client(settings) as client, redis.Redis.from_url(settings.ledger) as ledger:
        ids = client.submit_many([job(f"job-{at}") for at in range(2)])
        wait_until(lambda: all(client.status(one).state == "running" for one in ids))
        restartable_redis.process.send_signal(signal.SIGSTOP)
        try:
            worker.process.send_signal(signal.SIGTERM)
            statuses(worker)
        finally:
            restartable_redis.process.send_signal(signal.SIGCONT)
        assert [client.status(one).state for one in ids] == ["queued", "queued"]
        assert {ledger.hget(f"rerankq:job:{one}", "suspect") for one in ids} == {b"0"}
        assert ledger.hkeys("rerankq:workers") == [], "it signed off"


@pytest.mark.parametrize(("hangs", "status"), [("device", 0), ("tokenise", 75)])
def test_a_thread_that_never_comes_back_does_not_keep_a_worker_alive(
    client: Client, start_worker: Callable, wait_until: Callable, hangs: str, status: int
):
    worker = start_worker("hanging", HANGS=hangs, **ENV)
    stuck = client.submit(job("stuck", query="hang", words=400))
    wait_until(lambda: client.status(stuck).state == "running")
    worker.process.send_signal(signal.SIGTERM)
    assert statuses(worker) == [status]
    assert client.status(stuck).state == "queued", "handed back: the ledger takes it"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_worker_that_loads_its_model_ends_at_once(
    start_worker: Callable, wait_until: Callable, number: int, status: int, tmp_path: Any
):
    worker = start_worker("hanging", HANGS="load", ready=False, **ENV)
    wait_until(lambda: _handles(worker.process.pid, number), 60)
    worker.process.send_signal(number)
    assert statuses(worker) == [status]


def _handles(pid: int, number: int) -> bool:
    """Whether a process handles SIGTERM and this signal: Linux tells. Python itself handles SIGINT at once."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    caught = int(lines["SigCgt"], 16)
    return all(caught >> (one - 1) & 1 for one in (number, signal.SIGTERM))


def test_a_worker_whose_ledger_hangs_at_the_start_ends_at_once(
    start_worker: Callable, restartable_redis: Any, wait_until: Callable
):
    restartable_redis.process.send_signal(signal.SIGSTOP)
    try:
        worker = start_worker(url=restartable_redis.url, ready=False, **ENV)
        wait_until(lambda: _handles(worker.process.pid, signal.SIGTERM), 60)
        worker.process.send_signal(signal.SIGTERM)
        assert statuses(worker) == [143]
    finally:
        restartable_redis.process.send_signal(signal.SIGCONT)


def test_a_log_that_nobody_reads_does_not_keep_a_worker_alive(start_worker: Callable, wait_until: Callable):
    reader, writer = os.pipe()
    other = start_worker(**ENV)
    command = [sys.executable, *other.arguments[:-1], "INFO"]
    worker = subprocess.Popen(command, env=other.environment, stdout=writer, stderr=writer, cwd="/tmp")
    filling = threading.Thread(target=_fill, args=(writer,))
    try:
        said = b""
        while b" ready." not in said:
            said += os.read(reader, 4096)
        filling.start()
        wait_until(lambda: not select.select([], [writer], [], 0)[1])
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(ENDS_S) == 75
    finally:
        worker.kill()
        worker.wait()
        os.close(reader)
        filling.join()
        os.close(writer)


def _fill(pipe: int) -> None:
    """Write until the pipe is full."""
    with suppress(BrokenPipeError):
        while True:
            os.write(pipe, bytes(4096))


def test_a_worker_that_flower_shuts_down_drains_no_longer_than_one_that_is_told_by_a_signal(
    client: Client, start_worker: Callable, settings: Settings, wait_until: Callable
):
    worker = start_worker(**ENV, **SLOW)
    ids = client.submit_many([job(f"job-{at}") for at in range(2)])
    wait_until(lambda: all(client.status(one).state == "running" for one in ids))
    app = make_app(settings)
    app.control.shutdown()
    assert statuses(worker) == [0]
    app.close()
    assert [client.status(one).state for one in ids] == ["queued", "queued"]
