"""What a URL says holds for client, worker and doctor alike, and another program's environment for none of them."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from forked_processes import run_program

from rerankq import BrokerUnavailable, Client, SettingsInvalid
from rerankq.broker.celery_app import make_app
from rerankq.doctor.checks import checks
from rerankq.doctor.collect import collect
from rerankq.local.embedded import EmbeddedRedis
from rerankq.settings import Settings

# All that a URL of a socket may hold as it is.
PASSWORD = " !\"#$%&'()*+,-.:;<=>@[\\]^_`{|}~é"


@pytest.fixture
def local(redis_binary_each_version: Path) -> Iterator[str]:
    """The path of a server that listens on nothing else, and asks for an awkward password."""
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:
        path = f"{folder}/redis.sock"
        (Path(folder) / "redis.conf").write_text("port 0\nsave ''\n")
        command = [redis_binary_each_version, f"{folder}/redis.conf", "--unixsocket", path, "--dir", folder]
        with subprocess.Popen([*command, "--logfile", "log"], stdout=subprocess.DEVNULL) as server:
            with redis.Redis(unix_socket_path=path) as admin:
                for _ in range(500):
                    try:
                        admin.config_set("requirepass", PASSWORD)
                        break
                    except redis.ConnectionError:
                        time.sleep(0.02)
            yield path
            server.kill()


def said_of(settings: Settings) -> list[str]:
    return [f"{one.level} {one.subject}: {one.said}" for one in checks(collect(settings))]


def in_good_time(client: Client, worker: Any, wait_until: Callable) -> None:
    """A job comes back before a sweeper would have found it."""
    wait_until(lambda: client.workers() or worker.process.poll() is not None, 90)
    client.rerank("warm", ["x"], timeout=30)
    began = time.monotonic()
    for number in range(5):
        assert client.rerank(f"q{number}", ["a", "b"], timeout=30).chunks
    assert time.monotonic() - began < 5 * 2.5, "a lost doorbell or a missed message costs three seconds each"


def test_a_socket_with_a_password_of_every_sign_serves_all_roles(
    local: str, start_worker: Callable, wait_until: Callable
):
    url = f"unix://:{PASSWORD}@{local}?db=0"
    worker = start_worker(url=url, ready=False)
    settings = Settings(_env_file=None, broker_url=url, model="stub")
    with Client(settings) as client:
        in_good_time(client, worker, wait_until)
    said = said_of(settings)
    assert not [one for one in said if one.startswith("wrong") and "appendonly" not in one], said
    assert "MOVED" not in "".join(said)
    logged = "".join(said) + worker.log.read_text()
    assert PASSWORD not in logged
    assert "{|}~" not in logged
    assert worker.stop() == 0


def test_options_of_redis_py_work_for_client_worker_and_doctor(
    redis_url: str, start_worker: Callable, wait_until: Callable
):
    options = "health_check_interval=5&socket_timeout=8&socket_connect_timeout=4&retry_on_timeout=yes&client_name=mine"
    url = f"{redis_url}?{options}&max_connections=1&protocol=3&decode_responses=True&socket_keepalive=yes"
    worker = start_worker(url=url, ready=False, RERANKQ_CONCURRENCY="4")
    settings = Settings(_env_file=None, broker_url=url, model="stub")
    with Client(settings) as client:
        in_good_time(client, worker, wait_until)
        again = client.rerank("warm", ["x"], timeout=30, id="again")
        assert again.usage.cached_pairs == 1, "the cache is read and written, too"
    with redis.Redis.from_url(redis_url) as admin:
        assert {one["name"] for one in admin.client_list()} >= {"mine"}
    assert not [one for one in said_of(settings) if one.startswith("wrong") and "appendonly" not in one]
    assert "Traceback" not in worker.log.read_text()


ELSEWHERE = "redis://:others@127.0.0.1:1/0"
OTHERS = {
    "CELERY_BROKER_URL": ELSEWHERE,
    "CELERY_BROKER_READ_URL": ELSEWHERE,
    "CELERY_BROKER_WRITE_URL": ELSEWHERE,
    "CELERY_RESULT_BACKEND": ELSEWHERE,
    "BROKER_URL": ELSEWHERE,
    "RESULT_BACKEND": ELSEWHERE,
    "CELERY_CONFIG_MODULE": "no_such_module",
    "CONFIG_MODULE": "no_such_module",
    "CELERY_LOADER": "no_such_module:Loader",
    "CELERY_WORKER_POOL": "solo",
    "CELERY_WORKER_CONCURRENCY": "1",
    "CELERY_WORKER_QUEUES": "others",
    "CELERY_WORKER_LOGLEVEL": "CRITICAL",
    "DJANGO_SETTINGS_MODULE": "no_such_module",
    "CELERY_TIMEZONE": "Asia/Shanghai",
    "CELERY_ENABLE_UTC": "0",
}


def test_another_programs_celery_in_the_environment_steers_neither_client_nor_worker(
    redis_url: str, start_worker: Callable, wait_until: Callable, monkeypatch: pytest.MonkeyPatch
):
    worker = start_worker(url=redis_url, ready=False, RERANKQ_CONCURRENCY="5", **OTHERS)
    for name, value in OTHERS.items():
        monkeypatch.setenv(name, value)
    settings = Settings(_env_file=None, broker_url=redis_url, model="stub")
    with Client(settings) as client:
        in_good_time(client, worker, wait_until)
    with closing(make_app(settings)) as app:
        for connection in (app.connection(), app.connection_for_read(), app.connection_for_write()):
            assert ":1/" not in connection.as_uri()
        assert app.backend.as_uri() == "disabled://"
        answers: dict[str, Any] = {}
        for _ in range(30):
            answers = app.control.inspect(timeout=1, limit=1).stats() or {}
            if answers:
                break
        (stats,) = answers.values()
    assert ("thread" in stats["pool"]["implementation"], stats["pool"]["max-concurrency"]) == (True, 5)


def test_celerys_own_options_in_the_environment_do_not_reach_a_worker_of_the_command_line(
    tmp_path: Path, redis_url: str
):
    environment = {**os.environ, **OTHERS, "RERANKQ_BROKER_URL": redis_url, "RERANKQ_MODEL": "no/such/folder"}
    environment |= {"CELERY_WORKDIR": "/nowhere", "CELERY_APP": "no_such_module", "CELERY_CONFIG": "no_such_module"}
    worker = run_program(["-m", "rerankq.cli", "worker"], {**environment, "HF_HUB_OFFLINE": "1"}, tmp_path)
    assert "the worker cannot start: model 'no/such/folder'" in worker.stderr, "it came as far as its model"
    assert "Traceback" not in worker.stderr


def test_a_server_with_one_database_names_the_settings_to_set(redis_binary_each_version: Path, start_worker: Callable):
    with EmbeddedRedis(binary=redis_binary_each_version) as server:
        one = f"{server.url.removesuffix('/0')}/15"  # it has 16, so that none follows
        settings = Settings(_env_file=None, broker_url=one, model="stub")
        said = r"^RERANKQ_LEDGER_URL: the server has no database 16: name one that it has"
        with Client(settings) as client, pytest.raises(SettingsInvalid, match=said) as caught:
            client.submit({"query": "q", "chunks": ["x"]})
        assert not caught.value.retryable
        assert not isinstance(caught.value, BrokerUnavailable)
        worker = start_worker(url=one, ready=False)
        assert worker.process.wait(90) == 1
        assert "RERANKQ_LEDGER_URL: the server has no database 16" in worker.log.read_text()
        assert "Traceback" not in worker.log.read_text()
        doctors = said_of(settings)
        for role in ("LEDGER", "CACHE"):
            assert any(line.startswith("wrong") and f"RERANKQ_{role}_URL" in line for line in doctors), doctors
        # All roles in one database: their keys have names of their own.
        together = dict.fromkeys(("broker_url", "ledger_url", "cache_url"), one)
        worker = start_worker(url=one, ready=False, RERANKQ_LEDGER_URL=one, RERANKQ_CACHE_URL=one)
        with Client(Settings(_env_file=None, model="stub", **together)) as client:
            ids = client.submit_many({"query": f"q{number}", "chunks": ["x", "y"]} for number in range(20))
            assert len(dict(client.as_completed(ids, timeout=90))) == 20


def test_two_deployments_whose_brokers_are_databases_of_one_server_answer_their_own_jobs(
    redis_url: str, start_worker: Callable
):
    staging = f"{redis_url.removesuffix('/0')}/5"
    start_worker(url=staging, RERANKQ_MODEL="stub:0")
    settings = Settings(_env_file=None, broker_url=redis_url, model="stub")
    with Client(settings) as client, Client(Settings(_env_file=None, broker_url=staging, model="stub:0")) as other:
        assert client.workers() == []
        job = client.submit({"query": "q", "chunks": ["x"]})
        assert other.rerank("q", ["x"], timeout=60)
        assert client.status(job).state == "queued"


def test_two_deployments_on_one_ledger_are_found_by_the_doctor_of_either(
    redis_url: str, start_worker: Callable, wait_until: Callable
):
    server = redis_url.removesuffix("/0")
    ours = Settings(_env_file=None, broker_url=redis_url, model="stub")
    theirs = ours.model_copy(update={"broker_url": f"{server}/5", "ledger_url": ours.ledger})
    start_worker(url=theirs.broker, ready=False, RERANKQ_LEDGER_URL=ours.ledger)
    with Client(theirs) as client:
        wait_until(client.workers, 90)
        assert client.rerank("q", ["x"], timeout=60)
    found = [one for one in said_of(ours) if "does not answer through this broker" in one]
    assert len(found) == 1
    assert found[0].startswith("wrong worker")
    assert not [one for one in said_of(theirs) if "through this broker" in one], "by its own broker it does"
    named = ours.model_copy(update={"deployment": "blue"})
    assert [one for one in said_of(named) if "belongs to another deployment on the same ledger" in one]
