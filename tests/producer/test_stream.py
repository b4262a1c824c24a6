import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq import (
    BrokerUnavailable,
    JobFailed,
    JobRejected,
    JobTimedOut,
    ModelUnknown,
    QueueFull,
    RerankJob,
    SettingsInvalid,
)
from rerankq import stream as flows
from rerankq.stream import JobStream, batches


def job(name, *, pairs=1, **fields):
    return RerankJob(query=name, chunks=["x"] * pairs, **fields)


class FakeDesk:
    """A client whose jobs are done when they are asked for; `troubles` are raised by submissions, in turn."""

    def __init__(self, troubles=(), failing=(), refusing=()):
        self.troubles = list(troubles)
        self.failing = set(failing)
        self.refusing = set(refusing)
        self.slow = set()
        self.known: list[str] = []
        self.most_known = 0
        self.submitted: list[str] = []
        self.cancelled: list[str] = []

    def _take(self, job):
        if job.query in self.refusing:
            raise JobRejected("refused", field="query")
        # As a client names them: equal jobs alike, unless their scores are to be made anew.
        name = job.id or (f"id-of-{job.query}" if job.cache == "use" else f"random-{len(self.submitted)}")
        self.submitted.append(name)
        if name not in self.known:
            self.known.append(name)
        self.most_known = max(self.most_known, len(self.known))
        return name

    def submit(self, job):
        self._trouble()
        return self._take(job)

    def submit_many(self, jobs):
        self._trouble()
        accepted = []
        for one in jobs:
            try:
                accepted.append(self._take(one))
            except JobRejected as error:
                error.accepted = accepted
                raise
        return accepted

    def _trouble(self):
        trouble = self.troubles.pop(0) if self.troubles else None
        if trouble is not None:
            raise trouble

    def as_completed(self, job_ids, timeout=None):
        for name in reversed(list(job_ids)):
            if name in self.slow:
                self.slow.discard(name)
                raise JobTimedOut("later")
            assert name in self.known, "asked for a job that was forgotten"
            yield name, JobFailed("failed") if name in self.failing else f"ranking of {name}"

    def cancel(self, job_id):
        self.cancelled.append(job_id)
        return "cancelled"

    def forget(self, *job_ids):
        for name in job_ids:
            self.known.remove(name)


def flow_of(desk, **options):
    pauses = []
    made = JobStream(desk, pause=pauses.append, **options)
    made.pauses = pauses
    return made


def keyed(names):
    return [(name, job(name)) for name in names]


def test_every_key_has_its_outcome_once():
    names = [f"q{number}" for number in range(300)]
    outcomes = list(flow_of(FakeDesk(failing={"id-of-q7"})).outcomes(keyed(names)))
    assert sorted(key for key, _ in outcomes) == sorted(names)
    assert {key for key, outcome in outcomes if isinstance(outcome, JobFailed)} == {"q7"}


def test_equal_jobs_share_a_ranking_even_in_different_batches():
    jobs = [(number, job("same")) for number in range(300)]
    outcomes = list(flow_of(FakeDesk()).outcomes(jobs))
    assert sorted(key for key, _ in outcomes) == list(range(300))


def test_jobs_of_ours_are_forgotten_and_never_more_than_two_batches_are_known():
    desk = FakeDesk()
    assert len(list(flow_of(desk, ours=True).outcomes(keyed(f"q{number}" for number in range(1000))))) == 1000
    assert desk.known == []
    assert desk.most_known <= 2 * flows.JOBS_AT_ONCE


def test_jobs_of_others_are_neither_forgotten_nor_cancelled_and_those_that_go_on_are_known():
    desk = FakeDesk()
    flow = flow_of(desk)
    outcomes = flow.outcomes(keyed(["a", "b"]))
    assert next(outcomes)[0] == "b"
    outcomes.close()
    assert flow.under_way == {"id-of-a": None}
    assert desk.known == ["id-of-a", "id-of-b"]
    assert desk.cancelled == []


def test_jobs_of_ours_are_cancelled_when_the_flow_is_abandoned():
    desk = FakeDesk()
    outcomes = flow_of(desk, ours=True).outcomes(keyed(["a", "b", "c"]))
    assert next(outcomes)[0] == "c"
    outcomes.close()
    assert desk.known == ["id-of-a", "id-of-b"]
    assert desk.cancelled == ["id-of-a", "id-of-b"]


def test_while_waiting_the_workers_are_looked_after():
    desk, looks = FakeDesk(), []
    desk.slow = {"id-of-a", "id-of-b"}
    assert len(list(flow_of(desk, supervise=lambda: looks.append(1)).outcomes(keyed(["a", "b"])))) == 2
    assert len(looks) >= 3


def test_what_the_look_raises_ends_the_flow():
    def dead():
        raise BrokerUnavailable("gone")

    with pytest.raises(BrokerUnavailable):
        list(flow_of(FakeDesk(), supervise=dead).outcomes(keyed(["a"])))


def test_a_refused_job_leaves_its_neighbours_ranked():
    desk = FakeDesk(refusing={"b", "c"})
    outcomes = dict(flow_of(desk).outcomes(keyed(["a", "b", "c", "d"])))
    assert {key for key, outcome in outcomes.items() if isinstance(outcome, JobRejected)} == {"b", "c"}
    assert set(outcomes) == {"a", "b", "c", "d"}


def test_a_job_that_would_get_a_random_id_keeps_one_when_it_is_submitted_again():
    desk = FakeDesk(refusing={"b"})
    jobs = [("a", job("a", cache="refresh")), ("b", job("b"))]
    assert len(list(flow_of(desk).outcomes(jobs))) == 2
    assert len(desk.submitted) == 2
    assert len(set(desk.submitted)) == 1


def test_a_full_queue_is_waited_for():
    full = QueueFull("full", retry_after_s=7)
    flow = flow_of(FakeDesk(troubles=[full, full]))
    assert len(list(flow.outcomes(keyed(["a", "b"])))) == 2
    assert flow.pauses == [7]


def test_a_broker_that_is_not_there_is_said_at_once():
    flow = flow_of(FakeDesk(troubles=[BrokerUnavailable("nobody")]))
    with pytest.raises(BrokerUnavailable):
        list(flow.outcomes(keyed(["a"])))
    assert flow.pauses == []


def test_a_broker_that_goes_away_in_the_middle_is_waited_for():
    gone = BrokerUnavailable("gone")
    desk = FakeDesk(troubles=[None, gone, gone])
    flow = flow_of(desk)
    assert len(list(flow.outcomes(keyed(f"q{number}" for number in range(200))))) == 200
    assert flow.pauses == [1.0]


def test_a_broker_that_stays_away_ends_the_flow_with_the_ids_accepted():
    gone = BrokerUnavailable("gone", accepted=["id-of-a"])
    flow = flow_of(FakeDesk(troubles=[gone, None, *[BrokerUnavailable("gone") for _ in range(20)]]))
    with pytest.raises(BrokerUnavailable) as error:
        flow.submit(keyed(["a", "b"]))
    assert error.value.accepted == ["id-of-a"]
    assert flow.pauses == list(flows.PAUSES_S)


def test_a_model_that_nobody_serves_refuses_the_job_of_another_but_is_waited_for_with_ours():
    unknown = ModelUnknown("nobody serves it")
    assert isinstance(dict(flow_of(FakeDesk(troubles=[unknown, unknown])).outcomes(keyed(["a"])))["a"], ModelUnknown)
    with pytest.raises(ModelUnknown):  # at the first submission: a wrong name, more likely
        list(flow_of(FakeDesk(troubles=[unknown]), ours=True).outcomes(keyed(["a"])))


@given(st.lists(st.integers(1, 9_000), max_size=40))
def test_batches_keep_the_order_and_their_bounds(sizes):
    jobs = [(at, RerankJob.model_construct(query="q", chunks=range(size))) for at, size in enumerate(sizes)]
    made = list(batches(jobs))
    assert [key for batch in made for key, _ in batch] == list(range(len(sizes)))
    for batch in made:
        pairs = sum(len(one.chunks) for _, one in batch)
        assert len(batch) <= flows.JOBS_AT_ONCE
        assert pairs <= flows.PAIRS_AT_ONCE or len(batch) == 1


def test_an_error_that_no_pause_mends_ends_the_flow_at_once():
    flow = flow_of(FakeDesk(troubles=[None, QueueFull("full", retry_after_s=7), SettingsInvalid("wrong")]))
    with pytest.raises(SettingsInvalid):
        list(flow.outcomes(keyed(f"q{number}" for number in range(200))))
    assert flow.pauses == []


def test_jobs_of_all_batches_under_way_are_cancelled_when_the_flow_is_abandoned():
    desk = FakeDesk()
    outcomes = flow_of(desk, ours=True).outcomes(keyed(f"q{number}" for number in range(2 * flows.JOBS_AT_ONCE)))
    ended, _ = next(outcomes)
    outcomes.close()
    assert set(desk.cancelled) == set(desk.submitted) - {f"id-of-{ended}"}


def test_the_workers_are_looked_after_while_a_full_queue_is_waited_for():
    full = QueueFull("full", retry_after_s=7)
    events = []
    flow = JobStream(FakeDesk(troubles=[full, full]), supervise=lambda: events.append("look"), pause=events.append)
    flow.submit(keyed(["a"]))
    assert events == ["look", 7]


def test_a_ledger_that_goes_away_while_jobs_are_forgotten_or_cancelled_takes_no_ranking_along():
    def gone(*_):
        raise BrokerUnavailable("gone")

    desk = FakeDesk()
    desk.forget = desk.cancel = gone
    assert len(list(flow_of(desk, ours=True).outcomes(keyed(["a", "b"])))) == 2
    outcomes = flow_of(desk, ours=True).outcomes(keyed(["c", "d"]))
    next(outcomes)
    outcomes.close()
