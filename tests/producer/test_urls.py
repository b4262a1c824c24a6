"""What a URL means: one reading for every role, with passwords as they were written or a sentence that quotes none."""

import string
from urllib.parse import quote

import pytest

from rerankq.errors import SettingsInvalid
from rerankq.settings import Settings
from rerankq.urls import (
    AMQP,
    OVERRIDDEN,
    PASSED,
    PASSED_WITH_TLS,
    REDIS,
    REFUSED,
    database_of,
    encoded,
    masked,
    read,
    with_database,
)

# A URL of each kind, around a user, and what follows the question mark.
KINDS = {
    "redis": "redis://{user}host:6379/3{query}",
    "rediss": "rediss://{user}host:6379/3{query}",
    "unix": "unix://{user}/run/redis.sock{query}",
    "sentinel": "sentinel://{user}one,two:26380/3?master=jobs{query}",
    "sentinels": "sentinels://{user}one,two:26380/3?master=jobs{query}",
}
PRINTABLE = [character for character in map(chr, range(32, 127)) if not character.isalnum()]


def url_of(kind: str, user: str = "", query: str = "") -> str:
    mark = "" if not query else "&" if "sentinel" in kind else "?"
    return KINDS[kind].format(user=user, query=mark + query)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["{}word", "wo{}rd", "word{}", "1{}2"])
def test_a_password_works_as_written_or_is_refused_by_the_character_that_cannot_stand_there(kind: str, place: str):
    for character in [*PRINTABLE, "é", "\u2100", "密"]:
        password = place.format(character)
        assert read(url_of(kind, f":{quote(password, safe='')}@")).password == password
        as_written = url_of(kind, f":{password}@")
        if character not in "/?":
            assert read(as_written).password == password
            continue
        with pytest.raises(ValueError, match="in a password write") as caught:
            read(as_written)
        assert f"in a password write {character} as {quote(character, safe='')}" in str(caught.value)
        assert "wo" not in str(caught.value).replace("word", "")


def test_a_port_is_from_1_to_65535():
    assert [read(f"redis://host:{port}/0").hosts for port in (1, 65_535)] == [(("host", 1),), (("host", 65_535),)]
    for port in (0, 65_536):
        with pytest.raises(ValueError, match="port must be 1 to 65535"):
            read(f"redis://host:{port}/0")


def test_seconds_may_be_an_hour_and_no_more():
    assert read("redis://host?socket_timeout=3600").options["socket_timeout"] == 3_600
    with pytest.raises(ValueError, match="at most 3600"):
        read("redis://host?socket_timeout=3601")


def test_an_empty_password_is_none():
    assert read("redis://me:@host/0").password is None
    assert read("redis://me:@host/0?password=secret").password == "secret"


def test_the_path_of_a_socket_is_measured_in_bytes():
    assert read(f"unix:///{'é' * 51}").path == f"/{'é' * 51}"
    with pytest.raises(ValueError, match="at most 103 bytes"):
        read(f"unix:///{'é' * 52}")


@pytest.mark.parametrize("character", ["\t", "\n", "\r", "\0", "\x7f", "\udcff"])
def test_characters_that_no_url_holds_are_refused(character: str):
    with pytest.raises(ValueError, match=r"control character|not UTF-8"):
        read(f"redis://:se{character}cret@host/0")


@pytest.mark.parametrize("special", list("/?"))
@pytest.mark.parametrize("before", ["secret", "12", "p@12"])
def test_a_password_that_spoils_its_url_is_not_quoted_and_not_taken_for_a_host(special: str, before: str):
    for url in (
        f"redis://:{before}{special}secret@host:6379/0",
        f"amqps://me:{before}{special}secret@host//",
        f"unix://:{before}{special}secret@/run/redis.sock",
        f"sentinel://:{before}{special}secret@one/0?master=m",
    ):
        with pytest.raises(SettingsInvalid, match=r"RERANKQ_BROKER_URL: cannot be read; in a password write") as caught:
            Settings(_env_file=None, broker_url=url, ledger_url="redis://host/1")
        assert before not in str(caught.value)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://secret:word",  # a password where the host belongs
        "redis://:secret@host:word/0",
        "redis://:secret@ho st/0",
        "redis://:secret@host/0/secret",
        "redis://:%ff@host",
        "redis://host?password=sec&ret",
        "redis://host?password=secret&ret=1",
        "redis://host?secret",
        "redis://:secret@host:99999",
        "redis://:secret@[::1/0",
        "http://:secret@host",
        "secret",
    ],
)
def test_no_message_about_a_url_quotes_it(url: str):
    with pytest.raises(ValueError, match=r"\w") as caught:
        read(url)
    for word in ("word", "secret@", "sec&", " ret ", "ret=", "99999"):
        assert word not in str(caught.value).replace("password", "")


def test_a_printed_address_shows_no_password():
    address = read("redis://me:secret@host/0?password=other&client_name=x")
    assert "secret" not in repr(address)
    assert "other" not in repr(address)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_redis_py_has_a_meaning_for_every_kind_of_url(kind: str):
    given = {"client_name": "me", "password": "x", "username": "x"}
    for name in PASSED:
        assert read(url_of(kind, "", f"{name}={given.get(name, '3' if name == 'db' else '1')}"))
    for name in OVERRIDDEN:
        assert read(url_of(kind, "", f"{name}=3")).options == {}
    for name, reason in REFUSED.items():
        with pytest.raises(ValueError, match=rf"option {name} cannot be given: {reason[:10]}"):
            read(url_of(kind, "", f"{name}=1"))


def test_options_of_tls_are_refused_without_tls():
    values = {
        "ssl_cert_reqs": "CERT_REQUIRED",
        "ssl_check_hostname": "no",
        "ssl_exclude_verify_flags": "VERIFY_X509_STRICT",
        "ssl_include_verify_flags": "[VERIFY_X509_STRICT,VERIFY_X509_PARTIAL_CHAIN]",
        "ssl_min_version": "TLSv1_3",
    }
    for name in PASSED_WITH_TLS:
        query = f"{name}={values.get(name, 'x')}"
        assert name in read(url_of("rediss", "", query)).options
        for kind, other in (("redis", "rediss"), ("sentinel", "sentinels"), ("unix", "rediss")):
            with pytest.raises(ValueError, match=f"option {name} needs an encrypted connection: write {other}://"):
                read(url_of(kind, "", query))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("sokcet_timeout=1", "unknown option sokcet_timeout; did you mean socket_timeout?"),
        ("visibility_timeout=1", "unknown option visibility_timeout"),
        ("socket_timeout=0", "option socket_timeout: expected seconds, more than 0 and at most 3600"),
        ("socket_timeout=nan", "option socket_timeout: expected seconds"),
        ("socket_timeout=inf", "option socket_timeout: expected seconds"),
        ("socket_timeout=soon", "option socket_timeout: expected seconds, more than 0 and at most 3600"),
        ("max_connections=0", "option max_connections: expected a whole number from 1 to"),
        ("max_connections=-1", "option max_connections: expected a whole number from 1 to"),
        ("health_check_interval=1.5", "option health_check_interval: expected a whole number"),
        ("retry_on_timeout=maybe", "option retry_on_timeout: expected true or false"),
        ("client_name=a%20b", "option client_name: expected letters"),
        ("db=1&db=2", "the option db twice"),
        ("db=-1", "option db: expected a whole number"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(query: str, said: str):
    with pytest.raises(ValueError, match=r"option") as caught:
        read(url_of("redis", "", query))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["sentinel://one,two/0", "sentinel://one,,two/0?master=m", "sentinel://one?master=", "sentinel:///0?master=m"],
)
def test_a_url_of_sentinel_names_its_hosts_and_its_master(url: str):
    with pytest.raises(ValueError, match="master"):
        read(url)


def test_hosts_are_names_numbers_or_left_out():
    assert read("redis://").hosts == (("localhost", 6379),)
    assert read("redis://:pw@/4").hosts == (("localhost", 6379),)
    assert read("redis://my_redis.svc:1").hosts == (("my_redis.svc", 1),)
    assert read("rediss://[::1]:7/0").hosts == (("::1", 7),)
    assert read("sentinel://[fe80::1%eth0],two:5/0?master=m").hosts == (("fe80::1%eth0", 26379), ("two", 5))
    assert read("sentinel://[fe80::1%25eth0]/0?master=m").hosts == (("fe80::1%eth0", 26379),)
    assert read("amqp://host").hosts == (("host", 5672),)


def test_a_slash_after_the_number_of_a_database_changes_nothing():
    assert read("redis://host/3/").database == database_of("redis://host/3/") == 3
    assert with_database("redis://host/3/", 4) == "redis://host/4"
    with pytest.raises(ValueError, match="the number of a database"):
        read("redis://host/3//")


@pytest.mark.parametrize("url", [" redis://host/0", "redis://host/0 ", "unix:///run/redis.sock "])
def test_a_space_at_an_end_of_a_url_is_refused(url: str):
    with pytest.raises(ValueError, match="begins or ends with a space"):
        read(url)


@pytest.mark.parametrize("special", list("/?"))
def test_a_url_whose_password_is_cut_is_masked_whole(special: str):
    assert masked(f"redis://me:se{special}cret@host/0") == "redis://***"


def test_a_socket_has_a_path_that_may_be_percent_encoded_and_users_of_all_kinds():
    address = read("unix://me:se;cret@/run/my%20redis%3F.sock?db=4")
    assert (address.path, address.username, address.password) == ("/run/my redis?.sock", "me", "se;cret")
    assert address.database == 4
    assert read("unix:///run/r.sock?username=me&password=a+b%26c").password == "a+b&c"
    for url in ("unix://", "unix:///", "unix://run/redis.sock", f"unix:///{'x' * 200}", "unix:///a%00b"):
        with pytest.raises(ValueError, match="path of a socket"):
            read(url)


def test_two_databases_in_one_url_are_a_mistake():
    with pytest.raises(ValueError, match="names two databases"):
        read("redis://host/1?db=2")
    assert read("redis://host?db=4").database == 4
    assert read("redis://host/4?db=4").database == 4


def test_rabbitmqs_urls_reach_kombu_in_a_form_that_it_cannot_misread():
    address = read("amqp://me:se;cr%40et@rabbit:5673/my%2Fhost?heartbeat=10", AMQP)
    assert (encoded(address), address.vhost) == ("me:se%3Bcr%40et@rabbit:5673", "my/host")
    assert read("amqp://rabbit//").vhost == "/"
    assert read("amqp://rabbit").vhost == "/"
    with pytest.raises(ValueError, match="expected a host and a port"):
        read("amqp://one;amqp://two", AMQP)


@pytest.mark.parametrize(
    ("url", "database", "expected"),
    [
        ("redis://host", 1, "redis://host/1"),
        ("redis://host/?timeout=2", 1, "redis://host/1?timeout=2"),
        ("rediss://user:p%40ss@host:1/3", 2, "rediss://user:p%40ss@host:1/2"),
        ("redis://:p;[#ss@host:1/3", 2, "redis://:p;[#ss@host:1/2"),
        ("redis://host?db=4", 1, "redis://host/1"),
        ("sentinel://:pw@one:1,two/0?master=m", 1, "sentinel://:pw@one:1,two/1?master=m"),
        ("unix:///run/r.sock", 1, "unix:///run/r.sock?db=1"),
        ("unix:///run/r.sock?db=4&password=x", 1, "unix:///run/r.sock?password=x&db=1"),
        ("unix://user:pw@/run/r.sock", 1, "unix://user:pw@/run/r.sock?db=1"),
    ],
)
def test_a_url_is_pointed_at_another_database_and_keeps_the_rest(url: str, database: int, expected: str):
    assert with_database(url, database) == expected
    assert database_of(expected) == database
    assert read(expected, REDIS).database == database


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_url_holds_neither_password_nor_options(kind: str):
    for character in string.punctuation.replace("/", "").replace("?", ""):
        said = masked(url_of(kind, f"me:se{character}cret@", "client_name=hidden"))
        assert "cret" not in said
        assert "hidden" not in said
    assert masked(url_of(kind, "secret@")).startswith(f"{kind}://***@")
