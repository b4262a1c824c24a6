"""Health tells the truth: a call would be ranked now, or it says which part fails."""

import signal

import httpx
import psutil
import pytest

from rerankq import Client
from rerankq.local.stack import Stack

READY = ("/health/ready", "/health", "/ping", "/readyz", "/v1/health/ready")
LIVE = ("/health/live", "/healthz", "/v1/health/live")


def parts(gateway) -> dict[str, str]:
    return httpx.get(f"{gateway.url}/health/ready", timeout=10).json()["parts"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_every_servers_health_paths_answer(http, method):
    for path in READY + LIVE:
        answer = http.request(method, path)
        assert answer.status_code == 200, path
        assert bool(answer.content) == (method == "GET")


def test_ready_names_every_part_and_nothing_of_where_it_is(http):
    told = http.get("/health/ready").json()
    assert told["status"] == "ready"
    assert told["parts"] == {"broker": "ok", "ledger": "ok", "worker": "ok"}


def test_without_a_worker_the_gateway_lives_and_is_not_ready(start_gateway):
    gateway = start_gateway()
    answer = httpx.get(f"{gateway.url}/health/ready")
    assert answer.status_code == 503
    assert answer.json()["parts"] == {"broker": "ok", "ledger": "ok", "worker": "no worker serves the default model"}
    assert all(httpx.get(gateway.url + path).status_code == 503 for path in READY)
    assert all(httpx.get(gateway.url + path).status_code == 200 for path in LIVE)


def test_a_worker_of_another_model_does_not_make_it_ready(start_gateway, start_worker):
    gateway = start_gateway(model="bundled")
    start_worker(gateway.settings.model_copy(update={"model": "stub", "default_model": "bundled"}))
    assert parts(gateway)["worker"] == "no worker serves the default model"


def test_a_paused_worker_is_not_ready_and_is_again_when_it_goes_on(redis_url, start_gateway, wait_until):
    gateway = start_gateway()
    with Stack(gateway.settings) as stack, Client(gateway.settings) as client:
        stack.wait_until_ready(client)
        wait_until(lambda: parts(gateway)["worker"] == "ok")
        (worker,) = (process.pid for process in stack._processes)
        family = [psutil.Process(worker), *psutil.Process(worker).children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: parts(gateway)["worker"].startswith("no sign of life"), 20)
            assert httpx.get(f"{gateway.url}/health").status_code == 503
        finally:
            for process in family:
                process.send_signal(signal.SIGCONT)
        wait_until(lambda: parts(gateway)["worker"] == "ok")


@pytest.mark.parametrize("way", ["kill", "pause"])
def test_a_redis_that_is_gone_or_hangs_is_told_within_seconds(restartable_redis, start_gateway, wait_until, way):
    gateway = start_gateway(broker_url=restartable_redis.url)
    assert parts(gateway)["ledger"] == "ok"
    process = restartable_redis.process
    if way == "kill":
        restartable_redis.kill()
    else:
        process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: parts(gateway)["ledger"] != "ok", 10)
        assert parts(gateway) == {"broker": "does not answer", "ledger": "does not answer", "worker": "not known"}
        assert httpx.get(f"{gateway.url}/health/live").status_code == 200
    finally:
        if way == "kill":
            restartable_redis.start()
        else:
            process.send_signal(signal.SIGCONT)
    wait_until(lambda: parts(gateway)["ledger"] == parts(gateway)["broker"] == "ok", 30)


def test_a_broker_apart_from_the_ledger_is_looked_at_apart(redis_url, restartable_redis, start_gateway, wait_until):
    gateway = start_gateway(broker_url=restartable_redis.url, ledger_url=redis_url)
    assert (parts(gateway)["broker"], parts(gateway)["ledger"]) == ("ok", "ok")
    restartable_redis.kill()
    wait_until(lambda: parts(gateway)["broker"] != "ok", 10)
    assert parts(gateway)["ledger"] == "ok"
    restartable_redis.start()


def test_an_amqp_broker_that_does_not_answer_is_told(redis_url, start_gateway):
    gateway = start_gateway(broker_url="amqp://guest:guest@127.0.0.1:9/", ledger_url=redis_url)
    assert parts(gateway)["broker"] == "does not answer"
    assert parts(gateway)["ledger"] == "ok"
