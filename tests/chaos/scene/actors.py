"""The processes of a run: workers under a supervisor, a Redis with an append-only file, producers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import redis
from forked_processes import ForkedProcess
from gear.workers import POISONABLE, TASKS, python_path

from rerankq.local import worker_command
from rerankq.local.embedded import find_binary, free_port
from rerankq.local.processes import SupervisedProcess
from rerankq.settings import Settings

# A supervisor that waits a second, as systemd and Docker do, and does not wait longer each time.
RESTART_S = 1.0
PRODUCER = (sys.executable, "-m", "scene.producing")
BY_SIGKILL = 128 + signal.SIGKILL
# The sessions of programs that are no children of ours.
SESSIONS: set[int] = set()


class ForkedPart(SupervisedProcess):
    """A program that is forked from one that has imported what it needs, and has no guard: the server is that."""

    def start(self, now: float) -> None:
        self._started_at, self._start_at = now, None
        environment = {**os.environ, **self._environment}
        nothing, log = subprocess.DEVNULL, self._log
        self._process = ForkedProcess(self._command[1:], environment, stdin=nothing, stdout=log, stderr=log)
        SESSIONS.add(self._process.pid)

    def ask_to_stop(self) -> None:
        self._start_at = None
        if self._process:
            self._process.terminate()

    def kill(self) -> None:
        self._start_at = None
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


class Clock:
    """A wall clock that can be set, for programs that are started with :attr:`environment`."""

    def __init__(self, folder: Path, library: Path) -> None:
        self._file = folder / "clock.offset"
        self._offset_s = 0
        self.step(0)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._file)}

    @classmethod
    def made(cls, folder: Path) -> Clock | None:
        """Make one; None where there is no C compiler to make it with."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            return None
        source, library = Path(__file__).with_name("clock.c"), folder / "clock.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        return cls(folder, library)

    def step(self, seconds: int) -> None:
        """Set it on by so many seconds, or back."""
        self._offset_s += seconds
        # In place: the programs have it mapped.
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(self._offset_s.to_bytes(8, sys.byteorder, signed=True))


class RedisServer:
    """A server with an append-only file that is killed and started again on its port, and may hang.

    *settings* are lines of its configuration beside those that every server has. They stand in a file, into which
    Sentinel writes whose replica it is from then on.
    """

    def __init__(self, folder: Path, *, fsync: str, clock: Clock | None = None, settings: Sequence[str] = ()) -> None:
        folder.mkdir(exist_ok=True)
        self.port = free_port(0)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        conf = folder / "redis.conf"
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {folder}", 'save ""', "loglevel warning"]
        lines += ["appendonly yes", f"appendfsync {fsync}", *settings]
        conf.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._part = SupervisedProcess(
            "redis", [str(find_binary()), str(conf)], clock.environment if clock else {}, quiet=True
        )
        self.start()

    def start(self) -> None:
        self._part.start(time.monotonic())
        self._answers()

    def kill(self) -> float:
        """SIGKILL; answers when, in seconds since the epoch."""
        if self._part.pid is not None:
            os.killpg(self._part.pid, signal.SIGKILL)
        at = time.time()
        self._part.kill()
        return at

    def freeze(self) -> float:
        """SIGSTOP; answers when, in seconds since the epoch."""
        self.process().suspend()
        return time.time()

    def replaced(self) -> bool:
        """Whether another server has taken the place of one that was struck: there is none."""
        return False

    def thaw(self) -> None:
        # Killed while it hung, and not started again yet: then there is nothing to continue.
        with suppress(RuntimeError):
            self.process().resume()

    def process(self) -> psutil.Process:
        return program_of(self._part)

    def close(self) -> None:
        with suppress(psutil.Error):
            self.thaw()
        self._part.ask_to_stop()
        self._part.wait()
        self._part.close()

    def _answers(self) -> None:
        with redis.Redis(port=self.port) as connection:
            for _ in range(1_000):
                with suppress(redis.RedisError):
                    if connection.ping():
                        return
                time.sleep(0.02)
        raise RuntimeError(f"redis-server did not start: {self._part.last_output()}")


class WatchedRedis:
    """A master, two replicas, and a Sentinel that watches them. What befalls it befalls the master of the moment.

    A server that died or hung is made a replica by Sentinel when it is back. Until then it takes itself for the master,
    and refuses what is written, as nobody follows it: without that, jobs would be accepted and then forgotten.
    """

    DOWN_AFTER_S = 2.0

    def __init__(self, folder: Path, *, fsync: str) -> None:
        refuses_alone = ["min-replicas-to-write 1", "min-replicas-max-lag 2"]
        first = RedisServer(folder / "first", fsync=fsync, settings=refuses_alone)
        follows = [*refuses_alone, f"replicaof 127.0.0.1 {first.port}"]
        others = [RedisServer(folder / name, fsync=fsync, settings=follows) for name in ("second", "third")]
        self._servers = [first, *others]
        self._port = free_port(0)
        conf = folder / "sentinel.conf"
        conf.write_text(
            f"port {self._port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor jobs 127.0.0.1 {first.port} 1\n"
            f"sentinel down-after-milliseconds jobs {self.DOWN_AFTER_S * 1_000:.0f}\n"
            "sentinel failover-timeout jobs 4000\n"
        )
        self._sentinel = SupervisedProcess("sentinel", [str(find_binary()), str(conf), "--sentinel"], {}, quiet=True)
        self._sentinel.start(time.monotonic())
        self.url = f"sentinel://127.0.0.1:{self._port}/0?master=jobs"
        self._struck: RedisServer | None = None
        self._knows_all()

    def kill(self) -> float:
        self._struck = self._master()
        return self._struck.kill()

    def start(self) -> None:
        assert self._struck is not None
        self._struck.start()

    def freeze(self) -> float:
        self._struck = self._master()
        return self._struck.freeze()

    def thaw(self) -> None:
        assert self._struck is not None
        self._struck.thaw()

    def replaced(self) -> bool:
        """Whether another server has taken the place of the one that was struck last."""
        return self._master() is not self._struck

    def close(self) -> None:
        self._sentinel.kill()
        self._sentinel.close()
        for server in self._servers:
            server.close()

    def _master(self) -> RedisServer:
        with redis.Redis(port=self._port) as sentinel:
            address = sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "jobs")
        return next(server for server in self._servers if server.port == int(address[1]))

    def _knows_all(self) -> None:
        with redis.Redis(port=self._port, decode_responses=True) as sentinel:
            for _ in range(1_000):
                with suppress(redis.RedisError):
                    replicas = sentinel.sentinel_slaves("jobs")
                    if sum(one["master-link-status"] == "ok" for one in replicas) == len(self._servers) - 1:
                        return
                time.sleep(0.02)
        raise RuntimeError(f"the sentinel found no replicas: {self._sentinel.last_output()}")


class Worker:
    """A worker process that is started again a second after its death."""

    def __init__(self, name: str, url: str, environment: Mapping[str, str], *, forked: bool = False) -> None:
        # Killed by the chunk that reads "poison"; otherwise the worker that everybody runs.
        command = ["poisonable" if word == TASKS else word for word in worker_command.command(name=name)]
        # With the run's model: an environment that names another as the default would send its jobs to other queues.
        settings = Settings(_env_file=None, broker_url=url, model=environment["RERANKQ_MODEL"])
        variables = {
            **worker_command.tuned(os.environ),
            **worker_command.environment(settings),
            "PYTHONPATH": python_path(POISONABLE),
            **environment,
        }
        self.name = name
        self.hung = False
        self.died_by_itself: list[str] = []
        self._part = (ForkedPart if forked else SupervisedProcess)(name, command, variables, quiet=True)
        self._part.start(time.monotonic())
        self._again_at: float | None = None

    @property
    def token(self) -> str:
        """The part of its id in the ledger that only it has; empty while it is down."""
        with suppress(psutil.Error, RuntimeError):
            return f":{self.process().pid}:"
        return ""

    def process(self) -> psutil.Process:
        return program_of(self._part)

    def supervise(self) -> bool:
        """Start it again when it is time; answers whether it has died since the last look."""
        now = time.monotonic()
        if self._again_at is not None:
            if now >= self._again_at:
                self._again_at = None
                self._part.start(now)
            return False
        death = self._part.supervise(now)
        if death is None:
            return False
        if death.status != BY_SIGKILL:
            self.died_by_itself.append(f"{death}: {self._part.last_output(3)}")
        self._again_at = now + RESTART_S
        self.hung = False
        return True

    def kill(self) -> float | None:
        """SIGKILL; answers when, or None if it was dead already: the poison may have come first."""
        try:
            process = self.process()
            process.kill()
        except (psutil.Error, RuntimeError):
            return None
        at = time.time()
        # One that is ending is no worker that could be hit.
        with suppress(psutil.TimeoutExpired):
            process.wait(5)
        return at

    def pause(self) -> float | None:
        """SIGSTOP, as :meth:`kill`."""
        try:
            # The program alone: its guard must go on, to end it whatever happens to us.
            self.process().suspend()
        except (psutil.Error, RuntimeError):
            return None
        self.hung = True
        return time.time()

    def resume(self) -> None:
        with suppress(psutil.Error, RuntimeError):
            self.process().resume()
        self.hung = False

    def ask_to_stop(self) -> None:
        self._again_at = None
        self.resume()
        self._part.ask_to_stop()

    def wait(self) -> None:
        self._part.wait()

    def close(self) -> None:
        self._part.close()

    def said(self) -> str:
        return self._part.last_output(40)


def program_of(part: SupervisedProcess) -> psutil.Process:
    """Find a part's program: the child of its guard, if it has one.

    Raises:
        RuntimeError: while it is down.
    """
    if isinstance(part, ForkedPart) and part.pid:
        return psutil.Process(part.pid)
    children = psutil.Process(part.pid).children() if part.pid else []
    if not children:
        raise RuntimeError(f"{part.name} is down")
    return children[0]


class Producers:
    """Programs that submit orders and keep journals, gone at the latest when the block ends."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        starts_at: float,
        patience_s: float,
        forked: bool = False,
    ) -> None:
        self._folder = folder
        self._parts = [
            (ForkedPart if forked else SupervisedProcess)(
                path.stem,
                [*PRODUCER, str(path), str(path.with_suffix(".journal")), str(starts_at), str(patience_s)],
                {**environment, "PYTHONPATH": python_path(Path(__file__).parents[1])},
                quiet=True,
            )
            for path in sorted(folder.glob("producer-*.orders"))
        ]
        for part in self._parts:
            part.start(time.monotonic())

    def running(self) -> int:
        """Count those that are not through with their orders.

        Raises:
            RuntimeError: if one has failed.
        """
        count = 0
        for part in self._parts:
            if part.pid is None:
                continue
            death = part.supervise(time.monotonic())
            if death is None:
                count += 1
            elif death.status:
                raise RuntimeError(f"{death}\n{part.last_output()}")
            else:
                part.kill()
        return count

    def said(self) -> str:
        return "\n".join(filter(None, (part.last_output(5) for part in self._parts)))

    def journals(self) -> Iterator[Path]:
        yield from sorted(self._folder.glob("producer-*.journal"))

    def close(self) -> None:
        for part in self._parts:
            part.close()


def leftovers(before: set[int]) -> list[str]:
    """Name the processes that this one has left running, its children's children and what was forked for it too."""
    alive = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
    for one in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(one.pid) in SESSIONS:
                alive.append(one)
    return [" ".join(one.cmdline())[:120] for one in alive if one.status() != psutil.STATUS_ZOMBIE]
