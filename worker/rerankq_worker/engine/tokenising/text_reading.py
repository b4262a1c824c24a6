"""Encode texts into token ids, each once, and no further than its ids are needed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from .token_id_cache import TokenIdCache, TokenPrefix, text_hash

#: Bytes of the cache of chunks' token ids: 65 000 chunks of 330 tokens, where an id takes two bytes (measured).
CACHE_BYTES = 64 << 20

#: Characters of a long text that are encoded at first, per token kept; enough for nearly every language.
_CHARACTERS_PER_TOKEN = 16
#: Four times as many are tried each time that a text gives too few tokens, up to so many characters: some seconds of
#: work and 150 MB (measured). Text after them is never read, so that no result depends on an earlier request.
MAX_CHARACTERS = 1 << 20
#: The last tokens before a cut, which may differ from those of the whole text; none of them is kept.
_MARGIN_TOKENS = 128
#: A cut moves back to white space within so many characters, if there is any.
_BOUNDARY_CHARACTERS = 512

_MARKS = {"Mn", "Mc", "Me"}
_SURROGATES = re.compile("[\ud800-\udfff]")


class ChunkReader:
    """Encodes chunks into token ids without special tokens, and caches them. Safe to share between threads.

    ``opening`` is put before every chunk, and its tokens count as the chunk's. At most ``longest`` ids of a chunk are
    cached, as elements of ``dtype``.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, longest: int, opening: str = "", cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.cache = TokenIdCache(cache_bytes)
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32)
        self._tokenizer = tokenizer
        self._longest = longest
        self._opening = opening

    def read(self, chunks: Sequence[str], count: int, *, hashes: Sequence[bytes] | None = None) -> list[TokenPrefix]:
        """Return at least the first ``count`` ids of each chunk, in order; fewer only where there are no more.

        ``hashes``, one per chunk, are those of ``text_hash``, if the caller knows them. Text after the first
        ``MAX_CHARACTERS`` is ignored.
        """
        keys = [text_hash(chunk) for chunk in chunks] if hashes is None else hashes
        texts = dict(zip(keys, chunks, strict=True))
        known = self.cache.get_many(texts)
        for key in [key for key, first in known.items() if not first.whole and self._elements(first) < count]:
            del known[key]
        missing = [key for key in texts if key not in known]
        if missing:
            known.update(self._encode(missing, [texts[key] for key in missing], count))
        return [known[key] for key in keys]

    def _elements(self, first: TokenPrefix) -> int:
        return len(first.ids) // self.dtype.itemsize

    def _encode(self, keys: Sequence[bytes], texts: Sequence[str], count: int) -> dict[bytes, TokenPrefix]:
        fresh = {}
        read = encode_prefixes(self._tokenizer, texts, count, opening=self._opening)
        for key, (encoding, sure, whole) in zip(keys, read, strict=True):
            kept = min(sure, self._longest)
            ids = np.array(encoding.ids[:kept], self.dtype).tobytes()
            fresh[key] = TokenPrefix(ids, whole and sure <= kept)
        self.cache.put_many(fresh)
        return fresh


class TextPrefix(NamedTuple):
    """The beginning of a text, encoded.

    The first ``sure`` ids are those of the whole text; ``whole`` says that the beginning is the whole text.
    """

    encoding: Encoding
    sure: int
    whole: bool

    def ids(self, count: int) -> list[int]:
        """Return the first ``count`` ids, or all that are sure."""
        return list(self.encoding.ids[: min(count, self.sure)])

    def fits(self, count: int) -> bool:
        """Tell whether the whole text has no more than ``count`` ids."""
        return self.whole and self.sure <= count


def encode_prefixes(tokenizer: Tokenizer, texts: Sequence[str], count: int, *, opening: str = "") -> list[TextPrefix]:
    """Encode as much of each text as its first ``count`` ids need, with ``opening`` before it, without special tokens.

    Fewer ids are sure only where the text has no more, as far as it is read.
    """
    found: dict[int, TextPrefix] = {}
    margin = _margin(tokenizer)
    unsettled = list(range(len(texts)))
    for limit in _limits(count + margin):
        heads = [_sure_prefix(texts[at], limit) for at in unsettled]
        encodings = tokenizer.encode_batch_fast(
            [opening + replace_surrogates(head) for head in heads], add_special_tokens=False
        )
        for at, head, encoding in zip(unsettled, heads, encodings, strict=True):
            whole = len(head) == len(texts[at])
            if whole or limit == MAX_CHARACTERS:
                found[at] = TextPrefix(encoding, len(encoding), whole)
            elif len(encoding) >= count + margin and not _joins(texts[at][len(head)]):
                found[at] = TextPrefix(encoding, len(encoding) - margin, whole)
        unsettled = [at for at in unsettled if at not in found]
        if not unsettled:
            break
    return [found[at] for at in range(len(texts))]


def _margin(tokenizer: Tokenizer) -> int:
    # In WordPiece the first letters of a long word may be a token each, and the whole word a single one.
    return max(_MARGIN_TOKENS, getattr(tokenizer.model, "max_input_chars_per_word", 0))


def prefix_with_tokens(tokenizer: Tokenizer, text: str, count: int) -> str:
    """Cut a text to a beginning that contains its first ``count`` tokens, and perhaps more."""
    margin = _margin(tokenizer)
    for limit in _limits(count + margin):
        head = _sure_prefix(text, limit)
        [encoding] = tokenizer.encode_batch_fast([replace_surrogates(head)], add_special_tokens=False)
        if len(head) == len(text) or len(encoding) >= count + margin:
            break
    return head


def characters_of(tokenizer: Tokenizer, text: str, count: int) -> int:
    """Return how many characters of a text its first ``count`` tokens cover; all, if it has no more."""
    head = prefix_with_tokens(tokenizer, text, count)
    offsets = tokenizer.encode(replace_surrogates(head), add_special_tokens=False).offsets
    if len(offsets) <= count:
        return len(text)
    return int(offsets[count - 1][1]) if count else 0


def _limits(tokens: int) -> Iterator[int]:
    limit = _CHARACTERS_PER_TOKEN * tokens
    while limit < MAX_CHARACTERS:
        yield limit
        limit *= 4
    yield MAX_CHARACTERS


def _sure_prefix(text: str, limit: int) -> str:
    head = prefix_of(text, limit)
    # White space before a cut may belong to the next token: some added tokens include all white space before them.
    return head if len(head) == len(text) or limit == MAX_CHARACTERS else head.rstrip()


def prefix_of(text: str, limit: int) -> str:
    """Cut a text to at most ``limit`` characters: before white space where there is some near, not before an accent.

    >>> prefix_of("one two three", 9), prefix_of("unbroken", 4), prefix_of("short", 9)
    ('one two', 'unbr', 'short')
    >>> prefix_of("re\u0301sume\u0301", 2)
    'r'
    """
    if len(text) <= limit:
        return text
    near = max(0, limit - _BOUNDARY_CHARACTERS)
    boundary = max(text.rfind(space, near, limit) for space in " \n\t\u3000")
    if boundary <= 0:
        boundary = next((at for at in range(limit, near, -1) if not _joins(text[at])), limit)
    return text[:boundary]


def _joins(character: str) -> bool:
    """Tell whether a character may combine with those before it: an accent, a joiner, part of a syllable, a tone."""
    return (
        unicodedata.category(character) in _MARKS
        or character in "\u200c\u200d"
        or "\u1160" <= character <= "\u11ff"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    )


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which have no UTF-8, by U+FFFD."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
