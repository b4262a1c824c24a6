"""Slots against a slow twin: a plain list of the jobs in flight."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq.ledger import Deferred, Doorbell
from rerankq_worker.slots import Slots, SuspectSlots, kept_for_interactive

# A step: a job's name, and whether it comes in as bulk, as interactive, or goes out (None).
STEPS = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([True, False, None])))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Twin:
    """Every doorbell in a list."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken: list[tuple[str, bool]] = []

    def available(self, bulk: bool) -> bool:
        bulk_taken = [send for send in self.taken if send[1]]
        return len(self.taken) < self.total and (not bulk or len(bulk_taken) < self.total - min(2, self.total // 2))

    def step(self, job: str, bulk: bool | None) -> None:
        if bulk is not None:
            self.taken.append((job, bulk))
        elif last := [at for at, send in enumerate(self.taken) if send[0] == job]:
            del self.taken[last[-1]]


@given(total=st.integers(1, 6), steps=STEPS)
def test_slots_equal_a_plain_list_of_all_doorbells(total: int, steps: list[tuple[str, bool | None]]):
    slots, twin = Slots(total), Twin(total)
    for job, bulk in steps:
        before = [twin.available(kind) for kind in (False, True)]
        twin.step(job, bulk)
        after = [twin.available(kind) for kind in (False, True)]
        if bulk is None:
            assert slots.give_back(job) == (before != after), "True where a class has a free slot that had none"
        else:
            slots.take(job, bulk=bulk)
        assert slots.taken == len(twin.taken)
        for kind in (False, True):
            assert slots.available(bulk=kind) == twin.available(kind)


@given(st.integers(2, 40))
def test_bulk_that_asks_first_leaves_slots_for_interactive_jobs(total: int):
    slots = Slots(total)
    number = 0
    while slots.available(bulk=True):
        slots.take(f"bulk {number}", bulk=True)
        number += 1
    assert total - slots.taken == kept_for_interactive(total) == (1 if total < 4 else 2)
    assert slots.available(bulk=False)


def test_a_job_that_was_never_received_gives_no_slot_back():
    slots = Slots(4)
    slots.take("a", bulk=True)
    assert not slots.give_back("revoked before it was received")
    assert slots.taken == 1
    slots.give_back("a")
    assert not slots.give_back("a"), "nor does one that has gone already"
    assert slots.taken == 0


def test_slots_are_counted_rightly_by_many_threads():
    slots, start = Slots(8), threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for turn in range(500):
            slots.take(f"job {turn % 3}", bulk=bool(number % 2))
            slots.give_back(f"job {turn % 3}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert slots.taken == 0
    assert slots.available(bulk=True)
    assert slots._in_flight == {}
    assert slots._bulk == 0


def suspect(name: str) -> Deferred:
    return Deferred(Doorbell(name, "q", "", ahead=True), "interactive" if name.isupper() else "bulk")


def ended(slots: SuspectSlots, name: str) -> str | None:
    """One has ended: whose doorbell is sent?"""
    slots.give_back(suspect(name))
    doorbell = slots.next_doorbell()
    return None if doorbell is None else doorbell.id


def test_suspects_are_taken_one_of_each_class_at_a_time_interactive_ones_first():
    slots = SuspectSlots(4)
    assert [slots.take(suspect(name)) for name in "abAcBC"] == [True, False, True, False, False, False]
    assert slots.next_doorbell() is None
    assert ended(slots, "a") == "b"
    assert slots.take(suspect("b"))
    assert ended(slots, "A") == "B"
    assert slots.take(suspect("B"))
    assert not slots.take(suspect("c")), "a doorbell that was sent twice"
    assert slots.forget() == [suspect("c").doorbell, suspect("C").doorbell]
    assert ended(slots, "b") is None


@pytest.mark.parametrize("total", [2, 3])
def test_suspects_with_few_slots_are_taken_one_in_all_and_bulk_waits_for_interactive_ones(total: int):
    slots = SuspectSlots(total)
    assert [slots.take(suspect(name)) for name in "abA"] == [True, False, False]
    assert ended(slots, "a") == "A"
    assert slots.take(suspect("A"))
    assert ended(slots, "A") == "b"
    assert slots.take(suspect("B"))
    assert not slots.take(suspect("C"))
    assert ended(slots, "B") == "C"


def test_an_interactive_suspect_with_one_slot_is_taken_behind_the_jobs_that_wait():
    clock = Clock()
    slots = SuspectSlots(1, clock=clock)
    assert not slots.take(suspect("A"))
    assert slots.next_doorbell() == Doorbell("A", "q", "", ahead=False)
    assert not slots.take(suspect("B")), "one after the other"
    assert slots.next_doorbell() is None
    assert slots.take(suspect("A")), "by the doorbell of its own"
    assert not slots.take(suspect("b"))
    assert ended(slots, "A") == "B"
    assert not slots.take(suspect("c"))
    # Another worker has it, most likely.
    clock.now += SuspectSlots.INVITED_S
    assert slots.next_doorbell() == suspect("b").doorbell
    assert slots.take(suspect("b"))


def test_with_eight_slots_a_second_suspect_of_each_class_waits_so_that_the_lock_knows_of_it():
    slots = SuspectSlots(8)
    assert [slots.take(suspect(name)) for name in "abcABC"] == [True, True, False, True, True, False]
    assert ended(slots, "a") == "c"
    assert slots.take(suspect("c"))
    assert not slots.take(suspect("d"))
    seven = SuspectSlots(7)
    assert [seven.take(suspect(name)) for name in "ab"] == [True, False]


@given(st.integers(1, 9), st.lists(st.sampled_from("abcdABCD"), max_size=40))
def test_no_suspect_is_lost_and_none_is_taken_twice(total: int, names: list[str]):
    slots, inside, waiting = SuspectSlots(total, clock=Clock()), [], set()

    def receive(name: str) -> None:
        if slots.take(suspect(name)):
            waiting.discard(name)
            inside.append(name)
        else:
            waiting.add(name)
        follow()

    def follow() -> None:
        doorbell = slots.next_doorbell()
        if doorbell is not None:
            assert doorbell.id in waiting
            receive(doorbell.id)

    for name in names:
        if name in inside:
            inside.remove(name)
            slots.give_back(suspect(name))
            follow()
        else:
            receive(name)
        assert len(inside) <= (4 if total >= 8 else 2 if total >= 4 else 1)
        assert not waiting or inside, "no suspect waits while none runs"
    assert {doorbell.id for doorbell in slots.forget()} == waiting


def test_remembered_suspects_are_10000_at_most():
    slots = SuspectSlots(4)
    for number in range(SuspectSlots.MOST_REMEMBERED + 3):
        slots.take(suspect(f"a{number}"))
    assert len(slots.forget()) == SuspectSlots.MOST_REMEMBERED == 10_000
    assert slots.forget() == []


def test_a_suspect_that_is_taken_by_a_second_doorbell_is_not_remembered():
    slots = SuspectSlots(4)
    assert [slots.take(suspect(name)) for name in "ab"] == [True, False]
    slots.give_back(suspect("a"))
    assert slots.take(suspect("b"))
    assert slots.forget() == []
