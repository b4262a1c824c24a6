"""Which URLs and addresses a webhook may lead to, and what it is told: pure functions."""

import hashlib
import hmac
import ipaddress
import json

import pytest

from rerankq.contract import ModelName, RankedChunk, Ranking
from rerankq.gateway.webhooks import message
from rerankq.gateway.webhooks.targets import TargetRefused, read, refuse_inside


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
        *("255.255.255.255", "168.63.129.16", "192.0.2.1"),
        *("::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "fe80::1"),
        *("fc00::1", "fd00:ec2::254", "ff02::1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::"),
        *("2001:0:1234::1", "2001:db8::1", "fec0::1"),
    ],
)
def test_an_address_that_is_not_the_publics_is_refused(address):
    with pytest.raises(TargetRefused, match="not a public address"):
        refuse_inside(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_a_public_address_is_allowed(address):
    refuse_inside(ipaddress.ip_address(address))


def test_a_network_that_a_setting_names_is_allowed_and_no_other():
    allowed = [ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd12::/16")]
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd12::5"):
        refuse_inside(ipaddress.ip_address(address), allowed)
    for address in ("10.2.0.1", "127.0.0.1", "fd13::5"):
        with pytest.raises(TargetRefused):
            refuse_inside(ipaddress.ip_address(address), allowed)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "begins with https"),
        ("example.org/hook", "begins with https"),
        ("ftp://example.org/", "begins with https"),
        ("file:///etc/passwd", "begins with https"),
        ("gopher://example.org/", "begins with https"),
        ("http:///hook", "names no host"),
        ("http://", "names no host"),
        ("https://user:secret@example.org/", "user or password"),
        ("https://example.org@127.0.0.1/", "user or password"),
        ("https://example.org\\@127.0.0.1/", "backslashes"),
        ("https://example.org/a b", "spaces"),
        ("https://example.org/\r\nHost: inside", "control characters"),
        ("https://example.org:99999/", "not a URL"),
        ("https://example.org:port/", "not a URL"),
        ("https://[::1/", "not a URL"),
        ("https://[fe80::1%25eth0]/", "zone"),
        ("https://example.org:22/", "port 22"),
        ("https://example.org:25/", "port 25"),
        ("https://example.org:0/", "port 0"),
        ("https://example.org:6379/", "port 6379"),
        ("https://example.org/ü", "ASCII"),
        (f"https://example.org/{'a' * 3_000}", "longer"),
        (f"https://{'ü' * 80}.org/", "cannot be"),
    ],
)
def test_a_url_that_may_not_be_told_is_refused_with_the_reason(url, why):
    with pytest.raises(TargetRefused, match=why):
        read(url)


def test_a_url_is_taken_apart_once():
    target = read("HTTPS://Example.ORG/hook?a=1#part")
    assert (target.scheme, target.host, target.port, target.path) == ("https", "example.org", 443, "/hook?a=1")
    assert target.authority == "example.org"
    assert read("http://[2606:4700::1]:8080").authority == "[2606:4700::1]:8080"
    assert read("https://münchen.example/").host == "xn--mnchen-3ya.example"


def test_a_signature_is_the_hmac_of_time_dot_body():
    signed = message.signature("a secret", b'{"a": 1}', at=1_700_000_000)
    expected = hmac.new(b"a secret", b'1700000000.{"a": 1}', hashlib.sha256).hexdigest()
    assert signed == f"t=1700000000,v1={expected}"


def ranking(text: str) -> Ranking:
    chunk = RankedChunk(id="0", index=0, rank=1, score=0.5, text=text)
    return Ranking(job_id="j", model=ModelName(name="m", fingerprint="f"), chunks=[chunk])


def test_the_same_ending_has_the_same_id_and_another_one_another():
    told = {message.event_id(message.body_of("j", "done", ended_at=5.0, ranking=ranking("x"))) for _ in range(2)}
    assert len(told) == 1
    others = {
        message.event_id(message.body_of("j", state, ended_at=ended_at))
        for state, ended_at in (("done", 6.0), ("failed", 5.0), ("failed", None))
    }
    assert len(others | told) == 4


def test_a_large_ranking_is_told_by_its_link_alone():
    small, large = (
        json.loads(message.body_of("j", "done", ended_at=5.0, ranking=ranking("x" * size))) for size in (9, 300_000)
    )
    assert small["ranking"]["chunks"][0]["text"] == "x" * 9
    assert large["ranking"] is None
    assert large["links"] == {"self": "/v1/jobs/j"}


def test_waits_grow_up_to_a_limit_and_heed_the_receiver_within_one():
    waits = [message.wait_after(tries, chance=0.5) for tries in range(1, 40)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (1.0, 900.0)
    assert message.wait_after(1, asked_s=120.0) == 120.0
    assert message.wait_after(1, asked_s=1e9) == 3_600.0
