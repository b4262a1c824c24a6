import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import rerankq
from rerankq import cli
from rerankq.cli.app import app
from rerankq.settings import Settings

GOOD = '{"query": "why tides?", "chunks": ["The moon pulls."]}'


@pytest.fixture
def run(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("RERANKQ_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)  # away from a person's .env

    def run(*arguments, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return CliRunner().invoke(app, list(arguments))

    return run


def test_version_option_prints_the_version(run):
    assert run("--version").stdout == f"{rerankq.__version__}\n"


@pytest.mark.parametrize(
    "command",
    [["worker"], ["submit", "-"], ["result", "x"], ["status", "x"], ["cancel", "x"], ["dead", "list"]],
)
def test_commands_without_a_url_say_how_to_set_one(run, command):
    done = run(*command)
    assert done.exit_code == 2
    assert "RERANKQ_BROKER_URL=redis://" in done.stderr


def test_invalid_settings_are_reported_together(run):
    done = run("status", "x", RERANKQ_CONCURRENCY="0", RERANKQ_DTYPE="float8", RERANKQ_BROKER_URL="http://x")
    assert done.exit_code == 2
    assert {line.split(":")[1].strip() for line in done.stderr.splitlines()} == {
        "RERANKQ_CONCURRENCY",
        "RERANKQ_DTYPE",
        "RERANKQ_BROKER_URL",
    }


def test_unreachable_redis_is_one_message_and_status_1(run):
    done = run("status", "x", RERANKQ_BROKER_URL="redis://127.0.0.1:1/0")
    assert done.exit_code == 1
    assert done.stderr.startswith("rerankq: the ledger does not answer")


def test_file_with_invalid_lines_is_refused_whole_naming_each(run, tmp_path):
    (tmp_path / "jobs.jsonl").write_text(f'{GOOD}\nnope\n\n{{"query": "", "chunks": ["x"]}}\n')
    done = run("submit", "jobs.jsonl", RERANKQ_BROKER_URL="redis://127.0.0.1:1/0")
    assert done.exit_code == 2
    assert done.stdout == ""
    bad, blank, last = done.stderr.splitlines()
    assert bad.startswith("jobs.jsonl:2: not JSON")
    assert blank.startswith("jobs.jsonl:4: query: ")
    assert last == "rerankq: jobs.jsonl: nothing was submitted; invalid lines: 2"


def test_file_without_jobs_is_reported(run, tmp_path):
    (tmp_path / "jobs.jsonl").write_text("\n")
    done = run("submit", "jobs.jsonl", RERANKQ_BROKER_URL="redis://127.0.0.1:1/0")
    assert (done.exit_code, done.stderr) == (0, "rerankq: jobs.jsonl: no jobs found\n")


def test_invalid_lines_beyond_a_limit_are_counted_but_not_named(run, tmp_path):
    (tmp_path / "jobs.jsonl").write_text("nope\n" * 1000)
    done = run("submit", "jobs.jsonl", RERANKQ_BROKER_URL="redis://127.0.0.1:1/0")
    assert len(done.stderr.splitlines()) == 22
    assert done.stderr.endswith("invalid lines: 1000\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["result", "x", "--timeout", "nan"],
        ["result", "x", "--timeout", "inf"],
        ["result", "x", "--timeout", "-1"],
        ["result", "x", "--timeout", "soon"],
        ["worker", "--concurrency", "0"],
        ["worker", "--concurrency", "1000000000000"],
        ["up", "--flower-port", "0"],
        ["up", "--flower-port", "65536"],
        ["rescore", "--limit", "0"],
        ["rescore", "--limit", f"1{'0' * 30}"],
        ["rescore", "--limit", "1.5"],
    ],
)
def test_numbers_out_of_range_are_refused_naming_the_option(run, arguments):
    # A job or a worker of that kind would be waited for.
    done = run(*arguments, RERANKQ_BROKER_URL="redis://127.0.0.1:1/0")
    assert done.exit_code == 2
    assert f"Invalid value for '{arguments[-2]}'" in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--depth", "0", "--depth: expected 1 to 10000"),
        ("--depth", "10001", "--depth: expected 1 to 10000"),
        ("--fusion", "nope", "--fusion: no profile 'nope'; there are"),
        ("--queries", "nowhere.jsonl", "--queries: nowhere.jsonl is not a file"),
        ("--qrels", "nowhere.tsv", "--qrels: nowhere.tsv is not a file"),
        ("--queries", "-", "--queries: - is not a file; it is read more than once, which a pipe"),
        ("--corpus", "/dev/null", "--corpus: /dev/null is not a file; it is read more than once, which a pipe"),
        ("--run", ".", "--run: . is not a file but a folder"),
        ("--output", "nowhere/out.trec", "--output: nowhere is not a folder"),
        ("--output", ".", "--output: . is a folder"),
        ("--output", "r", "--output: r is the same file as --run"),
        ("--depth", "-1", "--depth: expected 1 to 10000"),
        ("--depth", "1000000000000", "--depth: expected 1 to 10000"),
    ],
)
def test_invalid_rescore_options_are_refused_before_anything_starts(run, tmp_path, option, value, message):
    for name in ("q", "c", "r"):
        (tmp_path / name).write_text("")
    options = {"--queries": "q", "--corpus": "c", "--run": "r", "--output": "out", option: value}
    done = run("rescore", *[part for pair in options.items() for part in pair])
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out.part").exists()


def test_invalid_rescore_file_is_reported_with_file_line_and_field(run, tmp_path):
    (tmp_path / "q").write_text('{"_id": "1", "text": "a"}\n{"_id": "2"}\n')
    (tmp_path / "c").write_text('{"_id": "d", "text": "a"}\n')
    (tmp_path / "r").write_text("1 Q0 d 1 0.5 x\n2 Q0 d 1 0.5 x\n")
    done = run("rescore", "--queries", "q", "--corpus", "c", "--run", "r", "--output", "out")
    assert done.exit_code == 2
    assert done.stderr == "rerankq: q:2: text: is missing\n"


def test_rescore_that_ranked_nothing_reports_no_progress_kept(run, tmp_path):
    (tmp_path / "q").write_text('{"_id": "1", "text": "a"}\n')
    (tmp_path / "c").write_text('{"_id": "d", "text": "a"}\n')
    (tmp_path / "r").write_text("1 Q0 d 1 0.5 x\n")
    files = ("--queries", "q", "--corpus", "c", "--run", "r", "--output", "out")
    done = run("rescore", *files, RERANKQ_BROKER_URL="redis://127.0.0.1:1/0")
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("rerankq: the ledger does not answer")
    assert not (tmp_path / "out.part").exists()


def test_worker_command_is_celery_with_our_settings(run, monkeypatch):
    started = []
    monkeypatch.setattr("os.execve", lambda *arguments: started.append(arguments))
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)  # an engine of another test sets it
    run("worker", "--model", "stub", "--concurrency", "7", "--name", "gpu0", RERANKQ_BROKER_URL="redis://h/3")
    (program, command, environment) = started[0]
    assert program == sys.executable
    assert command[1:6] == ["-m", "celery", "-q", "-A", "rerankq_worker.tasks"]
    assert "gpu0@%h" in command
    ledger = Settings(broker_url="redis://h/3").ledger
    wanted = {"RERANKQ_MODEL": "stub", "RERANKQ_CONCURRENCY": "7", "RERANKQ_LEDGER_URL": ledger}
    assert wanted.items() <= environment.items()
    assert environment["TOKENIZERS_PARALLELISM"] == "false"


def test_missing_packages_are_named_with_how_to_install_them():
    hidden = "import sys; sys.modules['typer'] = None; from rerankq.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"{cli.HOW_TO_INSTALL}\n"


def test_command_line_starts_before_any_library_is_loaded():
    script = "import sys, rerankq.cli; print({'pydantic', 'redis', 'celery', 'typer', 'asyncio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n", "Ctrl-C before main() runs ends in a traceback"


@pytest.mark.parametrize("module", ["celery", "pydantic", "typer"])
def test_interrupt_while_a_library_loads_is_quiet_with_status_130(module):
    script = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from rerankq.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_every_command_has_help_and_loads_no_torch():
    script = (
        "import sys\nfrom rerankq.cli.app import app\n"
        "from typer.main import get_command\n"
        "commands = get_command(app).commands\n"
        "assert all(command.help for command in commands.values())\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "import json; print(json.dumps(sorted(commands)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        "batch",
        "cancel",
        "dead",
        "demo",
        "doctor",
        "gateway",
        "key",
        "rescore",
        "result",
        "status",
        "submit",
        "up",
        "worker",
    ]
