"""What holds for every request: hosts, origins, bodies that are wrong, too large or slow; headers of every answer."""

import asyncio
import contextlib
import json
import socket
import time

import anyio
import httpx
import pytest
from tides import DOCUMENTS, QUERY

from rerankq.gateway.edge import SECURITY_HEADERS, Edge
from rerankq.gateway.server import BoundedHeaders, config_of
from rerankq.settings import Settings

BODY = {"query": QUERY, "documents": DOCUMENTS}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def gateway(start_gateway):
    return start_gateway(max_job_bytes=2_000)


def assert_told(answer: httpx.Response, status: int) -> dict:
    """Every dialect's clients can read it, and it has the headers of every answer."""
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert told["message"] == told["detail"] == told["error"]
    assert told["message"]
    assert told["error_type"]
    for name in SECURITY_HEADERS:
        assert name in answer.headers, name
    return told


def test_every_answer_keeps_browsers_from_guessing_framing_and_storing(gateway):
    for method, path, status in (
        ("GET", "/health/live", 200),
        ("GET", "/docs", 200),
        ("GET", "/no/such/path", 404),
        ("PUT", "/v2/rerank", 405),
        ("POST", "/v2/rerank", 422),
    ):
        answer = httpx.request(method, gateway.url + path)
        assert answer.status_code == status, path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers
        if status >= 400:
            assert_told(answer, status)


def test_a_slash_at_the_end_of_a_path_is_answered_and_leads_to_no_other_host(start_gateway, tmp_path):
    gateway = start_gateway(allowed_hosts="evil.example", files_dir=tmp_path)
    headers = {"Host": "evil.example", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example"}
    for path, status in (("/v1/files/", 200), ("/v1/jobs/a/", 404), ("/v1/models/", 200), ("/no/such/", 404)):
        answer = httpx.get(gateway.url + path, headers=headers)
        assert (answer.status_code, answer.headers.get("location")) == (status, None), path
    assert_told(httpx.post(f"{gateway.url}/v1/jobs/", json={"query": "q"}), 422)


def test_an_unknown_path_and_a_wrong_method_are_told_in_the_same_form(gateway):
    assert_told(httpx.get(f"{gateway.url}/no/such/path"), 404)
    wrong = httpx.put(f"{gateway.url}/v2/rerank", json=BODY)
    assert_told(wrong, 405)
    assert "POST" in wrong.headers["allow"]


# Bodies -------------------------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_refused_with_and_without_its_length(gateway):
    large = b'{"query": "' + b"x" * 7_000 + b'"}'
    for path in ("/v2/rerank", "/v1/jobs"):
        told = assert_told(httpx.post(gateway.url + path, content=large, headers=JSON), 413)
        assert told["error_type"] == "validation"
        chunked = httpx.post(gateway.url + path, content=iter([large[:4_000], large[4_000:]]), headers=JSON)
        assert_told(chunked, 413)


def test_a_body_that_claims_to_be_too_large_is_refused_before_it_comes(gateway):
    with connected(gateway) as connection:
        connection.sendall(b"POST /v2/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 413 ")


HOSTILE = {
    "nothing": b"",
    "no JSON": b"documents=1",
    "a list": b"[]",
    "a text": b'"text"',
    "null": b"null",
    "not UTF-8": b'{"query": "\xff\xfe", "documents": ["a"]}',
    "UTF-16": '{"query": "q", "documents": ["a"]}'.encode("utf-16"),
    "a lone surrogate": b'{"query": "\\ud800", "documents": ["a"]}',
    "a lone surrogate in a document": b'{"query": "q", "documents": ["\\udfff"]}',
    "NaN": b'{"query": "q", "documents": ["a"], "top_n": NaN}',
    "infinity": b'{"query": "q", "documents": [{"text": "a", "vector_score": Infinity}]}',
    "NaN in a score": b'{"query": "q", "documents": [{"text": "a", "vector_score": NaN}]}',
    "an overflowing score": b'{"query": "q", "documents": [{"text": "a", "vector_score": 1e999}]}',
    "a huge number": b'{"query": "q", "documents": ["a"], "top_n": ' + b"9" * 1_500 + b"}",
    "a number of many digits": b'{"query": "q", "documents": ["a"], "top_n": 1e400}',
    "nested lists": b"[" * 1_900,
    "nested documents": b'{"query": "q", "documents": [' + b'{"a":' * 900,
    "deep metadata": b'{"query":"q","documents":[{"text":"a","metadata":' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}]}",
    "an unclosed text": b'{"query": "q',
    "a byte order mark": b'\xef\xbb\xbf{"query": "q"}',
    "NUL bytes": b"\0\0\0",
    "something behind": b'{"query": "q", "documents": ["a"]} x',
}


# What some paths can make sense of: an infinite score is none, a limit beyond the documents is all of them.
ANSWERED = {"an overflowing score", "a huge number", "deep metadata"}


@pytest.mark.parametrize("path", ["/v2/rerank", "/rerank", "/v1/jobs", "/v1/jobs/batch"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused_by_what_is_wrong_with_it(http, path, name):
    answer = http.post(path, content=HOSTILE[name], headers=JSON)
    if name in ANSWERED and answer.status_code == 200:
        return
    assert_told(answer, 422)


def test_the_last_of_two_equal_keys_counts(gateway):
    told = assert_told(
        httpx.post(f"{gateway.url}/v2/rerank", content=b'{"query": "q", "query": 5, "documents": ["a"]}'), 422
    )
    assert told["field"] == "query"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "é", None])
def test_json_of_any_declared_type_is_read(gateway, kind):
    headers = {} if kind is None else {"Content-Type": kind.encode()}
    # 503: it was read, and there is no worker.
    assert_told(httpx.post(f"{gateway.url}/v2/rerank", content=json.dumps(BODY), headers=headers), 503)


def test_a_byte_order_mark_before_a_body_is_none_of_it(gateway):
    assert_told(httpx.post(f"{gateway.url}/v2/rerank", content=b"\xef\xbb\xbf" + json.dumps(BODY).encode()), 503)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
def test_a_compressed_body_is_refused_packed(gateway, encoding):
    told = assert_told(
        httpx.post(f"{gateway.url}/v2/rerank", content=b"\x1f\x8b", headers={"Content-Encoding": encoding}), 415
    )
    assert told["field"] == "Content-Encoding"


# Time ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(gateway):
    with socket.create_connection(("127.0.0.1", gateway.settings.port), timeout=20) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            found += part
    return found


def test_a_body_that_does_not_come_is_given_up(gateway, monkeypatch):
    monkeypatch.setattr("rerankq.gateway.edge.BODY_GRACE_S", 0.3)
    with connected(gateway) as connection:
        connection.sendall(b'POST /v2/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"query')
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"message"' in answer


def test_headers_that_do_not_come_or_do_not_end_cost_a_connection(gateway, monkeypatch):
    monkeypatch.setattr(BoundedHeaders, "headers_within_s", 0.3)
    for begun in (b"", b"GET /health/live HTTP/1.1\r\nHost: loc"):
        with connected(gateway) as connection:
            connection.sendall(begun)
            assert read_all(connection) == b""
    monkeypatch.setattr(BoundedHeaders, "headers_within_s", 20)
    with connected(gateway) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(b"GET /health/live HTTP/1.1\r\nX: " + b"x" * 100_000)
        assert read_all(connection).startswith(b"HTTP/1.1 431 ")


def test_a_connection_serves_several_requests_however_slowly_they_follow(gateway, monkeypatch):
    monkeypatch.setattr(BoundedHeaders, "headers_within_s", 2)
    request = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(gateway) as connection:
        for _ in range(3):
            for at in range(0, len(request), 10):
                connection.sendall(request[at : at + 10])
                time.sleep(0.01)
            # Its head and its body may come one after the other.
            answer = b""
            while not answer.endswith(b"}") and (part := connection.recv(65_536)):
                answer += part
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_connections_are_kept_for_longer_than_clients_and_proxies_keep_theirs():
    assert config_of(Settings(_env_file=None)).timeout_keep_alive == BoundedHeaders.keep_alive_s > 60


# Hosts and origins --------------------------------------------------------------------------------------------------


def test_a_body_is_read_whose_sender_offers_another_protocol(gateway):
    # As Java's client does with every request.
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAA"}
    told = assert_told(httpx.post(f"{gateway.url}/v2/rerank", json={"query": "q"}, headers=offer), 422)
    assert told["field"] == "documents"


def test_what_is_not_http_is_told_so_in_the_same_form(gateway):
    with connected(gateway) as connection:
        connection.sendall(b"\x16\x03\x01 nothing\r\n\r\n")
        head, _, told = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(told)["message"] == "Invalid HTTP request received."
    assert all(name.lower().encode() in head.lower() for name in SECURITY_HEADERS)


def test_a_caller_that_hangs_up_before_its_body_has_come_is_no_fault_of_the_gateway(gateway, wait_until):
    with connected(gateway) as connection:
        connection.sendall(b'POST /v2/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"query": ')
    wait_until(lambda: 'outcome="caller-gone"' in httpx.get(f"{gateway.url}/metrics").text)


@pytest.mark.parametrize(("fault", "raised"), [(anyio.BrokenResourceError(), False), (ValueError(), True)])
def test_a_caller_that_goes_away_while_events_are_sent_is_no_error_in_the_log(fault, raised):
    async def stream(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ExceptionGroup("unhandled errors in a TaskGroup", [fault])

    async def send(message):
        pass

    edge = Edge(stream, allowed_hosts=None, same_origin=False, cors_origins=())
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(ExceptionGroup) if raised else contextlib.nullcontext():
        asyncio.run(edge(scope, None, send))


def test_a_program_that_names_no_host_is_served(gateway):
    # HTTP/1.0, as checks of load balancers speak it.
    with connected(gateway) as connection:
        connection.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_a_strangers_name_for_the_loopback_is_refused(gateway):
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        told = assert_told(httpx.get(f"{gateway.url}/v1/models", headers={"Host": host}), 421)
        assert "RERANKQ_ALLOWED_HOSTS" in told["message"]
    for host in ("localhost:1", "127.0.0.1", "[::1]:8080", "gateway", "app.localhost"):
        assert httpx.get(f"{gateway.url}/health/live", headers={"Host": host}).status_code == 200, host


def test_named_hosts_are_served(start_gateway):
    gateway = start_gateway(allowed_hosts="rerank.example.com, *.example.org")
    for host, status in (("rerank.example.com", 200), ("a.example.org:80", 200), ("example.com", 421)):
        assert httpx.get(f"{gateway.url}/health/live", headers={"Host": host}).status_code == status, host


def test_a_page_of_another_origin_cannot_send_anything_where_no_key_is_asked_for(gateway):
    url = f"{gateway.url}/v2/rerank"
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        told = assert_told(httpx.post(url, json=BODY, headers={"Origin": origin}), 403)
        assert told["field"] == "Origin"
    assert_told(httpx.post(url, json=BODY, headers={"Origin": gateway.url}), 503)
    assert httpx.options(url, headers={"Origin": "https://evil.example"}).status_code == 405


def test_only_named_origins_may_call_from_a_browser(start_gateway):
    gateway = start_gateway(cors_origins="https://app.example.com", max_job_bytes=1_000)
    for origin, allowed in (("https://app.example.com", "https://app.example.com"), ("https://evil.example", None)):
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-api-key",
        }
        answer = httpx.options(f"{gateway.url}/v2/rerank", headers=asked)
        assert answer.headers.get("access-control-allow-origin") == allowed
        sent = httpx.post(f"{gateway.url}/v2/rerank", json=BODY, headers={"Origin": origin})
        assert sent.headers.get("access-control-allow-origin") == allowed
        assert sent.status_code == (503 if allowed else 403)
        if allowed:
            exposed = sent.headers["access-control-expose-headers"]
            assert "Retry-After" in exposed
            assert "X-Rerankq-Warning" in exposed
            # A page may read what is wrong, also if nobody read its body.
            refused = httpx.post(f"{gateway.url}/v2/rerank", content=b"x" * 4_000, headers={"Origin": origin})
            assert_told(refused, 413)
            assert refused.headers["access-control-allow-origin"] == allowed
