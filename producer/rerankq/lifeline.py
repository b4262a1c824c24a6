"""Run a program for exactly as long as its owner lives, in a folder that goes away with it.

The owner starts this file as a script, ``python lifeline.py FOLDER PROGRAM ARGUMENT…``, and holds the other end of its
standard input. A byte there, or its end, stops the program; the kernel sends the end even when the owner was killed.
Standard library only, and no import of this package: it has to start fast and to outlive whatever breaks in the owner.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

GRACE_S = 5.0
"""Seconds between asking the program to stop and killing it."""


def hold(folder: Path, command: Sequence[str]) -> int:
    """Run *command* in *folder* until it ends or standard input does; remove the folder; answer the exit status."""
    try:
        # Its own child, not a process id found later: an id may have passed to a stranger by then.
        program = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL)  # noqa: S603 - the owner chose it
        threading.Thread(target=_stop_at_the_end_of_input, args=(program,), daemon=True).start()
        return program.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stop_at_the_end_of_input(program: subprocess.Popen[bytes]) -> None:
    # Not sys.stdin: its lock, held by a daemon thread, aborts the interpreter's exit.
    os.read(0, 1)
    program.terminate()
    try:
        program.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        program.kill()


if __name__ == "__main__":
    sys.exit(hold(Path(sys.argv[1]), sys.argv[2:]))
