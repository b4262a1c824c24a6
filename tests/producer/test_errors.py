"""The tree of errors: as it is drawn, so it is."""

import copy
import pickle
import re

import pytest

import rerankq
from rerankq import errors
from rerankq.errors import JobRejected, QueueFull, RateLimited, RerankqError

STATUS = {
    "SettingsInvalid": (500, False),
    "BrokerUnavailable": (503, True),
    "ClientClosed": (503, False),
    "ClientUnusable": (500, False),
    "JobRejected": (422, False),
    "JobTooLarge": (413, False),
    "NoWorker": (503, True),
    "GatewayStopping": (503, True),
    "QueueFull": (429, True),
    "RateLimited": (429, True),
    "NotAllowed": (403, False),
    "ModelUnknown": (404, True),
    "JobFailed": (500, False),
    "JobExpired": (504, False),
    "JobCancelled": (409, False),
    "JobDead": (500, False),
    "JobTimedOut": (504, True),
    "JobUnknown": (404, False),
}


def drawn() -> dict[str, str]:
    """Read the drawing at the top of the file: each class with its parent."""
    above: dict[int, str] = {}
    tree = {}
    for line in errors.__doc__.splitlines():
        if found := re.match(r"([│ ]*)[├└]── (\w+)", line):
            depth = len(found[1]) // 4 + 1
            above[depth] = found[2]
            tree[found[2]] = above[depth - 1]
        elif line == "RerankqError":
            above[0] = line
    return tree


def all_kinds(kind: type[RerankqError] = RerankqError) -> list[type[RerankqError]]:
    return [each for sub in kind.__subclasses__() for each in (sub, *all_kinds(sub))]


def test_the_drawn_tree_of_errors_is_the_real_one():
    ours = [kind for kind in all_kinds() if kind.__module__ == errors.__name__]
    assert drawn() == {kind.__name__: kind.__bases__[0].__name__ for kind in ours}


def test_every_error_knows_its_http_status_and_whether_trying_again_can_help():
    assert {name: (getattr(errors, name).http_status, getattr(errors, name).retryable) for name in drawn()} == STATUS


def test_every_error_is_documented_and_exported():
    for name in drawn():
        assert getattr(errors, name).__doc__.startswith("Raised when ")
        assert getattr(rerankq, name) is getattr(errors, name)


@pytest.mark.parametrize("name", STATUS)
def test_an_error_survives_a_trip_to_another_process(name: str):
    error = getattr(errors, name)("why", accepted=["a", "b"])
    if isinstance(error, QueueFull | RateLimited):
        error.retry_after_s = 7.0
    assert error.accepted == ["a", "b"]
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == "why"
        assert vars(again) == vars(error)


def test_a_rejection_names_its_field_first():
    assert str(JobRejected("too long", field="chunks.3.text")) == "chunks.3.text: too long"
    assert str(JobRejected("no JSON")) == "no JSON"
    again = pickle.loads(pickle.dumps(JobRejected("too long", field="chunks")))
    assert (str(again), again.field) == ("chunks: too long", "chunks")
