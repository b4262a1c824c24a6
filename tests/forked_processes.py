"""Processes forked from one that has imported what they need.

An interpreter with a worker's, a gateway's or a command's libraries takes a core more than a second, as much as the
rest of most tests; one with the models' libraries ten. A fork takes a tenth of a second. The server that forks them is
started once, for all processes of a test run.

As a program, this module stands in for the interpreter: ``python forked_processes.py -m MODULE ARGUMENT…`` forks one,
passes signals on to it, and ends as it does.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# Where the sockets of the server are, and a program `python` that stands in for the interpreter.
FOLDER = "FORK_SERVER"
PYTHON = """#!/bin/sh
[ "$1" = -m ] && set -- "{forked}" "$@"
exec "{python}" "$@"
"""


def start_fork_server(*, heavy: bool) -> None:
    """Start the server that this process and all that it starts ask, and that ends with this one."""
    opened = ExitStack()
    atexit.register(opened.close)
    folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="forks-")))
    python = folder / "python"
    python.write_text(PYTHON.format(forked=__file__, python=sys.executable))
    python.chmod(0o700)
    with ExitStack() as binding:
        listeners = [binding.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(1 + heavy)]
        for listener, name in zip(listeners, ("light", "heavy"), strict=False):
            listener.bind(f"{folder}/{name}")
            listener.listen(64)
        numbers = [listener.fileno() for listener in listeners]
        command = [sys.executable, Path(__file__).with_name("fork_server.py"), *map(str, numbers)]
        opened.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=numbers))
    os.environ[FOLDER] = str(folder)


def interpreter() -> str:
    """Return the program that stands in for the interpreter: what it runs by ``-m`` is forked."""
    if FOLDER not in os.environ:
        start_fork_server(heavy=False)
    return f"{os.environ[FOLDER]}/python"


class ForkedProcess(subprocess.Popen):
    """A ``subprocess.Popen`` whose process is forked, in a session of its own; it does not outlive this object.

    Args:
        arguments: as after ``python``: ``-m`` and a module, ``-c`` and a program or a file, and what it is given.
        env: its environment. Where that names the bundled model, or no model, the process comes with the models'
            and the frameworks' libraries, if the server has them.
        options: ``cwd``, ``stdin``, ``stdout``, ``stderr``, ``text``.
    """

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], **options: Any) -> None:
        self._servers = Path(interpreter()).parent
        super().__init__(arguments, env=env, **options)

    # What subprocess.Popen keeps for its platforms to do.
    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others) -> None:
        *_, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = others[:9]
        files = (p2cread, c2pwrite, errwrite)
        heavy = self._servers / "heavy"
        wanted = env.get("RERANKQ_MODEL", "bundled") == "bundled"
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(heavy if wanted and heavy.exists() else self._servers / "light"))
        given = [number if file == -1 else file for number, file in enumerate(files)]
        socket.send_fds(self._connection, [b"\n"], given)
        # What a new program inherits.
        ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
        request = {"arguments": args, "environment": dict(env), "folder": str(cwd or Path.cwd()), "ignored": ignored}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self.pid = self._answer(None)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _answer(self, timeout: float | None) -> int:
        self._connection.settimeout(timeout)
        answer = b""
        while not answer.endswith(b"\n"):
            received = self._connection.recv(1)
            if not received:
                raise ConnectionError("the fork server has ended")
            answer += received
        return int(answer)

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            try:
                self.returncode = self._answer(timeout)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._connection.close()
        return self.returncode

    def _internal_poll(self, *_: object) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()


def run_forked(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, *, given: str | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a forked process to its end."""
    return run_program(["-m", "rerankq.cli", *arguments], environment, folder, given=given, timeout=timeout)


def run_program(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    *,
    given: str | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run what stands after ``python`` in a forked process to its end."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with ForkedProcess(arguments, environment, cwd=folder, text=True, **pipes) as process:
        try:
            out, err = process.communicate(given, timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def stand_in() -> int:
    """Be the interpreter: a signal that comes to this process, and one that ends the forked one, reach the other."""
    process = ForkedProcess(sys.argv[1:], os.environ)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(process.pid, number))
    status = process.wait()
    if status < 0:
        if -status in PASSED_ON:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(stand_in())
