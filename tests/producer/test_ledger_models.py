"""What the ledger does where models come and go: other weights, other queues."""

from collections.abc import Iterator

import pytest

from rerankq.contract import ModelName, Priority, Ranking
from rerankq.ledger import Claim, LedgerLimits, NewJob, calls, connect
from rerankq.ledger.runner import Ledger

TERMS = LedgerLimits("tests")


@pytest.fixture
def ledger(redis_url_each_version: str) -> Iterator[Ledger]:
    connection = connect(redis_url_each_version)
    yield Ledger(connection)
    connection.close()


def submit(ledger: Ledger, *weights: str, queue: str = "q", priority: Priority = "bulk") -> str:
    new_job = NewJob("a", "content", queue, "", priority, 1, None, "label", "m", b"{}", weights)
    return ledger.ask(calls.submit(new_job, TERMS)).state


def claim(ledger: Ledger, owner: str = "w") -> Claim:
    taken = ledger.ask(calls.claim("a", owner, TERMS))
    assert isinstance(taken, Claim)
    return taken


def rank(ledger: Ledger, weights: str) -> None:
    ranking = Ranking(job_id="a", model=ModelName(name="m", fingerprint=weights), chunks=[])
    assert ledger.ask(calls.complete("a", claim(ledger).fence, ranking, TERMS)) == "done"


def test_a_ranking_of_former_weights_is_made_anew_when_its_job_is_submitted(ledger: Ledger):
    submit(ledger, "old")
    rank(ledger, "old")
    assert submit(ledger, "old") == "done"
    assert submit(ledger, "new") == "queued"
    assert ledger.ask(calls.snapshot("a", TERMS, with_ranking=True)).ranking is None
    rank(ledger, "new")
    assert submit(ledger, "new") == "done"
    assert ledger.redis.hlen("rerankq:backlog") == 0


def test_a_ranking_is_answered_while_no_worker_is_alive_to_make_another(ledger: Ledger):
    submit(ledger)
    rank(ledger, "old")
    assert submit(ledger) == "done"


def test_a_fleet_that_is_being_renewed_does_not_rank_a_job_again_and_again(ledger: Ledger):
    submit(ledger, "new", "old")
    for weights in ("old", "new"):
        if submit(ledger, weights) == "queued":
            rank(ledger, weights)
        for _ in range(3):
            assert submit(ledger, "new", "old") == submit(ledger, "old", "new", "newer") == "done"
    assert submit(ledger, "newe") == "queued", "a part of a fingerprint is another"


def test_a_ranking_that_does_not_say_which_weights_made_it_is_answered(ledger: Ledger):
    submit(ledger)
    rank(ledger, "old")
    ledger.redis.hdel("rerankq:job:a", "weights")  # as an earlier version stored it
    assert submit(ledger, "new") == "done"


def test_a_waiting_job_moves_to_where_its_model_is_served_when_it_is_submitted_again(ledger: Ledger):
    submit(ledger, queue="before")
    assert submit(ledger, queue="now") == "queued"
    assert ledger.redis.hget("rerankq:job:a", "queue") == b"now"
    assert {key.decode() for key in ledger.redis.hkeys("rerankq:backlog")} == {"*", "now", "now|"}
    # But not down into the bulk queue.
    assert submit(ledger, queue="interactive", priority="interactive") == "queued"
    assert submit(ledger, queue="now", priority="bulk") == "queued"
    assert ledger.redis.hget("rerankq:job:a", "queue") == b"interactive"


@pytest.mark.parametrize("deaths", [0, 1])
def test_a_job_sent_on_to_another_queue_keeps_its_suspicion_and_its_claims(ledger: Ledger, deaths: int):
    submit(ledger)
    if deaths:
        claim(ledger, "one that dies")
        ledger.redis.zadd("rerankq:running", {"a": 1})
        assert ledger.ask(calls.sweep("s", TERMS)).lapsed == 1
    taken = claim(ledger)
    assert ledger.ask(calls.reroute("a", taken.fence, "elsewhere", "n"))
    assert not ledger.ask(calls.reroute("a", taken.fence, "nowhere", "n")), "only who holds it sends it on"
    found = claim(ledger)
    assert found.suspect == bool(deaths)
    assert found.fence > taken.fence
    assert ledger.ask(calls.snapshot("a", TERMS)).status.attempts == 1 + deaths


def test_a_job_that_was_started_in_time_does_not_expire_when_it_is_sent_on_later(ledger: Ledger):
    new_job = NewJob("a", "content", "q", "", "bulk", 1, 60.0, "label", "m", b"{}")
    ledger.ask(calls.submit(new_job, TERMS))
    assert ledger.ask(calls.hand_back([("a", claim(ledger).fence)])) == 1
    assert ledger.ask(calls.reroute("a", claim(ledger).fence, "elsewhere", "n"))
    assert ledger.redis.hget("rerankq:job:a", "deadline") == b""
