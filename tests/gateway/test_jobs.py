"""The native API: submit, wait, follow, cancel, over HTTP."""

import json
import threading

import httpx
import pytest
from tides import DOCUMENTS, QUERY

JOB = {"query": QUERY, "chunks": DOCUMENTS}


def submitted(http, job=JOB, **headers):
    answer = http.post("/v1/jobs", json=job, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()["job_id"]


def events_of(http, job_id, found=None):
    """(event, data) of a stream until its end; in *found* as they come."""
    found, event = [] if found is None else found, ""
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                event = value
            elif name == "data":
                found.append((event, json.loads(value)))
    return found


def test_a_job_is_accepted_at_once_and_its_ranking_waited_for(http):
    answer = http.post("/v1/jobs", json=JOB)
    assert answer.status_code == 202
    told = answer.json()
    assert answer.headers["location"] == told["links"]["self"] == f"/v1/jobs/{told['job_id']}"
    ended = http.get(told["links"]["self"], params={"wait": 30}).json()
    assert ended["state"] == "done"
    assert ended["ranking"]["chunks"][0]["index"] == 1
    assert ended["status"]["pairs_done"] == len(DOCUMENTS)
    assert ended["error"] is None
    # Without waiting, now that it has ended.
    assert http.get(told["links"]["self"]).json()["ranking"] == ended["ranking"]


def test_equal_jobs_are_one_job(http):
    assert submitted(http) == submitted(http)


def test_an_idempotency_key_names_one_job(http):
    first = submitted(http, **{"Idempotency-Key": "a"})
    assert submitted(http, **{"Idempotency-Key": "a"}) == first
    assert submitted(http, **{"Idempotency-Key": "b"}) != first
    other = http.post("/v1/jobs", json={**JOB, "query": "another"}, headers={"Idempotency-Key": "a"})
    assert other.status_code == 422
    assert "other content" in other.json()["message"]
    assert other.json()["field"] == "Idempotency-Key"


def test_an_idempotency_key_names_the_jobs_of_a_batch_by_their_places(http):
    jobs = {"jobs": [{**JOB, "cache": "bypass"}] * 2}
    ids = [
        [
            job["job_id"]
            for job in http.post("/v1/jobs/batch", json=jobs, headers={"Idempotency-Key": key}).json()["jobs"]
        ]
        for key in ("first", "first", "second")
    ]
    assert ids[0] == ids[1]
    assert len({*ids[0], *ids[2]}) == 4


def test_many_jobs_are_submitted_in_one_call(http):
    answer = http.post("/v1/jobs/batch", json={"jobs": [{**JOB, "query": f"{QUERY} {at}"} for at in range(5)]})
    assert answer.status_code == 202
    ids = [job["job_id"] for job in answer.json()["jobs"]]
    assert len(set(ids)) == 5
    assert all(http.get(f"/v1/jobs/{one}", params={"wait": 30}).json()["state"] == "done" for one in ids)
    again = http.post("/v1/jobs/batch", json={"jobs": [{**JOB, "query": f"{QUERY} 0"}]})
    assert again.json()["jobs"][0]["state"] == "done"


def test_a_malformed_job_among_many_is_named_and_none_is_accepted(http):
    jobs = [{**JOB, "query": "never accepted"}, {**JOB, "chunks": []}]
    answer = http.post("/v1/jobs/batch", json={"jobs": jobs})
    assert answer.status_code == 422
    assert answer.json()["field"].startswith("jobs.1")
    assert "accepted" not in answer.json()


@pytest.mark.parametrize(
    ("job", "field"),
    [
        ({"query": QUERY}, "chunks"),
        ({**JOB, "priority": "high"}, "priority"),
        ({**JOB, "fusion": "unheard"}, "fusion"),
        ({**JOB, "unheard": 1}, "unheard"),
        ({**JOB, "chunks": [{"text": "a"}, {"text": 3}]}, "chunks.1.text"),
    ],
)
def test_malformed_jobs_are_refused_by_field(http, job, field):
    answer = http.post("/v1/jobs", json=job)
    assert answer.status_code == 422
    assert answer.json()["field"] == field


def test_an_unknown_job_is_not_found(http):
    assert http.get("/v1/jobs/unheard").status_code == 404
    assert http.delete("/v1/jobs/unheard").status_code == 404
    assert http.get("/v1/jobs/unheard/events").status_code == 404
    assert http.get("/v1/jobs/unheard/webhooks").status_code == 404


@pytest.mark.parametrize("wait", ["-1", "soon", "1e9"])
def test_a_wait_that_is_no_number_of_seconds_is_refused(http, wait):
    answer = http.get("/v1/jobs/unheard", params={"wait": wait})
    assert answer.status_code == 422
    assert answer.json()["field"] == "wait"


def test_a_job_is_followed_to_its_ranking(http):
    job_id = submitted(http, {**JOB, "query": f"{QUERY} followed"})
    events = events_of(http, job_id)
    assert events[0][0] == "state"
    assert events[-2:-1] == [("progress", {"pairs_done": 3, "pairs_total": 3})]
    assert [data["state"] for name, data in events if name == "state"][-1] == "done"
    name, ranking = events[-1]
    assert name == "ranking"
    assert ranking["job_id"] == job_id
    assert ranking["chunks"][0]["index"] == 1


def test_who_has_seen_the_last_event_is_told_not_to_connect_again(http):
    job_id = submitted(http)
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        (last_id,) = {line[4:] for line in stream.iter_lines() if line.startswith("id: ")}
    again = http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": last_id})
    assert (again.status_code, again.content) == (204, b"")


def test_a_follower_is_not_cut_off_by_an_outage_of_redis(restartable_redis, start_gateway, wait_until):
    followed = []
    with httpx.Client(base_url=start_gateway(broker_url=restartable_redis.url).url, timeout=60) as http:
        job_id = submitted(http)
        follower = threading.Thread(target=events_of, args=(http, job_id, followed))
        follower.start()
        wait_until(lambda: followed)
        restartable_redis.kill()
        wait_until(lambda: http.get(f"/v1/jobs/{job_id}").status_code == 503)
        restartable_redis.start()
        wait_until(lambda: http.delete(f"/v1/jobs/{job_id}").status_code == 200)
        follower.join(30)
    assert [name for name, _ in followed] == ["state", "state", "error"]
    assert followed[-1][1]["error_type"] == "JobCancelled"


@pytest.fixture
def slow(start_gateway, start_worker):
    """Talks to a gateway whose worker takes a quarter of a second for a pair, ten pairs at a time."""
    gateway = start_gateway(model="stub:0.05")
    start_worker(gateway.settings, RERANKQ_MAX_BATCH_TOKENS="64")
    with httpx.Client(base_url=gateway.url, timeout=60) as http:
        yield http


def test_progress_is_told_while_a_job_runs(slow):
    job_id = submitted(slow, {"query": "q", "chunks": [f"chunk {at}" for at in range(40)], "priority": "bulk"})
    events = events_of(slow, job_id)
    assert [name for name, _ in events][-1] == "ranking"
    done = [data["pairs_done"] for name, data in events if name == "progress"]
    assert len(done) >= 2
    assert done == sorted(done)


def test_a_cancelled_job_ends_for_who_waits_and_who_follows(slow):
    job_id = submitted(slow, {"query": "q", "chunks": [f"chunk {at}" for at in range(400)]})
    followed = []
    follower = threading.Thread(target=lambda: followed.extend(events_of(slow, job_id)))
    follower.start()
    assert slow.get(f"/v1/jobs/{job_id}", params={"wait": 0.3}).json()["state"] in {"queued", "running"}
    assert slow.delete(f"/v1/jobs/{job_id}").json() == {"job_id": job_id, "state": "cancelled"}
    ended = slow.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()
    assert (ended["state"], ended["error_type"]) == ("cancelled", "JobCancelled")
    follower.join(30)
    assert followed[-1][0] == "error"
    assert followed[-1][1]["error_type"] == "JobCancelled"


def test_submissions_are_accepted_while_no_worker_runs(start_gateway):
    with httpx.Client(base_url=start_gateway().url, timeout=30) as http:
        job_id = submitted(http)
        waited = http.get(f"/v1/jobs/{job_id}", params={"wait": 0.2})
    assert waited.status_code == 200
    assert waited.json()["state"] == "queued"
