"""Processes forked from one that has imported what they need.

An interpreter with a worker's, a gateway's or a command's libraries takes a core more than a second, as much as the
rest of most tests; a fork takes a tenth of that. This module is imported in each of them: it needs nothing itself.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

# None of these reads the settings when it is imported, as `rerankq_worker.tasks` does.
LIBRARIES = [
    "celery.bin.celery", "celery.app.amqp", "celery.app.control", "celery.apps.worker", "celery.concurrency.thread",
    "celery.worker.components", "celery.worker.consumer", "kombu.transport.redis", "rerankq.client", "rerankq.broker",
    "rerankq_worker.worker", "rerankq_worker.celery_consumer", "rerankq.cli.app", "rerankq.gateway.server",
    "forked_processes",
]  # fmt: skip
_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(LIBRARIES)


class Stream:
    """An open file that a forked process gets as its own."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _received, (DupFd(self.number),)


def _received(passed: Any) -> Stream:
    return Stream(passed.detach())


def become(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    streams: Sequence[Stream | None],
) -> None:
    """Run a module as the program of this process, in a session of its own."""
    gc.freeze()  # what was imported before the fork stays shared: a garbage collection writes to all it looks through
    os.setsid()
    os.chdir(folder)
    for number, stream in enumerate(streams):
        if stream is not None:
            os.dup2(stream.number, number)
            os.close(stream.number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # as the new environment says
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class ForkedProcess:
    """Runs a module in a forked process, and is asked of it as a ``subprocess.Popen`` is."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        folder: str | Path = "/",
        stdin: IO | None = None,
        stdout: IO | None = None,
        stderr: IO | None = None,
    ) -> None:
        streams = [None if one is None else Stream(one.fileno()) for one in (stdin, stdout, stderr)]
        given = (module, list(arguments), dict(environment), folder, streams)
        self._process = _forking.Process(target=become, args=given, daemon=True)
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


def run_forked(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, *, given: str | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a forked process to its end."""
    with ExitStack() as opened:
        out, err = (opened.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
        reading, writing = os.pipe()
        with open(reading, "rb") as stdin, open(writing, "w") as typed:  # noqa: PTH123
            process = ForkedProcess(
                "rerankq.cli", arguments, environment, folder=folder, stdin=stdin, stdout=out, stderr=err
            )
            stdin.close()
            with suppress(BrokenPipeError):
                typed.write(given or "")
                typed.flush()
        try:
            process.wait(timeout)
        finally:
            process.kill()
        for written in (out, err):
            written.seek(0)
        return subprocess.CompletedProcess(arguments, process.returncode, out.read(), err.read())
