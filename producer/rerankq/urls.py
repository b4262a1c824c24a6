"""Reading URLs of Redis and of brokers: done only here, for every role, before anything is connected.

No message of this module quotes a URL, because any part of one may be a part of a password. The name of an option is
quoted if it cannot be one.
"""

from __future__ import annotations

import difflib
import math
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

REDIS = frozenset({"redis", "rediss", "unix", "sentinel", "sentinels"})
AMQP = frozenset({"amqp", "amqps"})
TLS = frozenset({"rediss", "sentinels", "amqps"})
SENTINEL = frozenset({"sentinel", "sentinels"})

PORTS = {"redis": 6379, "rediss": 6379, "sentinel": 26379, "sentinels": 26379, "amqp": 5672, "amqps": 5671}

# Longest path of a Unix socket, in bytes (Linux: 107; macOS: 103).
LONGEST_PATH = 103


@dataclass(frozen=True)
class Address:
    """A URL, read: decoded, checked, and safe to print.

    ``hosts`` are those of the server, or of the sentinels that know it as ``master``; empty for a Unix socket, which
    has a ``path``. ``vhost`` is RabbitMQ's. ``options`` are those after the question mark, by redis-py's names.
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    database: int = 0
    master: str = ""
    vhost: str = "/"
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def tls(self) -> bool:
        """Whether it is encrypted, and the server's certificate verified unless an option says otherwise."""
        return self.scheme in TLS


class Parts(NamedTuple):
    """A URL cut into its parts, none of them decoded. ``user`` is all before the last ``@``, None without one."""

    scheme: str
    user: str | None
    host: str
    path: str
    query: str


def parts_of(url: str) -> Parts:
    """Cut a URL. Unlike :mod:`urllib` it keeps every character, and takes ``;``, ``#`` and brackets for ordinary ones.

    >>> parts_of("redis://:se;c#r[et@host:6379/0?timeout=5")
    Parts(scheme='redis', user=':se;c#r[et', host='host:6379', path='/0', query='timeout=5')
    """
    scheme, _, rest = url.partition("://")
    before, _, query = rest.partition("?")
    authority, slash, path = before.partition("/")
    user, at, host = authority.rpartition("@")
    return Parts(scheme, user if at else None, host, slash + path, query)


def joined(parts: Parts) -> str:
    """Put a cut URL together again."""
    user = "" if parts.user is None else f"{parts.user}@"
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{user}{parts.host}{parts.path}{query}"


def read(url: str, schemes: frozenset[str] = REDIS | AMQP) -> Address:
    """Read a URL of one of *schemes*.

    Raises:
        ValueError: saying what is wrong with it, without quoting it.

    >>> read("unix://:secret@/run/redis.sock?db=3").database
    3
    >>> read("redis://:se/cret@host:6379/0")
    Traceback (most recent call last):
        ...
    ValueError: cannot be read; in a password write / as %2F, in a path @ as %40
    """
    _refuse_invisible_characters(url)
    parts = parts_of(url)
    if "://" not in url or parts.scheme not in schemes:
        others = " or amqp://" if schemes >= AMQP else ""
        raise ValueError(f"expected a URL that begins with redis://, rediss://, unix://, sentinel://{others}")
    _refuse_torn(parts)
    options = dict(_options(parts))
    username, password = _credentials(parts.user, options)
    known = partial(Address, parts.scheme, username=username, password=password, options=options)
    if parts.scheme in AMQP:
        return known(hosts=(_host(parts.host or "localhost", parts.scheme),), vhost=_text(parts.path[1:]) or "/")
    database = _database(parts, options)
    if parts.scheme == "unix":
        return known(path=_socket(parts), database=database)
    hosts = parts.host.split(",") if parts.scheme in SENTINEL else [parts.host or "localhost"]
    master = options.pop("master", "")
    if parts.scheme in SENTINEL and not (master and all(hosts)):
        raise ValueError(HOW_TO_NAME_A_MASTER)
    return known(hosts=tuple(_host(host, parts.scheme) for host in hosts), database=database, master=master)


def with_database(url: str, database: int) -> str:
    """Point a Redis URL at another database of the same server.

    >>> with_database("redis://:secret@host:6379/0?health_check_interval=5", 2)
    'redis://:secret@host:6379/2?health_check_interval=5'
    >>> with_database("unix:///run/redis.sock?db=0", 1)
    'unix:///run/redis.sock?db=1'
    """
    parts = parts_of(url)
    query = [pair for pair in parts.query.split("&") if pair and pair.partition("=")[0] != "db"]
    if parts.scheme == "unix":
        return joined(parts._replace(query="&".join([*query, f"db={database}"])))
    return joined(parts._replace(path=f"/{database}", query="&".join(query)))


def database_of(url: str) -> int:
    """Read the database number in a Redis URL, 0 where there is none.

    >>> database_of("redis://host:6379/3"), database_of("unix:///run/redis.sock?db=2"), database_of("redis://host")
    (3, 2, 0)
    """
    parts = parts_of(url)
    named = [value for name, _, value in (pair.partition("=") for pair in parts.query.split("&")) if name == "db"]
    number = parts.path.strip("/") if parts.scheme != "unix" else ""
    return int((number or next(iter(named), "")) or 0)


def masked(url: str) -> str:
    """Write a URL so that it can be shown: without its password and without its options.

    A user's name without a password may be a password in the wrong place, and is not shown; nor is anything of a URL
    whose password was cut.

    >>> masked("rediss://me:secret@host:6379/0?ssl_ca_certs=x"), masked("redis://host"), masked("unix:///run/r.sock?db=1")
    ('rediss://me:***@host:6379/0', 'redis://host', 'unix:///run/r.sock')
    """
    parts = parts_of(url)
    if "@" in parts.path + parts.query:
        return f"{parts.scheme}://***"
    name, colon, _ = (parts.user or "").partition(":")
    user = None if parts.user is None else f"{name}:***" if colon else "***"
    return joined(parts._replace(user=user, query=""))


def encoded(address: Address, *, password: bool = True) -> str:
    """Write ``USER:PASSWORD@HOST:PORT`` as every library reads it; of several hosts the first."""
    name, word = (quoted(one) if password else "" for one in (address.username or "", address.password or ""))
    host, port = address.hosts[0] if address.hosts else ("", 0)
    at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}" if host else ""
    return f"{name}{':' if word else ''}{word}{'@' if name or word else ''}{at}"


def quoted(text: str) -> str:
    """Percent-encode every character with a meaning in a URL."""
    return quote(text, safe="")


def _refuse_invisible_characters(url: str) -> None:
    if url != url.strip(" "):
        raise ValueError("begins or ends with a space; a space in a password is written %20")
    for character in url:
        if ord(character) < 32 or ord(character) == 127:
            raise ValueError(
                f"holds a control character (a line break?); in a password it is written {quote(character)}"
            )
        if "\ud800" <= character <= "\udfff":
            raise ValueError("is not UTF-8; other bytes are written percent-encoded")


def _refuse_torn(parts: Parts) -> None:
    """Refuse a URL whose password was cut: an ``@`` then stands where none belongs."""
    if "@" in parts.query:
        raise ValueError("cannot be read; in a password write ? as %3F, in an option @ as %40")
    if "@" in parts.path:
        raise ValueError("cannot be read; in a password write / as %2F, in a path @ as %40")
    if parts.scheme == "unix" and parts.host:
        raise ValueError("expected the path of a socket, as in unix:///run/redis.sock?db=0")


def _credentials(user: str | None, options: dict[str, Any]) -> tuple[str | None, str | None]:
    name, colon, word = (user or "").partition(":")
    username, password = options.pop("username", None), options.pop("password", None)
    if user is not None:
        username = _text(name) or username
        password = _text(word) if colon and word else password
    return username, password


def _text(part: str) -> str:
    """Decode what is percent-encoded; ``+`` stays what it is."""
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        raise ValueError("holds percent-encoded bytes that are not UTF-8") from None


HOW_TO_NAME_A_MASTER = (
    "expected the sentinels and the master's name, as in sentinel://one:26379,two:26379/0?master=NAME"
)
HOW_TO_NAME_A_HOST = (
    "expected a host and a port, as in redis://:PASSWORD@localhost:6379/0; in a password write / as %2F, ? as %3F"
)


def _host(text: str, scheme: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([\w.~-]+))(?::([0-9]*))?", text)
    if found is None:
        raise ValueError(HOW_TO_NAME_A_HOST)
    port = int(found[3]) if found[3] else PORTS[scheme]
    if not 1 <= port <= 65_535:
        raise ValueError("port must be 1 to 65535")
    # A zone is written with an encoded sign: [fe80::1%25eth0].
    return (found[1] or found[2]).replace("%25", "%"), port


def _database(parts: Parts, options: dict[str, Any]) -> int:
    named: int | None = options.pop("db", None)
    if parts.scheme == "unix":
        return named or 0
    if not re.fullmatch(r"/?[0-9]{0,9}/?", parts.path):
        raise ValueError("expected the number of a database after the host, as in redis://localhost:6379/0")
    path = parts.path.strip("/")
    if named is not None and path and int(path) != named:
        raise ValueError("names two databases: one after the host and one as db=")
    return int(path) if path else named or 0


def _socket(parts: Parts) -> str:
    path = _text(parts.path)
    if path in {"", "/"}:
        raise ValueError("expected the path of a socket, as in unix:///run/redis.sock?db=0")
    if "\0" in path or len(path.encode()) > LONGEST_PATH:
        raise ValueError(f"the path of a socket has at most {LONGEST_PATH} bytes, none of them 0")
    return path


# What follows the question mark ---------------------------------------------------------------------------------------


def _seconds(text: str) -> float:
    number = float(text) if re.fullmatch(r"[0-9]*\.?[0-9]+", text) else math.nan
    if not (math.isfinite(number) and 0 < number <= 3_600):
        raise ValueError("seconds, more than 0 and at most 3600")
    return number


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return int(text)

    return parse


def _yes(text: str) -> bool:
    word = text.lower()
    if word in {"1", "true", "t", "yes", "y", "on"}:
        return True
    if word in {"0", "false", "f", "no", "n", "off"}:
        return False
    raise ValueError("true or false")


def _name(text: str) -> str:
    if not re.fullmatch(r"[!-~]{1,200}", text):
        raise ValueError("letters, digits and signs of ASCII, without a space")
    return text


def _words(text: str) -> str:
    if not text:
        raise ValueError("some text")
    return text


def _verification(text: str) -> str:
    word = text.lower().removeprefix("cert_")
    if word not in {"none", "optional", "required"}:
        raise ValueError("required, optional or none")
    return word


def _tls_version(text: str) -> ssl.TLSVersion:
    versions = {"771": ssl.TLSVersion.TLSv1_2, "772": ssl.TLSVersion.TLSv1_3}
    versions |= {"TLSv1_2": versions["771"], "TLSv1_3": versions["772"]}
    if text not in versions:
        raise ValueError("TLSv1_2 or TLSv1_3 (771 or 772)")
    return versions[text]


def _verify_flags(text: str) -> list[ssl.VerifyFlags]:
    try:
        return [ssl.VerifyFlags[flag.strip()] for flag in text.strip("[]").split(",")]
    except KeyError:
        raise ValueError("names of ssl.VerifyFlags, separated by commas") from None


#: Passed to redis-py, by every role that has such an option.
PASSED: dict[str, Callable[[str], Any]] = {
    "db": _whole(0, 1_000_000),
    "username": _words,
    "password": _words,
    "client_name": _name,
    "health_check_interval": _whole(0, 3_600),
    "max_connections": _whole(1, 100_000),
    "retry_on_timeout": _yes,
    "socket_connect_timeout": _seconds,
    "socket_keepalive": _yes,
    "socket_read_size": _whole(1, 1 << 26),
    "socket_timeout": _seconds,
    "timeout": _seconds,
}
#: The same, for connections with TLS.
PASSED_WITH_TLS: dict[str, Callable[[str], Any]] = {
    "ssl_ca_certs": _words,
    "ssl_ca_data": _words,
    "ssl_ca_path": _words,
    "ssl_cert_reqs": _verification,
    "ssl_certfile": _words,
    "ssl_check_hostname": _yes,
    "ssl_ciphers": _words,
    "ssl_exclude_verify_flags": _verify_flags,
    "ssl_include_verify_flags": _verify_flags,
    "ssl_keyfile": _words,
    "ssl_min_version": _tls_version,
    "ssl_password": _words,
}
#: Accepted and ignored: how answers are encoded is decided by our own code, which reads them.
OVERRIDDEN = frozenset(
    {"decode_responses", "encoding", "encoding_errors", "legacy_responses", "lib_name", "lib_version", "protocol"}
)
#: For connections to RabbitMQ.
PASSED_TO_AMQP: dict[str, Callable[[str], Any]] = {
    "connect_timeout": _seconds,
    "heartbeat": _seconds,
    "login_method": _name,
}
AMQP_WITH_TLS = ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_ciphers", "ssl_keyfile")
#: Refused, with the reason.
REFUSED = {
    "credential_provider": "write USER:PASSWORD@ before the host",
    "host": "write it before the question mark",
    "path": "write it before the question mark",
    "port": "write it before the question mark",
    "retry_on_error": "the errors that are retried are fixed",
    "ssl": "write rediss:// or sentinels://",
    "ssl_validate_ocsp": "connections of asyncio do not support it",
    "ssl_validate_ocsp_stapled": "connections of asyncio do not support it",
    "virtual_host": "write the database's number after the host, or ?db= after a socket's path",
}


def _options(parts: Parts) -> Iterator[tuple[str, Any]]:
    table = _table(parts.scheme)
    pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
    # A password with an ampersand leaves its rest among the names of options.
    holds_password = any(name.endswith("password") for name, _, _ in pairs)
    seen = set()
    for name, equals, value in pairs:
        if name in OVERRIDDEN and parts.scheme in REDIS:
            continue
        if name not in table:
            raise ValueError(_no_option(name, parts.scheme, table, quoted=not holds_password))
        if name in seen:
            raise ValueError(f"gives the option {name} twice")
        seen.add(name)
        try:
            yield name, table[name](_text(value) if equals else "")
        except ValueError as error:
            raise ValueError(f"option {name}: expected {error}") from None


def _table(scheme: str) -> dict[str, Callable[[str], Any]]:
    if scheme in AMQP:
        return PASSED_TO_AMQP | ({name: PASSED_WITH_TLS[name] for name in AMQP_WITH_TLS} if scheme in TLS else {})
    return PASSED | (PASSED_WITH_TLS if scheme in TLS else {}) | ({"master": _words} if scheme in SENTINEL else {})


def _no_option(name: str, scheme: str, table: Mapping[str, object], *, quoted: bool) -> str:
    if name in PASSED_WITH_TLS:
        encrypted = {"amqp": "amqps", "sentinel": "sentinels"}.get(scheme, "rediss")
        return f"option {name} needs an encrypted connection: write {encrypted}://"
    if name in REFUSED:
        return f"option {name} cannot be given: {REFUSED[name]}"
    if not (quoted and re.fullmatch(r"\w{1,40}", name)):
        return "has an unknown option; in a password write & as %26, ? as %3F, in an option's value & as %26"
    near = difflib.get_close_matches(name, table, 1)
    return f"has an unknown option {name}" + (f"; did you mean {near[0]}?" if near else "")
