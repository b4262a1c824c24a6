"""rerankq batch: the lines of a file answered from the command line, resumed after a kill."""

import gzip
import json
import os
import subprocess
import time
from contextlib import contextmanager

import pytest
from batch_client import FakeClient
from forked_processes import ForkedProcess, run_forked
from tides import DOCUMENTS, QUERY
from typer.testing import CliRunner

from rerankq.cli.app import app
from rerankq.settings import Settings
from rerankq.stream import OpenClient


def lines_of(*names: str) -> bytes:
    body = {"query": QUERY, "documents": DOCUMENTS}
    return b"".join(
        json.dumps({"custom_id": name, "url": "/v1/rerank", "body": body}).encode() + b"\n" for name in names
    )


@pytest.fixture
def environment(redis_url, start_worker):
    """The environment of a command that finds a worker."""
    start_worker(Settings(broker_url=redis_url, model="stub:0.002", _env_file=None))
    return {**os.environ, "RERANKQ_BROKER_URL": redis_url, "RERANKQ_MODEL": "stub:0.002"}


@pytest.fixture
def command(environment, tmp_path):
    """Run the command to its end, in a process of its own."""

    def run(*arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
        return run_forked(["batch", *map(str, arguments)], environment, tmp_path, given=given, timeout=90)

    return run


def test_lines_are_answered_in_order_from_files_pipes_and_compressed_ones(command, tmp_path):
    source, packed, answers = (tmp_path / name for name in ("in.jsonl", "in.jsonl.gz", "out.jsonl"))
    content = lines_of("a", "b", "c")
    source.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    told = []
    for argument, given in ((source, ""), (packed, ""), ("-", content.decode())):
        done = command(argument, "--output", answers, "--force", "--json", given=given)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["ranked"] == 3
        told.append([json.loads(one) for one in answers.read_text().splitlines()])
        assert not answers.with_name("out.jsonl.part").exists()
    assert [one["custom_id"] for one in told[0]] == ["a", "b", "c"]
    assert all(one["response"]["status_code"] == 200 for one in told[0])
    scores = [[one["response"]["body"]["results"] for one in each] for each in told]
    assert scores[0] == scores[1] == scores[2]
    again = command(source, "--output", answers)
    assert (again.returncode, "--force" in again.stderr) == (2, True)


def test_a_malformed_line_is_named_answered_and_changes_the_status(command, tmp_path):
    source, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of("a") + b'{"custom_id": "b", "body": {"query": "q"}}\nnot json\n' + lines_of("c"))
    done = command(source, "--output", answers)
    assert done.returncode == 2
    assert f"{source}:2: body.documents" in done.stderr
    assert f"{source}:3: line" in done.stderr
    told = [json.loads(one) for one in answers.read_text().splitlines()]
    assert [one["custom_id"] for one in told] == ["a", "b", None, "c"]
    assert [one["response"]["status_code"] for one in told] == [200, 422, 422, 200]


def test_after_a_kill_the_same_command_answers_the_rest(environment, command, tmp_path):
    source, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    names = [f"n{at}" for at in range(200)]
    source.write_bytes(lines_of(*names))
    part = answers.with_name("out.jsonl.part")
    arguments = ["-m", "rerankq.cli", "batch", str(source), "--output", str(answers)]
    first = ForkedProcess(arguments, environment, stderr=subprocess.PIPE)
    ends = time.monotonic() + 60
    while not part.exists() or part.read_bytes().count(b"\n") < 50:
        assert first.poll() is None, first.stderr.read()
        assert time.monotonic() < ends
        time.sleep(0.01)
    first.kill()
    first.communicate()
    before = part.read_bytes().count(b"\n") - 1
    assert 0 < before < 200
    second = command(source, "--output", answers)
    assert second.returncode == 0, second.stderr
    assert [json.loads(one)["custom_id"] for one in answers.read_text().splitlines()] == names


def test_without_a_broker_a_worker_of_its_own_is_asked_and_supervised(tmp_path, monkeypatch):
    source, answers, opened = tmp_path / "in.jsonl", tmp_path / "out.jsonl", []
    source.write_bytes(lines_of("a", "b"))
    client, supervised = FakeClient(), []

    @contextmanager
    def open_client(settings, model, notify):
        opened.append((settings.broker_url, model))
        yield OpenClient(client, None, lambda: supervised.append(1))

    monkeypatch.delenv("RERANKQ_BROKER_URL", raising=False)
    monkeypatch.setattr("rerankq.cli.batch.open_client", open_client)
    run = CliRunner().invoke(app, ["batch", str(source), "--output", str(answers), "--model", "stub"])
    assert (run.exit_code, opened) == (0, [(None, "stub")]), run.output
    assert supervised
    # The worker that was started for it serves that model as its default.
    assert {job.model for job in client.jobs.values()} == {None}
    assert [json.loads(one)["custom_id"] for one in answers.read_text().splitlines()] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_an_input_that_cannot_be_read_is_named_with_status_2(tmp_path):
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(lines_of("a", "b"))[:-9])
    for source in (tmp_path / "missing.jsonl", tmp_path, torn):
        run = CliRunner().invoke(app, ["batch", str(source), "--output", str(tmp_path / "out.jsonl")])
        assert run.exit_code == 2
        assert f"{source}: cannot be read: " in run.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--endpoint", "/v1/chat/completions"], "--endpoint"),
        (["--fusion", "none-such"], "fusion"),
    ],
)
def test_wrong_options_are_named(tmp_path, arguments, said):
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines_of("a"))
    command = ["batch", str(source), "--output", str(tmp_path / "out.jsonl"), *arguments]
    done = run_forked(command, os.environ, tmp_path, given="", timeout=90)
    assert done.returncode == 2
    assert said in done.stderr
