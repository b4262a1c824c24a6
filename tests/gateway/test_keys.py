"""API keys: who is let in, as which tenant, how urgently, and how much."""

import asyncio
import json
import re
import threading
import time

import httpx
import pytest
import redis
from tides import DOCUMENTS, QUERY
from typer.testing import CliRunner

from rerankq import Client
from rerankq.cli.app import app
from rerankq.errors import BrokerUnavailable, JobTooLarge, RateLimited, SettingsInvalid
from rerankq.gateway.app import create_app
from rerankq.gateway.keys import ApiKey, KnownKeys, entry_of, hash_of, new_key, parse_keys
from rerankq.gateway.rates import KEY_PREFIX, Rates
from rerankq.settings import Settings

pytestmark = pytest.mark.slow

BODY = {"query": QUERY, "documents": DOCUMENTS}
HASH = "a" * 64
SECRETS = {name: f"rerankq-{name}-and-forty-characters-of-nothing" for name in ("one", "two", "all", "slow")}


def keys_file(folder, **entries: dict):
    """Write a file of keys: their fields by name."""
    made = [ApiKey(name=name, hash=hash_of(SECRETS[name]), **fields) for name, fields in entries.items()]
    file = folder / "keys.toml"
    file.write_text("\n\n".join(map(entry_of, made)))
    return file


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[name]}"}


@pytest.fixture
def guarded(start_gateway, start_worker, tmp_path):
    """A gateway with keys of two tenants and one for all, and a worker."""
    file = keys_file(
        tmp_path,
        one={},
        two={"tenant": "second", "priority": "bulk"},
        all={"tenant": "*", "operator": True},
    )
    gateway = start_gateway(api_keys=str(file))
    start_worker(gateway.settings)
    return gateway


# Entries ------------------------------------------------------------------------------------------------------------


def test_keys_are_read_from_a_line_and_from_a_file(tmp_path):
    (found,) = parse_keys(f"search:sha256:{HASH}")
    assert (found.name, found.hash, found.own_tenant) == ("search", f"sha256:{HASH}", "search")
    assert [key.name for key in parse_keys(f"a:{HASH}, b:{'B' * 64},")] == ["a", "b"]
    file = keys_file(tmp_path, one={"tenant": "*", "pairs_per_minute": 5}, two={"priority": "bulk"})
    one, two = parse_keys(str(file))
    assert (one.own_tenant, one.pairs_per_minute, two.priority) == (None, 5, "bulk")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("search:not-a-hash", "key 1: hash: expected the SHA-256"),
        ("rerankq-a-key-itself", "key 1: hash: expected the SHA-256"),
        (f"a b:{HASH}", "key 1: name: "),
        (f"a:{HASH},a:{'b' * 64}", "two keys have the name 'a'"),
        (f"a:{HASH},b:{HASH}", "two keys have the hash"),
        (",", "holds no keys"),
        ("nowhere/keys.toml", "cannot be read"),
    ],
)
def test_wrong_keys_are_refused_by_entry_and_field_without_what_was_given(setting, said):
    with pytest.raises(SettingsInvalid) as refused:
        parse_keys(setting)
    assert "RERANKQ_API_KEYS" in str(refused.value)
    assert said in str(refused.value)
    assert "rerankq-a-key-itself" not in str(refused.value)
    assert "not-a-hash" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected entries"),
        ("keys = 1", "expected entries"),
        ("keys = [1]", "expected entries"),
        ("other = 1", "expected entries"),
        ("keys = []", "holds no keys"),
        ("[[keys]", "line 1"),
        (f'[[keys]]\nname = "a"\nhash = "{HASH}"\ntennant = "b"', "key 1: tennant: "),
        (f'[[keys]]\nname = "a"\nhash = "{HASH}"\nconcurrent = 0', "key 1: concurrent: "),
        (f'[[keys]]\nname = "a"\nhash = "{HASH}"\npriority = "high"', "key 1: priority: "),
    ],
)
def test_a_wrong_file_of_keys_is_refused_by_entry_and_field(tmp_path, text, said):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(SettingsInvalid, match=r"keys\.toml") as refused:
        parse_keys(str(file))
    assert said in str(refused.value)


def test_made_keys_are_long_and_never_the_same():
    made = {new_key() for _ in range(50)}
    assert len(made) == 50
    assert all(len(key) > 45 for key in made)


def test_the_command_prints_a_key_and_an_entry_that_knows_it(tmp_path):
    run = CliRunner().invoke(
        app, ["key", "search", "--tenant", "shop", "--priority", "bulk", "--pairs-per-minute", "9"]
    )
    assert run.exit_code == 0
    (made,) = re.findall(r"^rerankq-\S+$", run.output, re.MULTILINE)
    file = tmp_path / "keys.toml"
    file.write_text(run.output.partition("[[keys]]")[1] + run.output.partition("[[keys]]")[2])
    found = KnownKeys(str(file)).find(made)
    assert found is not None
    assert (found.own_tenant, found.priority, found.pairs_per_minute) == ("shop", "bulk", 9)
    for wrong in (["key", "a b"], ["key", "a", "--priority", "high"], ["key", "a", "--concurrent", "0"]):
        assert CliRunner().invoke(app, wrong).exit_code == 2


def test_a_changed_file_of_keys_holds_at_once_and_a_broken_one_leaves_the_last(tmp_path):
    file = keys_file(tmp_path, one={})
    known = KnownKeys(str(file))
    assert known.find(SECRETS["one"]) is not None
    keys_file(tmp_path, two={})
    known.refresh()
    assert known.find(SECRETS["one"]) is None
    assert known.find(SECRETS["two"]) is not None
    for broken in ("[[keys]]\nname = 5", "[[keys]"):
        file.write_text(broken)
        known.refresh()
        known.refresh()
        assert known.find(SECRETS["two"]) is not None
    file.unlink()
    known.refresh()
    assert known.find(SECRETS["two"]) is not None


@pytest.mark.parametrize("emptied", ["", "# none\n", "keys = []\n"])
def test_the_last_key_that_is_taken_out_of_the_file_is_void_and_opens_nothing(tmp_path, emptied):
    file = keys_file(tmp_path, one={})
    known = KnownKeys(str(file))
    file.write_text(emptied)
    known.refresh()
    assert known.find(SECRETS["one"]) is not None  # it may be about to be written
    known.refresh()
    assert known.find(SECRETS["one"]) is None
    assert known  # keys are asked for
    keys_file(tmp_path, two={})
    known.refresh()
    assert known.find(SECRETS["two"]) is not None


# Who is let in ------------------------------------------------------------------------------------------------------


def test_without_keys_only_the_loopback_is_served(redis_url):
    settings = Settings(broker_url=redis_url, host="0.0.0.0", _env_file=None)
    with pytest.raises(SettingsInvalid, match=r"RERANKQ_API_KEYS.*RERANKQ_OPEN_ACCESS"):
        create_app(settings)
    create_app(settings.model_copy(update={"open_access": True}))
    create_app(settings.model_copy(update={"api_keys": f"a:{HASH}"}))


def test_a_key_comes_in_the_headers_that_clients_use(guarded):
    key = SECRETS["one"]
    for headers in (
        bearer("one"),
        {"Authorization": f"bearer {key}"},
        {"Authorization": key},
        {"X-API-Key": key},
        {"api-key": key},
        {"Authorization": "Bearer", "X-API-Key": key},
    ):
        answer = httpx.post(f"{guarded.url}/v2/rerank", json=BODY, headers=headers)
        assert answer.status_code == 200, (headers, answer.text)


def test_who_has_no_key_is_refused_in_every_dialects_form_before_its_body_is_read(guarded):
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer wrong"}, {"X-API-Key": "é".encode()}):
        for path in ("/v2/rerank", "/rerank", "/v1/jobs", "/no/such/path"):
            # No JSON, and too large: nobody looked.
            answer = httpx.post(f"{guarded.url}{path}", content=b"{", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            told = answer.json()
            assert told["message"] == told["detail"] == told["error"]
            assert told["error_type"] == "unauthorized"
    for path in ("/v1/jobs/a", "/metrics", "/v1/jobs/health"):
        assert httpx.get(guarded.url + path).status_code == 401
    for path in ("/health/live", "/openapi.json"):
        assert httpx.get(guarded.url + path).status_code == 200
    # Xinference's client sends its key only if it is told that one is needed.
    for path in ("/v1/cluster/auth", "/xinference/v1/cluster/auth"):
        assert httpx.get(guarded.url + path).json() == {"auth": True}


def test_a_ceiling_and_a_tenant_are_laid_on_every_call(guarded):
    with redis.Redis.from_url(guarded.settings.ledger, decode_responses=True) as ledger:
        for path, body in (("/v2/rerank", BODY), ("/v1/jobs", {"query": "q", "chunks": ["a"]})):
            answer = httpx.post(f"{guarded.url}{path}", json={**body, "priority": 0}, headers=bearer("two"))
            if path == "/v1/jobs":
                answer = httpx.post(f"{guarded.url}{path}", json=body, headers=bearer("two"))
            assert answer.status_code in {200, 202}, answer.text
            job = ledger.hgetall(f"rerankq:job:{answer.headers['x-rerankq-job']}")
            assert (job["tenant"], job["priority"]) == ("second", "bulk")


def test_another_tenant_cannot_be_named_unless_a_key_is_for_all(guarded):
    for headers in ({"X-Rerankq-Tenant": "else"}, {}):
        body = {"query": "q", "chunks": ["a"], **({} if headers else {"tenant": "else"})}
        path, body = ("/v2/rerank", BODY) if headers else ("/v1/jobs", body)
        answer = httpx.post(f"{guarded.url}{path}", json=body, headers={**bearer("one"), **headers})
        assert answer.status_code == 403
        assert answer.json()["code"] == "NotAllowed"
        assert httpx.post(f"{guarded.url}{path}", json=body, headers={**bearer("all"), **headers}).status_code < 300
    own = httpx.post(f"{guarded.url}/v2/rerank", json=BODY, headers={**bearer("one"), "X-Rerankq-Tenant": "one"})
    assert own.status_code == 200


def test_a_job_of_another_tenant_is_as_unknown_as_one_that_never_was(guarded):
    body = {"query": "q", "chunks": ["a"], "id": "of-one"}
    assert httpx.post(f"{guarded.url}/v1/jobs", json=body, headers=bearer("one")).status_code == 202
    for way in (
        lambda client, job: client.get(f"/v1/jobs/{job}"),
        lambda client, job: client.get(f"/v1/jobs/{job}?wait=1"),
        lambda client, job: client.get(f"/v1/jobs/{job}/events"),
        lambda client, job: client.delete(f"/v1/jobs/{job}"),
    ):
        with httpx.Client(base_url=guarded.url, headers=bearer("two"), timeout=20) as client:
            theirs, none = way(client, "of-one"), way(client, "never-was")
        assert theirs.status_code == none.status_code == 404
        assert theirs.text.replace("of-one", "ID") == none.text.replace("never-was", "ID")
    for name in ("one", "all"):
        assert httpx.get(f"{guarded.url}/v1/jobs/of-one?wait=20", headers=bearer(name)).json()["state"] == "done"


# How much -----------------------------------------------------------------------------------------------------------


def limited(start_gateway, tmp_path, **limits):
    return start_gateway(api_keys=str(keys_file(tmp_path, one=limits, two={})))


def test_requests_beyond_a_keys_rate_are_refused_until_they_may_come(start_gateway, tmp_path):
    gateway = limited(start_gateway, tmp_path, requests_per_minute=3)
    answers = [httpx.get(f"{gateway.url}/v1/jobs/a", headers=bearer("one")) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [404, 404, 404, 429]
    refused = answers[-1]
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert refused.json()["error_type"] == "overloaded"
    assert "3 requests a minute" in refused.json()["message"]
    assert httpx.get(f"{gateway.url}/v1/jobs/a", headers=bearer("two")).status_code == 404
    assert httpx.get(f"{gateway.url}/health/live", headers=bearer("one")).status_code == 200


@pytest.mark.parametrize("path", ["/v2/rerank", "/v1/jobs", "/v1/jobs/batch"])
@pytest.mark.parametrize("limit", [{"pairs_per_minute": 4}, {"tokens_per_minute": 12}])
def test_pairs_and_tokens_are_counted_before_they_are_ranked(start_gateway, start_worker, tmp_path, path, limit):
    gateway = limited(start_gateway, tmp_path, **limit)
    start_worker(gateway.settings)

    def ask(count: int) -> httpx.Response:
        # 12 bytes with the query: 3 tokens each.
        job = {"query": "four", "chunks": ["eight888"] * count}
        body = {
            "/v2/rerank": {"query": "four", "documents": ["eight888"] * count},
            "/v1/jobs": job,
            "/v1/jobs/batch": {"jobs": [job]},
        }[path]
        return httpx.post(f"{gateway.url}{path}", json=body, headers=bearer("one"), timeout=30)

    assert ask(3).status_code < 300
    assert ask(2).status_code == 429
    assert ask(1).status_code < 300
    never = ask(5)
    assert never.status_code == 413, never.text
    assert "retry-after" not in never.headers


def test_rates_are_those_of_all_gateways_together(start_gateway, tmp_path):
    first = limited(start_gateway, tmp_path, requests_per_minute=2)
    second = limited(start_gateway, tmp_path, requests_per_minute=2)
    statuses = [httpx.get(f"{at.url}/v1/jobs/a", headers=bearer("one")).status_code for at in (first, second, first)]
    assert statuses == [404, 404, 429]


def test_calls_beyond_a_keys_places_wait_for_their_turn(start_gateway, start_worker, tmp_path):
    gateway = limited(start_gateway, tmp_path, concurrent=2)
    start_worker(gateway.settings)
    answers, most = [], []

    def ask():
        answers.append(httpx.post(f"{gateway.url}/v2/rerank", json=BODY, headers=bearer("one"), timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    with redis.Redis.from_url(gateway.settings.ledger) as ledger:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most.append(ledger.zcard(f"{KEY_PREFIX}:places:one"))
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in answers] == [200] * 12
    assert max(most) <= 2


def test_a_call_that_finds_no_place_in_its_time_is_told_when_to_come_back(start_gateway, start_worker, tmp_path):
    gateway = limited(start_gateway, tmp_path, concurrent=1)
    with redis.Redis.from_url(gateway.settings.ledger) as ledger:
        ledger.zadd(f"{KEY_PREFIX}:places:one", {"another gateway's": time.time() + 60})
        headers = {**bearer("one"), "X-Rerankq-Timeout": "0.5"}
        answer = httpx.post(f"{gateway.url}/v2/rerank", json=BODY, headers=headers, timeout=30)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        # Cancelling is no call: it needs no place.
        assert httpx.delete(f"{gateway.url}/v1/jobs/a", headers=bearer("one")).status_code == 404
        # A gateway that died gives no sign of life: its places are free when their time is over.
        ledger.zadd(f"{KEY_PREFIX}:places:one", {"another gateway's": time.time() - 1})
        start_worker(gateway.settings)
        assert httpx.post(f"{gateway.url}/v2/rerank", json=BODY, headers=bearer("one")).status_code == 200


def test_held_places_are_renewed_for_as_long_as_the_gateway_lives(redis_url, monkeypatch):
    monkeypatch.setattr("rerankq.gateway.rates.PLACE_HELD_S", 1.2)
    key = ApiKey(name="one", hash=HASH, concurrent=1)

    async def hold():
        rates, other = Rates(redis_url), Rates(redis_url)
        try:
            async with rates.place(key, within_s=5):
                with pytest.raises(Exception, match="none of them ended"):
                    async with other.place(key, within_s=3):
                        pass
            async with other.place(key, within_s=5):
                pass
        finally:
            await rates.aclose()
            await other.aclose()

    asyncio.run(hold())


def with_rates(redis_url: str, use) -> None:
    async def run():
        rates = Rates(redis_url)
        try:
            await use(rates)
        finally:
            await rates.aclose()

    asyncio.run(run())


def test_a_call_that_is_refused_for_its_tokens_uses_up_no_pairs(redis_url):
    key = ApiKey(name="one", hash=HASH, pairs_per_minute=10, tokens_per_minute=10)

    async def use(rates):
        await rates.spend_pairs(key, pairs=2, tokens=5)
        for _ in range(5):
            with pytest.raises(RateLimited, match="10 tokens a minute"):
                await rates.spend_pairs(key, pairs=4, tokens=6)
        await rates.spend_pairs(key, pairs=8, tokens=5)

    with_rates(redis_url, use)


def test_the_lines_of_a_batch_leave_a_share_of_the_rate_to_calls_and_wait(redis_url):
    key = ApiKey(name="one", hash=HASH, pairs_per_minute=8)

    async def use(rates):
        assert await rates.spend_line(key, pairs=5, tokens=1) == 0
        assert await rates.spend_line(key, pairs=1, tokens=1) == 0
        assert 1 <= await rates.spend_line(key, pairs=1, tokens=1) <= 120
        await rates.spend_pairs(key, pairs=2, tokens=1)
        with pytest.raises(RateLimited):
            await rates.spend_pairs(key, pairs=1, tokens=1)
        with pytest.raises(JobTooLarge):
            await rates.spend_line(key, pairs=9, tokens=1)
        # One that needs more than the share of lines may take what there is.
        other = key.model_copy(update={"name": "two"})
        assert await rates.spend_line(other, pairs=8, tokens=1) == 0

    with_rates(redis_url, use)


def test_a_place_that_is_given_back_while_places_are_renewed_is_free(redis_url):
    key = ApiKey(name="one", hash=HASH, concurrent=1)

    async def use(rates):
        leaving = asyncio.Event()
        renew = rates._renew

        async def renewed_late(**given):
            leaving.set()
            await asyncio.sleep(0.1)
            return await renew(**given)

        rates._renew = renewed_late
        async with rates.place(key, within_s=5):
            renewing = asyncio.create_task(rates._renew_all())
            await leaving.wait()
        await renewing
        await asyncio.gather(*rates._tasks)
        assert await rates._redis.zcard(f"{KEY_PREFIX}:places:one") == 0

    with_rates(redis_url, use)


def test_calls_that_wait_for_places_of_a_redis_that_hangs_are_not_blamed_and_not_kept_in_turn(redis_url, monkeypatch):
    monkeypatch.setattr("rerankq.gateway.rates.ANSWER_WITHIN_S", 0.2)
    key = ApiKey(name="one", hash=HASH, concurrent=1)

    async def use(rates):
        async def hangs(**_):
            await asyncio.Event().wait()

        async def call(within_s):
            async with rates.place(key, within_s=within_s):
                pass

        monkeypatch.setattr(rates, "_take", hangs)
        async with asyncio.timeout(2):  # 20 turns would take 4
            told = await asyncio.gather(*(call(30 if at else 0.1) for at in range(20)), return_exceptions=True)
        assert {type(one) for one in told} == {BrokerUnavailable}

    with_rates(redis_url, use)


def test_the_lines_of_a_batch_count_against_the_rates_of_its_callers_key(start_gateway, tmp_path, wait_until):
    gateway = limited(start_gateway, tmp_path, pairs_per_minute=20)
    body = {"query": QUERY, "documents": DOCUMENTS}
    lines = b"".join(json.dumps({"custom_id": str(at), "body": body}).encode() + b"\n" for at in range(9))
    with httpx.Client(base_url=gateway.url, headers=bearer("one"), timeout=30) as client:
        sent = client.post("/v1/files", files={"file": ("in.jsonl", lines)}, data={"purpose": "batch"}).json()
        batch = client.post("/v1/batches", json={"input_file_id": sent["id"]}).json()
        with redis.Redis.from_url(gateway.settings.ledger) as ledger:
            # Three quarters of the rate; more once a new minute has begun.
            wait_until(lambda: len(ledger.keys("rerankq:job:*")) >= 5)
            assert sum(int(ledger.get(key)) for key in ledger.keys(f"{KEY_PREFIX}:rate*")) >= 15
        answer = client.post("/v2/rerank", json={"query": QUERY, "documents": ["a"] * 20})
        assert (answer.status_code, "20 pairs a minute" in answer.text) == (429, True)
        assert client.post(f"/v1/batches/{batch['id']}/cancel").status_code == 200
        wait_until(lambda: client.get(f"/v1/batches/{batch['id']}").json()["status"] == "cancelled")


def test_without_redis_calls_are_not_let_through_and_not_blamed(restartable_redis, start_gateway, tmp_path):
    file = keys_file(tmp_path, one={"requests_per_minute": 5, "concurrent": 1})
    gateway = start_gateway(broker_url=restartable_redis.url, api_keys=str(file))
    assert httpx.get(f"{gateway.url}/v1/jobs/a", headers=bearer("one")).status_code == 404
    restartable_redis.kill()
    answer = httpx.get(f"{gateway.url}/v1/jobs/a", headers=bearer("one"), timeout=30)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert httpx.get(f"{gateway.url}/v1/jobs/a").status_code == 401
    restartable_redis.start()
    assert httpx.get(f"{gateway.url}/v1/jobs/a", headers=bearer("one"), timeout=30).status_code == 404


# The queue ----------------------------------------------------------------------------------------------------------


def test_a_call_that_cannot_be_ranked_in_its_time_is_refused_before_it_is_submitted(start_gateway, start_worker):
    gateway = start_gateway(model="stub:0.05")
    start_worker(gateway.settings)
    with Client(gateway.settings) as client:
        # The worker's pace is known once it has worked.
        client.rerank("q", ["a", "b"], timeout=60)
        client.submit_many([{"query": f"q{n}", "chunks": [f"text {m} of {n}" for m in range(50)]} for n in range(40)])
        headers = {"X-Rerankq-Timeout": "1"}
        answers = []
        ends = time.monotonic() + 30
        while time.monotonic() < ends:
            answers.append(httpx.post(f"{gateway.url}/v2/rerank", json=BODY, headers=headers, timeout=30))
            if answers[-1].status_code == 429:
                break
        refused = answers[-1]
        assert refused.status_code == 429, refused.text
        assert int(refused.headers["retry-after"]) > 1
        assert "pairs are waiting" in refused.json()["message"]
        # Whoever takes the first stage is not refused.
        degraded = httpx.post(
            f"{gateway.url}/v2/rerank", json=BODY, headers={**headers, "X-Rerankq-On-Timeout": "first-stage"}
        )
        assert degraded.headers["x-rerankq-status"] == "degraded"


def test_calls_wait_for_room_in_a_full_queue_instead_of_being_refused(start_gateway, start_worker):
    gateway = start_gateway(model="stub:0.002", max_queued_pairs=10)
    start_worker(gateway.settings)
    answers = []

    def ask(number: int):
        body = {"query": QUERY, "documents": [f"{number} {at}" for at in range(5)]}
        answers.append(httpx.post(f"{gateway.url}/v2/rerank", json=body, timeout=120))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 40
