import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from rerankq.cli import leash, show, stack
from rerankq.cli.stack import Part, Stack
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
        part = Part(name, command, {}, quiet=True)
        parts.append(part)
        part.start(now=0.0)
        eventually(lambda: "here" in part.said())
        return part, psutil.Process(part.pid).children()[0]

    yield start
    for part in parts:
        part.close()


def gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_part_that_is_asked_to_stop_stops(start):
    part, program = start(SLEEP)
    part.ask_to_stop()
    part.wait()
    assert gone(program)
    assert part.pid is None


def test_a_part_that_is_killed_takes_its_program_with_it_however_stubborn(start):
    part, program = start(STUBBORN)
    part.kill()
    eventually(lambda: gone(program))


def test_a_part_whose_leash_was_killed_leaves_no_program_behind(start):
    part, program = start(SLEEP)
    os.kill(part.pid, signal.SIGKILL)
    eventually(lambda: part.tend(1.0) is not None)
    eventually(lambda: gone(program))


def test_a_part_that_dies_is_started_again_after_a_pause(start):
    part, program = start(SLEEP)
    program.kill()
    deaths = []
    eventually(lambda: deaths.append(part.tend(now=5.0)) or deaths[-1])
    assert deaths[-1] == stack.Death("part", 137, 1.0)
    assert str(deaths[-1]) == "part ended (signal 9); starting it again in 1 s"
    assert part.tend(now=5.9) is None
    assert part.pid is None
    assert part.tend(now=6.0) is None
    assert part.pid is not None


def test_the_program_ends_with_its_owner_however_that_one_ends(tmp_path):
    owner = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {leash.__file__!r}, '1', *{SLEEP!r}], stdin=subprocess.PIPE, "
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
def test_the_leash_hands_on_the_exit_status(code, status):
    command = [sys.executable, leash.__file__, "1", sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait() == status


def test_a_port_that_is_taken_is_replaced_by_a_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert stack.free_port(port) != port
    assert stack.free_port(port) == port


def test_the_password_of_a_redis_that_was_there_before_is_not_printed(capsys):
    url = "redis://me:s3cret@redis.example:6379/0"
    show.show_stack(Stack(Settings(_env_file=None, broker_url=url)), None)
    said = capsys.readouterr().out
    assert "redis://me:***@redis.example:6379/0 (yours)" in said
    assert "s3cret" not in said
