"""The program that has imported what many processes need, and forks them: see forked_processes.

``python fork_server.py LIGHT [HEAVY]``: the numbers of listening sockets. Who asks on the first gets a process that has
what workers, gateways and commands import, on the second one with the models' and the frameworks' libraries, too. The
server ends with its standard input, and what it forked ends with it.

A request is three open files, which become the process' standard input, output and error, and a line of JSON: its
``arguments`` as after ``python``, its ``environment``, its ``folder``, and the signals that are ``ignored``. Answered
are, a line each, its pid, and its exit status when it has ended. Who hangs up before that has it killed.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import redis.utils

PR_SET_PDEATHSIG = 1

# None of these reads the settings when it is imported, as `rerankq_worker.tasks` does.
LIGHT = [
    "celery.bin.celery", "celery.app.amqp", "celery.app.control", "celery.apps.worker", "celery.concurrency.thread",
    "celery.worker.components", "celery.worker.consumer", "kombu.transport.redis", "rerankq.client", "rerankq.broker",
    "rerankq_worker.worker", "rerankq_worker.celery_consumer", "rerankq.cli.app", "rerankq.gateway.server",
]  # fmt: skip
HEAVY = [
    "sentence_transformers", "openvino", "rerankq_worker.engine.cross_encoder", "transformers.generation.utils",
    "transformers.models.bert.modeling_bert", "transformers.models.modernbert.modeling_modernbert",
    "transformers.models.qwen3.modeling_qwen3", "transformers.models.xlm_roberta.modeling_xlm_roberta",
    "transformers.models.deberta_v2.modeling_deberta_v2", "openai", "playwright.sync_api", "hypothesis.stateful",
    "jsonschema", "typer.testing", "pytest",
    "rerankq.integrations.haystack", "rerankq.integrations.langchain", "rerankq.integrations.llama_index",
    "langchain_classic.retrievers.document_compressors", "langchain_core.vectorstores.in_memory", "langsmith.client",
    "haystack.components.retrievers.in_memory", "haystack.document_stores.in_memory",
]  # fmt: skip


class ForkServer:
    """Forks a process for each request, and tells who asked for it when it has ended."""

    def __init__(self, listener: socket.socket) -> None:
        self._selector = selectors.DefaultSelector()
        self._running: dict[int, socket.socket] = {}
        ended, wake = socket.socketpair()
        wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._wake = wake
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._end)
        self._selector.register(ended, selectors.EVENT_READ, self._reap)
        self._selector.register(listener, selectors.EVENT_READ, self._fork)

    def serve(self) -> dict[str, Any]:
        """Serve requests; returns, with a request, in each process that is forked."""
        while True:
            for key, _ in self._selector.select():
                request = key.data(key.fileobj)
                if request is not None:
                    return request

    def _fork(self, listener: socket.socket) -> dict[str, Any] | None:
        address = listener.getsockname()
        connection, _ = listener.accept()
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile("rb") as sent:
            request: dict[str, Any] = json.loads(sent.readline())
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            for key in self._selector.get_map().values():
                if key.fileobj is not sys.stdin:
                    key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()
            self._wake.close()
            return {**request, "files": files, "python": f"{Path(address).parent}/python"}
        for number in files:
            os.close(number)
        self._running[pid] = connection
        with suppress(OSError):
            connection.sendall(b"%d\n" % pid)
        self._selector.register(connection, selectors.EVENT_READ, self._hang_up)
        return None

    def _reap(self, ended: socket.socket) -> None:
        ended.recv(4096)
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                connection = self._running.pop(found[0])
                with suppress(KeyError):  # hung up
                    self._selector.unregister(connection)
                with connection, suppress(OSError):
                    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(found[1]))

    def _hang_up(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        os.kill(next(pid for pid, other in self._running.items() if other is connection), signal.SIGKILL)

    def _end(self, _: object) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def become(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    ignored: Sequence[int],
    files: Sequence[int],
    python: str,
) -> None:
    """Run what stands after ``python`` as the program of this process, in a session of its own."""
    with suppress(AttributeError):  # on Linux alone: if the server is killed it can end nobody
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    os.chdir(folder)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # Opened anew: a stream remembers whether its file is a terminal, and whether it can seek.
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # as the new environment says
    sys.path[:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    flag, *rest = (argument for argument in arguments if argument != "-u")
    if flag == "-m":
        # What a command starts is forked, too.
        sys.executable = python
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif flag == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(rest[0], main.__dict__)
    else:
        sys.argv = [flag, *rest]
        sys.path.insert(0, str(Path(flag).parent))
        runpy.run_path(flag, run_name="__main__")


def end(program: Callable[[], None]) -> NoReturn:
    """Run a program, and end the process as the interpreter does, but without taking all modules apart."""
    status = 0
    try:
        program()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if not isinstance(exit_.code, int | None):
            print(exit_.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = -signal.SIGINT
        traceback.print_exc()
    except BaseException:
        status = 1
        traceback.print_exc()
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def spare_repeated_work() -> None:
    """Do once what libraries do again for each connection or each test."""
    # redis-py reads its own version from a file for each connection.
    redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)
    # pytest adds two handlers to each logger that does not propagate, three times for each test: torch has sixty.
    for logger in logging.getLogger().manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True


def main(light: int, heavy: int | None = None) -> None:
    """Import the libraries, and serve."""
    # Ctrl-C goes to the terminal's whole group: who started us ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # While modules are imported nothing becomes garbage, and what was imported before a fork stays shared only as long
    # as no garbage collection writes to it.
    gc.disable()
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as in conftest
    for name in LIGHT:
        importlib.import_module(name)
    served = light
    if heavy is not None and os.fork() != 0:
        served = heavy
        for name in HEAVY:
            with suppress(ModuleNotFoundError):  # its tests skip, too
                importlib.import_module(name)
    spare_repeated_work()
    gc.freeze()
    request = ForkServer(socket.socket(fileno=served)).serve()
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end(functools.partial(become, **request))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
