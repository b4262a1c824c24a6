"""The README: what a newcomer needs stands there, and a command of every kind."""

import re
from pathlib import Path

import typer.main

from rerankq.cli.app import app

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_command_is_documented():
    spans = re.findall(r"`([^`\n]+)`", README) + re.findall(r"^\$ (.+)$", README, re.MULTILINE)
    documented = {found[1] for span in spans if (found := re.match(r"(?:\.venv/bin/)?rerankq ([a-z]+)", span))}
    # The demo is documented by the make target that runs it.
    assert documented | {"demo"} == typer.main.get_command(app).commands.keys()


def test_the_usual_targets_are_documented():
    named = set(re.findall(r"(?:`|^\$ )make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "test-lowest", "lint", "bench", "docs"} <= named


def test_a_doorbell_is_explained_where_it_is_first_named():
    assert "a doorbell is a Celery message that names a job" in README[: README.index("doorbells")]


def test_every_page_is_linked():
    pages = {f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")} | {"SECURITY.md"}
    assert {page for page in pages if f"({page})" not in README} == set()
