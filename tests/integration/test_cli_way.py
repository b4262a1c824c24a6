"""The command line with real processes: what a person types, what comes out, and what is left behind."""

import base64
import bz2
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest
import redis
from forked_processes import ForkedProcess, interpreter, run_forked

pytestmark = pytest.mark.slow

# What the command starts of Python is forked.
COMMAND = """
import runpy, sys
sys.executable = sys.argv.pop(1)
runpy.run_module("rerankq.cli", run_name="__main__", alter_sys=True)
"""
QUERIES = 40
DEPTH = 5


@pytest.fixture
def start(tmp_path):
    """Start the command line in an empty folder, with the stub model unless said otherwise."""
    running = []

    def start(*arguments, through=(), **environment):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        options = {"env": clean(environment), "cwd": tmp_path, "text": True, **pipes}
        if through:
            command = [sys.executable, "-c", COMMAND, interpreter()]
            process = subprocess.Popen([*through, *command, *arguments], **options)
        else:
            process = ForkedProcess(["-m", "rerankq.cli", *arguments], **options)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def clean(more):
    """The environment without settings but these."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RERANKQ_")}
    return {**ours, "RERANKQ_MODEL": "stub", **more}


@pytest.fixture
def run(start, tmp_path):
    """Run the command line to its end: forked, unless another command is to start it."""

    def run(*arguments, given=None, through=(), **environment):
        if not through:
            return run_forked(arguments, clean(environment), tmp_path, given=given, timeout=120)
        process = start(*arguments, through=through, **environment)
        out, err = process.communicate(given, timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return run


@pytest.fixture
def served(redis_url, start_worker):
    """Where a deployment stands, with a worker: what a command brings of its own takes seconds to start."""
    start_worker()
    return {"RERANKQ_BROKER_URL": redis_url}


@pytest.fixture
def collection(tmp_path):
    """A first-stage run with its texts; the options that name the files."""
    queries = [{"_id": f"q{number}", "text": f"word{number} and word{number + 1}"} for number in range(QUERIES)]
    corpus = [{"_id": f"d{number}", "title": "", "text": f"word{number} here"} for number in range(QUERIES + DEPTH)]
    write(tmp_path / "q.jsonl", map(json.dumps, queries))
    write(tmp_path / "c.jsonl", map(json.dumps, corpus))
    run = [f"q{query} Q0 d{query + at} {at + 1} {DEPTH - at} x" for query in range(QUERIES) for at in range(DEPTH)]
    write(tmp_path / "r.trec", run)
    write(
        tmp_path / "j.tsv", ["query-id\tcorpus-id\tscore", *(f"q{number}\td{number}\t1" for number in range(QUERIES))]
    )
    files = {"--queries": "q.jsonl", "--corpus": "c.jsonl", "--run": "r.trec", "--output": "o.trec", "--qrels": "j.tsv"}
    return [part for pair in files.items() for part in pair]


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def family(process):
    return psutil.Process(process.pid).children(recursive=True)


def is_worker(process):
    try:
        command = process.cmdline()
    except psutil.Error:  # it ended while we looked
        return False
    return "rerankq_worker.tasks" in command and not any(part.endswith("process_guard.py") for part in command)


def gone(processes):
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def scores_of(path):
    return {tuple(line.split()[::2][:2]): float(line.split()[4]) for line in path.read_text().splitlines()}


def test_rescore_starts_its_own_stack_and_leaves_nothing_behind(run, collection, tmp_path):
    done = run("rescore", *collection, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["queries"], report["pairs"], report["judged_queries"]) == (QUERIES, QUERIES * DEPTH, QUERIES)
    assert report["ndcg"]["first stage"] == 1
    assert set(report["ndcg"]) == {"first stage", "model alone", "fusion default"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "j.tsv", "o.trec", "q.jsonl", "r.trec"]
    lines = (tmp_path / "o.trec").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [f"q{number}" for number in range(QUERIES) for _ in range(DEPTH)]
    for at in range(0, len(lines), DEPTH):
        columns = [line.split() for line in lines[at : at + DEPTH]]
        assert [int(row[3]) for row in columns] == [1, 2, 3, 4, 5]
        assert sorted(columns, key=lambda row: -float(row[4])) == columns


def test_invalid_lines_that_a_rescore_does_not_need_are_counted(run, collection, served, tmp_path):
    for name, odd in (("q.jsonl", '{"_id": "z", "text": " "}'), ("c.jsonl", '{"_id": 9.0, "title": null}\n{"_id"')):
        with (tmp_path / name).open("a") as file:
            file.write(f"{odd}\n")
    (tmp_path / "c.jsonl").write_bytes(bz2.compress((tmp_path / "c.jsonl").read_bytes().replace(b'""', b"null")))
    write(tmp_path / "j.tsv", ["qid\tpid\trel", *(f"q{number}\td{number}\t1.0" for number in range(QUERIES)), "z"])
    done = run("rescore", *collection, "--json", **served)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skipped_lines"] == {"c.jsonl": 2, "j.tsv": 1, "q.jsonl": 1}
    at = QUERIES + DEPTH + 1
    assert f"rerankq: c.jsonl: 2 invalid lines skipped, the first: c.jsonl:{at}: text: is missing" in done.stderr


def test_report_names_the_model_that_scored(run, collection, redis_url, start_worker):
    start_worker()
    there = {"RERANKQ_BROKER_URL": redis_url, "RERANKQ_MODEL": "bundled"}
    report = json.loads(run("rescore", *collection, "--json", **there).stdout)
    assert report["model"] == "stub"
    told = run("rescore", *collection, "--force", **there).stdout
    assert f"scored by stub (weights {report['weights']}), fusion default" in told


def test_report_names_weighted_signals_that_no_chunk_has(run, collection, served):
    report = run("rescore", *collection, "--limit", "2", "--fusion", "elasticsearch", **served)
    assert "weighted signals that no chunk has, which add nothing to the score: vector\n" in report.stdout
    in_json = run("rescore", *collection, "--limit", "3", "--fusion", "model", "--force", "--json", **served)
    assert json.loads(in_json.stdout)["missing"] == {}
    told = run("rescore", *collection, "--limit", "2", "--force", **served).stdout
    assert "weighted signals" not in told, "a query without tags asks for none"


def test_limit_takes_the_first_queries_of_the_run(run, collection, served, tmp_path):
    done = run("rescore", *collection, "--json", "--limit", "3", **served)
    report = json.loads(done.stdout)
    assert (report["queries"], report["pairs"], report["judged_queries"]) == (3, 3 * DEPTH, 3)
    assert {line.split()[0] for line in (tmp_path / "o.trec").read_text().splitlines()} == {"q0", "q1", "q2"}


def test_existing_output_is_overwritten_with_force_alone(run, collection, served, tmp_path):
    (tmp_path / "o.trec").write_text("mine\n")
    refused = run("rescore", *collection)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "rerankq: --output: o.trec exists; add --force to overwrite it\n"
    assert (tmp_path / "o.trec").read_text() == "mine\n"
    assert run("rescore", *collection, "--force", **served).returncode == 0
    assert len((tmp_path / "o.trec").read_text().splitlines()) == QUERIES * DEPTH


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_run_on_standard_output_has_nothing_else_beside_it(run, collection, served, tmp_path, json_too):
    at = collection.index("o.trec")
    done = run("rescore", *collection[:at], "-", *collection[at + 1 :], *json_too, **served)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == QUERIES * DEPTH
    assert all(len(line.split()) == 6 for line in lines)
    assert "first stage" in done.stderr
    if json_too:
        assert json.loads(done.stderr)["queries"] == QUERIES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "j.tsv", "q.jsonl", "r.trec"]


def test_scores_that_could_not_be_written_are_kept_for_the_same_command(run, collection, served, tmp_path):
    at = collection.index("o.trec")
    full = [*collection[:at], "/dev/full", *collection[at + 1 :]]
    temporary = {"TMPDIR": str(tmp_path), **served}
    done = run("rescore", *full, **temporary)
    assert done.returncode == 1
    assert done.stdout == ""
    kept, error = done.stderr.splitlines()
    assert kept.startswith(f"rerankq: stopped; the progress is kept in {tmp_path}/rerankq-{os.getuid()}/")
    assert error == "rerankq: /dev/full: cannot be written: No space left on device"
    (journal,) = tmp_path.glob("rerankq-*/*.part")
    assert journal.read_bytes().count(b"\n") == QUERIES + 1
    again = run("rescore", *full, **temporary)
    assert (again.returncode, again.stderr) == (1, done.stderr), "and nothing was scored"


def dcg(gains):
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains[:10]))


@pytest.mark.parametrize("later_names_first", [False, True])
def test_printed_ndcg_is_that_of_the_written_run_for_any_tie_breaking(run, served, tmp_path, later_names_first):
    chance = random.Random(3)
    names = [f"d{number:02}" for number in range(30)]
    chance.shuffle(names)
    # Every text stands there many times, so that most scores are ties.
    write(tmp_path / "c", (json.dumps({"_id": name, "text": f"word{at % 3}"}) for at, name in enumerate(names)))
    write(tmp_path / "q", (json.dumps({"_id": f"q{n}", "text": f"word{n % 3}"}) for n in range(6)))
    write(tmp_path / "r", (f"q{n} Q0 {name} 0 {chance.randint(0, 4)} x" for n in range(6) for name in names))
    grades = {f"q{n}": {name: chance.randint(0, 2) for name in names} for n in range(6)}
    write(tmp_path / "j", (f"{query} 0 {name} {grade}" for query in grades for name, grade in grades[query].items()))
    files = ("--queries", "q", "--corpus", "c", "--run", "r", "--output", "o", "--qrels", "j")
    report = json.loads(run("rescore", *files, "--json", **served).stdout)

    found = {}
    for line in (tmp_path / "o").read_text().splitlines():
        query, _, name, rank, score, _ = line.split()
        found.setdefault(query, []).append((struct.unpack("<f", struct.pack("<f", float(score)))[0], name, int(rank)))
    values = []
    for query, rows in found.items():
        rows.sort(key=lambda row: row[1], reverse=later_names_first)
        rows.sort(key=lambda row: -row[0])
        assert [rank for _, _, rank in rows] == list(range(1, 31))
        best = sorted(grades[query].values(), reverse=True)
        values.append(dcg([grades[query][name] for _, name, _ in rows]) / dcg(best))
    assert report["ndcg"]["fusion default"] == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_second_rescore_on_a_running_redis_finds_every_pair_in_the_cache(
    run, collection, redis_url, start_worker, tmp_path
):
    start_worker()
    first = json.loads(run("rescore", *collection, "--json", RERANKQ_BROKER_URL=redis_url).stdout)
    before = (tmp_path / "o.trec").read_text()
    again = json.loads(run("rescore", *collection, "--json", "--force", RERANKQ_BROKER_URL=redis_url).stdout)
    assert (first["cached_pairs"], again["cached_pairs"]) == (0, QUERIES * DEPTH)
    assert (tmp_path / "o.trec").read_text() == before


def test_jobs_of_a_rescore_are_forgotten(run, collection, client, redis_url, start_worker):
    start_worker()
    assert run("rescore", *collection, RERANKQ_BROKER_URL=redis_url).returncode == 0
    with redis.Redis.from_url(client.settings.ledger) as ledger:
        assert list(ledger.scan_iter("rerankq:job:*")) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_rescore_resumes_where_it_stopped(
    start, run, collection, tmp_path, wait_until, redis_url, start_worker, number, status
):
    # Slow, and in small batches, so that the stop comes in the middle.
    worker = start_worker(RERANKQ_MODEL="stub:0.002", RERANKQ_MAX_BATCH_TOKENS="64")
    part = tmp_path / "o.trec.part"
    process = start("rescore", *collection, RERANKQ_BROKER_URL=redis_url)
    wait_until(lambda: part.exists() and part.read_bytes().count(b"\n") > 1)
    worker.send(signal.SIGSTOP)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert ("the same command resumes" in said) == (number != signal.SIGKILL)
    kept = part.read_bytes().count(b"\n") - 1
    assert not (tmp_path / "o.trec").exists()
    with part.open("ab") as file:
        file.write(b'{"query": "torn')
    worker.send(signal.SIGCONT)

    done = run("rescore", *collection, "--json", RERANKQ_BROKER_URL=redis_url)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["resumed"] == kept
    assert report["pairs"] == (QUERIES - kept) * DEPTH
    assert not part.exists()

    interrupted = scores_of(tmp_path / "o.trec")
    assert len(interrupted) == QUERIES * DEPTH
    assert run("rescore", *collection, "--force", RERANKQ_BROKER_URL=redis_url).returncode == 0
    assert scores_of(tmp_path / "o.trec") == pytest.approx(interrupted)


def test_interrupted_rescore_with_other_options_is_refused_without_restart(run, collection, served, tmp_path):
    header = {"journal": "rerankq rescore 2", "depth": 3}
    (tmp_path / "o.trec.part").write_text(
        json.dumps(header) + '\n{"query": "q0", "rows": [], "model": "m", "weights": "w", "pairs": 0, '
        '"cached_pairs": 0, "truncated_pairs": 0, "missing": []}\n'
    )
    refused = run("rescore", *collection)
    assert refused.returncode == 2
    assert "add --restart" in refused.stderr
    assert run("rescore", *collection, "--restart", **served).returncode == 0


def test_failed_queries_are_named_and_the_others_written(run, collection, served, tmp_path):
    write(
        tmp_path / "q.jsonl",
        (json.dumps({"_id": f"q{n}", "text": "w" * (300 if n == 3 else 3)}) for n in range(QUERIES)),
    )
    # Too large for a job, only with the long query.
    done = run("rescore", *collection, "--json", RERANKQ_MAX_JOB_BYTES="800", **served)
    assert done.returncode == 1
    assert list(json.loads(done.stdout)["failed"]) == ["q3"]
    assert "rerankq: query q3: JobTooLarge" in done.stderr
    written = {line.split()[0] for line in (tmp_path / "o.trec").read_text().splitlines()}
    assert written == {f"q{number}" for number in range(QUERIES)} - {"q3"}
    # The same command tries them again.
    again = run("rescore", *collection, "--json", RERANKQ_MAX_JOB_BYTES="2000", **served)
    assert (again.returncode, json.loads(again.stdout)["resumed"]) == (0, QUERIES - 1)


def test_model_that_cannot_be_loaded_is_reported_in_the_words_of_the_worker(run, collection):
    done = run("rescore", *collection, "--model", "/no/such/folder")
    assert done.returncode == 1
    assert "the worker could not be started" in done.stderr
    assert "/no/such/folder" in done.stderr


def test_submitted_jobs_come_out_as_rankings(run, redis_url, start_worker, tmp_path):
    start_worker()
    there = {"RERANKQ_BROKER_URL": redis_url}
    jobs = [json.dumps({"id": f"job-{n}", "query": f"w{n}", "chunks": [f"w{n}", "other"]}) for n in range(300)]
    write(tmp_path / "jobs.jsonl", jobs)
    assert run("submit", "jobs.jsonl", **there).stdout.split() == [f"job-{number}" for number in range(300)]
    ranking = json.loads(run("result", "job-0", "--timeout", "60", **there).stdout)
    assert [chunk["rank"] for chunk in ranking["chunks"]] == [1, 2]
    status = json.loads(run("status", "job-0", "--json", **there).stdout)
    assert (status["state"], status["pairs_total"]) == ("done", 2)
    assert run("status", "job-0", **there).stdout.startswith("done  2 of 2 pairs")
    assert run("cancel", "job-0", **there).returncode == 1
    assert run("result", "nobody", **there).returncode == 1
    assert run("status", "nobody", **there).returncode == 1

    waited = run("submit", "jobs.jsonl", "--wait", **there)
    assert {json.loads(line)["job_id"] for line in waited.stdout.splitlines()} == {f"job-{n}" for n in range(300)}


def test_invalid_line_of_a_pipe_leaves_its_neighbours_ranked(run, redis_url, start_worker):
    start_worker()
    good = '{"query": "a", "chunks": ["b"]}'
    other = '{"query": "a", "chunks": ["b"], "model": "nobody-has-it"}'
    done = run("submit", "-", "--wait", given=f"{good}\nnope\n{other}\n{good}\n", RERANKQ_BROKER_URL=redis_url)
    assert done.returncode == 2
    assert "standard input:2: not JSON" in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum("chunks" in line for line in lines) == 2
    assert [line["error_type"] for line in lines if "chunks" not in line] == ["ModelUnknown"]


def test_queued_job_can_be_cancelled(run, redis_url):
    there = {"RERANKQ_BROKER_URL": redis_url}
    run("submit", "-", given='{"id": "one", "query": "a", "chunks": ["b"]}', **there)
    assert json.loads(run("cancel", "one", "--json", **there).stdout) == {"job_id": "one", "state": "cancelled"}
    done = run("result", "one", **there)
    assert done.returncode == 1
    assert "one" in done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_up_runs_until_it_is_stopped_and_leaves_no_process(start, run, wait_until, number, status):
    process = start("up", "--json")
    stack = json.loads(process.stdout.readline())
    assert stack["embedded"] is True
    ranked = run(
        "submit", "-", "--wait", given='{"query": "a", "chunks": ["b"]}', RERANKQ_BROKER_URL=stack["broker_url"]
    )
    assert json.loads(ranked.stdout)["chunks"][0]["rank"] == 1
    processes = family(process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status
    wait_until(lambda: gone(processes))


@pytest.mark.parametrize(("password", "revoked"), [("", False), ("me:secret", True)])
def test_flower_revokes_a_job_where_a_password_is_set_and_only_shows_without(start, password, revoked, wait_until):
    process = start("up", "--json", FLOWER_BASIC_AUTH=password)
    url = json.loads(process.stdout.readline())["flower"]
    revoke = urllib.request.Request(f"{url}/api/task/revoke/some-job", method="POST")
    revoke.add_header("Authorization", f"Basic {base64.b64encode(password.encode()).decode()}")
    found = []

    def answered():
        try:
            with urllib.request.urlopen(revoke) as response:
                found.append(response.status)
        except urllib.error.HTTPError as error:
            found.append(error.code)
            error.close()
        except urllib.error.URLError:  # it is not up yet
            return False
        return True

    wait_until(answered, seconds=60)
    assert (found[-1] == 200) == revoked, found


def test_up_restarts_a_worker_that_died(start, run, wait_until):
    process = start("up", "--json")
    url = json.loads(process.stdout.readline())["broker_url"]

    def workers():
        return [one for one in family(process) if is_worker(one)]

    (first,) = workers()
    first.kill()
    wait_until(lambda: workers() not in ([], [first]))
    done = run("submit", "-", "--wait", given='{"query": "a", "chunks": ["b"]}', RERANKQ_BROKER_URL=url)
    assert done.returncode == 0
    processes = family(process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "worker ended (signal 9); restarting in 1 s" in said
    assert process.returncode == 143
    wait_until(lambda: gone(processes))


# How a shell starts a program: with signals ignored or not, with standard streams closed.
def shell(words):
    return ["sh", "-c", words + ' exec "$@"', "sh"]


CLOSED = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_up_in_the_background_of_a_script_can_be_stopped_and_outlives_a_terminal(start, wait_until, number, status):
    process = start("up", "--json", through=shell("trap '' INT HUP TERM PIPE;"))
    process.stdout.readline()
    processes = family(process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status
    wait_until(lambda: gone(processes))


def test_closed_terminal_stops_up(start, wait_until):
    process = start("up", "--json", through=[sys.executable, "-c", UNIGNORED])
    process.stdout.readline()
    processes = family(process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 129
    wait_until(lambda: gone(processes))


UNIGNORED = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.parametrize("command", ["demo", "rescore"])
def test_interrupt_during_the_start_of_a_stack_leaves_no_process(start, collection, wait_until, command):
    process = start(command, *(collection if command == "rescore" else ()))
    wait_until(lambda: len(family(process)) >= 3)
    processes = family(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
    wait_until(lambda: gone(processes))


def test_rescore_works_with_closed_standard_streams(run, collection, tmp_path):
    done = run("rescore", *collection, through=CLOSED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len((tmp_path / "o.trec").read_text().splitlines()) == QUERIES * DEPTH
    at = collection.index("o.trec")
    refused = run("rescore", *collection[:at], "-", *collection[at + 1 :], through=["sh", "-c", 'exec "$@" >&-', "sh"])
    assert refused.returncode == 2
    assert refused.stderr == "rerankq: --output: standard output is not open for writing\n"


def test_rescore_needs_nothing_of_its_working_folder(run, collection, tmp_path):
    nowhere = ["env", "-u", "HOME", "-C", "/proc"]
    absolute = [str(tmp_path / part) if (tmp_path / part).is_file() else part for part in collection]
    absolute[absolute.index("o.trec")] = str(tmp_path / "o.trec")
    done = run("rescore", *absolute, through=nowhere, TMPDIR="/nowhere", TERM="dumb", COLUMNS="10")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [("status", "nobody"), ("submit", "jobs.jsonl"), ("dead", "list")])
def test_closed_pipe_ends_a_command_quietly(run, redis_url, tmp_path, arguments):
    write(tmp_path / "jobs.jsonl", (json.dumps({"query": f"w{n}", "chunks": ["x"]}) for n in range(1000)))
    into_a_closed_pipe = ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "sh"]
    done = run(*arguments, through=into_a_closed_pipe, RERANKQ_BROKER_URL=redis_url)
    assert (done.returncode, done.stderr) == (1, "")


def test_waiting_command_reports_missing_workers_and_jobs_that_continue(start, run, redis_url, start_worker):
    there = {"RERANKQ_BROKER_URL": redis_url}
    process = start("submit", "-", "--wait", **there)
    process.stdin.write('{"id": "one", "query": "a", "chunks": ["b"]}\n{"id": "two", "query": "a", "chunks": ["c"]}\n')
    process.stdin.close()
    process.stdin = None
    said = process.stderr.readline()
    assert said == "rerankq: no worker is running; waiting for jobs one, two (start one with: rerankq worker)\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "rerankq: stopped waiting; 2 jobs continue (rerankq result ID, or rerankq cancel ID):\none\ntwo\n"

    waiting = start("result", "two", **there)
    assert (
        waiting.stderr.readline()
        == "rerankq: no worker is running; waiting for job two (start one with: rerankq worker)\n"
    )
    start_worker()
    out, err = waiting.communicate(timeout=60)
    assert json.loads(out)["job_id"] == "two"
    assert json.loads(run("result", "one", **there).stdout)["job_id"] == "one"


def test_job_continues_after_result_stops_waiting(start, run, redis_url):
    there = {"RERANKQ_BROKER_URL": redis_url}
    run("submit", "-", given='{"id": "one", "query": "a", "chunks": ["b"]}', **there)
    process = start("result", "one", **there)
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "rerankq: stopped waiting; job one continues\n")
    late = run("result", "one", "--timeout", "0.5", **there)
    assert (late.returncode, late.stderr) == (1, "rerankq: job one: no ranking within 0.5 s; it may still come\n")


def test_rescore_reports_missing_workers(start, collection, redis_url):
    process = start("rescore", *collection, RERANKQ_BROKER_URL=redis_url)
    assert process.stderr.readline().startswith("rerankq: no worker is running; jobs are waiting")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_second_interrupt_ends_everything_at_once(start, wait_until):
    process = start("up", "--json")
    process.stdout.readline()
    processes = family(process)
    for one in processes:
        if is_worker(one):
            one.suspend()  # it cannot answer the first request
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=8)  # less than the grace of a part
    wait_until(lambda: gone(processes))


def test_demo_ranks_the_sample_with_the_bundled_model_and_stops(run):
    elsewhere = {"RERANKQ_BROKER_URL": "redis://127.0.0.1:1/0", "RERANKQ_DEFAULT_MODEL": "ignored"}
    done = run("demo", "--json", RERANKQ_MODEL="ignored", **elsewhere)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["pairs"] == record["jobs"] * record["chunks"]
    assert record["again"]["cached_pairs"] == record["pairs"]
    for one in record["comparisons"]:
        scores = [chunk["score"] for chunk in one["after"]]
        assert scores == sorted(scores, reverse=True)
        assert sorted(chunk["id"] for chunk in one["after"]) == sorted(one["before"])
    assert done.stderr == ""
