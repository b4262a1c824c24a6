"""The lease policy in figures: what is a break in watching the ledger, and what is none."""

import math

import pytest

from rerankq.ledger.lease_policy import BATCH_TIME_FACTOR, BREAK_S, PATIENCE_S, LeasePolicy, Server, Watch

POLICY = LeasePolicy(lease_s=12.0)


def watch_at(now: float, *, uptime_s: float = 1000.0, ledger_now: float = 5000.0) -> Watch:
    """Give a watch that saw server "a" at *now* for the first time."""
    return Watch(POLICY).saw(now, now, ledger_now=ledger_now, server=Server("a", uptime_s))


def test_a_lease_is_renewed_twice_before_it_could_lapse_and_progress_told_every_second():
    assert LeasePolicy(1.5).renew_every_s == 0.5
    assert POLICY.renew_every_s == 1.0


@pytest.mark.parametrize(("lease_s", "seconds"), [(1.0, 60.0), (6.0, 60.0), (8.0, 80.0)])
def test_a_worker_is_forgotten_after_ten_of_its_leases_and_a_minute_at_least(lease_s, seconds):
    assert LeasePolicy(lease_s).forget_after_s == seconds


def test_a_device_hangs_only_beyond_both_limits():
    assert not POLICY.hangs(PATIENCE_S, predicted_s=0.0)
    assert POLICY.hangs(math.nextafter(PATIENCE_S, math.inf), predicted_s=0.0)
    assert not POLICY.hangs(BATCH_TIME_FACTOR * 10, predicted_s=10)
    assert POLICY.hangs(math.nextafter(BATCH_TIME_FACTOR * 10, math.inf), predicted_s=10)


def test_a_server_seen_first_has_been_watched_for_as_long_as_it_is_up():
    assert watch_at(100.0, uptime_s=7.0).watched_s(103.0) == 10.0


def test_an_uptime_below_zero_says_nothing_of_a_servers_age():
    assert watch_at(100.0, uptime_s=-5.0).watched_s(103.0) == math.inf
    assert watch_at(100.0, uptime_s=0.0).watched_s(103.0) == 3.0


def test_a_watch_that_was_lost_before_it_began_counts_from_the_loss():
    lost = Watch(POLICY).lost(99.0)
    assert lost.saw(100.0, 100.0, ledger_now=1.0, server=Server("a", 50.0)).watched_s(103.0) == 4.0


# Between two looks so much of a lease may pass that its worker could still renew it: two thirds.
@pytest.mark.parametrize(("passed", "breaks"), [(8.0, False), (8.1, True)])
def test_a_sweeper_that_looked_away_for_longer_than_a_lease_bears_begins_anew(passed, breaks):
    watch = watch_at(100.0).saw(100 + passed, 100 + passed, ledger_now=5000 + passed, server=Server("a", 1009.0))
    assert (watch.watched_s(100 + passed) == 0.0) == breaks


def test_seconds_without_a_look_are_no_break_however_short_the_lease():
    first = Watch(LeasePolicy(1.0)).saw(100.0, 100.0, ledger_now=5000.0, server=Server("a", 1000.0))
    assert first.saw(103.0, 103.0, ledger_now=5003.0, server=Server("a", 1003.0)).watched_s(103.0) > 1000
    assert first.saw(103.5, 103.5, ledger_now=5003.5, server=Server("a", 1003.0)).watched_s(103.5) == 0.0


@pytest.mark.parametrize(("ahead", "breaks"), [(BREAK_S, False), (BREAK_S + 0.5, True), (-3600.0, False)])
def test_a_clock_that_was_set_forward_begins_the_watch_anew_and_one_set_back_does_not(ahead, breaks):
    watch = watch_at(100.0).saw(101.0, 101.0, ledger_now=5001.0 + ahead, server=Server("a", 1001.0))
    assert (watch.watched_s(101.0) == 0.0) == breaks


def test_a_slow_answer_is_no_step_of_the_clock():
    watch = watch_at(100.0).saw(101.0, 105.0, ledger_now=5005.0, server=Server("a", 1005.0))
    assert watch.watched_s(105.0) == 1005.0
    # The next answer is held against the moment of asking, and against the time that the ledger told.
    assert watch.saw(105.5, 106.0, ledger_now=5012.9, server=Server("a", 1012.0)).watched_s(106.0) == 1006.0
    assert watch.saw(105.5, 106.0, ledger_now=5013.5, server=Server("a", 1012.0)).watched_s(106.0) == 0.0


def test_another_server_begins_the_watch_anew_and_the_next_look_goes_on():
    watch = watch_at(100.0).saw(101.0, 101.0, ledger_now=5001.0, server=Server("b", 9.0))
    assert watch.watched_s(101.0) == 0.0
    assert watch.saw(102.0, 102.0, ledger_now=5002.0, server=Server("b", 10.0)).watched_s(102.0) == 1.0
