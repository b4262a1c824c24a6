"""The tests do not depend on how they are started."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from fork_server import HEAVY, LIGHT

CHECK = """
import importlib.util, signal, subprocess, sys
found = importlib.util.spec_from_file_location("conftest", sys.argv[1])
found.loader.exec_module(importlib.util.module_from_spec(found))
for number in (signal.SIGINT, signal.SIGTERM):
    with subprocess.Popen(["sleep", "600"]) as program:
        program.send_signal(number)
        assert program.wait(30) == -number, number
"""


def test_what_a_test_starts_can_be_interrupted_also_where_the_tests_run_in_the_background():
    conftest = Path(__file__).with_name("conftest.py")
    command = [sys.executable, "-c", CHECK, str(conftest)]
    through = ["sh", "-c", "trap '' INT TERM; exec \"$@\"", "sh"]
    environment = {**os.environ, "PYTHONPATH": str(conftest.parent)}
    done = subprocess.run([*through, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_imported_before_processes_are_forked_is_there():
    assert [name for name in LIGHT + HEAVY if name not in sys.modules and find_spec(name) is None] == []
