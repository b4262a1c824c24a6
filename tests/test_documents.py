"""The documents: what they name is there, their tables are the models', their sessions run."""

import doctest
import fnmatch
import re
import runpy
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer.main

from rerankq import Fusion, RerankJob
from rerankq.catalogue import RemoteCard
from rerankq.cli.app import app
from rerankq.gateway.keys import ApiKey
from rerankq.ledger import keys
from rerankq.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = ["README.md", "SECURITY.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
DOCUMENTS = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in NAMES}

# What a run writes, and a checkout need not hold.
WRITTEN_BY_A_RUN = "benchmarks/results/"
# Files of the repository as pages name them: by their whole path, or by its end.
FILE = r"`([\w.*/-]+\.(?:py|lua|toml|txt|conf|yml|md|json)|[\w.*-]+(?:/[\w.*-]+)*/)`"
SEARCHED = ("benchmarks", "conf", "docker", "docs", "examples", "models", "producer", "tests", "worker", ".ci")


@cache
def known_tests() -> set[str]:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py"))
    return set(re.findall(r"^(?:async )?def (test_\w+)", code, re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_every_test_that_is_named_exists(name):
    named = set(re.findall(r"`(test_\w+)`", DOCUMENTS[name]))
    assert len(named) > 8 or name not in {"docs/reliability.md", "SECURITY.md"}
    assert named <= known_tests(), named - known_tests()


@cache
def known_files() -> list[str]:
    """Every file, and every folder with a slash behind it, by its path with a slash before it."""
    found = [
        *REPOSITORY.glob("*.*"),
        *(path for folder in SEARCHED for path in (REPOSITORY / folder, *(REPOSITORY / folder).rglob("*"))),
    ]
    return [
        f"/{path.relative_to(REPOSITORY)}{'/' * path.is_dir()}" for path in found if "__pycache__" not in path.parts
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name):
    named = {file for file in re.findall(FILE, DOCUMENTS[name]) if not file.startswith(WRITTEN_BY_A_RUN)}
    assert {file for file in named if not fnmatch.filter(known_files(), f"*/{file}")} == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    for goal in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[name]):
        if goal.startswith("https://"):
            continue
        file, _, heading = goal.partition("#")
        path = (REPOSITORY / name).parent / file if file else REPOSITORY / name
        assert path.exists(), goal
        assert not heading or heading in headings(path), goal


def headings(path: Path) -> set[str]:
    """The names by which a page's headings are linked to."""
    found = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_target_and_extra_that_is_named_exists(name):
    text = DOCUMENTS[name]
    settings = {setting.lower() for setting in re.findall(r"\bRERANKQ_([A-Z_]+)\b", text)}
    assert settings <= Settings.model_fields.keys(), settings - Settings.model_fields.keys()
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^\$ )make ([a-z-]+)", text, re.MULTILINE)) <= targets
    declared = set(re.findall(r"^([\w-]+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE))
    extras = {extra for named in re.findall(r"(?:rerankq|\.|whl)\[([\w,-]+)\]", text) for extra in named.split(",")}
    assert extras <= declared


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_option_that_is_named_exists(name):
    spans = re.findall(r"`(rerankq [^`\n]+)`", DOCUMENTS[name])
    spans += re.findall(r"^\$ .*?(?:\.venv/bin/)?\b(rerankq [a-z][^\n]*)$", DOCUMENTS[name], re.MULTILINE)
    for span in spans:
        command = typer.main.get_command(app)
        for word in span.split()[1:]:
            if hasattr(command, "commands") and word in command.commands:
                command = command.commands[word]
            elif word.startswith("--"):
                assert word in {option for parameter in command.params for option in parameter.opts}, span
        assert command.name != "rerankq", span


def test_the_tables_are_those_that_make_docs_writes():
    run = subprocess.run(
        [sys.executable, REPOSITORY / "docs/generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{run.stdout}{run.stderr}: run make docs"


def test_every_setting_and_every_field_of_a_job_says_who_reads_it():
    for name in ("settings", "jobs"):
        rows = re.findall(r"^\| `.*$", DOCUMENTS[f"docs/{name}.md"], re.MULTILINE)
        assert len(rows) > len(Settings.model_fields) - 1
        for row in rows:
            assert not row.endswith("|  |"), row
            assert row.count(" | ") == 2 or row.split(" | ")[4].strip(), row


def test_the_promises_defaults_are_the_settings_defaults():
    assert Settings.model_fields["lease_s"].default == 8
    assert "(`RERANKQ_LEASE_S`, 8 s)" in DOCUMENTS["docs/reliability.md"]


def test_the_table_of_keys_is_the_ledgers_list():
    rows = re.findall(r"^\| `(rerankq:[^`]+)` \| ([a-z ]+) \|", DOCUMENTS["docs/ledger.md"], re.MULTILINE)
    assert rows == [(key.pattern, key.type) for key in keys.ALL]


def test_no_key_of_the_ledger_is_written_anywhere_else():
    sources = [path for root in ("producer", "worker") for path in (REPOSITORY / root).rglob("*.*")]
    names = "|".join(key.name.partition(":")[2] for key in keys.ALL)
    found = {
        str(path.relative_to(REPOSITORY))
        for path in sources
        if path.suffix in {".py", ".lua"} and re.search(rf"rerankq:(?:{names})\b", path.read_text(encoding="utf-8"))
    }
    assert found == {"producer/rerankq/ledger/keys.py"}


def test_the_fields_of_a_job_in_the_ledger_are_those_that_its_scripts_write():
    scripts = "\n".join(path.read_text() for path in (REPOSITORY / "producer/rerankq/ledger/scripts").glob("*.lua"))
    page = DOCUMENTS["docs/ledger.md"]
    table = page[page.index("| field of a job") :].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    assert {name for name in named if f"'{name}'" not in scripts} == set()
    (accepting,) = re.findall(r"redis.call\('HSET', key, ('state', 'queued', 'content'.*?)\)\n", scripts, re.DOTALL)
    written = set(re.findall(r"'(\w+)'", accepting)) - {"queued"}
    assert len(written) > 10
    assert written <= named


def test_the_words_of_a_jobs_history_are_those_that_are_written():
    scripts = "\n".join(path.read_text() for path in (REPOSITORY / "producer/rerankq/ledger/scripts").glob("*.lua"))
    page = DOCUMENTS["docs/ledger.md"]
    table = page[page.index("| word | what happened") :].split("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == set(re.findall(r"note\(key, '([\w-]+)'", scripts))


@pytest.mark.parametrize("name", [name for name in NAMES if ">>> " in DOCUMENTS[name]])
def test_the_sessions_of_a_page_give_what_stands_there(name):
    failed, tried = doctest.testfile(str(REPOSITORY / name), module_relative=False, encoding="utf-8")
    assert tried > 0
    assert failed == 0


def blocks(kind: str) -> list[str]:
    return [
        block
        for text in DOCUMENTS.values()
        for block in re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def test_the_jobs_and_profiles_that_are_shown_are_well_formed():
    jobs, profiles = blocks("json"), blocks("toml")
    assert jobs
    assert profiles
    for job in jobs:
        RerankJob.model_validate_json(job)
    for profile in profiles:
        shown = tomllib.loads(profile)
        assert set(shown) <= {"profile", "remote", "keys"}
        for key in shown.get("keys", []):
            ApiKey(**key)
        for card in shown.get("remote", {}).values():
            RemoteCard.model_validate(card)
        for fusion in shown.get("profile", {}).values():
            Fusion(**fusion)


def test_every_module_and_package_stands_in_the_architecture():
    arrows = runpy.run_path(str(REPOSITORY / "tests/test_layers.py"))["ARROWS"]
    paths = {
        f"{'worker' if room.startswith('rerankq_worker') else 'producer'}/{room.replace('.', '/')}" for room in arrows
    }
    named = {path.removesuffix(".py").rstrip("/") for path in re.findall(FILE, DOCUMENTS["docs/architecture.md"])}
    assert paths - named == set()


def test_the_threads_of_the_architecture_are_those_that_are_started():
    code = "\n".join(path.read_text() for root in ("producer", "worker") for path in (REPOSITORY / root).rglob("*.py"))
    named = set(re.findall(r"`(rerankq-[a-z]+)`", DOCUMENTS["docs/architecture.md"]))
    assert len(named) > 5
    assert named <= set(re.findall(r'name="(rerankq-[a-z]+)"', code))
