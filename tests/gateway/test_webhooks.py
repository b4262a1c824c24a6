"""Webhooks against a real receiver: delivered, signed, tried again, given up, and lost by nobody's death."""

import asyncio
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
import redis
from tides import DOCUMENTS, QUERY

from rerankq import Client
from rerankq.gateway.webhooks import delivering, message, posting
from rerankq.ledger import Ledger, LedgerLimits, connect, webhooks
from rerankq.settings import Settings

SECRET = "whsec-of-the-tests"
ALLOWED = {"webhook_secret": SECRET, "webhook_networks": "127.0.0.0/8"}
JOB = {"query": QUERY, "chunks": DOCUMENTS}


class Receiver:
    """Receives deliveries; *answers* are statuses for the first ones, then 200. A function is called instead."""

    def __init__(self) -> None:
        self.answers: list = []
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.release = threading.Event()
        receiver = self

        class Answering(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.received.append(({**self.headers}, body))
                answer = receiver.answers.pop(0) if receiver.answers else 200
                if callable(answer):
                    answer(self)
                    return
                self.send_response(answer)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST  # noqa: N815 - the library calls it so

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


@pytest.fixture
def soon(monkeypatch):
    """A second try follows at once."""
    monkeypatch.setattr(message, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def submit(start_gateway) -> Callable[..., str]:
    """Submit a job with a webhook to a gateway without a worker; answers its id."""

    def send(url: object, **settings) -> str:
        gateway = start_gateway(**{**ALLOWED, **settings})
        answer = httpx.post(f"{gateway.url}/v1/jobs", json={**JOB, "webhook": url})
        assert answer.status_code == 202, answer.text
        send.gateway = gateway
        return answer.json()["job_id"]

    return send


def cancel(submit, job_id: str) -> None:
    """End the job: the quickest way without a worker."""
    with Client(submit.gateway.settings) as client:
        client.cancel(job_id)


def state_of(submit, job_id: str) -> dict:
    return httpx.get(f"{submit.gateway.url}/v1/jobs/{job_id}/webhooks").json()["webhooks"][0]


def test_a_ranking_is_delivered_with_a_signature_that_holds(start_gateway, start_worker, receiver, wait_until):
    gateway = start_gateway(**ALLOWED)
    start_worker(gateway.settings)
    job_id = httpx.post(f"{gateway.url}/v1/jobs", json={**JOB, "webhook": receiver.url}).json()["job_id"]
    wait_until(lambda: receiver.received)
    headers, body = receiver.received[0]
    told = json.loads(body)
    assert (told["type"], told["job_id"], told["state"], told["error"]) == ("job.done", job_id, "done", None)
    assert len(told["ranking"]["chunks"]) == 3
    assert httpx.get(gateway.url + told["links"]["self"]).json()["ranking"] == told["ranking"]
    stamp, _, given = headers["X-Rerankq-Signature"].partition(",v1=")
    at = stamp.removeprefix("t=")
    assert abs(time.time() - int(at)) < 60
    assert hmac.new(SECRET.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest() == given
    assert headers["X-Rerankq-Delivery"] == told["id"]
    assert headers["Content-Type"] == "application/json"


def test_a_job_that_has_ended_before_is_delivered_too(submit, receiver, wait_until):
    job_id = submit(receiver.url)
    cancel(submit, job_id)
    wait_until(lambda: len(receiver.received) == 1)
    ledger = Ledger(connect(submit.gateway.settings.ledger))
    record = message.Record(url=receiver.url, added_at=0).model_dump_json()
    limits = LedgerLimits.of(submit.gateway.settings)
    assert ledger.ask(webhooks.add(job_id, "later", record, limits, look_s=60)) == "cancelled"
    wait_until(lambda: len(receiver.received) == 2)
    ids = {headers["X-Rerankq-Delivery"] for headers, _ in receiver.received}
    assert len(ids) == 1  # the same ending: a receiver can tell


def test_a_job_that_fails_is_told_with_its_error(submit, receiver, wait_until):
    job_id = submit({"url": receiver.url, "secret": "the caller's own"})
    cancel(submit, job_id)
    wait_until(lambda: receiver.received)
    headers, body = receiver.received[0]
    told = json.loads(body)
    assert (told["state"], told["error_type"], told["ranking"]) == ("cancelled", "JobCancelled", None)
    at, _, given = headers["X-Rerankq-Signature"].removeprefix("t=").partition(",v1=")
    assert hmac.new(b"the caller's own", f"{at}.".encode() + body, hashlib.sha256).hexdigest() == given
    wait_until(lambda: state_of(submit, job_id)["state"] == "delivered")
    assert "secret" not in state_of(submit, job_id)


@pytest.mark.usefixtures("soon")
def test_a_receiver_that_fails_is_tried_again_with_the_same_delivery(submit, receiver, wait_until):
    receiver.answers = [500, 503, 404]
    job_id = submit(receiver.url)
    cancel(submit, job_id)
    wait_until(lambda: len(receiver.received) == 4)
    wait_until(lambda: state_of(submit, job_id)["state"] == "delivered")
    assert len({body for _, body in receiver.received}) == 1
    assert [headers["X-Rerankq-Attempt"] for headers, _ in receiver.received] == ["1", "2", "3", "4"]
    assert state_of(submit, job_id)["attempts"] == 4


@pytest.mark.usefixtures("soon")
def test_a_delivery_outlives_its_job(submit, receiver, wait_until):
    receiver.answers = [500, lambda to: (receiver.release.wait(30), to.send_response(500), to.end_headers())]
    job_id = submit(receiver.url)
    cancel(submit, job_id)
    wait_until(lambda: len(receiver.received) == 2)
    with Client(submit.gateway.settings) as client:
        client.forget(job_id)
    receiver.release.set()
    wait_until(lambda: len(receiver.received) == 3)
    assert json.loads(receiver.received[2][1])["state"] == "cancelled"


@pytest.mark.usefixtures("soon")
def test_a_receiver_that_hangs_is_left_after_its_time_and_tried_again(submit, receiver, wait_until, monkeypatch):
    monkeypatch.setattr(delivering.posting, "DELIVERY_S", 0.3)
    monkeypatch.setattr(delivering.Poster.__init__, "__kwdefaults__", {"timeout_s": 0.3})
    receiver.answers = [lambda _: receiver.release.wait(30)]
    job_id = submit(receiver.url)
    cancel(submit, job_id)
    wait_until(lambda: len(receiver.received) == 2)
    wait_until(lambda: state_of(submit, job_id)["state"] == "delivered")


def test_a_redirect_is_not_followed(submit, receiver, wait_until):
    def redirect(to):
        to.send_response(307)
        to.send_header("Location", receiver.url.replace("/hook", "/elsewhere"))
        to.send_header("Content-Length", "0")
        to.end_headers()

    receiver.answers = [redirect] * 99
    job_id = submit(receiver.url, webhook_give_up_s=0)
    cancel(submit, job_id)
    wait_until(lambda: state_of(submit, job_id)["state"] == "given_up")
    assert "redirects are not followed" in state_of(submit, job_id)["error"]
    assert len(receiver.received) == 1


def test_an_endless_response_is_not_read_to_its_end(submit, receiver, wait_until):
    def endless(to):
        to.send_response(200)
        to.end_headers()
        try:
            while not receiver.release.is_set():
                to.wfile.write(b"x" * 65_536)
        except OSError:
            pass

    receiver.answers = [endless]
    job_id = submit(receiver.url)
    cancel(submit, job_id)
    wait_until(lambda: state_of(submit, job_id)["state"] == "delivered", 10)


def test_after_its_time_a_delivery_is_given_up_and_that_can_be_seen(submit, receiver, wait_until):
    receiver.answers = [500] * 99
    job_id = submit(receiver.url, webhook_give_up_s=0)
    cancel(submit, job_id)
    wait_until(lambda: state_of(submit, job_id)["state"] == "given_up")
    told = state_of(submit, job_id)
    assert (told["attempts"], told["error"], told["next_attempt_at"]) == (1, "status 500", None)


def test_a_receiver_that_wants_no_more_is_not_tried_again(submit, receiver, wait_until):
    receiver.answers = [410]
    job_id = submit(receiver.url)
    cancel(submit, job_id)
    wait_until(lambda: state_of(submit, job_id)["state"] == "given_up")


def test_both_who_submitted_the_same_job_are_told(submit, receiver, wait_until):
    job_id = submit(receiver.url)
    again = httpx.post(f"{submit.gateway.url}/v1/jobs", json={**JOB, "webhook": f"{receiver.url}?other"})
    assert again.json()["job_id"] == job_id
    cancel(submit, job_id)
    wait_until(lambda: len(receiver.received) == 2)


def test_each_job_of_a_batch_is_told(start_gateway, receiver, wait_until):
    gateway = start_gateway(**ALLOWED)
    jobs = [{**JOB, "id": f"j{at}"} for at in range(3)]
    answer = httpx.post(f"{gateway.url}/v1/jobs/batch", json={"jobs": jobs, "webhook": receiver.url})
    assert answer.status_code == 202, answer.text
    with Client(gateway.settings) as client:
        for job in jobs:
            client.cancel(job["id"])
    wait_until(lambda: {json.loads(body)["job_id"] for _, body in receiver.received} == {"j0", "j1", "j2"})


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:8080/", "http://localhost:8080/", "http://2130706433:8080/", "http://0x7f.1:8080/"),
        *("http://0177.0.0.1:8080/", "http://0:8080/", "http://0.0.0.0:8080/", "http://[::1]:8080/"),
        *(
            "http://[::ffff:127.0.0.1]:8080/",
            "http://[::ffff:7f00:1]:8080/",
            "http://169.254.169.254/latest/meta-data/",
        ),
        *(
            "http://[fe80::1]/",
            "http://[fd00:ec2::254]/",
            "http://10.0.0.1/",
            "http://192.168.0.1/",
            "http://①②⑦.⓪.⓪.①/",
        ),
        *("http://127.1/", "http://[::]/", "http://100.100.100.200/"),
    ],
)
def test_an_address_inside_is_refused_when_the_job_is_submitted(start_gateway, url):
    gateway = start_gateway(webhook_secret=SECRET)
    answer = httpx.post(f"{gateway.url}/v1/jobs", json={**JOB, "webhook": url})
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] == "webhook.url"
    with redis.Redis.from_url(gateway.settings.ledger) as ledger:
        assert ledger.keys("rerankq:job:*") == []


def test_a_name_that_leads_inside_later_is_not_connected_to(start_gateway, receiver, wait_until, monkeypatch):
    """As by DNS rebinding: public when it was checked, and the loopback when it is told."""
    answers = {"leads_to": "93.184.215.14"}

    def getaddrinfo(host, port, **_):
        return [(2, 1, 6, "", (answers["leads_to"], port))]

    gateway = start_gateway(webhook_secret=SECRET)
    monkeypatch.setattr(posting, "socket", resolving_by(getaddrinfo))
    url = receiver.url.replace("127.0.0.1", "rebound.example")
    job_id = httpx.post(f"{gateway.url}/v1/jobs", json={**JOB, "webhook": url}).json()["job_id"]
    answers["leads_to"] = "127.0.0.1"
    assert httpx.delete(f"{gateway.url}/v1/jobs/{job_id}").json()["state"] == "cancelled"
    told = f"{gateway.url}/v1/jobs/{job_id}/webhooks"
    wait_until(lambda: httpx.get(told).json()["webhooks"][0]["attempts"] >= 1)
    assert "not a public address" in httpx.get(told).json()["webhooks"][0]["error"]
    assert receiver.received == []


def resolving_by(getaddrinfo: Callable) -> SimpleNamespace:
    return SimpleNamespace(getaddrinfo=getaddrinfo, SOCK_STREAM=socket.SOCK_STREAM, IPPROTO_TCP=socket.IPPROTO_TCP)


def test_names_that_are_resolved_slowly_hold_up_nothing_else_of_the_gateway(monkeypatch):
    release = threading.Event()

    def getaddrinfo(*_, **__):
        release.wait(30)
        return []

    monkeypatch.setattr(posting, "socket", resolving_by(getaddrinfo))

    async def use():
        resolving = [asyncio.create_task(posting.resolve(f"h{at}.example", 80, ())) for at in range(40)]
        try:
            await asyncio.sleep(0)
            # As files and batches are read.
            async with asyncio.timeout(10):
                await asyncio.to_thread(lambda: None)
        finally:
            release.set()
            await asyncio.gather(*resolving)

    asyncio.run(use())


@pytest.fixture
def hooks(redis_url, monkeypatch):
    """Webhooks whose posts hang until they are released, and whose reports are written down."""
    found = delivering.Webhooks(Settings(broker_url=redis_url, **ALLOWED, _env_file=None))
    found.reports, found.posted, found.release = [], [], asyncio.Event()

    async def report(taken, record, *, wait_s, keep_s):
        found.reports.append((taken.job_id, wait_s))

    async def post(url, headers, body):
        found.posted.append(url)
        await found.release.wait()

    def deliver(name: str, attempts: int = 0) -> asyncio.Task:
        record = message.Record(url="http://127.0.0.1:8000/", added_at=0, attempts=attempts, body=body)
        return asyncio.create_task(found._deliver(webhooks.Taken(name, "n", "token", record.model_dump_json())))

    body = message.body_of("j", "failed", ended_at=None).decode()
    monkeypatch.setattr(found, "_report", report)
    monkeypatch.setattr(found._poster, "post", post)
    found.deliver = deliver
    return found


def test_an_unexpected_error_does_not_end_the_deliveries(hooks, monkeypatch):
    monkeypatch.setattr(delivering, "LOOK_EVERY_S", 0)
    looks = []

    async def use():
        looked = asyncio.Event()

        async def take():
            looks.append(1)
            if len(looks) < 3:
                raise ValueError("a bug")
            looked.set()

        monkeypatch.setattr(hooks, "_take", take)
        running = asyncio.create_task(hooks.run())
        async with asyncio.timeout(10):
            await looked.wait()
        running.cancel()
        await asyncio.wait({running})
        await hooks.aclose()

    asyncio.run(use())


def test_deliveries_that_have_failed_before_leave_room_for_others(hooks, monkeypatch):
    async def use():
        monkeypatch.setattr(hooks, "_again", delivering.AT_ONCE_AGAIN)
        hooks.release.set()
        await asyncio.gather(hooks.deliver("failed before", attempts=1), hooks.deliver("first"))
        await hooks.aclose()

    asyncio.run(use())
    assert hooks.reports == [("failed before", delivering.CROWD_WAIT_S), ("first", None)]


def test_a_receiver_that_never_answered_gets_few_deliveries_at_once_and_a_crowd_waits_longer(hooks):
    async def use():
        tasks = [hooks.deliver(str(at)) for at in range(12)]
        await asyncio.sleep(0)
        assert len(hooks.posted) == delivering.AT_ONCE_UNPROVEN == 2
        waits = [wait_s for _, wait_s in hooks.reports]
        assert waits == sorted(waits)
        assert (waits[0], waits[-1]) == (1.0, 5.5)
        hooks.release.set()
        await asyncio.gather(*tasks)
        hooks.release.clear()
        # It has answered.
        tasks = [hooks.deliver(str(at)) for at in range(20)]
        await asyncio.sleep(0)
        assert len(hooks.posted) == 2 + delivering.AT_ONCE_EACH
        hooks.release.set()
        await asyncio.gather(*tasks)
        await hooks.aclose()

    asyncio.run(use())


def test_a_gateway_that_stops_hands_back_what_it_has_not_delivered(submit, start_gateway, receiver, wait_until):
    receiver.answers = [lambda _: receiver.release.wait(30)]
    cancel(submit, submit(receiver.url))
    wait_until(lambda: len(receiver.received) == 1)
    submit.gateway.stop()
    start_gateway(**ALLOWED)
    wait_until(lambda: len(receiver.received) == 2, delivering.LEASE_S / 3)
    assert [headers["X-Rerankq-Attempt"] for headers, _ in receiver.received] == ["1", "1"]


@pytest.mark.parametrize(
    ("webhook", "field"),
    [
        (5, "webhook"),
        ([], "webhook"),
        ({}, "webhook"),
        ({"url": 5}, "webhook"),
        ("not a url", "webhook.url"),
        ({"url": "https://example.org/", "secret": "short"}, "webhook.secret"),
    ],
)
def test_a_malformed_webhook_is_refused_by_field_and_no_job_accepted(start_gateway, webhook, field):
    gateway = start_gateway(**ALLOWED)
    answer = httpx.post(f"{gateway.url}/v1/jobs", json={**JOB, "webhook": webhook})
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    with redis.Redis.from_url(gateway.settings.ledger) as ledger:
        assert ledger.keys("rerankq:job:*") == []


def test_a_webhook_that_nobody_can_sign_is_refused(start_gateway):
    gateway = start_gateway(webhook_networks="127.0.0.0/8")
    answer = httpx.post(f"{gateway.url}/v1/jobs", json={**JOB, "webhook": "http://127.0.0.1:9000/"})
    assert answer.status_code == 422
    assert "RERANKQ_WEBHOOK_SECRET" in answer.json()["message"]


def test_after_a_gateways_death_another_delivers(redis_url, start_gateway_process, start_gateway, receiver, wait_until):
    """Killed between the acceptance of a job and its end; nobody else knew of the webhook."""
    dying = start_gateway_process(
        broker_url=redis_url, model="stub", webhook_secret=SECRET, webhook_networks="127.0.0.0/8"
    )
    sent = httpx.post(f"{dying.url}/v1/jobs", json={**JOB, "webhook": receiver.url})
    assert sent.status_code == 202, sent.text
    dying.kill()
    with Client(redis_url) as client:
        client.cancel(sent.json()["job_id"])
    assert receiver.received == []
    start_gateway(**ALLOWED)
    wait_until(lambda: receiver.received)
    assert json.loads(receiver.received[0][1])["job_id"] == sent.json()["job_id"]


def test_a_delivery_that_was_taken_and_not_reported_is_taken_again(redis_url, wait_until):
    """As by a gateway that was killed while it delivered; its report, if it comes late, counts for nothing."""
    settings = Settings(broker_url=redis_url, model="stub", _env_file=None)
    ledger, limits = Ledger(connect(settings.ledger)), LedgerLimits.of(settings)
    with Client(settings) as client:
        job_id = client.submit(JOB)
        assert ledger.ask(webhooks.add(job_id, "n", "record", limits, look_s=60)) == "queued"

        def take(lease_s):
            return ledger.ask(webhooks.take(limits, lease_s=lease_s, look_s=60, limit=5))

        assert take(60) == []
        client.cancel(job_id)
    (first,) = take(0.2)
    assert (first.job_id, first.name, first.record) == (job_id, "n", "record")
    assert take(60) == []
    again = []
    wait_until(lambda: again.extend(take(60)) or again)
    assert not ledger.ask(webhooks.report(first, "late", wait_s=None, keep_s=60))
    assert ledger.ask(webhooks.report(again[0], "delivered", wait_s=None, keep_s=60))
    assert ledger.ask(webhooks.list_of(job_id)) == [webhooks.Listed("n", "delivered", None)]
    assert ledger.redis.zcard("rerankq:webhooks") == 0
    assert 0 < ledger.redis.ttl(f"rerankq:webhook:{job_id}") <= 60
    ledger.redis.close()
