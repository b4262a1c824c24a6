"""Batches over HTTP: every line answered once and in order, whatever is killed meanwhile."""

import gzip
import json
import time
from collections.abc import Callable

import httpx
import pytest
from tides import DOCUMENTS, QUERY

from rerankq import Client
from rerankq.gateway.keys import hash_of
from rerankq.settings import Settings

pytestmark = pytest.mark.slow


def line(name: object, **more) -> dict:
    body = {"query": QUERY, "documents": [*DOCUMENTS, f"a text of {name}"]}
    return {"custom_id": name, "method": "POST", "url": "/v1/rerank", "body": body, **more}


def as_lines(*requests: dict) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in requests)


OPENED: list[httpx.Client] = []


@pytest.fixture(autouse=True)
def _closed():
    """Close what talks to gateways."""
    yield
    while OPENED:
        OPENED.pop().close()


class Api:
    """Files and batches of one gateway, over HTTP."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        OPENED.append(self.http)

    def upload(self, content: bytes) -> str:
        answer = self.http.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def create(self, content: bytes, **more) -> dict:
        headers = more.pop("headers", {})
        body = {"input_file_id": self.upload(content), "endpoint": "/v1/rerank", "completion_window": "24h", **more}
        answer = self.http.post("/v1/batches", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def read(self, batch: str) -> dict:
        answer = self.http.get(f"/v1/batches/{batch}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def content(self, file: str | None) -> list[dict]:
        if file is None:
            return []
        answer = self.http.get(f"/v1/files/{file}/content")
        assert answer.status_code == 200, answer.text
        return [json.loads(one) for one in answer.text.splitlines()]

    def ended(self, batch: str, seconds: float = 90) -> dict:
        ends = time.monotonic() + seconds
        while (found := self.read(batch))["status"] not in {"completed", "failed", "expired", "cancelled"}:
            if time.monotonic() > ends:
                pytest.fail(f"did not end: {found}")
            time.sleep(0.05)
        return found


@pytest.fixture
def api(start_gateway, start_worker, tmp_path) -> Api:
    """A gateway with a worker that scores at once."""
    gateway = start_gateway(files_dir=tmp_path / "files")
    start_worker(gateway.settings)
    return Api(gateway.url)


@pytest.fixture
def idle(start_gateway, tmp_path) -> Api:
    """A gateway without a worker."""
    return Api(start_gateway(files_dir=tmp_path / "files").url)


def test_each_line_is_answered_in_its_dialect_and_in_order(api):
    texts = {"query": QUERY, "texts": DOCUMENTS}
    requests = [
        line("a"),
        line("b", url="/rerank", body=texts),
        line("c", url="https://api.example.org/v2/v2/rerank/"),
        line("d", body={"query": QUERY, "documents": [" ", ""]}),
        {"custom_id": "e", "body": {"query": QUERY, "documents": DOCUMENTS, "top_n": 1}},
    ]
    life = {"anchor": "created_at", "seconds": 7200}
    batch = api.create(as_lines(*requests), metadata={"run": "5"}, output_expires_after=life)
    assert (batch["object"], batch["status"], batch["metadata"]) == ("batch", "validating", {"run": "5"})
    ended = api.ended(batch["id"])
    assert ended["status"] == "completed"
    assert ended["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
    assert ended["error_file_id"] is None
    assert ended["completed_at"] >= ended["in_progress_at"] >= ended["created_at"]
    output = api.http.get(f"/v1/files/{ended['output_file_id']}").json()
    assert 0 <= output["expires_at"] - output["created_at"] - 7200 <= 1
    answers = api.content(ended["output_file_id"])
    assert [one["custom_id"] for one in answers] == ["a", "b", "c", "d", "e"]
    assert all(one["response"]["status_code"] == 200 and one["error"] is None for one in answers)
    bodies = [one["response"]["body"] for one in answers]
    alone = api.http.post("/v1/rerank", json=requests[0]["body"]).json()
    assert bodies[0]["results"] == alone["results"]
    assert bodies[1] == api.http.post("/rerank", json=texts).json()
    assert [result["index"] for result in bodies[3]["results"]] == [0, 1]
    assert len(bodies[4]["results"]) == 1
    assert len({one["id"] for one in answers}) == 5


FAULTS = [
    (b"not json", None, "line"),
    (b"[1]", None, "line"),
    (b'{"custom_id": "x"', None, "line"),
    (b'{"body": {}}', None, "custom_id"),
    (b'{"custom_id": 5, "body": {}}', None, "custom_id"),
    (b'{"custom_id": "", "body": {}}', None, "custom_id"),
    (b'{"custom_id": "m", "method": "GET", "body": {}}', "m", "method"),
    (b'{"custom_id": "u", "url": "/v1/chat/completions", "body": {}}', "u", "url"),
    (b'{"custom_id": "v", "url": 5, "body": {}}', "v", "url"),
    (b'{"custom_id": "b"}', "b", "body"),
    (b'{"custom_id": "w", "body": "text"}', "w", "body"),
    (b'{"custom_id": "d", "url": "/v2/rerank", "body": {"query": "q"}}', "d", "body.documents"),
    (
        b'{"custom_id": "q", "url": "/v2/rerank", "body": {"query": "q", "documents": ["a", 5]}}',
        "q",
        "body.documents.1",
    ),
    (b'{"custom_id": "n", "body": {"query": "q", "documents": ["a"], "top_n": -1}}', "n", "body.top_n"),
    (b"\xff\xfe{}", None, "line"),
    (b"[" * 5_000, None, "line"),
]


def test_a_malformed_line_is_answered_with_its_number_and_field(api):
    content = as_lines(line("first")) + b"".join(raw + b"\n" for raw, _, _ in FAULTS) + as_lines(line("last"))
    ended = api.ended(api.create(content)["id"])
    assert ended["request_counts"] == {"total": len(FAULTS) + 2, "completed": 2, "failed": len(FAULTS)}
    assert [one["custom_id"] for one in api.content(ended["output_file_id"])] == ["first", "last"]
    errors = api.content(ended["error_file_id"])
    told = [(one["custom_id"], one["error"]["line"], one["error"]["param"]) for one in errors]
    assert told == [(name, at, field) for at, (_, name, field) in enumerate(FAULTS, 2)]
    assert all(one["response"]["status_code"] == 422 and one["error"]["message"] for one in errors)


def test_byte_order_mark_carriage_returns_blank_lines_and_a_last_line_without_end(api):
    one, other = (json.dumps(line(name)).encode() for name in "ab")
    ended = api.ended(api.create(b"\xef\xbb\xbf" + one + b"\r\n\r\n  \n" + other)["id"])
    assert ended["request_counts"] == {"total": 2, "completed": 2, "failed": 0}


def test_a_repeated_custom_id_is_answered_once_with_a_ranking(api):
    ended = api.ended(api.create(as_lines(line("a"), line("b"), line("a"), line("c"), line("a")))["id"])
    assert [one["custom_id"] for one in api.content(ended["output_file_id"])] == ["a", "b", "c"]
    errors = api.content(ended["error_file_id"])
    assert [(one["error"]["line"], one["error"]["code"]) for one in errors] == [
        (3, "duplicate_custom_id"),
        (5, "duplicate_custom_id"),
    ]


def test_a_line_over_the_limit_is_skipped_and_told(start_gateway, start_worker, tmp_path):
    gateway = start_gateway(files_dir=tmp_path, max_job_bytes=1_000)
    start_worker(gateway.settings)
    api = Api(gateway.url)
    huge = {**line("h"), "padding": "x" * 10_000}
    large = line("l", body={"query": QUERY, "documents": ["x" * 1_500]})
    ended = api.ended(api.create(as_lines(huge, large, line("a")))["id"])
    errors = api.content(ended["error_file_id"])
    assert [(one["custom_id"], one["error"]["code"]) for one in errors] == [
        (None, "line_too_long"),
        ("l", "JobTooLarge"),
    ]
    assert ended["request_counts"]["completed"] == 1


@pytest.mark.parametrize("content", [b"", b"\n\r\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_lines_fails(idle, content):
    ended = idle.ended(idle.create(content)["id"])
    assert ended["status"] == "failed"
    assert ended["errors"]["data"][0]["code"] == "empty_file"
    assert ended["failed_at"]


def test_a_file_of_too_many_lines_fails(start_gateway, tmp_path):
    api = Api(start_gateway(files_dir=tmp_path, max_batch_lines=2).url)
    ended = api.ended(api.create(as_lines(line("a"), line("b"), line("c")))["id"])
    assert (ended["status"], ended["errors"]["data"][0]["code"]) == ("failed", "too_many_lines")


def test_fields_for_all_lines_and_options_by_header_are_taken(api):
    content = as_lines({"custom_id": "a", "body": {"query": QUERY, "documents": DOCUMENTS}})
    batch = api.create(content, request_params={"top_k": 2}, headers={"X-Rerankq-Fusion": "rrf"})
    (answer,) = api.content(api.ended(batch["id"])["output_file_id"])
    results = next(value for value in answer["response"]["body"].values() if isinstance(value, list))
    assert all(result["relevance_score"] < 0.1 for result in results)  # a sum of 1 / (60 + rank)


def test_an_unknown_model_is_an_answer_and_holds_nothing_up(api):
    named = {"query": QUERY, "documents": DOCUMENTS, "model": "BAAI/bge-reranker-v2-m3"}
    ended = api.ended(api.create(as_lines(line("a"), line("b", body=named), line("c")))["id"], 30)
    (error,) = api.content(ended["error_file_id"])
    assert (error["custom_id"], error["error"]["code"]) == ("b", "ModelUnknown")
    assert ended["request_counts"]["completed"] == 2


def test_a_batch_is_counted_while_it_runs_and_can_be_cancelled(start_gateway, start_worker, tmp_path, wait_until):
    gateway = start_gateway(model="stub:0.005", files_dir=tmp_path)
    start_worker(gateway.settings)
    api = Api(gateway.url)
    batch = api.create(as_lines(*(line(f"n{at}") for at in range(150))))["id"]
    wait_until(lambda: api.read(batch)["request_counts"]["completed"] > 0)
    running = api.read(batch)
    assert running["status"] == "in_progress"
    assert running["request_counts"]["total"] == 150
    assert api.http.post(f"/v1/batches/{batch}/cancel").json()["status"] == "cancelling"
    ended = api.ended(batch)
    assert ended["status"] == "cancelled"
    assert ended["cancelled_at"]
    output, errors = api.content(ended["output_file_id"]), api.content(ended["error_file_id"])
    assert 0 < len(output) < 150
    assert sorted(one["custom_id"] for one in output + errors) == sorted(f"n{at}" for at in range(150))
    assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
    with Client(gateway.settings) as client:
        wait_until(lambda: not client.workers() or states_of(gateway.settings.ledger) <= {"done", "cancelled"})
    again = api.http.post(f"/v1/batches/{batch}/cancel")
    assert again.status_code == 409


def states_of(ledger_url: str) -> set[str]:
    import redis  # noqa: PLC0415

    with redis.Redis.from_url(ledger_url, decode_responses=True) as ledger:
        pipe = ledger.pipeline(transaction=False)
        for key in ledger.scan_iter("rerankq:job:*", count=1_000):
            pipe.hget(key, "state")
        return set(pipe.execute())


def test_a_batch_expires_and_says_which_lines_were_not_ranked(idle, monkeypatch):
    from rerankq.gateway import batch_routes  # noqa: PLC0415

    monkeypatch.setattr(batch_routes, "MIN_WINDOW_S", 0)
    ended = idle.ended(idle.create(as_lines(line("a"), line("b")), completion_window="0m")["id"])
    assert (ended["status"], ended["output_file_id"]) == ("expired", None)
    errors = idle.content(ended["error_file_id"])
    assert [(one["custom_id"], one["error"]["code"]) for one in errors] == [
        ("a", "batch_expired"),
        ("b", "batch_expired"),
    ]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "1000d"}, "completion_window"),
        ({"completion_window": "１h"}, "completion_window"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"metadata": {str(at): "" for at in range(17)}}, "metadata"),
        ({"input_file_id": None}, "input_file_id"),
    ],
)
def test_a_malformed_batch_is_refused_by_field(idle, more, field):
    answer = idle.http.post("/v1/batches", json={"input_file_id": "file-1", **more})
    assert (answer.status_code, answer.json()["field"]) == (422, field)


@pytest.mark.parametrize("name", ["file-1", "..", "file-" + "0" * 32, "%2e%2e%2fbatches"])
def test_a_file_that_is_not_there_is_not_found(idle, name):
    assert idle.http.post("/v1/batches", json={"input_file_id": name}).status_code == 404
    assert idle.http.get(f"/v1/files/{name}").status_code == 404
    assert idle.http.get(f"/v1/files/{name}/content").status_code == 404
    assert idle.http.delete(f"/v1/files/{name}").status_code in {404, 405}
    assert idle.http.get("/v1/batches/batch_1").status_code == 404


def test_a_profile_that_is_not_there_is_refused_when_the_batch_is_made(idle):
    body = {"input_file_id": idle.upload(as_lines(line("a")))}
    answer = idle.http.post("/v1/batches", json=body, headers={"X-Rerankq-Fusion": "none-such"})
    assert (answer.status_code, answer.json()["field"]) == (422, "X-Rerankq-Fusion")
    for path in ("/v1/files", "/v1/batches"):
        answer = idle.http.get(path, params={"after": "none-such"})
        assert (answer.status_code, answer.json()["field"]) == (422, "after")


def test_files_are_listed_read_and_deleted(idle):
    names = [idle.upload(f"content {at}".encode()) for at in range(3)]
    found = idle.http.get("/v1/files").json()
    assert [one["id"] for one in found["data"]] == names[::-1]
    page = idle.http.get("/v1/files", params={"limit": 1, "after": names[2]}).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([names[1]], True)
    told = idle.http.get(f"/v1/files/{names[0]}").json()
    assert (told["bytes"], told["filename"], told["purpose"], told["object"]) == (9, "in.jsonl", "batch", "file")
    assert idle.http.get(f"/v1/files/{names[0]}/content").content == b"content 0"
    assert idle.http.delete(f"/v1/files/{names[0]}").json() == {"id": names[0], "object": "file", "deleted": True}
    assert idle.http.get(f"/v1/files/{names[0]}").status_code == 404
    assert len(idle.http.get("/v1/files").json()["data"]) == 2


def test_a_batch_goes_on_when_its_file_is_deleted(idle, start_worker):
    batch = idle.create(as_lines(line("a")))
    assert idle.http.delete(f"/v1/files/{batch['input_file_id']}").status_code == 200
    assert idle.read(batch["id"])["status"] in {"validating", "in_progress"}


@pytest.mark.parametrize(
    ("files", "data", "field"),
    [
        ({}, {"purpose": "batch"}, "file"),
        ({"file": ("x", b"x")}, {}, "purpose"),
        ({"file": ("x", b"x")}, {"purpose": "fine-tune"}, "purpose"),
        ({"file": ("x", b"x")}, {"purpose": "batch", "expires_after[seconds]": "soon"}, "expires_after[seconds]"),
        ({"file": ("x", b"x")}, {"purpose": "batch", "expires_after[seconds]": "３６００"}, "expires_after[seconds]"),
        ({"file": ("x", gzip.compress(b"{}"))}, {"purpose": "batch"}, "file"),
        ({"file": ("x", "{}".encode("utf-16"))}, {"purpose": "batch"}, "file"),
    ],
)
def test_a_malformed_upload_is_refused_by_field(idle, files, data, field):
    answer = idle.http.post("/v1/files", files=files, data=data)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_a_file_may_be_larger_than_a_job_and_not_than_its_own_limit(start_gateway, tmp_path):
    api = Api(start_gateway(files_dir=tmp_path, max_job_bytes=1_000, max_file_bytes=100_000).url)
    assert api.upload(b"x" * 90_000)
    for size in (110_000, 3_000_000):
        files = {"file": ("x", b"x" * size)}
        assert api.http.post("/v1/files", files=files, data={"purpose": "batch"}).status_code == 413


def test_batches_are_listed_the_newest_first(idle):
    content = as_lines(line("a"))
    names = [idle.create(content)["id"] for _ in range(3)]
    found = idle.http.get("/v1/batches", params={"limit": 2}).json()
    assert ([one["id"] for one in found["data"]], found["has_more"]) == ([names[2], names[1]], True)
    rest = idle.http.get("/v1/batches", params={"limit": 2, "after": found["last_id"]}).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == ([names[0]], False)


def started(process: Callable, redis_url: str, folder) -> Api:
    gateway = process(broker_url=redis_url, model="stub:0.004", files_dir=str(folder))
    api = Api(gateway.url)
    api.process = gateway
    return api


def test_a_gateway_and_a_worker_killed_in_the_middle_leave_no_line_out_and_none_twice(
    redis_url, start_gateway_process, start_worker, tmp_path, wait_until
):
    settings = Settings(broker_url=redis_url, model="stub:0.004", lease_s=1, _env_file=None)
    first = started(start_gateway_process, redis_url, tmp_path)
    worker = start_worker(settings)
    count = 200
    content = as_lines(*(line(f"n{at}") for at in range(count))) + b"malformed\n"
    batch = first.create(content)["id"]
    wait_until(lambda: first.read(batch)["request_counts"]["completed"] > 20, 60)
    first.process.kill()
    worker.kill()
    start_worker(settings)
    second = started(start_gateway_process, redis_url, tmp_path)
    before = second.read(batch)
    assert before["status"] == "in_progress"
    wait_until(lambda: second.read(batch)["request_counts"]["completed"] > before["request_counts"]["completed"], 60)
    second.process.kill()
    third = started(start_gateway_process, redis_url, tmp_path)
    ended = third.ended(batch, 150)
    assert ended["status"] == "completed"
    assert ended["request_counts"] == {"total": count + 1, "completed": count, "failed": 1}
    assert [one["custom_id"] for one in third.content(ended["output_file_id"])] == [f"n{at}" for at in range(count)]
    assert [one["error"]["line"] for one in third.content(ended["error_file_id"])] == [count + 1]


def test_of_two_gateways_one_runs_a_batch_and_both_tell_of_it(start_gateway, start_worker, tmp_path):
    apis = []
    for _ in range(2):
        gateway = start_gateway(files_dir=tmp_path)
        apis.append(Api(gateway.url))
    start_worker(gateway.settings)
    batch = apis[0].create(as_lines(*(line(f"n{at}") for at in range(100))))["id"]
    ended = [api.ended(batch) for api in apis]
    assert ended[0] == ended[1]
    assert len(apis[1].content(ended[1]["output_file_id"])) == 100


def test_a_batch_outlives_an_outage_of_redis(
    restartable_redis, start_gateway_process, start_worker, tmp_path, wait_until
):
    settings = Settings(broker_url=restartable_redis.url, model="stub:0.004", _env_file=None)
    api = started(start_gateway_process, restartable_redis.url, tmp_path / "files")
    start_worker(settings)
    batch = api.create(as_lines(*(line(f"n{at}") for at in range(120))))["id"]
    wait_until(lambda: api.read(batch)["request_counts"]["completed"] > 5, 60)
    restartable_redis.kill()
    restartable_redis.start()
    ended = api.ended(batch, 150)
    assert ended["request_counts"] == {"total": 120, "completed": 120, "failed": 0}
    assert [one["custom_id"] for one in api.content(ended["output_file_id"])] == [f"n{at}" for at in range(120)]


def test_files_and_batches_of_another_tenant_are_unknown(start_gateway, tmp_path):
    hashes = {name: hash_of(f"rerankq-{name}-and-forty-characters-of-nothing") for name in ("one", "two")}
    keys = ",".join(f"{name}:{digest}" for name, digest in hashes.items())
    gateway = start_gateway(files_dir=tmp_path, api_keys=keys)
    one, two = Api(gateway.url), Api(gateway.url)
    for api, name in ((one, "one"), (two, "two")):
        api.http.headers["Authorization"] = f"Bearer rerankq-{name}-and-forty-characters-of-nothing"
    batch = one.create(as_lines(line("a")))
    file = batch["input_file_id"]
    for path in (f"/v1/files/{file}", f"/v1/files/{file}/content", f"/v1/batches/{batch['id']}"):
        assert one.http.get(path).status_code == 200
        assert two.http.get(path).status_code == 404
    assert two.http.delete(f"/v1/files/{file}").status_code == 404
    assert two.http.post(f"/v1/batches/{batch['id']}/cancel").status_code == 404
    assert two.http.post("/v1/batches", json={"input_file_id": file}).status_code == 404
    assert (two.http.get("/v1/files").json()["data"], two.http.get("/v1/batches").json()["data"]) == ([], [])
    assert len(one.http.get("/v1/files").json()["data"]) == 1
