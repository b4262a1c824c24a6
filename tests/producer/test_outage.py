"""How often an outage is said, over days."""

from itertools import pairwise

from rerankq.outage import FIRST_INTERVAL_S, LONGEST_INTERVAL_S, Outage


def test_an_outage_is_logged_at_intervals_that_double_up_to_an_hour():
    ledger = Outage()
    said = [now for now in range(0, 100_000, 10) if ledger.fails(now)]
    intervals = [after - before for before, after in pairwise(said)]
    assert intervals[:9] == [FIRST_INTERVAL_S * 2**step for step in range(9)]
    assert set(intervals[9:]) == {LONGEST_INTERVAL_S}
    assert (ledger.lasts, ledger.works(100_000), ledger.lasts) == (True, 100_000, False)
    assert [now for now in range(200_000, 200_060, 10) if ledger.fails(now)] == [200_000, 200_010, 200_030]
