"""The end of a worker: within a stated time of the signal to stop, whatever hangs."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

logger = logging.getLogger("rerankq")

# Seconds after the drain, or after SIGQUIT, in which a worker hands back, signs off and closes its connections.
GRACE_S = 5.0
# Exit status of a worker that could not close in time: sysexits.h's EX_TEMPFAIL.
STOP_TIMED_OUT = 75
# Seconds that a last message to the log may take: the program that reads it may hang too.
LAST_MESSAGE_S = 1.0

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)


def within(limit_s: float, *steps: Callable[[], object]) -> bool:
    """Run steps side by side, each in a thread of its own; answers whether all ended within *limit_s* seconds.

    One that did not is left behind: its thread does not keep the process alive.
    """
    ends = time.monotonic() + limit_s
    threads = [threading.Thread(target=step, name="rerankq-closing", daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


class ShutdownWatchdog:
    """Ends the process when it shall stop and has not ended ``drain_s + GRACE_S`` seconds later.

    Told by SIGTERM, SIGINT or SIGHUP, or by :meth:`arm`; after SIGQUIT or a second SIGINT nothing is drained, and
    ``GRACE_S`` is all there is. *begin(hurry)* is called each time: True means to hand back now. A signal that comes
    while the worker still starts ends it at once, with status 128 + the signal's number: nothing was taken yet.

    It receives signals through Python's wakeup descriptor, in a thread of its own. Celery's handlers need the main
    thread, which may be waiting for a broker that hangs, or be inside a library that loads a model.
    """

    def __init__(
        self,
        drain_s: float,
        begin: Callable[[bool], None],
        *,
        grace_s: float = GRACE_S,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._drain_s = drain_s
        self._grace_s = grace_s
        self._begin = begin
        self._exit = exit_process
        self._armed = threading.Event()
        self._hurry = threading.Event()
        self._interrupts = 0
        self._restarts = False

    def install(self) -> None:
        """Begin to receive signals. Belongs to the main thread, before anything that may take long."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            # Without a handler the first process of a container would not even receive SIGTERM.
            # What is ignored stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _starting)
        threading.Thread(target=self._listen, args=(reader,), name="rerankq-signals", daemon=True).start()
        threading.Thread(target=self._watch, name="rerankq-watchdog", daemon=True).start()

    def arm(self, *, hurry: bool = False) -> None:
        """Count from now on; in a *hurry* without the drain."""
        if hurry:
            self._hurry.set()
        self._armed.set()

    def finish(self) -> None:
        """Leave the interpreter ``GRACE_S`` seconds for its own end, in which no thread of ours runs any more."""
        # The kernel's timer needs no interpreter. It would outlive the restart that SIGHUP asks for.
        if not self._restarts:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def receive(self, number: int) -> None:
        """Act on a signal."""
        if number not in _STOP_SIGNALS:
            return
        if signal.getsignal(number) is _starting:
            self._exit_with(128 + number, f"{signal.Signals(number).name} while starting")
            return
        self._interrupts += number == signal.SIGINT
        self._restarts |= number == signal.SIGHUP
        hurry = number == signal.SIGQUIT or self._interrupts > 1
        self.arm(hurry=hurry)
        self._begin(hurry)

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                try:
                    self.receive(number)
                except Exception:
                    # This thread must outlive any bug in it: it is what ends a worker that hangs.
                    logger.exception("signal %d was not acted on", number)

    def _watch(self) -> None:
        self._armed.wait()
        # Two waits, not one until a time: a process that was paused meanwhile still gets its time to hand back.
        self._hurry.wait(self._drain_s)
        time.sleep(self._grace_s)
        self._exit_with(STOP_TIMED_OUT, "not closed in time: the jobs that it still holds are left to their leases")

    def _exit_with(self, status: int, why: str) -> None:
        within(LAST_MESSAGE_S, lambda: logger.critical("%s; exiting with status %d", why, status))
        self._exit(status)


def _starting(_: int, __: object) -> None:
    """Handle a signal until Celery's handlers are in place: the watchdog's thread acts on it."""
