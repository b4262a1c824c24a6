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
from rerankq import stream as streams
from rerankq.stream import JobStream, batches


def job(name, *, pairs=1, **fields):
    return RerankJob(query=name, chunks=["x"] * pairs, **fields)


class FakeClient:
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


def stream_of(client, **options):
    pauses = []
    made = JobStream(client, sleep=pauses.append, **options)
    made.pauses = pauses
    return made


def keyed(names):
    return [(name, job(name)) for name in names]


def test_every_key_has_its_outcome_once():
    names = [f"q{number}" for number in range(300)]
    outcomes = list(stream_of(FakeClient(failing={"id-of-q7"})).outcomes(keyed(names)))
    assert sorted(key for key, _ in outcomes) == sorted(names)
    assert {key for key, outcome in outcomes if isinstance(outcome, JobFailed)} == {"q7"}


def test_equal_jobs_share_a_ranking_even_in_different_batches():
    jobs = [(number, job("same")) for number in range(300)]
    outcomes = list(stream_of(FakeClient()).outcomes(jobs))
    assert sorted(key for key, _ in outcomes) == list(range(300))


def test_owned_jobs_are_forgotten_and_at_most_two_batches_are_in_flight():
    client = FakeClient()
    assert len(list(stream_of(client, owned=True).outcomes(keyed(f"q{number}" for number in range(1000))))) == 1000
    assert client.known == []
    assert client.most_known <= 2 * streams.JOBS_AT_ONCE


def test_jobs_not_owned_are_neither_forgotten_nor_cancelled_but_listed_in_flight():
    client = FakeClient()
    stream = stream_of(client)
    outcomes = stream.outcomes(keyed(["a", "b"]))
    assert next(outcomes)[0] == "b"
    outcomes.close()
    assert stream.in_flight == {"id-of-a": None}
    assert client.known == ["id-of-a", "id-of-b"]
    assert client.cancelled == []


def test_owned_jobs_are_cancelled_when_the_stream_is_abandoned():
    client = FakeClient()
    outcomes = stream_of(client, owned=True).outcomes(keyed(["a", "b", "c"]))
    assert next(outcomes)[0] == "c"
    outcomes.close()
    assert client.known == ["id-of-a", "id-of-b"]
    assert client.cancelled == ["id-of-a", "id-of-b"]


def test_supervise_is_called_while_waiting():
    client, checks = FakeClient(), []
    client.slow = {"id-of-a", "id-of-b"}
    assert len(list(stream_of(client, supervise=lambda: checks.append(1)).outcomes(keyed(["a", "b"])))) == 2
    assert len(checks) >= 3


def test_supervise_ends_the_stream_by_raising():
    def dead():
        raise BrokerUnavailable("gone")

    with pytest.raises(BrokerUnavailable):
        list(stream_of(FakeClient(), supervise=dead).outcomes(keyed(["a"])))


def test_refused_job_leaves_its_neighbours_ranked():
    client = FakeClient(refusing={"b", "c"})
    outcomes = dict(stream_of(client).outcomes(keyed(["a", "b", "c", "d"])))
    assert {key for key, outcome in outcomes.items() if isinstance(outcome, JobRejected)} == {"b", "c"}
    assert set(outcomes) == {"a", "b", "c", "d"}


def test_job_without_an_id_keeps_one_id_when_submitted_again():
    client = FakeClient(refusing={"b"})
    jobs = [("a", job("a", cache="refresh")), ("b", job("b"))]
    assert len(list(stream_of(client).outcomes(jobs))) == 2
    assert len(client.submitted) == 2
    assert len(set(client.submitted)) == 1


def test_full_queue_is_waited_for():
    full = QueueFull("full", retry_after_s=7)
    stream = stream_of(FakeClient(troubles=[full, full]))
    assert len(list(stream.outcomes(keyed(["a", "b"])))) == 2
    assert stream.pauses == [7]


def test_unreachable_broker_is_reported_at_once():
    stream = stream_of(FakeClient(troubles=[BrokerUnavailable("nobody")]))
    with pytest.raises(BrokerUnavailable):
        list(stream.outcomes(keyed(["a"])))
    assert stream.pauses == []


def test_broker_that_goes_away_later_is_waited_for():
    gone = BrokerUnavailable("gone")
    client = FakeClient(troubles=[None, gone, gone])
    stream = stream_of(client)
    assert len(list(stream.outcomes(keyed(f"q{number}" for number in range(200))))) == 200
    assert stream.pauses == [1.0]


def test_broker_that_stays_away_ends_the_stream_with_the_accepted_ids():
    gone = BrokerUnavailable("gone", accepted=["id-of-a"])
    stream = stream_of(FakeClient(troubles=[gone, None, *[BrokerUnavailable("gone") for _ in range(20)]]))
    with pytest.raises(BrokerUnavailable) as error:
        stream.submit(keyed(["a", "b"]))
    assert error.value.accepted == ["id-of-a"]
    assert stream.pauses == list(streams.PAUSES_S)


def test_unserved_model_refuses_a_job_not_owned_and_is_waited_for_with_an_owned_one():
    unknown = ModelUnknown("nobody serves it")
    assert isinstance(
        dict(stream_of(FakeClient(troubles=[unknown, unknown])).outcomes(keyed(["a"])))["a"], ModelUnknown
    )
    with pytest.raises(ModelUnknown):  # at the first submission: a wrong name, more likely
        list(stream_of(FakeClient(troubles=[unknown]), owned=True).outcomes(keyed(["a"])))


@given(st.lists(st.integers(1, 9_000), max_size=40))
def test_batches_keep_the_order_and_their_bounds(sizes):
    jobs = [(at, RerankJob.model_construct(query="q", chunks=range(size))) for at, size in enumerate(sizes)]
    made = list(batches(jobs))
    assert [key for batch in made for key, _ in batch] == list(range(len(sizes)))
    for batch in made:
        pairs = sum(len(one.chunks) for _, one in batch)
        assert len(batch) <= streams.JOBS_AT_ONCE
        assert pairs <= streams.PAIRS_AT_ONCE or len(batch) == 1


def test_error_that_is_not_retryable_ends_the_stream_at_once():
    stream = stream_of(FakeClient(troubles=[None, QueueFull("full", retry_after_s=7), SettingsInvalid("wrong")]))
    with pytest.raises(SettingsInvalid):
        list(stream.outcomes(keyed(f"q{number}" for number in range(200))))
    assert stream.pauses == []


def test_owned_jobs_of_all_batches_in_flight_are_cancelled_on_abandoning():
    client = FakeClient()
    outcomes = stream_of(client, owned=True).outcomes(keyed(f"q{number}" for number in range(2 * streams.JOBS_AT_ONCE)))
    ended, _ = next(outcomes)
    outcomes.close()
    assert set(client.cancelled) == set(client.submitted) - {f"id-of-{ended}"}


def test_supervise_is_called_while_a_full_queue_is_waited_for():
    full = QueueFull("full", retry_after_s=7)
    events = []
    stream = JobStream(FakeClient(troubles=[full, full]), supervise=lambda: events.append("check"), sleep=events.append)
    stream.submit(keyed(["a"]))
    assert events == ["check", 7]


def test_ledger_failing_on_forget_or_cancel_loses_no_ranking():
    def gone(*_):
        raise BrokerUnavailable("gone")

    client = FakeClient()
    client.forget = client.cancel = gone
    assert len(list(stream_of(client, owned=True).outcomes(keyed(["a", "b"])))) == 2
    outcomes = stream_of(client, owned=True).outcomes(keyed(["c", "d"]))
    next(outcomes)
    outcomes.close()


class SlowClient:
    """A client that has no ranking before a moment of its clock."""

    def __init__(self, ready_at=float("inf")):
        self.ready_at, self.now, self.waited = ready_at, 100.0, []

    def result(self, job_id, timeout=None):
        self.waited.append(timeout)
        self.now += timeout
        if self.now < self.ready_at:
            raise JobTimedOut("not yet")
        return f"ranking of {job_id}"


@pytest.fixture
def wait(monkeypatch):
    def wait(client, timeout):
        checks = []
        monkeypatch.setattr(streams.time, "monotonic", lambda: client.now)
        try:
            return streams.wait_for(client, "x", timeout, supervise=lambda: checks.append(client.now)), checks
        except JobTimedOut as error:
            return str(error), checks

    return wait


@pytest.mark.parametrize(
    ("timeout", "waited"), [(5, [2.0, 2.0, 1.0]), (2, [2.0]), (4, [2.0, 2.0]), (0.5, [0.5]), (0, [0.0])]
)
def test_wait_for_keeps_its_timeout_and_supervises_between_checks(wait, timeout, waited):
    client = SlowClient()
    message, checks = wait(client, timeout)
    assert message == f"job x: no ranking within {timeout} s; it may still come"
    assert client.waited == waited
    assert len(checks) == len(waited) - 1


def test_wait_for_without_a_timeout_waits_for_the_ranking(wait):
    client = SlowClient(ready_at=106)
    assert wait(client, None) == ("ranking of x", [102.0, 104.0])
    assert client.waited == [2.0, 2.0, 2.0]
