"""Where a webhook may lead: which URLs, and which addresses behind their names. Pure functions.

A gateway stands inside a network whose other servers trust whoever is inside. A webhook's URL is its caller's: it may
lead to the outside only, unless the deployment names networks of its own.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_URL = 2_048
# Below 1024 only these: nothing else there speaks HTTP.
WELL_KNOWN_PORTS = frozenset({80, 443})
# Above: what servers inside listen on that act on lines of text. Browsers refuse some of them for the same reason.
REFUSED_PORTS = frozenset({2049, 3306, 4045, 4190, 5060, 5061, 5432, 6000, 6379, 6380, *range(6665, 6670), 6697, 11211})
# Not told apart by every version of Python, and one that is public by its number and inside of a cloud nevertheless.
NOT_PUBLIC = tuple(
    ipaddress.ip_network(one)
    for one in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2001:db8::/32", "3fff::/20")
)
# IPv6 that is assigned to the public; what translates or tunnels to other addresses stands apart.
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class TargetRefused(ValueError):
    """Raised where a URL, or an address behind it, may not be told; says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart once, so that nobody reads it differently later. ``host`` is ASCII, without brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


def read(url: str) -> Target:
    """Take a webhook's URL apart.

    Raises:
        TargetRefused: if it is none, or one that may not be told whatever is behind it.

    >>> read("https://example.org:8443/hook?a=1")
    Target(scheme='https', host='example.org', port=8443, path='/hook?a=1')
    """
    if len(url) > MAX_URL:
        raise TargetRefused(f"longer than {MAX_URL} characters")
    # Readers of URLs differ in what they make of these.
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise TargetRefused("expected a URL without spaces, backslashes and control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise TargetRefused(f"not a URL: {error}") from None
    if parts.scheme not in {"http", "https"}:
        raise TargetRefused("expected a URL that begins with https:// or http://")
    if "@" in parts.netloc:
        raise TargetRefused("expected a URL without a user or password")
    host = _ascii_host(parts.hostname or "")
    if port is None:
        port = 443 if parts.scheme == "https" else 80
    if (port < 1024 and port not in WELL_KNOWN_PORTS) or port in REFUSED_PORTS:
        raise TargetRefused(f"port {port} may not be used")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not path.isascii():
        raise TargetRefused("expected a URL in ASCII: write other characters as %XX")
    return Target(parts.scheme, host, port, path)


def _ascii_host(host: str) -> str:
    if not host:
        raise TargetRefused("names no host")
    if "%" in host:
        raise TargetRefused("expected an address without a zone")
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        raise TargetRefused("names a host that cannot be") from None


def refuse_inside(address: Address, allowed: Sequence[Network] = ()) -> None:
    """Refuse an address that is not the public's, unless it is in a network that is *allowed*.

    Raises:
        TargetRefused: if it may not be told.

    >>> refuse_inside(ipaddress.ip_address("93.184.215.14"))
    >>> refuse_inside(ipaddress.ip_address("::ffff:127.0.0.1"))
    Traceback (most recent call last):
    rerankq.gateway.webhooks.targets.TargetRefused: leads to 127.0.0.1, which is not a public address
    """
    real = embedded(address)
    if any(real.version == network.version and real in network for network in allowed):
        return
    if not is_public(real):
        raise TargetRefused(f"leads to {real}, which is not a public address")


def embedded(address: Address) -> Address:
    """Find the IPv4 address that an IPv6 address stands for; the address itself if it stands for none.

    >>> embedded(ipaddress.ip_address("64:ff9b::a00:1"))
    IPv4Address('10.0.0.1')
    """
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet: no loopback, private, link-local, shared, multicast, tunnel.

    >>> [is_public(ipaddress.ip_address(one)) for one in ("169.254.169.254", "100.64.0.1", "0.0.0.0", "2002:7f00:1::")]
    [False, False, False, False]
    """
    if address.is_multicast or address.is_unspecified or not address.is_global:
        return False
    if any(address.version == network.version and address in network for network in NOT_PUBLIC):
        return False
    return isinstance(address, ipaddress.IPv4Address) or (address in _PUBLIC_V6 and address.sixtofour is None)
