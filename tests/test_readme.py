"""What the README says is so: its commands, options, files, targets and code are the real ones."""

import ast
import re
from pathlib import Path

import pytest
import typer.main

import rerankq
from rerankq.cli.app import app

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands


def documented_commands() -> set[str]:
    """Every `rerankq something`: in running text between backquotes, and after the prompt of a session."""
    spans = re.findall(r"`([^`\n]+)`", README) + re.findall(r"^\$ (.+)$", README, re.MULTILINE)
    return {found[1] for span in spans if (found := re.match(r"(?:\.venv/bin/)?rerankq ([a-z]+)", span))}


def test_every_documented_command_exists_and_every_command_is_documented():
    # The demo is documented by the make target that runs it.
    assert documented_commands() | {"demo"} == COMMANDS.keys()


def test_every_documented_option_exists():
    sessions = re.findall(r"^\$ \.venv/bin/rerankq ([a-z]+)(.*)$", README, re.MULTILINE)
    assert sessions
    for name, rest in sessions:
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, name


def test_every_documented_target_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:`|^\$ )make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "test-lowest", "lint", "bench"} <= named <= targets


def test_every_file_named_exists():
    named = set(re.findall(r"`((?:conf|tests|producer|worker|models|\.ci)/[\w./-]*|[\w-]+\.(?:toml|txt|md))`", README))
    assert {"conf/models.toml", "conf/fusion.toml", "models/", ".ci/run"} <= named
    for name in named:
        assert (REPOSITORY / name).exists(), name


def test_every_extra_named_exists():
    declared = set(re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE))
    named = set(re.findall(r"rerankq\[(\w+)\]", README))
    assert named
    assert named <= declared


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


class RecordingClient:
    """Takes jobs and gives a ranking of the same form as a worker's, so that a documented session can be run."""

    def __init__(self):
        self.jobs = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, job):
        self.jobs.append(job)
        return "an-id"

    def result(self, job_id, timeout=None):
        chunks = [
            rerankq.RankedChunk(id=chunk.id, index=at, rank=at + 1, score=0.5, scores={"model": 0.5})
            for at, chunk in enumerate(self.jobs[-1].chunks)
        ]
        return rerankq.Ranking(job_id=job_id, model={"name": "m", "fingerprint": "f"}, chunks=chunks)


@pytest.mark.parametrize("block", python_blocks())
def test_the_documented_session_runs(block, monkeypatch, capsys):
    monkeypatch.setattr(rerankq, "Client", RecordingClient)
    exec(compile(ast.parse(block), "README.md", "exec"), {})
    assert capsys.readouterr().out == "1 a 0.5 {'model': 0.5}\n2 b 0.5 {'model': 0.5}\n"


def test_the_recorder_speaks_like_the_client():
    for name in ("submit", "result"):
        assert callable(getattr(rerankq.Client, name))


def test_the_readme_stays_short():
    assert 100 <= len(README.splitlines()) <= 150
