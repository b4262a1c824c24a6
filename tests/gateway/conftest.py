"""A gateway with a real worker behind it, and gateways of a test's own."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from forked_processes import ForkedProcess
from worker_processes import RunningWorker, wait_for_workers

from rerankq.gateway.server import Server, config_of
from rerankq.local import worker_command
from rerankq.local.embedded import free_port
from rerankq.settings import Settings


def url_of(settings: Settings) -> str:
    return f"http://127.0.0.1:{settings.port}"


def wait_for_gateway(url: str, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while True:
        try:
            httpx.get(f"{url}/health/live")
        except httpx.TransportError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="session")
def url(deployment: Settings) -> str:
    """The address of the gateway that has a worker."""
    wait_for_gateway(url_of(deployment))
    return url_of(deployment)


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    """Talks to the gateway that has a worker."""
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


class RunningGateway:
    """A gateway in a thread of this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.model_copy(update={"port": free_port(0)})
        self.url = url_of(self.settings)
        self.server = Server(config_of(self.settings))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))
        self.thread.start()
        wait_for_gateway(self.url)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def start_gateway(redis_url: str, tmp_path: Path) -> Iterator[Callable[..., RunningGateway]]:
    """Start gateways on an empty Redis, without a worker unless the test starts one; settings by keyword."""
    # Not the user's folder: batches of other tests are there.
    usual = {"broker_url": redis_url, "model": "stub", "files_dir": tmp_path / "files", "_env_file": None}
    with ExitStack() as running:

        def start(**given) -> RunningGateway:
            settings = Settings(**{**usual, **given})
            gateway = RunningGateway(settings)
            running.callback(gateway.stop)
            return gateway

        yield start


@pytest.fixture
def start_worker() -> Iterator[Callable[..., RunningWorker]]:
    """Start workers of the settings' model; they can be killed."""
    running: list[RunningWorker] = []

    def start(settings: Settings, **more: str) -> RunningWorker:
        environment = {**worker_command.environment(settings), "RERANKQ_LEASE_S": str(settings.lease_s), **more}
        worker = RunningWorker(settings.broker, "rerankq_worker.tasks", **environment)
        running.append(worker)
        wait_for_workers(settings.broker, worker)
        return worker

    yield start
    for worker in running:
        worker.stop()


class GatewayProcess:
    """A gateway in a process of its own, which can be killed."""

    def __init__(self, port: int, **variables: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, **{f"RERANKQ_{name.upper()}": value for name, value in variables.items()}}
        self._process = ForkedProcess(["-m", "rerankq.cli", "gateway", "--port", str(port)], environment)
        wait_for_gateway(self.url)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def start_gateway_process(tmp_path: Path) -> Iterator[Callable[..., GatewayProcess]]:
    """Start gateways that can be killed; settings by keyword, as their variables are written."""
    with ExitStack() as running:

        def start(**variables: str) -> GatewayProcess:
            gateway = GatewayProcess(free_port(0), **{"files_dir": str(tmp_path / "files"), **variables})
            running.callback(gateway.kill)
            return gateway

        yield start
