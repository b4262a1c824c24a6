"""Metrics: what was answered, by bounded labels, and what waits, from counters and heads."""

import httpx
from prometheus_client.parser import text_string_to_metric_families
from test_keys import BODY, bearer, keys_file
from tides import QUERY

from rerankq import Client
from rerankq.gateway.metrics import MOST_TENANTS, OTHER, CallRecord, Metrics
from rerankq.ledger.calls import Load


def samples(url: str, **headers: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    answer = httpx.get(f"{url}/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return read(answer.text)


def read(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    found: dict = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def count(found, name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for key, value in found.get(name, {}).items() if wanted <= set(key))


def test_calls_are_counted_by_dialect_model_and_outcome(start_gateway, start_worker):
    gateway = start_gateway()
    start_worker(gateway.settings)
    long = {**BODY, "documents": [*BODY["documents"], "tides " * 3_000]}
    for body in (BODY, BODY, long, {"query": QUERY}):
        httpx.post(f"{gateway.url}/v2/rerank", json=body, timeout=30)
    httpx.post(f"{gateway.url}/rerank", json={"query": QUERY, "texts": ["a"]}, timeout=30)
    httpx.get(f"{gateway.url}/health")
    found = samples(gateway.url)
    seconds = "rerankq_gateway_request_seconds_count"
    assert count(found, seconds, dialect="cohere", model="stub", outcome="answered") == 3
    assert count(found, seconds, dialect="cohere", outcome="invalid") == 1
    assert count(found, seconds, dialect="tei", outcome="answered") == 1
    assert count(found, seconds) - count(found, seconds, dialect="other") == 5
    assert count(found, "rerankq_gateway_pairs_total", dialect="cohere", model="stub") == 10
    assert count(found, "rerankq_gateway_cached_pairs_total", dialect="cohere") == 6
    assert count(found, "rerankq_gateway_truncated_pairs_total", dialect="cohere") == 1
    assert count(found, "rerankq_gateway_tokens_total") > 0
    assert count(found, "rerankq_workers", model="stub") == 1


def test_what_waits_is_read_when_it_is_asked_for(start_gateway):
    gateway = start_gateway(models="stub")
    with Client(gateway.settings) as client:
        for tenant, priority in (("a", "interactive"), ("a", "bulk"), ("b", "bulk")):
            client.submit(
                {"query": f"q {tenant} {priority}", "chunks": ["a", "b"], "tenant": tenant, "priority": priority}
            )
    found = samples(gateway.url)
    assert {dict(key)["queue"]: value for key, value in found["rerankq_waiting_jobs"].items()} == {
        "rerankq.interactive": 1,
        "rerankq.bulk": 2,
    }
    assert count(found, "rerankq_waiting_pairs", queue="rerankq.bulk") == 4
    assert all(0 <= value < 60 for value in found["rerankq_oldest_waiting_seconds"].values())
    assert (count(found, "rerankq_running_jobs"), count(found, "rerankq_dead_jobs")) == (0, 0)
    assert count(found, "rerankq_ledger_up") == 1


def test_without_the_ledger_the_gateways_own_metrics_are_told(restartable_redis, start_gateway):
    gateway = start_gateway(broker_url=restartable_redis.url)
    httpx.post(f"{gateway.url}/v2/rerank", json=BODY)
    restartable_redis.kill()
    found = samples(gateway.url)
    assert count(found, "rerankq_ledger_up") == 0
    assert count(found, "rerankq_gateway_request_seconds_count", outcome="unavailable") == 1
    assert "rerankq_waiting_jobs" not in found


def test_metrics_need_an_operators_key_unless_they_are_open(start_gateway, tmp_path):
    file = str(keys_file(tmp_path, one={}, all={"tenant": "*", "operator": True}))
    gateway = start_gateway(api_keys=file)
    assert httpx.get(f"{gateway.url}/metrics").status_code == 401
    assert httpx.get(f"{gateway.url}/metrics", headers=bearer("one")).status_code == 403
    samples(gateway.url, **bearer("all"))
    samples(start_gateway(api_keys=file, open_metrics=True).url)


def test_labels_that_callers_choose_do_not_grow_without_end():
    metrics = Metrics(known_tenants=lambda: {"ours"}, waiting=lambda: 0)
    for number in range(3 * MOST_TENANTS):
        record = CallRecord(dialect="cohere", model=f"m{number}")
        metrics.observe(record, tenant=f"t{number}", status=200, seconds=0.1)
    metrics.observe(CallRecord(dialect="cohere"), tenant="ours", status=200, seconds=0.1)
    found = read(metrics.exposition(Load(0, 0, ()), ()).decode())["rerankq_gateway_request_seconds_count"]
    assert len(found) <= 2 * MOST_TENANTS
    assert {dict(key)["tenant"] for key in found} >= {"ours", OTHER, "t0"}
    assert sum(found.values()) == 3 * MOST_TENANTS + 1


def test_a_tenant_that_a_call_names_is_its_label(start_gateway, start_worker):
    gateway = start_gateway()
    start_worker(gateway.settings)
    httpx.post(f"{gateway.url}/v2/rerank", json=BODY, headers={"X-Rerankq-Tenant": "shop"})
    assert count(samples(gateway.url), "rerankq_gateway_request_seconds_count", tenant="shop") == 1
