"""The watchdog ends a worker that does not stop in time: what it decides, without a process to end."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rerankq_worker import shutdown
from rerankq_worker.shutdown import STOP_TIMED_OUT, ShutdownWatchdog, within

WAIT_S = 20  # a test that hangs ends here; none that works waits so long


class Scene:
    """A watchdog whose process cannot end, and what it did."""

    def __init__(self, drain_s: float = 0, grace_s: float = 0) -> None:
        self.begun: list[bool] = []
        self.statuses: list[int] = []
        self.left = threading.Event()
        self.watchdog = ShutdownWatchdog(drain_s, self.begun.append, grace_s=grace_s, exit_process=self.leave)
        self.thread = threading.Thread(target=self.watchdog._watch, daemon=True)
        self.thread.start()

    def leave(self, status: int) -> None:
        self.statuses.append(status)
        self.left.set()


def test_a_worker_that_shall_not_stop_is_not_ended():
    scene = Scene()
    assert not scene.left.wait(0.05)
    assert scene.thread.is_alive()


def test_the_watchdog_waits_for_the_drain_and_then_for_the_handing_back(monkeypatch: pytest.MonkeyPatch):
    waits, statuses = [], []
    watchdog = ShutdownWatchdog(7, lambda _: None, grace_s=3, exit_process=statuses.append)
    monkeypatch.setattr(watchdog._hurry, "wait", lambda seconds: waits.append(("until in a hurry", seconds)))
    monkeypatch.setattr(shutdown.time, "sleep", lambda seconds: waits.append(("in any case", seconds)))
    watchdog.arm()
    watchdog._watch()
    assert waits == [("until in a hurry", 7), ("in any case", 3)]
    assert statuses == [STOP_TIMED_OUT]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_worker_that_drains_for_too_long_ends_with_a_status_of_its_own(number: int):
    scene = Scene()
    scene.watchdog.receive(number)
    assert scene.left.wait(WAIT_S)
    assert (scene.statuses, scene.begun) == ([STOP_TIMED_OUT], [False])


@pytest.mark.parametrize("numbers", [[signal.SIGQUIT], [signal.SIGTERM, signal.SIGQUIT], [signal.SIGINT] * 2])
def test_a_worker_in_a_hurry_is_not_given_the_time_to_drain(numbers: list[int]):
    scene = Scene(drain_s=10 * WAIT_S)
    for number in numbers:
        scene.watchdog.receive(number)
    assert scene.left.wait(WAIT_S)
    assert scene.begun[-1] is True


def test_the_same_signal_again_does_not_lengthen_or_shorten_the_time():
    scene = Scene(drain_s=0.2)
    for _ in range(3):
        scene.watchdog.receive(signal.SIGTERM)
    assert not scene.watchdog._hurry.is_set()
    assert scene.left.wait(WAIT_S)
    assert scene.statuses == [STOP_TIMED_OUT]


def test_other_signals_are_ignored_by_the_watchdog():
    scene = Scene()
    for number in (signal.SIGUSR1, signal.SIGCHLD, signal.SIGUSR2):
        scene.watchdog.receive(number)
    assert not scene.left.wait(0.05)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGQUIT, 131)])
def test_a_worker_that_still_starts_exits_at_once(monkeypatch: Any, number, status):
    monkeypatch.setattr(signal, "getsignal", lambda _: shutdown._starting)
    scene = Scene(drain_s=10 * WAIT_S)
    scene.watchdog.receive(number)
    assert (scene.statuses, scene.begun) == ([status], [])


class StuckLog(logging.Handler):
    """A log whose reader has stopped to read."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def emit(self, _: logging.LogRecord) -> None:
        self.free.wait(WAIT_S)


@pytest.fixture
def stuck_log() -> Iterator[StuckLog]:
    handler = StuckLog()
    shutdown.logger.addHandler(handler)
    yield handler
    handler.free.set()
    shutdown.logger.removeHandler(handler)


def test_a_log_that_nobody_reads_does_not_keep_a_worker_alive(stuck_log: StuckLog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutdown, "LAST_MESSAGE_S", 0.01)
    scene = Scene()
    scene.watchdog.arm()
    assert scene.left.wait(WAIT_S)
    assert not stuck_log.free.is_set()


def test_the_watchdog_counts_from_a_signal_whose_callback_failed():
    def stumble(_: bool) -> None:
        raise ZeroDivisionError

    left = threading.Event()
    watchdog = ShutdownWatchdog(0, stumble, grace_s=0, exit_process=lambda _: left.set())
    threading.Thread(target=watchdog._watch, daemon=True).start()
    with pytest.raises(ZeroDivisionError):
        watchdog.receive(signal.SIGTERM)
    assert left.wait(WAIT_S)


def test_steps_run_side_by_side_and_one_that_hangs_is_left_behind():
    met, free, beside, done = threading.Barrier(2), threading.Event(), threading.Event(), []

    def meet() -> None:
        met.wait(WAIT_S)
        done.append("met")

    steps: list[Callable[[], object]] = [meet, meet]
    assert within(WAIT_S, *steps)
    assert done == ["met", "met"]
    assert not within(0.02, lambda: free.wait(WAIT_S), beside.set)
    assert beside.wait(WAIT_S / 2), "it does not wait for the one that hangs"
    free.set()


@pytest.mark.parametrize(
    ("numbers", "timers"),
    [([signal.SIGTERM], [3]), ([], [3]), ([signal.SIGHUP], []), ([signal.SIGTERM, signal.SIGHUP], [])],
)
def test_the_interpreter_has_grace_for_its_own_end_unless_it_restarts(
    monkeypatch: pytest.MonkeyPatch, numbers: list[int], timers: list[float]
):
    set_to: list[float] = []
    monkeypatch.setattr(signal, "setitimer", lambda _, seconds: set_to.append(seconds))
    watchdog = ShutdownWatchdog(0, lambda _: None, grace_s=3, exit_process=lambda _: None)
    for number in numbers:
        watchdog.receive(number)
    watchdog.finish()
    assert set_to == timers


def test_steps_have_one_limit_together_and_not_one_each(monkeypatch: pytest.MonkeyPatch):
    clock, waits = [100.0], []

    class Hanging:
        def __init__(self, **_: object) -> None:
            self.start = self.is_alive = lambda: True

        def join(self, seconds: float) -> None:
            waits.append(seconds)
            clock[0] += seconds

    monkeypatch.setattr(shutdown.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(shutdown.threading, "Thread", Hanging)
    assert not within(3.0, int, int, int)
    assert waits == [3.0, 0.0, 0.0]


def test_signals_that_are_ignored_stay_ignored(monkeypatch: pytest.MonkeyPatch):
    def made(*, args: tuple[int, ...] = (), **_: object) -> SimpleNamespace:
        return SimpleNamespace(start=lambda: [os.close(reader) for reader in args])

    taken: list[int] = []
    ignored = {signal.SIGINT: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", lambda number: ignored.get(number, signal.SIG_DFL))
    monkeypatch.setattr(signal, "signal", lambda number, _: taken.append(number))
    monkeypatch.setattr(signal, "set_wakeup_fd", lambda writer, **_: os.close(writer))
    monkeypatch.setattr(shutdown.threading, "Thread", made)
    ShutdownWatchdog(0, lambda _: None).install()
    assert taken == [signal.SIGTERM, signal.SIGQUIT]
