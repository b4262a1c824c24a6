"""Run a program for no longer than its owner lives.

The owner starts this file as a script, ``python leash.py GRACE_S PROGRAM ARGUMENT…``, in a session of its own, and
holds the other end of its standard input. When that ends the program is asked to stop, and killed after *GRACE_S*
seconds. The kernel ends it even when the owner was killed. Standard library only, no import of this package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence


def run(grace_s: float, command: Sequence[str]) -> int:
    """Run *command* until it ends or standard input does; answer its exit status, 128 + n where signal n ended it."""
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 - the owner chose the program
    threading.Thread(target=_stop_at_the_end_of_input, args=(program, grace_s), daemon=True).start()
    status = program.wait()
    return status if status >= 0 else 128 - status


def _stop_at_the_end_of_input(program: subprocess.Popen[bytes], grace_s: float) -> None:
    # Not sys.stdin: its lock, held by a daemon thread, aborts the interpreter's exit.
    while os.read(0, 64):
        pass
    program.terminate()
    try:
        program.wait(grace_s)
    except subprocess.TimeoutExpired:
        program.kill()


if __name__ == "__main__":
    sys.exit(run(float(sys.argv[1]), sys.argv[2:]))
