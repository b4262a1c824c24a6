"""Pools of connections; that they follow Sentinel to a new master is shown with real workers, among the crashes."""

import pytest

from rerankq import BrokerUnavailable, Client
from rerankq.ledger import Ledger, connect
from rerankq.settings import Settings

NOBODY = "sentinel://:secret@127.0.0.1:1,127.0.0.1:2/0?master=jobs"


def test_sentinels_that_are_all_away_are_an_outage_told_in_a_line():
    said = r"^the ledger does not answer: no sentinel that answers knows a living master 'jobs'$"
    with Client(Settings(broker_url=NOBODY)) as client, pytest.raises(BrokerUnavailable, match=said):
        client.status("job")
    with connect(NOBODY) as connection, pytest.raises(BrokerUnavailable, match=said):
        Ledger(connection).workers()
