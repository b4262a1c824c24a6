"""Who is on the device: never anybody beside one who is alone, and nobody waits for ever."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rerankq_worker.gate import Gate

PATIENCE_S = 20  # a test that hangs ends here; none that works waits so long


class Device:
    """Counts who is on it, and remembers whether anybody ever was where nobody may be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.together = self.alone = 0
        self.most = 0
        self.wrong = False

    def come(self, *, alone: bool) -> None:
        with self._lock:
            self.alone += alone
            self.together += not alone
            self.most = max(self.most, self.together)
            self.wrong |= self.alone > 1 or (self.alone == 1 and self.together > 0)

    def go(self, *, alone: bool) -> None:
        with self._lock:
            self.wrong |= self.alone > 1 or (self.alone == 1 and self.together > 0)
            self.alone -= alone
            self.together -= not alone


def started(work) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def waits_alone(gate: Gate, count: int = 1) -> None:
    with gate._changed:
        assert gate._changed.wait_for(lambda: gate._want_alone == count, PATIENCE_S)


def test_jobs_share_the_device():
    gate, met = Gate(), threading.Barrier(3)

    def work(_: int) -> None:
        with gate.together():
            met.wait(PATIENCE_S)  # broken unless all three are in at once

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))


@pytest.mark.parametrize("seed", range(3))
def test_whoever_is_alone_is_alone_in_any_order_of_things(seed: int):
    gate, device = Gate(), Device()

    def work(number: int) -> None:
        chooser = random.Random(100 * seed + number)
        for _ in range(150):
            alone = chooser.random() < 0.3
            with gate.alone() if alone else gate.together():
                device.come(alone=alone)
                if chooser.random() < 0.2:
                    threading.Event().wait(0)  # lets others run
                device.go(alone=alone)

    threads = [started(lambda number=number: work(number)) for number in range(8)]
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "nobody waits for ever"
    assert not device.wrong
    assert device.together == device.alone == 0


def test_who_wants_to_be_alone_goes_before_newcomers():
    gate, order, first_is_in, leave = Gate(), [], threading.Event(), threading.Event()

    def first() -> None:
        with gate.together():
            first_is_in.set()
            leave.wait(PATIENCE_S)
            order.append("first")

    def suspect() -> None:
        with gate.alone():
            order.append("suspect")

    def newcomer() -> None:
        with gate.together():
            order.append("newcomer")

    threads = [started(first)]
    assert first_is_in.wait(PATIENCE_S)
    threads.append(started(suspect))
    waits_alone(gate)
    threads.append(started(newcomer))
    threads[-1].join(0.05)
    assert order == [], "the newcomer waits although the device is only shared"
    leave.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == ["first", "suspect", "newcomer"]


def test_a_row_of_suspects_goes_one_at_a_time_and_then_everybody_else():
    gate, device, leave, is_in = Gate(), Device(), threading.Event(), threading.Event()
    order = []

    def holder() -> None:
        with gate.together():
            is_in.set()
            leave.wait(PATIENCE_S)

    def work(*, alone: bool) -> None:
        with gate.alone() if alone else gate.together():
            device.come(alone=alone)
            order.append(alone)
            device.go(alone=alone)

    threads = [started(holder)]
    assert is_in.wait(PATIENCE_S)
    threads += [started(lambda: work(alone=True)) for _ in range(4)]
    waits_alone(gate, 4)
    threads += [started(lambda: work(alone=False)) for _ in range(4)]
    leave.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == [True] * 4 + [False] * 4
    assert not device.wrong


@pytest.mark.parametrize("way", ["alone", "together"])
def test_an_error_inside_lets_the_next_one_in(way: str):
    gate = Gate()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), getattr(gate, way)():
            raise ZeroDivisionError
    for then in (gate.alone, gate.together):
        done = started(lambda then=then: then().__enter__())
        done.join(PATIENCE_S)
        assert not done.is_alive()
        gate = Gate() if then == gate.alone else gate


def test_who_gives_up_waiting_to_be_alone_holds_up_nobody(monkeypatch: pytest.MonkeyPatch):
    gate = Gate()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gate._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), gate.alone():
            pass
    entered = started(lambda: gate.together().__enter__())
    entered.join(PATIENCE_S)
    assert not entered.is_alive()
