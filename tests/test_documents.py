"""What docs/reliability.md and SECURITY.md lean on is there: tests, files, settings, commands and targets."""

import re
from pathlib import Path

import pytest
import typer.main

from rerankq.cli.app import app
from rerankq.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in ("docs/reliability.md", "SECURITY.md")}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_test_that_is_named_exists(name):
    code = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^(?:async )?def (test_\w+)", code, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", DOCUMENTS[name]))
    assert len(named) > 8
    assert named <= there, named - there


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_setting_command_and_target_that_is_named_exists(name):
    text = DOCUMENTS[name]
    for file in re.findall(r"`((?:conf|tests|docs)/[\w./-]+|[\w-]+\.txt)`", text):
        assert (REPOSITORY / file).is_file(), file
    assert {setting.lower() for setting in re.findall(r"RERANKQ_([A-Z_]+)", text)} <= Settings.model_fields.keys()
    assert set(re.findall(r"`rerankq ([a-z]+)", text)) <= typer.main.get_command(app).commands.keys()
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets


def test_the_promises_defaults_are_the_settings_defaults():
    assert Settings.model_fields["lease_s"].default == 8
    assert "(`RERANKQ_LEASE_S`, 8 s)" in DOCUMENTS["docs/reliability.md"]
