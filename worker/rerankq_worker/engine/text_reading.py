"""Texts read into token ids, each by itself: once, and no further than ids are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from .token_ids import FirstIds, KnownIds, text_hash

# Unset, the tokenisers switch their threads off after a fork and say so on standard error at every one.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

#: Bytes of chunks' ids that are remembered: 65 000 chunks of 330 tokens, where an id takes two bytes (measured).
KNOWN_BYTES = 64 << 20

#: Characters of a long text that are encoded at first, per token kept; enough for nearly every language.
_CHARACTERS_PER_TOKEN = 16
#: How often four times as much is tried when a text gives few tokens for its characters.
_ENLARGEMENTS = 2
#: So many tokens before a cut may come out differently from those of the whole text; none of them is kept. WordPiece
#: needs most: up to a hundred letters of a word give as many tokens, and more of the same word give a single one.
_MARGIN_TOKENS = 128
#: A cut moves back to white space if there is some within so many characters.
_BOUNDARY_CHARACTERS = 512

_SURROGATES = re.compile("[\ud800-\udfff]")


class ChunkReader:
    """Turns chunks into token ids without special tokens, and remembers the ids. Safe to share between threads.

    ``opening`` is put before every chunk, and its tokens count as the chunk's. Of a chunk at most ``longest`` ids are
    kept, as elements of ``dtype``.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, longest: int, opening: str = "", known_bytes: int = KNOWN_BYTES
    ) -> None:
        self.known = KnownIds(known_bytes)
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32)
        self._tokenizer = tokenizer
        self._longest = longest
        self._opening = opening

    def read(self, chunks: Sequence[str], count: int, *, hashes: Sequence[bytes] | None = None) -> list[FirstIds]:
        """Read at least the first ``count`` ids of each chunk, in order; fewer only where there are no more.

        ``hashes``, one per chunk, spare computing them: equal where the texts are equal, and only there. Where
        hundreds of characters make one token throughout (a megabyte without white space), the rest goes unread.
        """
        keys = [text_hash(chunk) for chunk in chunks] if hashes is None else hashes
        texts = dict(zip(keys, chunks, strict=True))
        known = self.known.find(texts)
        for key in [key for key, first in known.items() if not first.whole and self._elements(first) < count]:
            del known[key]
        missing = [key for key in texts if key not in known]
        if missing:
            fresh = self._fresh(missing, [self._opening + texts[key] for key in missing], count)
            known.update(fresh)
        return [known[key] for key in keys]

    def _elements(self, first: FirstIds) -> int:
        return len(first.ids) // self.dtype.itemsize

    def _fresh(self, keys: Sequence[bytes], texts: Sequence[str], count: int) -> dict[bytes, FirstIds]:
        fresh, settled = {}, {}
        for key, (encoding, shortened) in zip(keys, encode_heads(self._tokenizer, texts, count), strict=True):
            ids = encoding.ids
            sure = len(ids) - _MARGIN_TOKENS if shortened else len(ids)
            kept = min(max(sure, count), self._longest)
            first = FirstIds(np.array(ids[:kept], self.dtype).tobytes(), not shortened and len(ids) <= kept)
            fresh[key] = first
            # What a long text without boundaries gave depends on how far it was read: the next reader asks again, so
            # that no answer depends on what was asked before.
            if sure >= count or not shortened:
                settled[key] = first
        self.known.keep(settled)
        return fresh


def encode_heads(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> list[tuple[Encoding, bool]]:
    """Encode so much of each text that its first ``count`` ids are those of the whole; say where that was not all.

    Special tokens are not added. A text that gives too few ids for its characters is read three times as far as
    others, no further: then there may be fewer than ``count``.
    """
    found: dict[int, tuple[Encoding, bool]] = {}
    unsettled = list(range(len(texts)))
    for limit, last in _limits(count):
        heads = [head_of(texts[at], limit) for at in unsettled]
        encodings = tokenizer.encode_batch_fast([sound(head) for head in heads], add_special_tokens=False)
        for at, head, encoding in zip(unsettled, heads, encodings, strict=True):
            shortened = len(head) < len(texts[at])
            if last or not shortened or len(encoding) >= count + _MARGIN_TOKENS:
                found[at] = encoding, shortened
        unsettled = [at for at in unsettled if at not in found]
        if not unsettled:
            break
    return [found[at] for at in range(len(texts))]


def characters_for(count: int) -> int:
    """Characters that are read of a text at most, for its first ``count`` ids."""
    return max(limit for limit, _ in _limits(count))


def _limits(count: int) -> Iterator[tuple[int, bool]]:
    for enlargement in range(_ENLARGEMENTS + 1):
        yield _CHARACTERS_PER_TOKEN * (count + _MARGIN_TOKENS) * 4**enlargement, enlargement == _ENLARGEMENTS


def head_of(text: str, limit: int) -> str:
    """Cut a text to at most ``limit`` characters, before white space where there is some near.

    >>> head_of("one two three", 9), head_of("unbroken", 4), head_of("short", 9)
    ('one two', 'unbr', 'short')
    """
    if len(text) <= limit:
        return text
    near = max(0, limit - _BOUNDARY_CHARACTERS)
    boundary = max(text.rfind(space, near, limit) for space in " \n\t\u3000")
    return text[: boundary if boundary > 0 else limit]


def sound(text: str) -> str:
    """Replace lone surrogates, which have no UTF-8, by U+FFFD."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
