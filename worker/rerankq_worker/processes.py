"""Whether a process of this machine has ended, by the mark that it wrote into the registry."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def mark_of(pid: int) -> str:
    """Identify a running process of this machine for ever: boot, process namespace, number, start.

    Empty where the system does not say: on other systems than Linux.
    """
    with suppress(OSError):
        return f"{_here()}/{pid}/{_stat(pid)[1]}"
    return ""


def has_ended(mark: str) -> bool:
    """Whether it is certain that the process of this mark has ended; never for other machines and containers.

    >>> has_ended(mark_of(os.getpid())), has_ended("another machine/pid:[1]/7/1"), has_ended("")
    (False, False, False)
    """
    here, _, rest = mark.rpartition("/")
    here, _, number = here.rpartition("/")
    try:
        if not number.isdecimal() or here != _here():
            return False
        # Not by what /proc shows: that may be hidden from other users.
        os.kill(int(number), 0)
        state, started = _stat(int(number))
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return started != rest or state in "ZX"


def boot_id() -> str:
    """Identify this run of the system's kernel; empty where the system does not say."""
    with suppress(OSError):
        return _boot()
    return ""


def _here() -> str:
    return f"{_boot()}/{(PROC / 'self/ns/pid').readlink()}"


def _boot() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[str, str]:
    """Read a process's state, and when it started, in ticks since the system's start."""
    # Its name, in brackets, may hold anything.
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
