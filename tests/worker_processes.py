"""Workers in processes of their own."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import redis
from forked_processes import ForkedProcess

from rerankq.settings import Settings

# Where the programs are that stand in for `rerankq_worker.tasks`.
PROGRAMS = Path(__file__).parent / "integration"


class RunningWorker:
    """A `celery worker` process in a session of its own."""

    def __init__(self, url: str, app: str, *, debug: bool = False, **env: str) -> None:
        self.log = Path(tempfile.mkstemp(prefix="rerankq-worker-", suffix=".log")[1])
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RERANKQ_")}
        # Ours before what the tests themselves were told: both run the same code.
        path = os.pathsep.join([str(PROGRAMS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= {"RERANKQ_BROKER_URL": url, "RERANKQ_MODEL": "stub", "PYTHONPATH": path, **env}
        self.environment = environment
        self.arguments = [
            "-m",
            "celery",
            "-A",
            app,
            "worker",
            "-n",
            f"{id(self)}@%h",
            "-l",
            "DEBUG" if debug else "WARNING",
        ]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = ForkedProcess(self.arguments, self.environment, cwd="/", stdout=log, stderr=log)

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        self.log.unlink(missing_ok=True)
        return self.process.returncode


def wait_for_workers(url: str, worker: RunningWorker, seconds: float = 90) -> None:
    # Longer than redis-py waits by itself: a server that writes to a busy disk takes its time.
    ledger = redis.Redis.from_url(Settings(broker_url=url).ledger, socket_timeout=seconds)
    ends = time.monotonic() + seconds
    while not any(f":{worker.process.pid}:".encode() in name for name in ledger.hkeys("rerankq:workers")):
        if worker.process.poll() is not None or time.monotonic() > ends:
            pytest.fail(f"the worker did not start: {worker.log.read_text()[-3000:]}")
        time.sleep(0.05)
    ledger.close()
