import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest

from rerankq import BrokerUnavailable
from rerankq.cli import render
from rerankq.local import process_guard, processes, stack
from rerankq.local.processes import SupervisedProcess
from rerankq.local.stack import Stack
from rerankq.settings import Settings

SLEEP = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(600)",
]


def eventually(holds, seconds=20):
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "did not come true in time"
        time.sleep(0.02)


@pytest.fixture
def start():
    parts = []

    def start(command, name="part"):
        part = SupervisedProcess(name, command, {}, quiet=True)
        parts.append(part)
        part.start(now=0.0)
        eventually(lambda: "here" in part.last_output())
        return part, psutil.Process(part.pid).children()[0]

    yield start
    for part in parts:
        part.close()


def gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_process_stops_when_asked_to(start):
    part, program = start(SLEEP)
    part.ask_to_stop()
    part.wait()
    assert gone(program)
    assert part.pid is None


def test_kill_ends_the_program_even_if_it_ignores_signals(start):
    part, program = start(STUBBORN)
    part.kill()
    eventually(lambda: gone(program))


def test_program_ends_when_its_guard_is_killed(start):
    part, program = start(SLEEP)
    os.kill(part.pid, signal.SIGKILL)
    eventually(lambda: part.supervise(1.0) is not None)
    eventually(lambda: gone(program))


def test_process_that_dies_is_restarted_after_a_pause(start):
    part, program = start(SLEEP)
    program.kill()
    deaths = []
    eventually(lambda: deaths.append(part.supervise(now=5.0)) or deaths[-1])
    assert deaths[-1] == processes.Death("part", 137, 1.0)
    assert str(deaths[-1]) == "part ended (signal 9); restarting in 1 s"
    assert part.supervise(now=5.9) is None
    assert part.pid is None
    assert part.supervise(now=6.0) is None
    assert part.pid is not None


def test_program_ends_with_its_owner_however_that_one_ends(tmp_path):
    owner = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {process_guard.__file__!r}, '1', '', *{SLEEP!r}], stdin=subprocess.PIPE, "
        "start_new_session=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2
        process.kill()
        eventually(lambda: all(gone(one) for one in family))


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_guard_returns_the_exit_status_of_its_program(code, status):
    command = [sys.executable, process_guard.__file__, "1", "", sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait() == status


def test_password_of_a_foreign_redis_is_not_printed(capsys):
    url = "redis://me:s3cret@redis.example:6379/0"
    render.print_stack(Stack(Settings(_env_file=None, broker_url=url)), None, None)
    message = capsys.readouterr().out
    assert "redis://me:***@redis.example:6379/0 (yours)" in message
    assert "s3cret" not in message


class DeadProcess:
    """A program that has ended."""

    pid, stdin = 2**22 + 1, None

    def __init__(self, command, env, **_):
        self.command, self.env = command, env
        self.returncode = 3

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        return self.returncode


def test_restart_pause_grows_with_deaths_in_a_row_alone(monkeypatch):
    monkeypatch.setattr(processes.subprocess, "Popen", DeadProcess)
    part, pauses, now = SupervisedProcess("part", ["x"], {}, quiet=False), [], 0.0
    for lived_s in (0, 0, 0, processes.LONG_LIFE_S, processes.LONG_LIFE_S + 1, 0):
        part.start(now)
        now += lived_s
        death = part.supervise(now)
        assert (death.status, str(death)[:21]) == (3, "part ended (status 3)")
        pauses.append(death.pause_s)
    assert pauses == [1, 2, 4, 8, 1, 2]


def test_given_variables_override_the_environment(monkeypatch):
    started = []
    monkeypatch.setattr(processes.subprocess, "Popen", lambda *given, **options: started.append(options["env"]))
    monkeypatch.setenv("RERANKQ_MODEL", "ours")
    SupervisedProcess("part", ["x"], {"RERANKQ_MODEL": "given"}, quiet=False).start(0.0)
    assert started[0]["RERANKQ_MODEL"] == "given"
    assert started[0]["PATH"] == os.environ["PATH"]


def test_last_output_is_the_last_lines(start):
    words = "import time\nfor n in range(20): print(n)\nprint('here', flush=True)\ntime.sleep(600)"
    part, _ = start([sys.executable, "-c", words])
    assert part.last_output(2) == "19\nhere"


def test_roles_of_an_embedded_redis_have_databases_of_their_own():
    settings = stack.settings_for("redis://:x@h:1/0", Settings(_env_file=None, broker_url="redis://other/7"))
    assert (settings.broker, settings.ledger, settings.cache) == (
        "redis://:x@h:1/0",
        "redis://:x@h:1/1",
        "redis://:x@h:1/2",
    )


@pytest.mark.parametrize(("read_only", "found"), [("true", "true"), ("", "false"), (None, "false")])
def test_flower_with_a_password_is_read_only_on_request_alone(read_only, found):
    message = {"FLOWER_BASIC_AUTH": "me:secret"} | ({} if read_only is None else {"FLOWER_READ_ONLY": read_only})
    assert stack.flower_environment(message)["FLOWER_READ_ONLY"] == found
    assert stack.flower_environment({"FLOWER_READ_ONLY": "false"})["FLOWER_READ_ONLY"] == "true"


class DyingPart:
    def __init__(self, name):
        self.name = name

    def supervise(self, now):
        return processes.Death(self.name, 1, 1.0)

    def last_output(self):
        return "its last words"


@pytest.fixture
def of_parts():
    """A stack that was not started, with these parts."""

    def of_parts(*parts, alive=True):
        printed = []
        made = Stack(Settings(_env_file=None), notify=printed.append)
        made._redis = SimpleNamespace(alive=alive)
        made._processes = list(parts)
        return made, printed

    return of_parts


def test_worker_that_was_never_ready_ends_the_stack_and_a_later_death_restarts_it(of_parts):
    made, printed = of_parts(DyingPart("Flower"))
    made.supervise()
    assert printed == ["Flower ended (status 1); restarting in 1 s"]
    made, printed = of_parts(DyingPart("worker"))
    with pytest.raises(processes.StackFailed, match=r"could not be started \(status 1\)\nits last words"):
        made.supervise()
    made._processes = []
    looks = [[], [SimpleNamespace(queues=())], [SimpleNamespace(queues=("rerankq.bulk",))]]
    made.wait_until_ready(SimpleNamespace(workers=lambda: looks.pop(0)), poll_s=0)
    assert looks == [], "a worker without queues takes no jobs"
    made._processes = [DyingPart("worker")]
    made.supervise()
    assert printed == ["worker ended (status 1); restarting in 1 s"]


def test_stack_ends_when_its_redis_has_ended(of_parts):
    made, _ = of_parts(alive=False)
    with pytest.raises(BrokerUnavailable, match="the embedded Redis has ended"):
        made.supervise()


def test_embedded_redis_is_started_without_a_url_or_on_request():
    there = Settings(_env_file=None, broker_url="redis://h")
    assert [Stack(there).embedded, Stack(there, embedded=True).embedded, Stack(Settings(_env_file=None)).embedded] == [
        False,
        True,
        True,
    ]


class Opened:
    """In place of a client and a stack: keeps the settings that it was opened with."""

    seen: ClassVar[list[Settings]] = []

    def __init__(self, settings, **_):
        self.settings = settings
        self.seen.append(settings)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def workers(self):
        return []

    def wait_until_ready(self, client):
        pass

    def supervise(self):
        pass


@pytest.mark.parametrize("model", ["named", None])
def test_open_client_names_the_model_to_a_deployment_and_serves_it_without_one(monkeypatch, model):
    monkeypatch.setattr(stack, "Client", Opened)
    monkeypatch.setattr(stack, "Stack", Opened)
    printed = []
    there = Settings(_env_file=None, broker_url="redis://h", model="m")
    with stack.open_client(there, model, printed.append) as (_, named, supervise):
        supervise()
    assert (named, len(printed)) == (model, 1)
    Opened.seen.clear()
    with stack.open_client(Settings(_env_file=None, model="m", default_model="d"), model, printed.append) as (
        _,
        named,
        _,
    ):
        pass
    assert named is None
    assert {(settings.model, settings.default_model) for settings in Opened.seen} == {(model or "m", "")}
