"""A program under a guard ends with its owner, and reports how it ended."""

import subprocess
import sys

import pytest

from rerankq.local import process_guard

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def hold(*command: str, grace_s: float = 5, folder: str = "") -> subprocess.Popen:
    guard = [sys.executable, "-I", "-S", process_guard.__file__, str(grace_s), folder, *command]
    return subprocess.Popen(guard, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_guard_exit_status_is_that_of_the_program():
    with hold("sh", "-c", "exit 7") as guard:
        assert guard.wait(30) == 7


def test_guard_reports_a_death_by_signal_as_a_shell_does():
    with hold("sh", "-c", "kill -KILL $$") as guard:
        assert guard.wait(30) == 128 + 9


@pytest.mark.parametrize("last_words", ["", "."])
def test_end_of_input_stops_the_program(last_words):
    with hold("sleep", "600") as guard:
        guard.communicate(last_words, timeout=30)
        assert guard.returncode == 128 + 15


def test_folder_is_removed_with_the_program(tmp_path):
    folder = tmp_path / "of its own"
    folder.mkdir()
    with hold("sh", "-c", "pwd; touch left-behind", folder=str(folder)) as guard:
        assert guard.stdout.read().strip() == str(folder)
    assert not folder.exists()
    assert tmp_path.exists()


def test_folder_is_removed_when_the_program_does_not_exist(tmp_path):
    folder = tmp_path / "of its own"
    folder.mkdir()
    guard = [sys.executable, "-I", "-S", process_guard.__file__, "1", str(folder), "/no/such/program"]
    ended = subprocess.run(guard, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "FileNotFoundError" in ended.stderr
    assert not folder.exists()


def test_guard_starts_without_the_package():
    script = f"import runpy, sys; runpy.run_path({process_guard.__file__!r}); assert 'rerankq' not in sys.modules"
    subprocess.run([sys.executable, "-I", "-c", script], check=True)


def test_guarded_program_has_no_input_and_is_killed_if_it_does_not_stop():
    command = [sys.executable, "-I", "-S", process_guard.__file__, "0.1", ""]
    with subprocess.Popen([*command, "cat"], stdin=subprocess.PIPE) as guarded:
        assert guarded.wait(30) == 0, "its guard's input is none of its own"
    with subprocess.Popen(
        [*command, sys.executable, "-c", STUBBORN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as guarded:
        guarded.stdout.readline()
        guarded.communicate(timeout=30)
        assert guarded.returncode == 128 + 9
