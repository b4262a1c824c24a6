"""Whether a process has ended: certain for those of this machine, and of no other."""

import os
import subprocess
import sys

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
    os.kill(child.pid, 19)
    assert not has_ended(mark)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(mark), "even while its parent has not asked for it"
    child.wait()
    assert has_ended(mark)


def test_another_process_under_the_same_number_is_not_the_one_that_ended():
    mark = mark_of(os.getpid())
    assert not has_ended(mark)
    assert has_ended(mark + "0")


@pytest.mark.parametrize("mark", ["", "/", "7/1", "x/pid:[1]/-1/2", "a/b/c/d", "\0/1/1"])
def test_of_processes_elsewhere_and_of_no_mark_at_all_nothing_is_certain(mark: str):
    assert not has_ended(mark)
    here = mark_of(os.getpid()).rpartition("/")[0].rpartition("/")[0]
    assert not has_ended(f"{here}/{10**30}/1")
    assert not has_ended(f"elsewhere-{here}/1/1")
