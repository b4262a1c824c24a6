"""Waiting for a ranking: in looks of two seconds, within the person's own timeout."""

import pytest

from rerankq import JobTimedOut
from rerankq.cli import submit


class JobClient:
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
    def wait(desk, timeout):
        looks = []
        monkeypatch.setattr(submit.time, "monotonic", lambda: desk.now)
        try:
            return submit.wait_for(desk, "x", timeout, lambda: looks.append(desk.now)), looks
        except JobTimedOut as error:
            return str(error), looks

    return wait


@pytest.mark.parametrize(
    ("timeout", "waited"), [(5, [2.0, 2.0, 1.0]), (2, [2.0]), (4, [2.0, 2.0]), (0.5, [0.5]), (0, [0.0])]
)
def test_a_timeout_is_kept_to_the_second_and_workers_are_looked_for_between(wait, timeout, waited):
    desk = JobClient()
    said, looks = wait(desk, timeout)
    assert said == f"job x: no ranking within {timeout} s; it may still come"
    assert desk.waited == waited
    assert len(looks) == len(waited) - 1


def test_without_a_timeout_a_ranking_is_waited_for_as_long_as_it_takes(wait):
    desk = JobClient(ready_at=106)
    assert wait(desk, None) == ("ranking of x", [102.0, 104.0])
    assert desk.waited == [2.0, 2.0, 2.0]


def test_as_many_faults_are_said_as_are_counted_up_to_a_number(tmp_path):
    (tmp_path / "jobs").write_text("nope\n" * submit.FAULTS_SAID + '{"query": "a", "chunks": ["b", "c"]}\n')
    told = []
    reader = submit.Reader(str(tmp_path / "jobs"), told.append)
    assert (reader.check(), reader.check()) == (2, 2)
    assert len(told) == submit.FAULTS_SAID + 1, "the second reading's are counted on"
    assert told[submit.FAULTS_SAID - 1].startswith(f"{tmp_path}/jobs:{submit.FAULTS_SAID}: ")
    assert told[-1] == f"{tmp_path}/jobs: more lines are wrong"
