"""Whether a process has ended: certain for those of this machine, and of no other."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rerankq_worker.processes import has_ended, mark_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")


@pytest.fixture
def child():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child
    child.kill()
    child.communicate()


def test_a_process_that_runs_or_is_paused_has_not_ended_and_one_that_was_killed_has(child: subprocess.Popen):
    mark = mark_of(child.pid)
    assert not has_ended(mark)
    os.kill(child.pid, signal.SIGSTOP)
    # The signal takes a while to arrive.
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert not has_ended(mark)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(mark), "even while its parent has not asked for it"
    child.wait()
    assert has_ended(mark)


def test_a_new_process_with_the_number_of_an_ended_one_is_told_from_it():
    mark = mark_of(os.getpid())
    assert not has_ended(mark)
    assert has_ended(mark + "0")


def test_a_process_whose_name_looks_like_the_state_of_a_dead_one_has_not_ended():
    rename = "open('/proc/self/comm', 'w').write('a) Z 1 2'); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", rename], **pipes) as child:
        child.stdout.readline()
        try:
            mark = mark_of(child.pid)
            assert not has_ended(mark)
            assert mark.rpartition("/")[2].isdecimal()
        finally:
            child.kill()


def test_a_mark_ends_with_the_time_at_which_its_process_started(child: subprocess.Popen):
    parent, later = (int(mark_of(pid).rpartition("/")[2]) for pid in (os.getpid(), child.pid))
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    assert "/pid:[" in mark_of(child.pid), "numbers of another namespace are others"
    assert 0 < parent < later <= round(up_s * os.sysconf("SC_CLK_TCK"))


@pytest.mark.parametrize("mark", ["", "/", "7/1", "x/pid:[1]/-1/2", "a/b/c/d", "\0/1/1"])
def test_processes_elsewhere_and_empty_marks_never_count_as_ended(mark: str):
    assert not has_ended(mark)
    here = mark_of(os.getpid()).rpartition("/")[0].rpartition("/")[0]
    assert not has_ended(f"{here}/{10**30}/1")
    assert not has_ended(f"elsewhere-{here}/1/1")
