"""Sends a webhook: one POST to an address that was checked, no redirect followed, within limits of time and size."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import cache, partial
from typing import Any

import httpcore

from .targets import Address, Network, Target, TargetRefused, read, refuse_inside

# Seconds: for a delivery as a whole, for a name to be resolved, and to connect.
DELIVERY_S, RESOLVE_S, CONNECT_S = 15.0, 5.0, 5.0
# Bytes of a response that are read, so that its connection could be kept; what is beyond them is not waited for.
MAX_RESPONSE = 16_384
# Addresses of a name that are tried.
TRIES = 3
# Threads that resolve names. Of their own: a name whose server is slow holds one for longer than it is waited for, and
# files, batches and connections need the event loop's.
_RESOLVERS = ThreadPoolExecutor(32, thread_name_prefix="rerankq-resolver")


class DeliveryFailed(Exception):
    """Raised where a receiver did not take a delivery; says why.

    ``retry_after_s`` is what it asked for; ``final``: it wants no more.
    """

    def __init__(self, why: str, *, retry_after_s: float | None = None, final: bool = False) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s
        self.final = final


async def resolve(host: str, port: int, allowed: Sequence[Network]) -> list[Address]:
    """Resolve a host and check every address that it has.

    Raises:
        TargetRefused: if one of them may not be told: a name that leads inside is not to be trusted at all.
        OSError: if it has none.
    """
    loop = asyncio.get_running_loop()
    asked = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    try:
        async with asyncio.timeout(RESOLVE_S):
            found = await loop.run_in_executor(_RESOLVERS, asked)
    except TimeoutError:
        raise OSError(f"{host} was not resolved within {RESOLVE_S:g} s") from None
    except UnicodeError:
        raise TargetRefused("names a host that cannot be") from None
    addresses = list(dict.fromkeys(ipaddress.ip_address(str(where[0]).partition("%")[0]) for *_, where in found))
    for address in addresses:
        refuse_inside(address, allowed)
    return addresses


async def check(url: str, allowed: Sequence[Network]) -> Target:
    """Check a URL when it is given; a name that cannot be resolved at the moment is let through.

    Raises:
        TargetRefused: if it may not be told.
    """
    target = read(url)
    with suppress(OSError):
        await resolve(target.host, target.port, allowed)
    return target


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to the very addresses that were checked: a name cannot lead elsewhere between check and connection."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = allowed
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's name
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve, check, connect."""
        fault: Exception = OSError(f"{host} has no address")
        for address in (await resolve(host, port, self._allowed))[:TRIES]:
            try:
                return await self._network.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                fault = error
        raise fault

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


@cache
def _trusting() -> ssl.SSLContext:
    # Once for all gateways of a process: to read the certificates of all authorities takes 50 ms.
    return ssl.create_default_context()


class Poster:
    """Posts webhooks. A connection for each: receivers are many, and seldom the same one twice in a second."""

    def __init__(self, allowed: Sequence[Network], *, timeout_s: float = DELIVERY_S) -> None:
        self._timeout_s = timeout_s
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=_trusting(),
            network_backend=CheckedNetwork(allowed),
            max_connections=None,
            max_keepalive_connections=0,
            retries=0,
        )

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> None:
        """Post a body.

        Raises:
            DeliveryFailed: unless it was answered by a status from 200 to 299.
        """
        try:
            target = read(url)
            async with asyncio.timeout(self._timeout_s):
                status, told = await self._post(target, headers, body)
        except TimeoutError:
            raise DeliveryFailed(f"no answer within {self._timeout_s:g} s") from None
        except TargetRefused as error:
            raise DeliveryFailed(f"refused: {error}") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise DeliveryFailed(f"{type(error).__name__}: {error}"[:300]) from None
        if 200 <= status < 300:
            return
        if 300 <= status < 400:
            raise DeliveryFailed(f"status {status}: redirects are not followed")
        raise DeliveryFailed(f"status {status}", retry_after_s=_seconds(told.get("retry-after")), final=status == 410)

    async def _post(self, target: Target, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, str]]:
        url = httpcore.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
        given = [("Host", target.authority), *headers.items(), ("Content-Length", str(len(body)))]
        limits = {"connect": CONNECT_S, "read": self._timeout_s, "write": self._timeout_s, "pool": self._timeout_s}
        async with self._pool.stream(
            "POST", url, headers=given, content=body, extensions={"timeout": limits}
        ) as response:
            told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if not 200 <= response.status < 300:
                return response.status, told
            size = 0
            async for part in response.aiter_stream():
                size += len(part)
                if size > MAX_RESPONSE:
                    break
            return response.status, told

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


def _seconds(text: str | None, *, now: float | None = None) -> float | None:
    """Read a Retry-After header: seconds, or a date.

    >>> _seconds("120"), _seconds("Thu, 01 Jan 1970 00:02:00 GMT", now=60.0), _seconds("soon")
    (120.0, 60.0, None)
    """
    if text is None:
        return None
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - (time.time() if now is None else now))
    return None
