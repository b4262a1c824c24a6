"""Token ids of texts, remembered within a number of bytes."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import NamedTuple

#: What an entry takes beside its key, its tuple and its ids: a node and a slot of the ordered dictionary. By
#: tracemalloc 79 to 124 bytes for 1 000 to 50 000 entries, depending on how full the dictionary is.
_NODE_BYTES = 128


def text_hash(text: str) -> bytes:
    """Hash a query or a chunk's text: BLAKE2b, 128 bits.

    >>> text_hash("tides") == text_hash("tides "), len(text_hash(""))
    (False, 16)
    """
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class TokenPrefix(NamedTuple):
    """The first token ids of a text, as an array's bytes; ``whole`` says that the text has no others."""

    ids: bytes
    whole: bool


class TokenIdCache:
    """Remembers ids by key; the least recently used go first. Safe to share between threads.

    ``max_bytes`` bounds everything held, what Python adds to each entry included.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[bytes, TokenPrefix] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held_bytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def find(self, keys: Iterable[bytes]) -> dict[bytes, TokenPrefix]:
        """Look up what is known of these keys, and count it as used."""
        held, found = self._held, {}
        with self._lock:
            for key in keys:
                first = held.get(key)
                if first is not None:
                    held.move_to_end(key)
                    found[key] = first
        return found

    def keep(self, entries: Mapping[bytes, TokenPrefix]) -> None:
        """Remember entries in place of what was known of their keys; one that is too large by itself is left out."""
        with self._lock:
            for key, first in entries.items():
                self._forget(key)
                size = _bytes_of(key, first)
                if size <= self._max_bytes:
                    self._held[key] = first
                    self._bytes += size
            while self._bytes > self._max_bytes:
                self._forget(next(iter(self._held)))

    def _forget(self, key: bytes) -> None:
        first = self._held.pop(key, None)
        if first is not None:
            self._bytes -= _bytes_of(key, first)


def _bytes_of(key: bytes, first: TokenPrefix) -> int:
    return sys.getsizeof(key) + sys.getsizeof(first) + sys.getsizeof(first.ids) + _NODE_BYTES
