"""Whose turn it is: shares by tokens, newcomers, credit and debt."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankq_worker.engine.scheduling.fair_queue import FairQueue


def leader(queue):
    return next(iter(queue))[1]


def serve(queue, turns, tokens=100):
    """Serve whoever leads, so many turns; answers who led."""
    led = []
    for _ in range(turns):
        led.append(leader(queue))
        queue.charge({led[-1]: tokens}, leader=led[-1])
    return led


def queue_of(*flows):
    queue = FairQueue()
    for flow in flows:
        queue.enter(flow)
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


def test_what_a_flow_gets_in_anothers_turn_counts_as_well():
    queue = queue_of("a", "b")
    queue.charge({"a": 100, "b": 300}, leader="a")
    assert serve(queue, 5) == ["a", "a", "a", "b", "a"]


def test_who_leads_a_small_turn_pays_for_what_it_takes_the_device():
    queue = queue_of("a", "b")
    queue.charge({"a": 10, "b": 5}, leader="a", least=500)
    assert {flow: start for start, flow in queue} == {"a": 500.0, "b": 5.0}


def test_a_newcomer_goes_before_those_who_have_had_more_than_their_share():
    queue = queue_of("large")
    serve(queue, 10)
    queue.enter("small")
    assert serve(queue, 3) == ["small", "large", "small"]


def test_the_clock_goes_on_by_a_turn_shared_among_all_flows():
    queue = queue_of("a", "b", "c", "d")
    serve(queue, 2)
    queue.enter("late")
    assert {flow: start for start, flow in queue} == {"a": 100.0, "b": 100.0, "c": 0.0, "d": 0.0, "late": 25.0}


def test_a_newcomer_waits_for_no_more_than_those_served_before_though_one_led_out_of_turn():
    queue = queue_of("ahead", "behind")
    queue.charge({"ahead": 1000}, leader="ahead")
    queue.charge({"behind": 10}, leader="behind")
    queue.charge({"ahead": 50}, leader="ahead")
    queue.enter("late")
    assert {flow: start for start, flow in queue} == {"ahead": 1050.0, "behind": 10.0, "late": 10.0}


def test_a_newcomer_goes_behind_those_who_wait_for_their_share():
    queue = queue_of("a", "b", "c")
    serve(queue, 1)
    queue.enter("late")
    assert serve(queue, 3) == ["b", "c", "late"]


@pytest.mark.parametrize(("every", "longest"), [(1, 40), (2, 3), (3, 3)])
def test_a_stream_of_newcomers_starves_nobody(every, longest):
    queue = queue_of("large")
    serve(queue, 3)
    led = []
    for turn in range(300):
        if turn % every == 0:
            queue.enter(turn)
        led += serve(queue, 1)
        if led[-1] != "large":
            queue.leave(led[-1])
    gaps = [place for place, flow in enumerate(led) if flow == "large"]
    # Who wants more than the device has makes more and more jobs wait; the large one has its share among them.
    assert max(after - before for before, after in zip([-1, *gaps], gaps, strict=False)) <= longest
    assert led.count("large") >= 300 / longest


@pytest.mark.parametrize("idle_turns", [0, 1, 100, 10_000])
def test_time_in_which_a_flow_wanted_nothing_is_no_credit(idle_turns):
    queue = queue_of("steady")
    serve(queue, idle_turns)
    queue.enter("late")
    led = serve(queue, 40)
    assert abs(led.count("late") - led.count("steady")) <= 2
    assert abs(led[:10].count("late") - led[:10].count("steady")) <= 2


def test_leaving_and_coming_back_is_no_second_share():
    queue = queue_of("steady", "hops")
    led = []
    for _ in range(60):
        one = leader(queue)
        led.append(one)
        queue.charge({one: 100}, leader=one)
        if one == "hops":
            queue.leave("hops", returns=True)
            queue.enter("hops")
    assert abs(led.count("hops") - led.count("steady")) <= 2


@pytest.mark.parametrize(("returns", "start"), [(True, 1000.0), (False, 0.0)])
def test_a_flow_that_left_with_more_than_its_share_starts_where_it_left_if_it_returns(returns, start):
    queue = queue_of("steady", "hops")
    queue.charge({"hops": 1000})
    queue.leave("hops", returns=returns)
    queue.enter("hops")
    assert {flow: at for at, flow in queue} == {"steady": 0.0, "hops": start}


def test_who_left_is_forgotten_once_the_clock_has_made_up_for_it():
    queue = queue_of("steady", *range(50))
    serve(queue, 51)
    for flow in range(50):
        queue.leave(flow, returns=True)
    serve(queue, 4)
    assert queue._ahead == {}
