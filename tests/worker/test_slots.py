"""Slots against a slow twin: a plain list of who is in flight."""

import threading
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from rerankq_worker.slots import KEPT_FOR_INTERACTIVE, Slots

# A step: seconds that pass, a job's name, and whether it comes in as bulk, as interactive, or goes out (None).
STEPS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abcdef"), st.sampled_from([True, False, None])))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Twin:
    """Every ring in a list, and a history of when there was room."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.rings: list[tuple[str, bool]] = []
        self.since = {False: 0.0, True: 0.0}

    def has_room(self, bulk: bool) -> bool:
        bulk_rings = [ring for ring in self.rings if ring[1]]
        return len(self.rings) < self.total and (not bulk or len(bulk_rings) < max(1, self.total - 2))

    def step(self, now: float, job: str, bulk: bool | None) -> None:
        if bulk is not None:
            self.rings.append((job, bulk))
        elif last := [at for at, ring in enumerate(self.rings) if ring[0] == job]:
            del self.rings[last[-1]]
        for kind in (False, True):
            had_none = self.since[kind] is None
            self.since[kind] = None if not self.has_room(kind) else now if had_none else self.since[kind]


@given(total=st.integers(3, 6), steps=STEPS)
def test_slots_equal_a_list_of_all_rings(total: int, steps: list[tuple[int, str, bool | None]]):
    clock, twin = Clock(), Twin(total)
    slots = Slots(total, clock=clock)
    for seconds, job, bulk in steps:
        clock.now += seconds
        before = [twin.has_room(kind) for kind in (False, True)]
        twin.step(clock.now, job, bulk)
        after = [twin.has_room(kind) for kind in (False, True)]
        if bulk is None:
            assert slots.give_back(job) == (before != after), "who makes room says so, and nobody else"
        else:
            slots.take(job, bulk=bulk)
        assert slots.taken == len(twin.rings)
        for kind in (False, True):
            assert slots.has_room(bulk=kind) == twin.has_room(kind)
            since = twin.since[kind]
            assert slots.free_for(bulk=kind) == (None if since is None else clock.now - since)


@given(st.integers(3, 40))
def test_bulk_that_asks_first_leaves_slots_for_interactive_jobs(total: int):
    slots = Slots(total)
    number = 0
    while slots.has_room(bulk=True):
        slots.take(f"bulk {number}", bulk=True)
        number += 1
    assert total - slots.taken == KEPT_FOR_INTERACTIVE
    assert slots.has_room(bulk=False)


def test_a_job_that_never_came_in_gives_nothing_back():
    slots = Slots(4)
    slots.take("a", bulk=True)
    assert not slots.give_back("revoked before it was received")
    assert slots.taken == 1
    slots.give_back("a")
    assert not slots.give_back("a"), "nor does one that has gone already"
    assert slots.taken == 0


def test_no_slot_is_lost_or_won_by_many_threads():
    slots, start = Slots(8), threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for turn in range(500):
            slots.take(f"job {turn % 3}", bulk=bool(number % 2))
            slots.give_back(f"job {turn % 3}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert slots.taken == 0
    assert slots.has_room(bulk=True)
    assert slots._in_flight == {}
    assert slots._bulk == 0
