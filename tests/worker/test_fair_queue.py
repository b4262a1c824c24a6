"""Start-time fair queueing: shares by tokens, new flows, credit and debt."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankq_worker.engine.scheduling.fair_queue import FairQueue


def leader(queue):
    return next(iter(queue))[1]


def serve(queue, turns, tokens=100):
    """Serve the leading flow, so many turns; returns which flows led."""
    led = []
    for _ in range(turns):
        led.append(leader(queue))
        queue.charge({led[-1]: tokens}, leader=led[-1])
    return led


def queue_of(*flows):
    queue = FairQueue()
    for flow in flows:
        queue.add(flow)
    return queue


def test_flows_lead_in_turns():
    assert serve(queue_of("a", "b", "c"), 6) == ["a", "b", "c", "a", "b", "c"]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 500)), min_size=1, max_size=60), st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_two_flows_that_always_wait_differ_by_no_more_than_a_turn_of_each(others, least):
    queue = queue_of(0, 1, 2, 3)
    paid = dict.fromkeys(range(4), 0)
    greatest = dict.fromkeys(range(4), least)
    for _, tokens in others:
        led = leader(queue)
        queue.charge({led: tokens}, leader=led, least=least)
        paid[led] += max(tokens, least)
        greatest[led] = max(greatest[led], tokens)
        for one in range(4):
            for other in range(one):
                assert abs(paid[one] - paid[other]) <= greatest[one] + greatest[other]


def test_tokens_served_in_another_flows_turn_are_charged_as_well():
    queue = queue_of("a", "b")
    queue.charge({"a": 100, "b": 300}, leader="a")
    assert serve(queue, 5) == ["a", "a", "a", "b", "a"]


def test_the_leader_of_a_small_turn_is_charged_for_the_least_tokens():
    queue = queue_of("a", "b")
    queue.charge({"a": 10, "b": 5}, leader="a", least=500)
    assert {flow: start for start, flow in queue} == {"a": 500.0, "b": 5.0}


def test_a_new_flow_goes_before_those_that_have_had_more_than_their_share():
    queue = queue_of("large")
    serve(queue, 10)
    queue.add("small")
    assert serve(queue, 3) == ["small", "large", "small"]


def test_the_clock_advances_by_a_turn_divided_among_all_flows():
    queue = queue_of("a", "b", "c", "d")
    serve(queue, 2)
    queue.add("late")
    assert {flow: start for start, flow in queue} == {"a": 100.0, "b": 100.0, "c": 0.0, "d": 0.0, "late": 25.0}


def test_a_new_flow_waits_for_no_more_than_those_served_before_although_one_led_out_of_turn():
    queue = queue_of("ahead", "behind")
    queue.charge({"ahead": 1000}, leader="ahead")
    queue.charge({"behind": 10}, leader="behind")
    queue.charge({"ahead": 50}, leader="ahead")
    queue.add("late")
    assert {flow: start for start, flow in queue} == {"ahead": 1050.0, "behind": 10.0, "late": 10.0}


def test_a_new_flow_goes_behind_those_that_wait_for_their_share():
    queue = queue_of("a", "b", "c")
    serve(queue, 1)
    queue.add("late")
    assert serve(queue, 3) == ["b", "c", "late"]


@pytest.mark.parametrize(("every", "longest"), [(1, 40), (2, 3), (3, 3)])
def test_a_flow_is_not_starved_by_a_stream_of_new_ones(every, longest):
    queue = queue_of("large")
    serve(queue, 3)
    led = []
    for turn in range(300):
        if turn % every == 0:
            queue.add(turn)
        led += serve(queue, 1)
        if led[-1] != "large":
            queue.remove(led[-1])
    gaps = [at for at, flow in enumerate(led) if flow == "large"]
    # Who wants more than the device has makes more and more jobs wait; the large one has its share among them.
    assert max(after - before for before, after in zip([-1, *gaps], gaps, strict=False)) <= longest
    assert led.count("large") >= 300 / longest


@pytest.mark.parametrize("idle_turns", [0, 1, 100, 10_000])
def test_a_flow_gets_no_credit_for_the_time_in_which_it_had_nothing_waiting(idle_turns):
    queue = queue_of("steady")
    serve(queue, idle_turns)
    queue.add("late")
    led = serve(queue, 40)
    assert abs(led.count("late") - led.count("steady")) <= 2
    assert abs(led[:10].count("late") - led[:10].count("steady")) <= 2


def test_a_flow_that_is_removed_and_added_again_gets_no_second_share():
    queue = queue_of("steady", "hops")
    led = []
    for _ in range(60):
        one = leader(queue)
        led.append(one)
        queue.charge({one: 100}, leader=one)
        if one == "hops":
            queue.remove("hops", may_return=True)
            queue.add("hops")
    assert abs(led.count("hops") - led.count("steady")) <= 2


@pytest.mark.parametrize(("may_return", "start"), [(True, 1000.0), (False, 0.0)])
def test_a_flow_removed_with_more_than_its_share_starts_where_it_stopped_if_it_may_return(may_return, start):
    queue = queue_of("steady", "hops")
    queue.charge({"hops": 1000})
    queue.remove("hops", may_return=may_return)
    queue.add("hops")
    assert {flow: at for at, flow in queue} == {"steady": 0.0, "hops": start}


def test_a_removed_flow_is_forgotten_once_the_clock_has_made_up_for_it():
    queue = queue_of("steady", *range(50))
    serve(queue, 51)
    for flow in range(50):
        queue.remove(flow, may_return=True)
    serve(queue, 4)
    assert queue._ahead == {}
