"""A run over a batch, with a client that answers at once: whose turn it is, what ends it, what goes wrong."""

import io
import json
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from batch_client import FakeClient
from hypothesis import given
from hypothesis import strategies as st

from rerankq import JobTooLarge
from rerankq.batches import running
from rerankq.batches.journal import Journal
from rerankq.batches.requests import Defaults
from rerankq.batches.running import BatchEnds, Plan, Run, survey
from rerankq.settings import Settings


def line(name: str, *, documents=("a", "b"), **fields) -> bytes:
    body = {"query": f"query of {name}", "documents": list(documents), **fields}
    return json.dumps({"custom_id": name, "body": body}).encode() + b"\n"


@pytest.fixture
def run(tmp_path) -> Callable:
    """Run a batch of lines; answers its journal's answers, by kind."""

    def do(content: bytes, client=None, **given):
        path = tmp_path / "in.jsonl"
        path.write_bytes(content)
        with path.open("rb") as file:
            found = survey(file, max_bytes=1_000_000, at_most=100)
        plan = Plan("batch", path, Defaults(), found, 1_000_000)
        settings = Settings(model="stub", _env_file=None)
        with Journal.open(tmp_path / "journal", b"batch") as journal:
            given = {"supervise": lambda: None, **given}
            Run(plan, journal, client or FakeClient(), settings, **given).run()
            answers = {kind: [json.loads(raw) for raw in journal.answers(kind)] for kind in ("output", "error")}
        return SimpleNamespace(**answers)

    return do


@given(st.lists(st.integers(0, 40)))
def test_ids_that_several_lines_have_are_found_wherever_they_are(ids):
    content = b"".join(b'{"custom_id": "%d", "body": {}}\n' % one for one in ids)
    found = survey(io.BytesIO(content), max_bytes=100, at_most=1_000)
    repeated = {running._hash(str(one)) for one, count in Counter(ids).items() if count > 1}
    assert (found.lines, found.repeated) == (len(ids), repeated)


def names(answers: list[dict]) -> list[str]:
    return [one["custom_id"] for one in answers]


def test_a_line_whose_turn_has_not_come_waits_for_those_before_it_and_for_its_time(run, monkeypatch):
    waits, slept = {"b": [7.0, 0.5], "c": [3.0]}, []
    monkeypatch.setattr(running.time, "sleep", slept.append)
    monkeypatch.setattr(Run, "_sleep", lambda self, seconds: slept.append(seconds))

    def admit(jobs):
        found = waits.get(jobs[0].query[-1])
        return found.pop(0) if found else 0.0

    client = FakeClient()
    done = run(b"".join(map(line, "abcd")), client, admit=admit)
    assert names(done.output) == ["a", "b", "c", "d"]
    # Nothing that was let in waits for what was not.
    assert client.order == [("query of a", 0), ("query of b", 1), ("query of c", 2), ("query of d", 2)]
    assert slept == [0.5]


def test_a_line_whose_turn_never_comes_says_so_and_holds_nothing_up(run):
    def admit(jobs):
        if len(jobs[0].chunks) > 2:
            raise JobTooLarge("3 pairs; this key may send 2 a minute", field="documents")
        return 0.0

    done = run(line("a") + line("b", documents="xyz") + line("c"), admit=admit)
    assert names(done.output) == ["a", "c"]
    ((name, error, status),) = [(one["custom_id"], one["error"], one["response"]["status_code"]) for one in done.error]
    assert (name, error["param"], status) == ("b", "body.documents", 413)


def test_a_batch_that_ends_while_a_line_waits_for_its_turn_answers_all_lines(run, monkeypatch):
    monkeypatch.setattr(running.time, "sleep", lambda _: None)
    ended = []

    def supervise():
        if ended:
            raise BatchEnds("batch_cancelled", "cancelled")

    def admit(jobs):
        if jobs[0].query != "query of b":
            return 0.0
        ended.append(True)
        return 60.0

    done = run(line("a") + line("b") + line("c"), supervise=supervise, admit=admit)
    assert (names(done.output), names(done.error)) == (["a"], ["b", "c"])


def test_a_batch_that_has_ended_asks_no_worker_and_no_broker(run):
    def supervise():
        raise BatchEnds("batch_expired", "too late")

    done = run(line("a") + line("b", model="m"), FakeClient(broker=False), supervise=supervise)
    assert [one["error"]["code"] for one in done.error] == ["batch_expired", "batch_expired"]


def test_a_batch_whose_lines_are_all_answered_is_not_ended_any_more(run):
    content, asked = line("a") + b"malformed\n", []
    run(content)
    done = run(content, supervise=lambda: asked.append(1))
    assert (names(done.output), len(done.error), asked) == (["a"], 1, [])


@pytest.mark.parametrize("broken", ["request_of", "job_of_call", "reply_of", "answer"])
def test_an_unexpected_error_is_the_fault_of_its_line_alone(run, monkeypatch, broken):
    real = getattr(running, broken)

    def breaks(*arguments, **named):
        if "query of b" in repr(arguments) or b"query of b" in getattr(arguments[0], "raw", b""):
            raise TypeError("a bug")
        return real(*arguments, **named)

    monkeypatch.setattr(running, broken, breaks)
    done = run(line("a") + line("b") + line("c"))
    assert names(done.output) == ["a", "c"]
    (error,) = done.error
    assert (error["custom_id"], error["error"]["code"], error["response"]["status_code"]) == (
        "b",
        "internal_error",
        500,
    )
    assert "bug" not in json.dumps(error)


def test_numbers_that_json_does_not_have_are_refused_as_in_a_call(run):
    raw = b'{"custom_id": "a", "body": {"query": "q", "documents": [{"text": "a", "vector_score": NaN}]}}\n'
    (error,) = run(raw + line("b")).error
    assert (error["error"]["line"], error["error"]["param"]) == (1, "line")
