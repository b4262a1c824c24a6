"""Connections of every role, over every kind of URL: to servers that answer late, by halves, or are replaced.

That they follow Sentinel to a new master while jobs run is shown with real workers, among the crashes.
"""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import redis
from redis.exceptions import RedisError

from rerankq import BrokerUnavailable, Client, urls
from rerankq.broker.celery_app import make_app
from rerankq.broker.doorbells import DoorbellSender
from rerankq.connections import opening as connections
from rerankq.connections import sentinel
from rerankq.connections.sentinel import Master
from rerankq.errors import RateLimited
from rerankq.gateway import rates as rates_of_keys
from rerankq.gateway.keys import ApiKey
from rerankq.gateway.rates import Rates
from rerankq.ledger import Doorbell, connect
from rerankq.ledger.runner import Ledger
from rerankq.local.embedded import free_port
from rerankq.settings import Settings

pytestmark = pytest.mark.slow

NOBODY = "sentinel://:secret@127.0.0.1:1,127.0.0.1:2/0?master=jobs"
KINDS = ["redis", "rediss", "unix", "sentinel", "sentinels"]
# What a test's server is given to answer in, in seconds: its answers are held until the client gave them up.
ANSWER_S = 1.0


def test_an_outage_of_all_sentinels_is_an_error_of_one_line():
    said = r"^the ledger does not answer: no sentinel that answers knows a living master 'jobs'$"
    with Client(Settings(broker_url=NOBODY)) as client, pytest.raises(BrokerUnavailable, match=said):
        client.status("job")
    with connect(NOBODY) as connection, pytest.raises(BrokerUnavailable, match=said):
        Ledger(connection).workers()


class Unanswering:
    """Accepts connections on the loopback, counts them, and answers nothing: closes them at once or (*holds*) never."""

    def __init__(self, *, holds: bool) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._holds = holds
        self.accepted: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                one, _ = self._listener.accept()
                self.accepted.append(one)
                if not self._holds:
                    one.close()

    def close(self) -> None:
        # A listener that is only closed goes on accepting in its thread.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for one in [self._listener, *self.accepted]:
            one.close()


@pytest.mark.usefixtures("patient")
def test_the_sentinel_that_answered_last_is_asked_first(tmp_path: Path):
    binary, watching = shutil.which("redis-server"), free_port()
    if binary is None:
        skip_on_a_laptop("no redis-server here")
    lines = [f"port {watching}", f"dir {tmp_path}", f"sentinel monitor jobs 127.0.0.1 {free_port()} 1"]
    lines += ["sentinel down-after-milliseconds jobs 600000"]
    (tmp_path / "sentinel.conf").write_text("\n".join(lines) + "\n")
    with ExitStack() as stack:
        dead = stack.enter_context(closing(Unanswering(holds=False)))
        start([binary, tmp_path / "sentinel.conf", "--sentinel"], watching, stack)
        url = f"sentinel://127.0.0.1:{dead.port},127.0.0.1:{watching}/0?master=jobs"
        master = Master.of(urls.read(url, urls.REDIS))
        first = master.address()
        asked = len(dead.accepted)
        assert asked
        assert [master.address(), asyncio.run(master.address_async())] == [first, first]
        assert len(dead.accepted) == asked


def test_a_command_of_the_ledger_is_not_sent_again_after_a_slow_answer():
    with closing(Unanswering(holds=True)) as server:
        url = f"redis://127.0.0.1:{server.port}/0?socket_timeout=0.2"
        with connect(url) as connection, pytest.raises(redis.TimeoutError):
            connection.ping()
        assert len(server.accepted) == 1


def test_an_answer_of_the_cache_is_awaited_for_less_long_than_one_of_the_ledger():
    limits = {}
    for role, opened in (("cache", connections.cache), ("ledger", connections.ledger)):
        with opened("redis://127.0.0.1:1/0") as connection:
            limits[role] = connection.connection_pool.connection_kwargs["socket_timeout"]
    assert limits == {"cache": connections.CACHE_ANSWER_S, "ledger": connections.ANSWER_S}
    assert connections.CACHE_ANSWER_S < 1


# A server that hangs, and then answers ------------------------------------------------------------------------------


class Stalling:
    """Stands before a server and passes everything on; holds back what the server says, or all after some bytes of it.

    Listens on a port of the loopback, or on a path.
    """

    def __init__(self, goal: int, path: Path | None = None) -> None:
        self._goal = goal
        self._listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        self._listener.bind(str(path) if path else ("127.0.0.1", 0))
        self._listener.listen(100)
        self.port = 0 if path else self._listener.getsockname()[1]
        self._passes = threading.Event()
        self._passes.set()
        # Bytes that are still let through while it holds back.
        self._some = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self, after: int = 0) -> None:
        self._some = after
        self._passes.clear()

    def release(self) -> None:
        self._passes.set()

    def close(self) -> None:
        self.release()
        for one in [self._listener, *self._open]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._goal))
                self._open += [near, far]
                threading.Thread(target=self._pass_on, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(far, near, True), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := one.recv(65_536):
                if answers and not self._passes.is_set():
                    now, data = data[: self._some], data[self._some :]
                    self._some = 0
                    other.sendall(now)
                    self._passes.wait()
                other.sendall(data)
            self._passes.wait()
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of one's own authority for the loopback, its key beside it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        skip_on_a_laptop("no openssl here")
    path = tmp_path_factory.mktemp("tls") / "redis.crt"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=rerankq-test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path.with_suffix(".key")), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def skip_on_a_laptop(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def start(command: list[Any], port: int, stack: ExitStack) -> subprocess.Popen:
    server = stack.enter_context(subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL))
    stack.callback(server.kill)
    for _ in range(1_000):
        if server.poll() is not None:
            skip_on_a_laptop(f"{command[0]} does not start with these options")
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        time.sleep(0.02)
    return server


class Deployment:
    """A server behind one that can stall; its URL of a kind, to which options can be added."""

    def __init__(self, kind: str, binary: Path, certificate: Path, folder: Path, stack: ExitStack) -> None:
        self.kind, port = kind, free_port()
        tls = ["--tls-cert-file", certificate, "--tls-key-file", certificate.with_suffix(".key")]
        tls += ["--tls-ca-cert-file", certificate, "--tls-auth-clients", "no"]
        options = ["--save", "", "--dir", folder, "--requirepass", "se;cret"]
        listens = ["--port", "0", "--tls-port", port, *tls] if kind in urls.TLS else ["--port", port]
        start([binary, *listens, *options], port, stack)
        path = folder / "r.sock" if kind == "unix" else None
        self.stalling = Stalling(port, path)
        stack.callback(self.stalling.close)
        user = ":se;cret@"
        self._query = f"socket_timeout={ANSWER_S}"
        if kind in urls.TLS:
            self._query += f"&ssl_ca_certs={certificate}"
        if kind in urls.SENTINEL:
            watching = free_port()
            lines = ["port 0", f"tls-port {watching}", "tls-replication yes", "tls-auth-clients no"]
            lines += [f"tls-cert-file {certificate}", f"tls-key-file {certificate.with_suffix('.key')}"]
            lines = [*lines, f"tls-ca-cert-file {certificate}"] if kind in urls.TLS else [f"port {watching}"]
            lines += [f"dir {folder}", f"sentinel monitor jobs 127.0.0.1 {self.stalling.port} 1"]
            lines += ["sentinel auth-pass jobs se;cret", "sentinel down-after-milliseconds jobs 600000"]
            (folder / "sentinel.conf").write_text("\n".join(lines) + "\n")
            start([binary, folder / "sentinel.conf", "--sentinel"], watching, stack)
            self._where = f"{kind}://{user}127.0.0.1:{watching}"
            self._query += "&master=jobs"
        else:
            self._where = f"unix://{user}{path}" if path else f"{kind}://{user}127.0.0.1:{self.stalling.port}"

    def url(self, database: int = 0) -> str:
        place = f"?db={database}&" if self.kind == "unix" else f"/{database}?"
        return f"{self._where}{place}{self._query}"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentinels that are alive answer, however busy the machine is."""
    for limit in ("socket_timeout", "socket_connect_timeout"):
        monkeypatch.setitem(sentinel.LIMITS, limit, 30.0)


@pytest.fixture(params=KINDS)
def deployment(request: pytest.FixtureRequest, certificate: Path, patient: None) -> Iterator[Deployment]:
    binary = shutil.which("redis-server")
    if binary is None:
        skip_on_a_laptop("no redis-server here")
    # A socket's path is short.
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="rq-") as folder:
        yield Deployment(request.param, Path(binary), certificate, Path(folder), stack)


ROUNDS = range(3)


@pytest.mark.parametrize("role", ["ledger", "cache"])
def test_a_late_answer_is_not_read_as_the_answer_to_the_next_command(deployment: Deployment, role: str):
    with getattr(connections, role)(deployment.url(1)) as client:
        # On a busy machine the first connection may take longer than an answer may.
        answered(lambda: client.mset({"a": "of a", "b": "of b"}))
        for after in (0, 3):  # no byte of the answer, and half of it
            deployment.stalling.hold(after)
            with pytest.raises(RedisError):
                client.get("a")
            # The late answer comes when the next question has been asked.
            threading.Timer(ANSWER_S / 5, deployment.stalling.release).start()
            assert answered(lambda: client.get("b")) == b"of b"
            for _ in ROUNDS:
                assert client.get("b") == b"of b"
                assert client.pipeline(transaction=False).get("a").get("b").execute() == [b"of a", b"of b"]


def answered(ask: Callable[[], Any]) -> Any:
    """Ask until there is an answer."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        with suppress(RedisError):
            return ask()
    return pytest.fail("no answer")


def test_a_late_answer_is_not_read_as_the_answer_to_the_next_command_by_asyncio(deployment: Deployment):
    async def ask() -> None:
        async with connections.ledger_async(deployment.url(1)) as client:
            await answered_in_time(lambda: client.mset({"a": "of a", "b": "of b"}))
            for after in (0, 3):
                deployment.stalling.hold(after)
                with pytest.raises(RedisError):
                    await client.get("a")
                # Whoever stops waiting by himself leaves no answer behind either.
                await gives_up(client)
                deployment.stalling.release()
                for _ in ROUNDS:
                    assert await answered_in_time(lambda: client.get("b")) == b"of b"
                    pipe = client.pipeline(transaction=False).get("a").get("b")
                    assert await answered_in_time(pipe.execute) == [b"of a", b"of b"]

    async def gives_up(client: Any) -> None:
        while True:
            with suppress(RedisError):  # on a busy machine connecting anew is given up first: once more
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(ANSWER_S / 10):
                        await client.get("a")
                return

    async def answered_in_time(ask_again: Callable[[], Awaitable[Any]]) -> Any:
        # Connecting anew may take longer than an answer may, on a busy machine.
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            with suppress(RedisError):
                return await ask_again()
        return pytest.fail("no answer")

    asyncio.run(ask())


def test_a_subscription_that_received_half_a_message_reconnects_and_goes_on(deployment: Deployment):
    with connections.ledger(deployment.url(1)) as client, closing(client.pubsub()) as heard:
        answered(lambda: heard.subscribe("channel"))
        assert heard.get_message(timeout=5)["type"] == "subscribe"
        deployment.stalling.hold(after=3)
        publish(deployment, "channel", "first")
        ends = time.monotonic() + ANSWER_S
        while time.monotonic() < ends:
            # Newer versions of redis-py notice the half and close, and wait for the first answer over a new connection;
            # older ones keep it, and wait no longer than told.
            with suppress(RedisError):
                assert heard.get_message(timeout=0.05) is None
        deployment.stalling.release()
        ends = time.monotonic() + 60
        while (message := heard.get_message(timeout=0.1) or {}).get("data") != b"second":
            assert time.monotonic() < ends
            assert message.get("data") in {None, 1, b"first"}, "or the confirmation that it hears again"
            publish(deployment, "channel", "second")


def publish(deployment: Deployment, channel: str, word: str) -> None:
    """Publish past the server that stalls."""
    with directly(deployment) as direct:
        direct.publish(channel, word)


def directly(deployment: Deployment) -> redis.Redis:
    options = {"ssl": True, "ssl_cert_reqs": "none"} if deployment.kind in urls.TLS else {}
    return redis.Redis(port=deployment.stalling._goal, password="se;cret", **options)


def test_the_completion_connection_opens_within_a_limit_and_closes_with_its_reader(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
):
    async def listen() -> None:
        deployment.stalling.hold()
        with monkeypatch.context() as patched:
            patched.setattr(connections, "CONNECT_S", ANSWER_S)
            line = connections.listening(deployment.url(1))
            with pytest.raises(RedisError):
                await asyncio.wait_for(line.connect(), 30)
        assert not line.is_connected
        deployment.stalling.release()
        line = connections.listening(deployment.url(1))
        await line.connect()
        await line.send_command("SUBSCRIBE", "channel")
        assert await line.read_response() == [b"subscribe", b"channel", 1]
        deployment.stalling.hold(after=3)
        opened = line._writer.transport.get_extra_info("socket")
        reading = asyncio.create_task(line.read_response())
        await asyncio.to_thread(publish, deployment, "channel", "first")
        # Any silence is borne, for half a message too: whoever listens decides how long.
        assert not (await asyncio.wait([reading], timeout=2 * ANSWER_S))[0]
        reading.cancel()
        await asyncio.wait([reading])
        assert not line.is_connected

        # TLS ends with a word of the other side.
        deployment.stalling.release()
        async with asyncio.timeout(30):
            while opened.fileno() != -1:  # noqa: ASYNC110  # a transport tells nobody of its end
                await asyncio.sleep(0.01)

    asyncio.run(listen())


def test_kombus_own_connections_are_closed_too(deployment: Deployment):
    app = make_app(Settings(_env_file=None, broker_url=deployment.url()))
    with closing(app), app.connection_for_write() as connection:
        channel = connection.default_channel
        for queue, doorbells in (("a", 1), ("b", 2)):
            for number in range(doorbells):
                channel._put(queue, {"body": f"{queue}{number}", "headers": {}, "properties": {}})
        for after in (0, 2):
            deployment.stalling.hold(after)
            with pytest.raises(RedisError):
                channel._size("a")
            threading.Timer(ANSWER_S / 5, deployment.stalling.release).start()
            assert answered(lambda: channel._size("b")) == 2
            for _ in ROUNDS:
                assert (channel._size("b"), channel._size("a")) == (2, 1)
        # The consumer's, which waits for a message without asking again: it hears half of one.
        with closing(connection.SimpleQueue("c", queue_opts={"no_ack": True})) as queue:
            with pytest.raises(Empty):
                queue.get(timeout=0.1)
            deployment.stalling.hold(after=5)
            send(deployment, "c", "first")
            with pytest.raises((RedisError, Empty)):
                queue.get(timeout=3)
            deployment.stalling.release()
            send(deployment, "c", "second")
            # The first may be lost, as a doorbell may.
            heard = [queue.get(timeout=10).payload]
            if heard != ["second"]:
                heard.append(queue.get(timeout=10).payload)
            assert heard in (["second"], ["first", "second"])


def send(deployment: Deployment, queue: str, word: str) -> None:
    """Send a message past the server that stalls."""
    properties = {"delivery_tag": word, "delivery_info": {"exchange": queue, "routing_key": queue}}
    message = {"body": json.dumps(word), "content-type": "application/json", "content-encoding": "utf-8"}
    with directly(deployment) as direct:
        direct.lpush(f"rerankq:{queue}", json.dumps({**message, "headers": {}, "properties": properties}))


@pytest.mark.parametrize("deployment", ["rediss", "sentinel", "sentinels"], indirect=True)
def test_rates_of_the_gateway_are_counted_over_tls_and_over_sentinel(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rates_of_keys, "ANSWER_WITHIN_S", 30.0)
    key = ApiKey(name="one", hash="a" * 64, requests_per_minute=1, concurrent=1)

    async def use() -> None:
        rates = Rates(deployment.url(1).replace(f"socket_timeout={ANSWER_S}", "socket_timeout=30"))
        try:
            await rates.spend_request(key)
            with pytest.raises(RateLimited):
                await rates.spend_request(key)
            async with rates.place(key, within_s=5):
                with pytest.raises(RateLimited, match="none of them ended"):
                    async with rates.place(key, within_s=2):
                        pass
        finally:
            await rates.aclose()

    asyncio.run(use())


@pytest.mark.parametrize("deployment", ["rediss", "sentinels"], indirect=True)
@pytest.mark.parametrize("verification", ["", "&ssl_cert_reqs=required", "&ssl_cert_reqs=CERT_REQUIRED"])
def test_no_role_sends_anything_to_a_server_with_an_untrusted_certificate(deployment: Deployment, verification: str):
    def unvouched(database: int) -> str:
        authority = next(part for part in deployment.url().split("&") if part.startswith("ssl_ca_certs"))
        return deployment.url(database).replace(f"&{authority}", verification)

    settings = Settings(_env_file=None, broker_url=unvouched(0))
    for role in ("ledger", "cache"):
        with getattr(connections, role)(getattr(settings, role)) as client, pytest.raises(RedisError):
            client.ping()

    async def ask() -> None:
        async with connections.ledger_async(settings.ledger) as client:
            with pytest.raises(RedisError):
                await client.ping()
        with pytest.raises(RedisError):
            await connections.listening(settings.ledger).connect()

    asyncio.run(ask())
    with (
        closing(make_app(settings)) as app,
        app.connection_for_write() as connection,
        pytest.raises(Exception, match=r"(?i)certificate|no sentinel"),
    ):
        connection.ensure_connection(max_retries=1, interval_start=0)


def test_doorbells_go_on_after_a_server_that_hung(deployment: Deployment):
    app = make_app(Settings(_env_file=None, broker_url=deployment.url()))
    with closing(DoorbellSender(app)) as doorbells:
        doorbells.send([Doorbell("one", "rerankq.bulk", "")])
        assert doorbells.flush(30)
        deployment.stalling.hold()
        doorbells.send([Doorbell("two", "rerankq.bulk", "")])
        assert not doorbells.flush(3 * ANSWER_S)
        deployment.stalling.release()
        doorbells.send([Doorbell("three", "rerankq.bulk", "")])
        assert doorbells.flush(30)
        with app.connection_for_write() as connection:
            assert connection.default_channel._size("rerankq.bulk") >= 3
