"""Jobs on the command line, in this process: submitted, waited for, cancelled, with the exit status of each."""

import json
import re
import threading

import pytest
from typer.testing import CliRunner

from rerankq import BrokerUnavailable, Client, RerankJob
from rerankq.cli import services, submit
from rerankq.cli.app import app
from rerankq.local import worker_command
from rerankq.settings import Settings
from rerankq.stream import JobStream

GOOD = '{"id": "good", "query": "a", "chunks": ["b", "c"]}'


@pytest.fixture
def run(settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RERANKQ_BROKER_URL", settings.broker)

    def run(*arguments, given=None, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return CliRunner().invoke(app, list(arguments), input=given)

    return run


@pytest.fixture
def client(settings):
    with Client(settings) as client:
        yield client


@pytest.fixture
def once_queued(worker, wait_until):
    """Do something with a job as soon as it is there, beside the command that submits it."""
    threads = []

    def once_queued(name, do):
        def wait():
            wait_until(lambda: worker.state(name) == "queued")
            do(name)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()

    yield once_queued
    for thread in threads:
        thread.join()


def test_failed_job_under_wait_is_a_record_and_status_1(run, worker, once_queued):
    worker.register("m")
    once_queued("good", lambda name: worker.fail(name, "no such thing"))
    done = run("submit", "-", "--wait", given=GOOD)
    printed = json.loads(done.stdout)
    assert (printed["line"], printed["error_type"]) == ("standard input:1", "JobFailed")
    assert "no such thing" in printed["error"]
    assert (done.exit_code, done.stderr) == (1, "")


def test_ranking_under_wait_is_printed_with_status_0(run, worker, once_queued):
    worker.register("m")
    once_queued("good", worker.finish)
    done = run("submit", "-", "--wait", given=GOOD)
    assert [chunk["rank"] for chunk in json.loads(done.stdout)["chunks"]] == [1, 2]
    assert done.exit_code == 0


def test_refused_job_leaves_the_ids_of_others_and_status_1(run):
    other = '{"query": "a", "chunks": ["b"], "model": "nobody-has-it"}'
    done = run("submit", "-", given=f"{other}\n{GOOD}\n")
    assert (done.exit_code, done.stdout) == (1, "good\n")
    assert done.stderr.startswith("rerankq: standard input:1: ")
    assert "nobody-has-it" in done.stderr


def test_ids_accepted_before_the_ledger_failed_are_printed(run, monkeypatch):
    def goes_away(stream, batch):
        raise BrokerUnavailable("gone", accepted=["one", "two"])

    monkeypatch.setattr(JobStream, "submit", goes_away)
    done = run("submit", "-", given=GOOD)
    assert (done.exit_code, done.stdout) == (1, "one\ntwo\n")


def test_alias_of_ones_own_catalogue_has_its_worker_under_wait(run, worker, monkeypatch, tmp_path):
    (tmp_path / "models.toml").write_text(
        '[models."org/long"]\nmax_length = 1\nlanguages = []\nsize_mb = 1\nlicence = "x"\nchoose_when = "x"\n'
        'aliases = ["short"]\n'
    )
    worker.register("org/long")

    class Watch(submit.WorkerWatch):
        def check(self, models, job_ids):
            super().check(models, job_ids)
            if job_ids:
                assert set(models) == {"short"}
                worker.finish(*job_ids)

    monkeypatch.setattr(submit, "WorkerWatch", Watch)
    monkeypatch.setattr("rerankq.stream.SUPERVISE_EVERY_S", 0.05)
    job = '{"id": "good", "query": "a", "chunks": ["b"], "model": "short"}'
    done = run("submit", "-", "--wait", given=job, RERANKQ_CONF_DIR=str(tmp_path))
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["job_id"] == "good"


def test_line_limit_allows_six_bytes_per_character(run):
    limit = {"RERANKQ_MAX_JOB_BYTES": "1000"}
    escaped = json.dumps({"id": "one", "query": "語" * 200, "chunks": ["b"]})
    assert len(escaped) > 1200
    done = run("submit", "-", given=escaped, **limit)
    assert (done.stdout, done.stderr) == ("one\n", "")
    done = run("submit", "-", given=f"{'x' * 4001}\n", **limit)
    assert (done.exit_code, done.stderr) == (2, "rerankq: standard input:1: longer than 4000 bytes\n")


@pytest.mark.parametrize(("jobs", "message"), [(["a"], "1 job continues"), (["a", "b"], "2 jobs continue")])
def test_jobs_that_continue_are_counted_and_named(capsys, jobs, message):
    submit._name_jobs_that_continue(jobs)
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.splitlines()[1:] == jobs
    submit._name_jobs_that_continue([])
    assert capsys.readouterr().err == ""


def test_status_prints_state_pairs_and_error(run, client, worker):
    client.submit(RerankJob(id="good", query="a", chunks=["b", "c"]))
    done = run("status", "good")
    state, when = done.stdout.splitlines()
    assert (done.exit_code, state) == (0, "queued  0 of 2 pairs, attempts: 0")
    assert re.fullmatch(r"submitted \d{1,2}\.\d s ago", when)
    worker.fail("good", "no such thing")
    done = run("status", "good")
    assert done.stdout.startswith("failed  ")
    assert done.stdout.endswith("no such thing\n")
    done = run("status", "nobody")
    assert (done.exit_code, done.stdout) == (1, "unknown: never submitted, forgotten, or past its time to live\n")
    assert run("status", "nobody", "--json").exit_code == 1


def test_cancel_of_an_ended_job_is_status_1(run, client, worker):
    for name in ("one", "two"):
        client.submit(RerankJob(id=name, query=name, chunks=["b"]))
    worker.finish("two")
    assert [(done.exit_code, done.stdout) for done in (run("cancel", "one"), run("cancel", "two"))] == [
        (0, "cancelled\n"),
        (1, "done\n"),
    ]
    assert run("cancel", "nobody").exit_code == 1


def test_result_without_a_ranking_in_time_is_status_1(run, client, worker):
    worker.register("m")
    client.submit(RerankJob(id="good", query="a", chunks=["b"]))
    done = run("result", "good", "--timeout", "0")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "rerankq: job good: no ranking within 0.0 s; it may still come\n"
    worker.finish("good")
    done = run("result", "good", "--timeout", "0")
    assert (done.exit_code, json.loads(done.stdout)["job_id"]) == (0, "good")


def test_worker_that_cannot_be_started_is_reported_with_status_1(run, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.execve", refuse)
    done = run("worker")
    assert (done.exit_code, done.stderr) == (1, "rerankq: [Errno 13] Permission denied\n")


def test_verbose_worker_logs_at_info(run, monkeypatch):
    started = []
    monkeypatch.setattr("os.execve", lambda program, command, environment: started.append(command))
    for more in ((), ("--verbose",)):
        run("worker", *more)
    quiet, verbose = started
    assert ("-q" in quiet, quiet[quiet.index("-l") + 1]) == (True, "WARNING")
    assert ("-q" in verbose, verbose[verbose.index("-l") + 1]) == (False, "INFO")


def test_worker_environment_carries_our_settings():
    settings = Settings(_env_file=None, broker_url="redis://a/0", cache_url="redis://c", model="m", concurrency=7)
    written = worker_command.environment(settings)
    assert written == {
        "RERANKQ_BROKER_URL": "redis://a/0",
        "RERANKQ_LEDGER_URL": "redis://a/1",
        "RERANKQ_CACHE_URL": "redis://c",
        "RERANKQ_MODEL": "m",
        "RERANKQ_DEFAULT_MODEL": "m",
        "RERANKQ_CONCURRENCY": "7",
    }
    other = settings.model_copy(update={"default_model": "n"})
    assert worker_command.environment(other)["RERANKQ_DEFAULT_MODEL"] == "n"


def test_tokeniser_variables_that_are_set_stay():
    assert worker_command.tuned({"TOKENIZERS_PARALLELISM": "true", "X": "1"}).items() >= {
        ("TOKENIZERS_PARALLELISM", "true"),
        ("X", "1"),
    }
    assert worker_command.tuned({})["TOKENIZERS_PARALLELISM"] == "false"


def test_password_of_a_foreign_redis_is_masked_in_json(run, settings, monkeypatch):
    class Stack:
        def __init__(self, given, **_):
            self.settings, self.embedded = given, False

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_until_ready(self, client):
            pass

        def supervise(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(services, "Stack", Stack)
    monkeypatch.setattr(services, "flower_is_installed", lambda: False)
    printed = json.loads(run("up", "--json").stdout)
    assert printed["broker_url"].startswith("redis://:***@")
    assert (printed["embedded"], printed["flower"]) == (False, None)
