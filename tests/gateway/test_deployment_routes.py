"""What a deployment tells of itself over HTTP, and what can be done about its dead jobs."""

import json

import httpx
import pytest
from test_keys import bearer, keys_file

from rerankq import Client, RerankJob
from rerankq.ledger import LedgerLimits, calls, connect
from rerankq.ledger.runner import Ledger
from rerankq.settings import Settings

SECRET = "a chunk that nobody shall read by the way"
QUESTION = "what kills"


@pytest.fixture
def gateway(start_gateway):
    """A gateway without a worker."""
    return start_gateway()


@pytest.fixture
def api(gateway):
    with httpx.Client(base_url=gateway.url) as client:
        yield client


def kill(settings: Settings, name: str, tenant: str = "t") -> None:
    """Submit a job and let it kill its workers until it is dead."""
    limits = LedgerLimits.of(settings)
    with Client(settings) as client, connect(settings.ledger) as redis:
        client.submit(RerankJob(id=name, query=QUESTION, chunks=[SECRET, "x"], tenant=tenant))
        ledger = Ledger(redis)
        for number in range(limits.max_attempts):
            owner = f"stand-in-{number}-{name}"
            claim = ledger.ask(calls.claim(name, owner, limits))
            ledger.ask(calls.isolate(name, claim.fence, owner))
            redis.zadd("rerankq:running", {name: 1})
            redis.delete("rerankq:sweeper")
            ledger.ask(calls.sweep("s", limits))
        assert client.status(name).state == "dead"


def test_an_empty_deployment_has_nothing_to_tell(api):
    told = api.get("/v1/deployment").json()
    assert (told["workers"], told["queues"], told["running"], told["dead"], told["oldest_s"]) == ([], [], 0, 0, None)
    assert told["default_model"] == "stub"
    assert api.get("/v1/dead").json() == {"jobs": [], "total": 0}


def test_waiting_jobs_are_counted_by_queue_with_the_age_of_the_oldest(api, gateway):
    with Client(gateway.settings) as client:
        client.submit_many([RerankJob(query="q", chunks=["a", "b"], tenant=tenant) for tenant in ("x", "y")])
        client.submit(RerankJob(query="q", chunks=["a"], priority="bulk"))
    with connect(gateway.settings.ledger) as redis:
        [some, *_] = [key for key in redis.scan_iter("rerankq:job:*") if redis.hget(key, "tenant") == b"x"]
        redis.hset(some, "created", float(redis.hget(some, "created")) - 50)
    told = api.get("/v1/deployment").json()
    assert (told["waiting_jobs"], told["waiting_pairs"]) == (3, 5)
    queues = {queue["name"]: queue for queue in told["queues"]}
    urgent, bulk = queues["rerankq.interactive"], queues["rerankq.bulk"]
    assert (urgent["jobs"], urgent["pairs"], urgent["workers"]) == (2, 4, 0)
    assert 50 <= urgent["oldest_s"] == told["oldest_s"] < 110
    assert (bulk["jobs"], bulk["pairs"]) == (1, 1)
    assert bulk["oldest_s"] < 50


def test_workers_tell_what_they_ranked_and_how_much_came_from_the_score_cache(start_gateway, start_worker, wait_until):
    gateway = start_gateway()
    start_worker(gateway.settings)
    with Client(gateway.settings) as client, httpx.Client(base_url=gateway.url) as api:
        for name in ("one", "two"):
            client.rerank("q", ["a", "b"], id=name, timeout=60, fusion="model")

        def worker():
            [found] = api.get("/v1/deployment").json()["workers"]
            return found

        # It says so with its next sign of life.
        wait_until(lambda: worker()["jobs"] == 2)
        assert (worker()["pairs"], worker()["cached_pairs"]) == (4, 2)
        assert worker()["model"] == "stub"
        assert worker()["queues"] == ["rerankq.interactive", "rerankq.bulk"]


def test_dead_jobs_are_listed_with_their_history_and_without_any_of_their_texts(api, gateway):
    kill(gateway.settings, "poison")
    answer = api.get("/v1/dead")
    [job] = answer.json()["jobs"]
    assert (job["job_id"], job["tenant"], job["pairs"], job["payload"]) == ("poison", "t", 2, None)
    assert {event["event"] for event in job["history"]} >= {"claimed", "alone", "lease-over"}
    assert SECRET not in answer.text
    assert QUESTION not in answer.text
    assert SECRET not in api.get("/v1/dead/poison").text
    assert SECRET in json.loads(api.get("/v1/dead/poison?payload=true").json()["payload"])["chunks"][0]["text"]


def test_a_dead_job_is_retried_or_dropped_and_no_other_one(api, gateway):
    kill(gateway.settings, "poison")
    kill(gateway.settings, "poison-2")
    assert api.get("/v1/dead?limit=1").json()["total"] == 2
    assert len(api.get("/v1/dead?limit=1").json()["jobs"]) == 1
    assert api.post("/v1/dead/poison/retry").json() == {"job_id": "poison", "state": "queued"}
    assert api.post("/v1/dead/poison/retry").status_code == 404
    assert api.delete("/v1/dead/poison").status_code == 404
    assert api.delete("/v1/dead/poison-2").json() == {"job_id": "poison-2", "state": "dropped"}
    assert api.get("/v1/dead/poison-2").status_code == 404
    assert api.get("/v1/dead").json()["total"] == 0
    with Client(gateway.settings) as client:
        assert client.status("poison").state == "queued"


def test_fusion_profiles_are_told_with_their_numbers_and_what_they_are_for(api):
    profiles = {one["name"]: one for one in api.get("/v1/fusion-profiles").json()["profiles"]}
    assert profiles["default"]["fusion"]["weights"] == {"model": 0.7, "pagerank": 0.1, "tags": 0.1, "token": 0.3}
    assert profiles["rrf"]["fusion"]["method"] == "rrf"
    assert profiles["rrf"]["description"].startswith("Reciprocal ranks")
    for one in profiles.values():
        job = {"query": "q", "chunks": ["a"], "fusion": one["fusion"]}
        assert api.post("/v1/jobs", json=job).status_code == 202


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/deployment"),
        ("GET", "/v1/dead"),
        ("GET", "/v1/dead/poison?payload=true"),
        ("POST", "/v1/dead/poison/retry"),
        ("DELETE", "/v1/dead/poison"),
    ],
)
def test_where_there_are_keys_only_an_operators_sees_the_deployment_and_its_dead_jobs(
    start_gateway, tmp_path, method, path
):
    gateway = start_gateway(api_keys=str(keys_file(tmp_path, one={}, all={"tenant": "*", "operator": True})))
    kill(gateway.settings, "poison")
    with httpx.Client(base_url=gateway.url) as api:
        assert api.request(method, path).status_code == 401
        refused = api.request(method, path, headers=bearer("one"))
        assert (refused.status_code, SECRET in refused.text) == (403, False)
        assert api.request(method, path, headers=bearer("all")).status_code == 200
        assert api.get("/v1/fusion-profiles", headers=bearer("one")).status_code == 200
        for public in ("/", "/deployment", "/playground/playground.js"):
            assert api.get(public).status_code == 200
