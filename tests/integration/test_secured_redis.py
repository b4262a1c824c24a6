"""Redis as SECURITY.md asks for it: users with the rights of conf/redis-acl.conf alone, and TLS."""

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from forked_processes import run_program

from rerankq import BrokerUnavailable, Client, JobUnknown, Ranking, RerankJob, __version__
from rerankq.broker.celery_app import make_app
from rerankq.doctor.collect import collect
from rerankq.errors import RateLimited
from rerankq.gateway.keys import ApiKey
from rerankq.gateway.rates import Rates
from rerankq.local.embedded import binaries, free_port
from rerankq.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
ROLES = ("producer", "worker", "flower")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a server, and wait until it listens or has ended."""
    running = []

    def start(binary: Path, port: int, *options: str) -> subprocess.Popen:
        command = [binary, *options, "--dir", str(tmp_path), "--save", "", "--logfile", "redis.log"]
        running.append(server := subprocess.Popen(command, stdout=subprocess.DEVNULL))
        while server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                break
        return server

    yield start
    for server in running:
        server.kill()
        server.wait()


@pytest.fixture
def urls(serve: Callable, redis_binary_each_version: Path, tmp_path: Path) -> dict[str, str]:
    """A server with our users: each role's URL."""
    text = (REPOSITORY / "conf" / "redis-acl.conf").read_text()
    for role in ROLES:
        assert text.count(f"CHANGE-ME-{role.upper()}") == 1
        text = text.replace(f"CHANGE-ME-{role.upper()}", f"secret-of-{role}")
    (tmp_path / "acl.conf").write_text(f"{text}\nuser admin on >secret-of-admin ~* &* +@all\n")
    port = free_port()
    server = serve(redis_binary_each_version, port, str(tmp_path / "acl.conf"), "--port", str(port))
    assert server.poll() is None, (tmp_path / "redis.log").read_text()
    users = {role: f"rerankq-{role}" for role in ROLES} | {"admin": "admin"}
    return {role: f"redis://{user}:secret-of-{role}@127.0.0.1:{port}/0" for role, user in users.items()}


def jobs(count: int) -> list[RerankJob]:
    return [
        RerankJob(query=f"q {at}", chunks=["a", "b"], priority="bulk" if at % 2 else "interactive", tenant=f"t{at % 2}")
        for at in range(count)
    ]


def settings_of(url: str) -> Settings:
    return Settings(_env_file=None, broker_url=url, model="stub")


def test_each_role_can_do_its_work_with_the_rights_of_the_acl_file(urls: dict[str, str], start_worker: Callable):
    worker = start_worker(url=urls["worker"], RERANKQ_LEASE_S="1", RERANKQ_DOORBELL_WINDOW="4")
    with Client(settings_of(urls["producer"])) as client:
        ids = client.submit_many(jobs(30))
        got = dict(client.as_completed(ids, timeout=60))
        assert all(isinstance(answer, Ranking) for answer in got.values())
        client.forget(*ids)
        assert client.status(ids[0]).state == "unknown"
        late = client.submit(RerankJob(query="later", chunks=["x"], deadline_s=60))
        assert isinstance(client.result(late, timeout=60), Ranking)
        with pytest.raises(JobUnknown):
            client.cancel("nobody")
    app = make_app(settings_of(urls["flower"]))
    try:
        assert app.control.ping(timeout=10, limit=1)
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"worker-heartbeat": lambda _: None})
            for _ in receiver.itercapture(limit=1, timeout=20, wakeup=True):
                pass
    finally:
        app.close()
    # Nobody was refused anything along the way.
    with redis.Redis.from_url(urls["admin"], decode_responses=True) as connection:
        refused = {(entry["username"], entry["reason"], entry["object"]) for entry in connection.acl_log()}
    # Redis-py names itself to servers that can keep it, and does without.
    assert {entry for entry in refused if not entry[2].startswith("client")} == set()
    # The doctor may ask as any of the two, and is not told how often Redis syncs.
    for role in ("producer", "worker"):
        snapshot = collect(settings_of(urls[role]))
        (server,), (seen,) = snapshot.servers, snapshot.workers
        assert (server.fault, server.refused, server.fsync) == ("", (), None)
        assert (seen.model, seen.device, seen.version) == ("stub", "none (float32)", __version__)
    assert "NOPERM" not in worker.log.read_text()
    assert worker.stop() == 0


FORBIDDEN = {
    "producer": [
        ("FLUSHALL",), ("CONFIG", "GET", "requirepass"), ("KEYS", "*"), ("SCAN", "0"), ("ACL", "LIST"), ("MONITOR",),
        ("HGETALL", "rerankq:scores:x:y"), ("GET", "others"), ("SUBSCRIBE", "others"), ("PSUBSCRIBE", "rerankq:*"),
    ],
    "worker": [
        ("FLUSHALL",), ("CONFIG", "SET", "dir", "/"), ("KEYS", "*"), ("GET", "others"), ("SUBSCRIBE", "others"),
        ("SHUTDOWN",), ("SCRIPT", "FLUSH"), ("REPLICAOF", "127.0.0.1", "1"),
    ],
    "flower": [
        ("HGETALL", "rerankq:job:x"), ("HGETALL", "rerankq:scores:x:y"), ("SUBSCRIBE", "rerankq:1:job:x"),
        ("PUBLISH", "rerankq:1:cancel", "x"), ("CONFIG", "GET", "*"), ("FLUSHALL",),
    ],
}  # fmt: skip


def test_the_gateway_counts_rates_with_the_rights_of_a_producer(urls: dict[str, str]):
    key = ApiKey(name="one", hash="a" * 64, requests_per_minute=1, concurrent=1)

    async def use() -> None:
        rates = Rates(urls["producer"])
        try:
            await rates.spend_request(key)
            with pytest.raises(RateLimited):
                await rates.spend_request(key)
            async with rates.place(key, within_s=5):
                pass
        finally:
            await rates.aclose()

    asyncio.run(use())


def test_no_role_can_do_more(urls: dict[str, str]):
    for role, commands in FORBIDDEN.items():
        with redis.Redis.from_url(urls[role]) as connection:
            for command in commands:
                with pytest.raises((redis.exceptions.NoPermissionError, redis.ResponseError), match=r"(?i)permission"):
                    connection.execute_command(*command)


def test_a_missing_user_or_a_wrong_password_is_refused_without_details(urls: dict[str, str]):
    for url in (
        urls["worker"].replace("rerankq-worker:secret-of-worker@", ""),
        urls["worker"].replace("secret-of", "wrong"),
    ):
        with Client(settings_of(url)) as client, pytest.raises(BrokerUnavailable) as refused:
            client.status("x")
        assert "wrong-worker" not in str(refused.value)


@pytest.fixture
def tls(serve: Callable, tmp_path: Path) -> str:
    """The URL of a server that speaks TLS alone, with its own authority."""
    openssl = shutil.which("openssl")
    certificate, key = tmp_path / "redis.crt", tmp_path / "redis.key"
    if openssl is None:
        skip_on_a_laptop("no openssl here")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=rerankq-test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    for binary in binaries():
        port = free_port()
        options = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no", "--requirepass", "secret"]
        files = [
            "--tls-cert-file",
            str(certificate),
            "--tls-key-file",
            str(key),
            "--tls-ca-cert-file",
            str(certificate),
        ]
        if serve(binary, port, *options, *files).poll() is None:
            return f"rediss://:secret@127.0.0.1:{port}/0?ssl_cert_reqs=required&ssl_ca_certs={certificate}"
    return skip_on_a_laptop("no redis-server with TLS here")


def skip_on_a_laptop(reason: str) -> str:
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def test_jobs_are_ranked_over_tls_from_end_to_end(tls: str, start_worker: Callable):
    start_worker(url=tls)
    with Client(settings_of(tls)) as client:
        ids = client.submit_many(jobs(12))
        assert all(isinstance(answer, Ranking) for _, answer in client.as_completed(ids, timeout=60))


def test_an_untrusted_certificate_is_refused(tls: str):
    stranger = tls.partition("?")[0] + "?ssl_cert_reqs=required"
    with Client(settings_of(stranger)) as client, pytest.raises(BrokerUnavailable, match="certificate"):
        client.status("x")
    app = make_app(settings_of(stranger))
    try:
        with app.connection_for_write() as connection, pytest.raises(Exception, match=r"(?i)certificate"):
            connection.ensure_connection(max_retries=1, interval_start=0)
    finally:
        app.close()


FORKING = """
import os, sys
from rerankq import Client, RerankJob
from rerankq.settings import Settings

with_worker = Settings(_env_file=None, broker_url=sys.argv[1], model="stub")
client = Client(with_worker)
assert client.rerank("before", ["x"], timeout=60).chunks
pid = os.fork()
for at in range(5):
    assert client.rerank(f"{'child' if pid == 0 else 'parent'} {at}", ["x"], timeout=60).chunks
if pid == 0:
    # Its end must send nothing over the encrypted connections that it inherited.
    client.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
# Those would be cut by the server now: their counters of records would not fit any more.
for at in range(5):
    assert client.rerank(f"after {at}", ["x"], timeout=60).chunks
client.close()
"""


def test_a_forked_child_and_its_parent_each_have_encrypted_connections_of_their_own(
    tls: str, start_worker: Callable, tmp_path: Path
):
    start_worker(url=tls)
    ended = run_program(["-c", FORKING, tls], os.environ, tmp_path, timeout=150)
    assert (ended.returncode, ended.stderr) == (0, "")
