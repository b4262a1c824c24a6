"""Texts read into token ids, each by itself: once, and no further than ids are kept."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from .token_id_cache import TokenIdCache, TokenPrefix, text_hash

# Unset, the tokenisers switch their threads off after a fork and say so on standard error at every one.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

#: Bytes of chunks' ids that are remembered: 65 000 chunks of 330 tokens, where an id takes two bytes (measured).
KNOWN_BYTES = 64 << 20

#: Characters of a long text that are encoded at first, per token kept; enough for nearly every language.
_CHARACTERS_PER_TOKEN = 16
#: Four times as much is tried each time that a text gives too few tokens, up to so many characters: some seconds' work
#: and 150 MB (measured). What stands behind is never read, whatever is asked, so that no answer depends on the last.
MOST_CHARACTERS = 1 << 20
#: So many tokens before a cut may come out differently from those of the whole text; none of them is kept.
_MARGIN_TOKENS = 128
#: A cut moves back to white space if there is some within so many characters.
_BOUNDARY_CHARACTERS = 512

_MARKS = {"Mn", "Mc", "Me"}
_SURROGATES = re.compile("[\ud800-\udfff]")


class ChunkReader:
    """Turns chunks into token ids without special tokens, and remembers the ids. Safe to share between threads.

    ``opening`` is put before every chunk, and its tokens count as the chunk's. Of a chunk at most ``longest`` ids are
    kept, as elements of ``dtype``.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, longest: int, opening: str = "", known_bytes: int = KNOWN_BYTES
    ) -> None:
        self.known = TokenIdCache(known_bytes)
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32)
        self._tokenizer = tokenizer
        self._longest = longest
        self._opening = opening

    def read(self, chunks: Sequence[str], count: int, *, hashes: Sequence[bytes] | None = None) -> list[TokenPrefix]:
        """Read at least the first ``count`` ids of each chunk, in order; fewer only where there are no more.

        ``hashes``, one per chunk, spare computing them: equal where the texts are equal, and only there. What stands
        behind the first ``MOST_CHARACTERS`` of a text is not there.
        """
        keys = [text_hash(chunk) for chunk in chunks] if hashes is None else hashes
        texts = dict(zip(keys, chunks, strict=True))
        known = self.known.find(texts)
        for key in [key for key, first in known.items() if not first.whole and self._elements(first) < count]:
            del known[key]
        missing = [key for key in texts if key not in known]
        if missing:
            known.update(self._fresh(missing, [texts[key] for key in missing], count))
        return [known[key] for key in keys]

    def _elements(self, first: TokenPrefix) -> int:
        return len(first.ids) // self.dtype.itemsize

    def _fresh(self, keys: Sequence[bytes], texts: Sequence[str], count: int) -> dict[bytes, TokenPrefix]:
        fresh = {}
        read = encode_heads(self._tokenizer, texts, count, opening=self._opening)
        for key, (encoding, sure, whole) in zip(keys, read, strict=True):
            kept = min(sure, self._longest)
            ids = np.array(encoding.ids[:kept], self.dtype).tobytes()
            fresh[key] = TokenPrefix(ids, whole and sure <= kept)
        self.known.keep(fresh)
        return fresh


class Head(NamedTuple):
    """The beginning of a text, encoded: the first ``sure`` ids are those of the text; ``whole`` says that it is all."""

    encoding: Encoding
    sure: int
    whole: bool

    def ids(self, count: int) -> list[int]:
        """Give the first ``count`` ids, or all that are sure."""
        return list(self.encoding.ids[: min(count, self.sure)])

    def fits(self, count: int) -> bool:
        """Tell whether the whole text gives no more than ``count`` ids."""
        return self.whole and self.sure <= count


def encode_heads(tokenizer: Tokenizer, texts: Sequence[str], count: int, *, opening: str = "") -> list[Head]:
    """Encode so much of each text that its first ``count`` ids are sure, with ``opening`` before it.

    Special tokens are not added. Fewer are sure only where the text has no more, as far as it is read.
    """
    found: dict[int, Head] = {}
    margin = _margin(tokenizer)
    unsettled = list(range(len(texts)))
    for limit in _limits(count + margin):
        heads = [_sure_head(texts[at], limit) for at in unsettled]
        encodings = tokenizer.encode_batch_fast([opening + sound(head) for head in heads], add_special_tokens=False)
        for at, head, encoding in zip(unsettled, heads, encodings, strict=True):
            whole = len(head) == len(texts[at])
            if whole or limit == MOST_CHARACTERS:
                found[at] = Head(encoding, len(encoding), whole)
            elif len(encoding) >= count + margin and not _joins(texts[at][len(head)]):
                found[at] = Head(encoding, len(encoding) - margin, whole)
        unsettled = [at for at in unsettled if at not in found]
        if not unsettled:
            break
    return [found[at] for at in range(len(texts))]


def _margin(tokenizer: Tokenizer) -> int:
    # In WordPiece the first letters of a word may give a token each, and more of the same word a single one.
    return max(_MARGIN_TOKENS, getattr(tokenizer.model, "max_input_chars_per_word", 0))


def first_tokens(tokenizer: Tokenizer, text: str, count: int) -> str:
    """Cut a text to a beginning that holds its first ``count`` tokens, and perhaps more."""
    margin = _margin(tokenizer)
    for limit in _limits(count + margin):
        head = _sure_head(text, limit)
        [encoding] = tokenizer.encode_batch_fast([sound(head)], add_special_tokens=False)
        if len(head) == len(text) or len(encoding) >= count + margin:
            break
    return head


def _limits(tokens: int) -> Iterator[int]:
    limit = _CHARACTERS_PER_TOKEN * tokens
    while limit < MOST_CHARACTERS:
        yield limit
        limit *= 4
    yield MOST_CHARACTERS


def _sure_head(text: str, limit: int) -> str:
    head = head_of(text, limit)
    # White space at a cut may go with what follows: some added tokens take all that is before them.
    return head if len(head) == len(text) or limit == MOST_CHARACTERS else head.rstrip()


def head_of(text: str, limit: int) -> str:
    """Cut a text to at most ``limit`` characters: before white space where there is some near, not before an accent.

    >>> head_of("one two three", 9), head_of("unbroken", 4), head_of("re\u0301sume\u0301", 2), head_of("short", 9)
    ('one two', 'unbr', 'r', 'short')
    """
    if len(text) <= limit:
        return text
    near = max(0, limit - _BOUNDARY_CHARACTERS)
    boundary = max(text.rfind(space, near, limit) for space in " \n\t\u3000")
    if boundary <= 0:
        boundary = next((at for at in range(limit, near, -1) if not _joins(text[at])), limit)
    return text[:boundary]


def _joins(character: str) -> bool:
    """Tell whether a character may become one with those before it: an accent, a joiner, part of a syllable, a tone."""
    return (
        unicodedata.category(character) in _MARKS
        or character in "\u200c\u200d"
        or "\u1160" <= character <= "\u11ff"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    )


def sound(text: str) -> str:
    """Replace lone surrogates, which have no UTF-8, by U+FFFD."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
