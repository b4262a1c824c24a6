"""Workers in processes of their own, forked from one that has imported their libraries."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from rerankq.settings import Settings

HERE = Path(__file__).parent
# Where the programs are that stand in for `rerankq_worker.tasks`.
PROGRAMS = HERE / "integration"

# A worker's libraries take more than a second to import, as much as the rest of most tests: it is forked from a process
# that has imported them. None of these reads the settings when it is imported, as `rerankq_worker.tasks` does.
LIBRARIES = [
    "celery.bin.celery", "celery.worker.consumer", "celery.apps.worker", "celery.concurrency.thread",
    "kombu.transport.redis", "rerankq.client", "rerankq.broker", "rerankq_worker.engine", "rerankq_worker.fusion",
]  # fmt: skip
_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(LIBRARIES)


class ForkedProcess:
    """Runs a program in a forked process, and is asked of it as a ``subprocess.Popen`` is."""

    def __init__(self, program: Path, given: dict[str, Any]) -> None:
        run = {"init_globals": given, "run_name": "__main__"}
        self._process = _forking.Process(target=runpy.run_path, args=(str(program),), kwargs=run, daemon=True)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked process", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class RunningWorker:
    """A `celery worker` process in a session of its own."""

    def __init__(self, url: str, app: str, *, debug: bool = False, **env: str) -> None:
        self.log = Path(tempfile.mkstemp(prefix="rerankq-worker-", suffix=".log")[1])
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RERANKQ_")}
        # Ours before what the tests themselves were told: both run the same code.
        path = os.pathsep.join([str(PROGRAMS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= {"RERANKQ_BROKER_URL": url, "RERANKQ_MODEL": "stub", "PYTHONPATH": path, **env}
        self.environment = environment
        self.arguments = ["-A", app, "worker", "-n", f"{id(self)}@%h", "-l", "DEBUG" if debug else "WARNING"]
        self.start()

    def start(self) -> None:
        given = {"ARGUMENTS": self.arguments, "ENVIRONMENT": self.environment, "LOG": str(self.log)}
        self.process = ForkedProcess(HERE / "forked_worker.py", given)

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        self.log.unlink(missing_ok=True)
        return self.process.returncode


def wait_for_workers(url: str, worker: RunningWorker, seconds: float = 90) -> None:
    ledger = redis.Redis.from_url(Settings(broker_url=url).ledger)
    ends = time.monotonic() + seconds
    while not any(f":{worker.process.pid}:".encode() in name for name in ledger.hkeys("rerankq:workers")):
        if worker.process.poll() is not None or time.monotonic() > ends:
            pytest.fail(f"the worker did not start: {worker.log.read_text()[-3000:]}")
        time.sleep(0.05)
    ledger.close()
