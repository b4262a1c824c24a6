"""The clients of an adapter: given by its user, or its own, made when they are first needed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from ..client import AsyncClient, Client
from ..errors import SettingsInvalid
from ..settings import Settings


@dataclass
class Clients:
    """A blocking client and one for asyncio, of the same deployment.

    Given ones are used and never closed. Otherwise they are made of a URL, of the settings of the one that was given,
    or of the environment.

    Raises:
        SettingsInvalid: if there are a URL and a client.
    """

    url: str | None = field(default=None, repr=False)
    client: Client | None = None
    async_client: AsyncClient | None = None
    _made: dict[type, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.url is not None and (self.client or self.async_client):
            raise SettingsInvalid("give a URL or a client, not both")

    @property
    def blocking(self) -> Client:
        """The client whose methods block."""
        if self.client is not None:
            return self.client
        found: Client | None = self._made.get(Client)
        if found is None:
            made = Client(self._settings())
            found = self._made.setdefault(Client, made)
            if found is not made:  # another thread was first
                made.close()
        return found

    @property
    def asynchronous(self) -> AsyncClient:
        """The client for asyncio; one for all event loops."""
        if self.async_client is not None:
            return self.async_client
        found: AsyncClient | None = self._made.get(AsyncClient)
        return found or self._made.setdefault(AsyncClient, AsyncClient(self._settings()))

    def close(self) -> None:
        """Close the blocking client that was made here; another is made if it is needed again."""
        made = self._made.pop(Client, None)
        if made is not None:
            made.close()

    async def aclose(self) -> None:
        """Close both clients that were made here."""
        made = self._made.pop(AsyncClient, None)
        if made is not None:
            await made.aclose()
        await asyncio.to_thread(self.close)

    def _settings(self) -> Settings | str | None:
        given = self.client or self.async_client
        return self.url if given is None else given.settings

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy makes its own: closing it must not close what others use.
        return Clients, (self.url, self.client, self.async_client)
