"""Dead jobs on the command line and through the client: named, explained, tried again, dropped."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from rerankq import BrokerUnavailable, Client, JobDead, JobUnknown, RerankJob
from rerankq.cli import dead
from rerankq.cli.app import app
from rerankq.contract import DeadJob
from rerankq.ledger import calls
from rerankq.settings import Settings

SECRET = "a chunk that nobody shall read by the way"


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as client:
        yield client


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RERANKQ_BROKER_URL", settings.broker)
    return lambda *arguments: CliRunner().invoke(app, ["dead", *arguments])


@pytest.fixture
def killed(client: Client, worker: Any) -> Callable[..., str]:
    """Submit a job and let it kill its workers until it is dead."""

    def kill(name: str, query: str = "what kills?") -> str:
        client.submit(RerankJob(id=name, query=query, chunks=[SECRET], tenant="t"))
        for number in range(worker.limits.max_attempts):
            owner = f"stand-in-{number}-{name}"
            claim = worker.ledger.ask(calls.claim(name, owner, worker.limits))
            worker.ledger.ask(calls.isolate(name, claim.fence, owner))
            worker.redis.zadd("rerankq:running", {name: 1})
            worker.redis.delete("rerankq:sweeper")
            worker.ledger.ask(calls.sweep("s", worker.limits))
        assert worker.state(name) == "dead"
        return name

    return kill


def lines(done: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_dead_list_names_jobs_without_their_texts(run: Callable, killed: Callable):
    assert run("list").stdout == "no dead jobs\n"
    assert run("list", "--json").stdout == ""
    for name in ("first", "second"):
        killed(name)
    printed = run("list").stdout
    assert printed.index("first") < printed.index("second")
    assert "what kills?" in printed
    found = lines(run("list", "--json"))
    assert [(job["job_id"], job["deaths"], job["pairs"], job["tenant"]) for job in found] == [
        ("first", 3, 1, "t"),
        ("second", 3, 1, "t"),
    ]
    assert SECRET not in printed + run("list", "--json").stdout


def test_dead_show_prints_the_history_and_texts_only_on_request(run: Callable, killed: Callable):
    killed("poison")
    printed = run("show", "poison").stdout
    assert "its worker died 3 times while alone with it" in printed
    assert printed.count("alone") == 4, "three times in the history, once in the reason"
    assert printed.count("lease-over  stand-in") == 3
    assert SECRET not in printed + run("show", "poison", "--json").stdout
    assert SECRET in run("show", "poison", "--payload").stdout
    (found,) = lines(run("show", "poison", "--payload", "--json"))
    assert found["payload"]["chunks"] == [{"text": SECRET}]
    assert [event["event"] for event in found["history"]][:3] == ["alone", "lease-over", "claimed"]


def test_retried_job_gets_a_doorbell_and_can_be_ranked(run: Callable, killed: Callable, client: Client, worker: Any):
    killed("poison")
    with pytest.raises(JobDead):
        client.result("poison", timeout=5)
    done = run("retry", "poison")
    assert (done.exit_code, done.stdout) == (0, "poison  queued\n")
    claim = worker.claim("poison")
    assert claim.suspect, "it is taken alone"
    worker.ledger.ask(calls.hand_back([("poison", claim.fence)]))
    worker.finish("poison")
    assert client.result("poison", timeout=5).job_id == "poison"
    again = run("retry", "poison", "--json")
    assert (again.exit_code, lines(again)) == (1, [{"job_id": "poison", "state": "done"}])


def test_dropped_job_is_gone_and_a_job_that_is_not_dead_stays(run: Callable, killed: Callable, client: Client):
    killed("poison")
    client.submit(RerankJob(id="alive", query="q", chunks=["c"]))
    done = run("drop", "poison", "alive", "nobody")
    assert (done.exit_code, done.stdout) == (1, "poison  dropped\nalive  queued\nnobody  unknown\n")
    assert client.status("alive").state == "queued"
    with pytest.raises(JobUnknown, match="not dead: unknown"):
        client.dead_job("poison")
    assert run("show", "poison").exit_code == 1


@pytest.mark.parametrize(("command", "state"), [("retry", "queued"), ("drop", "dropped")])
def test_all_option_names_every_dead_job(run: Callable, killed: Callable, client: Client, command: str, state: str):
    names = [killed(f"poison-{number}") for number in range(3)]
    done = run(command, "--all", "--json")
    assert (done.exit_code, lines(done)) == (0, [{"job_id": name, "state": state} for name in names])
    assert client.dead() == []
    assert run(command, "--all").exit_code == 0, "none is dead: nothing to do"


@pytest.mark.parametrize(("command", "state"), [("retry", "queued"), ("drop", "dropped")])
def test_states_changed_before_the_ledger_failed_are_printed(
    run: Callable, killed: Callable, command: str, state: str, monkeypatch: pytest.MonkeyPatch
):
    names = [killed(f"poison-{number}") for number in range(3)]
    asked: list[str] = []
    real = getattr(Client, f"{command}_dead")

    def goes_away(client: Client, job_id: str) -> str:
        asked.append(job_id)
        if len(asked) == 3:
            raise BrokerUnavailable("gone")
        return real(client, job_id)

    monkeypatch.setattr(Client, f"{command}_dead", goes_away)
    done = run(command, *names)
    assert done.exit_code != 0
    assert done.stdout == "".join(f"{name}  {state}\n" for name in names[:2])


@pytest.mark.parametrize("command", ["retry", "drop"])
def test_ids_and_all_exclude_each_other_and_one_is_needed(run: Callable, command: str):
    for arguments in ([], ["x", "--all"]):
        done = run(command, *arguments)
        assert done.exit_code == 2
        assert "--all" in done.stderr


def test_control_characters_of_a_query_are_not_printed(run: Callable, killed: Callable):
    killed("poison", query="[red]x[/red] \x9b31m \x1b[31m y")
    for printed in (run("list").stdout, run("show", "poison").stdout):
        assert "[red]x[/red]" in printed
        assert not {"\x9b", "\x1b"} & set(printed)


def test_times_are_printed_in_utc_in_every_time_zone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert dead._clock(1.5) == "1970-01-01 00:00:01.500000Z"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_job_named_twice_is_printed_once(run: Callable, killed: Callable):
    killed("poison")
    done = run("retry", "poison", "poison")
    assert (done.exit_code, done.stdout) == (0, "poison  queued\n")


def test_payload_that_is_not_json_is_printed_as_it_is():
    job = DeadJob(job_id="x", queue="q", tenant="", label="", pairs=1, deaths=3, submitted_at=None, died_at=None,
                  error="e", history=[], payload="no JSON")  # fmt: skip
    assert dead._record(job, payload=True)["payload"] == "no JSON"
    assert "payload" not in dead._record(job)
