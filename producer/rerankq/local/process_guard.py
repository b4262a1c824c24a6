"""Run a program for no longer than its owner lives.

The owner starts this file as a script, ``python process_guard.py GRACE_S FOLDER PROGRAM ARGUMENT…``, in a session of
its own, and holds the other end of its standard input. A byte there, or its end, asks the program to stop, and kills it
*GRACE_S* seconds later; the kernel sends the end even when the owner was killed. The program runs in *FOLDER*, which is
removed after it; an empty *FOLDER* stands for the owner's own, which stays. Standard library only, and no import of
this package: it has to start fast, and to outlive whatever breaks in the owner.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path


def hold(grace_s: float, folder: Path | None, command: Sequence[str]) -> int:
    """Run *command* until it or standard input ends; return its exit status, 128 + n if signal n ended it."""
    try:
        # Our child, not a process id that was read somewhere: ids are reused.
        program = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL)  # noqa: S603 - the owner chose it
        threading.Thread(target=_stop_at_the_end_of_input, args=(program, grace_s), daemon=True).start()
        status = program.wait()
        return status if status >= 0 else 128 - status
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _stop_at_the_end_of_input(program: subprocess.Popen[bytes], grace_s: float) -> None:
    # Not sys.stdin: its lock, held by a daemon thread, aborts the interpreter's exit.
    os.read(0, 1)
    program.terminate()
    try:
        program.wait(grace_s)
    except subprocess.TimeoutExpired:
        program.kill()


if __name__ == "__main__":
    sys.exit(hold(float(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None, sys.argv[3:]))
