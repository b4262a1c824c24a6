"""The lock of the device: an exclusive holder is alone, no waiter waits for ever, and turns alternate."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq_worker.locks import BULK_BETWEEN, PASSED_AT_MOST, Holders, SharedExclusiveLock, Waiter, admitted

WAIT_S = 20  # a test that hangs ends here; none that works waits so long

waiters = st.builds(Waiter, st.booleans(), st.booleans(), st.integers(0, PASSED_AT_MOST + 1))
sharers = st.builds(Holders, st.integers(0, 2), st.integers(0, 2))


# The decision, alone


def oracle(waiting: list[Waiter], holders: Holders, after_exclusive: bool) -> list[int]:
    """The rules one after the other, each for itself."""
    if holders.exclusive:
        return []
    held = holders.interactive + holders.bulk > 0
    alone = [at for at in range(len(waiting)) if waiting[at].exclusive]
    their_turn = bool(alone) and not (after_exclusive and len(alone) < len(waiting))
    going = []
    for at, waiter in enumerate(waiting):
        if waiter.exclusive:
            before = [
                other
                for other in alone
                if (waiting[other].interactive or waiting[other].passed >= PASSED_AT_MOST, -other)
                > (waiter.interactive or waiter.passed >= PASSED_AT_MOST, -at)
            ]
            if their_turn and not held and not before:
                going.append(at)
        elif their_turn:
            if waiter.interactive and holders.bulk:
                going.append(at)
        elif waiter.interactive or not alone or bulk_before(waiting, at) < BULK_BETWEEN:
            going.append(at)
    return going


def bulk_before(waiting: list[Waiter], at: int) -> int:
    """How many bulk jobs that would share the lock came before this one."""
    return sum(not waiter.exclusive and not waiter.interactive for waiter in waiting[:at])


@given(st.lists(waiters, max_size=12), sharers | st.just(Holders(exclusive=True)), st.booleans())
def test_admitted_waiters_equal_the_rules_one_after_the_other(waiting: list[Waiter], holders: Holders, after: bool):
    assert admitted(waiting, holders, after_exclusive=after) == oracle(waiting, holders, after)


@given(st.lists(waiters, min_size=1, max_size=8), st.booleans())
def test_a_free_lock_admits_a_waiter(waiting: list[Waiter], after: bool):
    going = [waiting[at] for at in admitted(waiting, Holders(), after_exclusive=after)]
    assert going
    assert len(going) == 1 or not any(waiter.exclusive for waiter in going)


# A device in steps: (exclusive, interactive) arrives, None lets one leave that is in.
STEPS = st.lists(st.none() | st.tuples(st.booleans(), st.booleans()), max_size=60)


@given(STEPS, st.randoms(use_true_random=False))
def test_an_interactive_job_waits_for_one_exclusive_holder_at_most_and_no_job_for_ever(steps, chooser):
    lock, inside = SharedExclusiveLock(), {}
    # For each that waits to share: how many went in alone meanwhile, and how many may. Bulk goes in a few at a time.
    went_before: dict[int, int] = {}
    allowed: dict[int, int] = {}

    def record_who_went_in(waiting_before: dict[int, Waiter]) -> None:
        now_in = {at: waiter for at, waiter in waiting_before.items() if at not in lock._waiting}
        if any(waiter.exclusive for waiter in now_in.values()):
            assert not inside
            assert len(now_in) == 1
            for at, waiter in lock._waiting.items():
                went_before[at] = went_before.get(at, 0) + (not waiter.exclusive)
        inside.update(now_in)

    for step in [*steps, *[None] * 100]:
        with lock._changed:
            if step is not None:
                waiter = Waiter(*step)
                before = {**lock._waiting, lock._arrivals: waiter}
                ahead = sum(not one.exclusive and not one.interactive for one in lock._waiting.values())
                allowed[lock._arrivals] = 1 if waiter.interactive else 1 + ahead // BULK_BETWEEN
                lock._waiting[lock._arrivals] = waiter
                lock._arrivals += 1
                lock._admit()
            elif inside:
                at = chooser.choice(sorted(inside))
                before = dict(lock._waiting)
                lock._leave(at, inside.pop(at))
            else:
                continue
            record_who_went_in(before)
    assert not lock._waiting
    assert not inside
    for at, went in went_before.items():
        assert went <= allowed[at]


def turns(*arrivals: tuple[str, Waiter]) -> list[str]:
    """In which order these go in when all have come while one is alone, and each leaves before the next decision."""
    waiting, holders, after, order = dict(arrivals), Holders(), True, []
    while waiting:
        going = [list(waiting)[at] for at in admitted(list(waiting.values()), holders, after_exclusive=after)]
        after = any(waiting[name].exclusive for name in going)
        for name in going:
            waiter = waiting.pop(name)
            order.append(name)
            if waiter.exclusive:
                waiting = {
                    other: Waiter(one.exclusive, one.interactive, one.passed + one.exclusive)
                    for other, one in waiting.items()
                }
    return order


def test_an_interactive_suspect_goes_before_bulk_ones_and_a_bulk_one_is_not_passed_for_ever():
    bulk = [(f"bulk {at}", Waiter(True, False)) for at in range(2)]
    urgent = [(f"urgent {at}", Waiter(True, True)) for at in range(5)]
    order = turns(*bulk, *urgent)
    assert order.index("urgent 0") == 0
    assert order.index("bulk 0") == PASSED_AT_MOST
    assert order.index("bulk 1") == PASSED_AT_MOST + 1


def test_shared_jobs_go_between_two_suspects():
    suspects = [(f"suspect {at}", Waiter(True, False)) for at in range(3)]
    others = [("bulk", Waiter(False, False)), ("soon", Waiter(False, True))]
    assert turns(*suspects, *others) == ["bulk", "soon", "suspect 0", "suspect 1", "suspect 2"]


def test_few_bulk_jobs_go_between_two_suspects_and_all_interactive_ones():
    suspects = [(f"suspect {at}", Waiter(True, False)) for at in range(2)]
    bulk = [(f"bulk {at}", Waiter(False, False)) for at in range(3 * BULK_BETWEEN)]
    soon = [(f"soon {at}", Waiter(False, True)) for at in range(2 * BULK_BETWEEN)]
    order = turns(*suspects, *bulk, *soon)
    assert set(order[: order.index("suspect 0")]) == {name for name, _ in [*bulk[:BULK_BETWEEN], *soon]}
    between = order[order.index("suspect 0") + 1 : order.index("suspect 1")]
    assert between == [name for name, _ in bulk[BULK_BETWEEN : 2 * BULK_BETWEEN]], "in order of arrival"
    assert order[order.index("suspect 1") + 1 :] == [name for name, _ in bulk[2 * BULK_BETWEEN :]]


def waiting_lock(*waiters: Waiter, inside: Waiter) -> SharedExclusiveLock:
    """A lock with one inside (its number is 0), for which these wait (1, 2 and so on)."""
    lock = SharedExclusiveLock()
    with lock._changed:
        lock._waiting[0] = inside
        lock._admit()
        lock._waiting |= dict(enumerate(waiters, 1))
    return lock


def test_a_suspect_that_gives_up_waiting_gives_bulk_no_turn_before_the_next_suspect():
    bulk, suspect = Waiter(exclusive=False, interactive=False), Waiter(exclusive=True, interactive=False)
    lock = waiting_lock(suspect, suspect, bulk, inside=bulk)
    with lock._changed:
        lock._leave(1, suspect)
        assert list(lock._waiting) == [2, 3]
        lock._leave(0, bulk)
    assert list(lock._waiting) == [3]
    assert lock._holders == Holders(exclusive=True)


def test_a_suspect_is_overtaken_only_by_those_that_came_after_it():
    bulk, soon = Waiter(exclusive=True, interactive=False), Waiter(exclusive=True, interactive=True)
    lock = waiting_lock(bulk, soon, bulk, inside=Waiter(exclusive=False, interactive=True))
    with lock._changed:
        lock._leave(0, Waiter(exclusive=False, interactive=True))
    assert {number: waiter.passed for number, waiter in lock._waiting.items()} == {1: 1, 3: 0}


def test_a_suspect_that_gives_up_admits_those_that_waited_for_it_only():
    bulk, suspect = Waiter(exclusive=False, interactive=False), Waiter(exclusive=True, interactive=False)
    lock = waiting_lock(suspect, bulk, inside=bulk)
    with lock._changed:
        lock._leave(1, suspect)
    assert not lock._waiting
    assert lock._holders == Holders(bulk=2)


@pytest.mark.parametrize("interactive", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_the_lock_records_who_is_interactive_and_who_is_exclusive(alone: bool, interactive: bool):
    lock = SharedExclusiveLock()
    lock._holders = Holders(exclusive=True)
    seen: list[Waiter] = []

    def give_up() -> None:
        seen.extend(lock._waiting.values())
        raise InterruptedError

    with pytest.raises(InterruptedError):
        entered(lock, alone=alone, interactive=interactive, check=give_up)
    assert seen == [Waiter(exclusive=alone, interactive=interactive)]


# The lock, with threads


class Device:
    """Counts its users, and remembers whether one ever was beside an exclusive one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.shared = self.alone = 0
        self.wrong = False

    def come(self, *, alone: bool) -> None:
        with self._lock:
            self.alone += alone
            self.shared += not alone
            self.wrong |= self.alone > 1 or (self.alone == 1 and self.shared > 0)

    def go(self, *, alone: bool) -> None:
        with self._lock:
            self.wrong |= self.alone > 1 or (self.alone == 1 and self.shared > 0)
            self.alone -= alone
            self.shared -= not alone


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_for_waiters(lock: SharedExclusiveLock, count: int) -> None:
    with lock._changed:
        assert lock._changed.wait_for(lambda: len(lock._waiting) == count, WAIT_S)


def entered(lock: SharedExclusiveLock, *, alone: bool = False, interactive: bool = False, **options) -> None:
    with (
        lock.exclusive(interactive=interactive, **options) if alone else lock.shared(interactive=interactive, **options)
    ):
        pass


def test_jobs_share_the_device():
    lock, met = SharedExclusiveLock(), threading.Barrier(3)

    def work(number: int) -> None:
        with lock.shared(interactive=bool(number % 2)):
            met.wait(WAIT_S)  # broken unless all three are in at once

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))


@pytest.mark.parametrize("seed", range(3))
def test_an_exclusive_holder_is_alone_in_any_order_of_events(seed: int):
    lock, device = SharedExclusiveLock(), Device()

    def work(number: int) -> None:
        chooser = random.Random(100 * seed + number)
        for _ in range(150):
            alone, interactive = chooser.random() < 0.3, chooser.random() < 0.5
            with lock.exclusive(interactive=interactive) if alone else lock.shared(interactive=interactive):
                device.come(alone=alone)
                if chooser.random() < 0.2:
                    threading.Event().wait(0)  # lets others run
                device.go(alone=alone)

    threads = [started(lambda number=number: work(number)) for number in range(8)]
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "no waiter waits for ever"
    assert not device.wrong
    assert device.shared == device.alone == 0


def test_interactive_jobs_go_in_beside_bulk_for_which_a_suspect_waits_and_bulk_does_not():
    lock, leave, is_in = SharedExclusiveLock(), threading.Event(), threading.Event()
    order: list[str] = []

    def hold() -> None:
        with lock.shared(interactive=False):
            is_in.set()
            leave.wait(WAIT_S)

    def work(name: str, **how: bool) -> None:
        with lock.exclusive(interactive=False) if how.get("alone") else lock.shared(interactive=how["interactive"]):
            order.append(name)

    threads = [started(hold)]
    assert is_in.wait(WAIT_S)
    threads.append(started(lambda: work("suspect", alone=True)))
    wait_for_waiters(lock, 1)
    threads.append(started(lambda: work("bulk", interactive=False)))
    wait_for_waiters(lock, 2)
    soon = started(lambda: work("soon", interactive=True))
    soon.join(WAIT_S)
    assert order == ["soon"]
    leave.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert order == ["soon", "suspect", "bulk"]


@pytest.mark.parametrize("alone", [True, False])
def test_an_error_of_a_holder_releases_the_lock(alone: bool):
    lock = SharedExclusiveLock()
    for _ in range(3):
        with (
            pytest.raises(ZeroDivisionError),
            lock.exclusive(interactive=True) if alone else lock.shared(interactive=True),
        ):
            raise ZeroDivisionError
    for then in (True, False):
        done = started(lambda then=then: entered(lock, alone=then))
        done.join(WAIT_S)
        assert not done.is_alive()


@pytest.mark.parametrize("alone", [True, False])
def test_a_waiter_that_gives_up_stops_waiting_and_blocks_no_other(alone: bool):
    lock, leave, cancelled, is_in = SharedExclusiveLock(), threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock.exclusive(interactive=False):
            is_in.set()
            leave.wait(WAIT_S)

    def check() -> None:
        if cancelled.is_set():
            raise InterruptedError

    def wait_and_give_up() -> None:
        with pytest.raises(InterruptedError):
            entered(lock, alone=alone, check=check)

    holder = started(hold)
    assert is_in.wait(WAIT_S)
    waiting = started(wait_and_give_up)
    wait_for_waiters(lock, 1)
    cancelled.set()
    waiting.join(WAIT_S)
    assert not waiting.is_alive(), "it does not wait for its turn"
    leave.set()
    holder.join(WAIT_S)
    for then in (True, False):
        entered(lock, alone=then)


def test_a_waiter_that_is_admitted_while_it_gives_up_blocks_no_other():
    lock = SharedExclusiveLock()

    def give_up() -> None:
        raise InterruptedError

    with lock.shared(interactive=False):
        with pytest.raises(InterruptedError):
            entered(lock, alone=True, check=give_up)
        entered(lock)
    entered(lock, alone=True)
