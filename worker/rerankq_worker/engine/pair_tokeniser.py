"""Token ids of pairs: query and chunks encoded apart, then joined by the model's own template."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer

from .errors import ModelUnusable
from .protocol import QUERY_MAX_TOKENS, TokenisedPair, checked_length, room_for

# Unset, the tokenisers switch their threads off after a fork and say so on standard error at every one.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

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
_PROBES = (("probe", "another one"), ("Wie groß?", "Größer: 你好, 世界!"), ("a b c", ""), ("", "d"))


@dataclass(frozen=True, slots=True)
class Template:
    """What stands before the query, between it and the chunk, and behind the chunk, as special token ids.

    ``two_segments`` says that the chunk and what follows it are marked as the second segment.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    two_segments: bool

    @property
    def special_tokens(self) -> int:
        """Tokens of a pair that are neither the query's nor the chunk's."""
        return len(self.before) + len(self.between) + len(self.after)


class PairTokeniser:
    """Joins separately encoded queries and chunks into what the tokeniser makes of the pair, id for id.

    The tokeniser becomes ours: its saved truncation and padding are switched off here, and it is never changed again,
    so that any number of threads may encode at once. Raises ModelUnusable where pairs are not made by a template of
    special tokens round two separately encoded texts.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.max_length = max_length
        self.template = _derive_template(tokenizer)
        for query, chunk in _PROBES:
            self._verify(query, chunk)

    def pairs(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order.

        The query is cut to ``query_max_tokens`` or half of the room beside the special tokens, whichever is less, the
        chunk to what is left. Of a very long chunk no more is read than gives the tokens that are kept; where
        hundreds of characters make one token throughout (a megabyte without white space), the rest counts as cut.
        """
        template = self.template
        room = room_for(checked_length(max_length, self.max_length), template.special_tokens, query_max_tokens)
        asked, query_cut = self._first_ids([query], room.query)[0]
        head = np.array([*template.before, *asked, *template.between], dtype=np.int32)
        tail = np.array(template.after, dtype=np.int32)
        pairs = []
        for read, chunk_cut in self._first_ids(chunks, room.for_chunk(len(asked))):
            ids = np.concatenate((head, np.array(read, dtype=np.int32), tail))
            second_from = len(head) if template.two_segments else len(ids)
            pairs.append(TokenisedPair(ids, second_from, query_cut or chunk_cut))
        return pairs

    def _first_ids(self, texts: Sequence[str], count: int) -> list[tuple[list[int], bool]]:
        """Encode texts without special tokens: the first ``count`` ids of each, and whether there was more."""
        found: list[tuple[list[int], bool]] = [([], False)] * len(texts)
        open_positions = list(range(len(texts)))
        limit = _CHARACTERS_PER_TOKEN * (count + _MARGIN_TOKENS)
        for last in [False] * _ENLARGEMENTS + [True]:
            heads = [_head(texts[position], limit) for position in open_positions]
            encodings = self._tokenizer.encode_batch_fast([_sound(head) for head in heads], add_special_tokens=False)
            unsettled = []
            for position, head, encoding in zip(open_positions, heads, encodings, strict=True):
                ids, shortened = encoding.ids, len(head) < len(texts[position])
                if shortened and not last and len(ids) < count + _MARGIN_TOKENS:
                    unsettled.append(position)
                else:
                    found[position] = ids[:count], shortened or len(ids) > count
            if not unsettled:
                break
            open_positions, limit = unsettled, limit * 4
        return found

    def _verify(self, query: str, chunk: str) -> None:
        whole = self._tokenizer.encode(query, chunk)
        types = np.array(whole.type_ids, dtype=bool)
        pair = self.pairs(query, [chunk])[0] if len(whole.ids) <= self.max_length else None
        if pair is None:
            return
        if whole.ids != pair.ids.tolist() or not np.array_equal(types, np.arange(pair.length) >= pair.second_from):
            raise ModelUnusable(
                "this model's tokeniser does more to a pair than put special tokens round its two texts; "
                f"tried on {query!r} and {chunk!r}"
            )


def _derive_template(tokenizer: Tokenizer) -> Template:
    probe: Encoding = tokenizer.encode(*_PROBES[0])
    sides, ids = probe.sequence_ids, probe.ids
    if sides.count(0) == 0 or sides.count(1) == 0:
        raise ModelUnusable("this model's tokeniser does not read pairs")
    query = slice(sides.index(0), _last(sides, 0) + 1)
    chunk = slice(sides.index(1), _last(sides, 1) + 1)
    if set(sides[query]) != {0} or set(sides[chunk]) != {1} or query.stop > chunk.start:
        raise ModelUnusable("this model's tokeniser does not put the query before the chunk, each in one piece")
    return Template(
        before=tuple(ids[: query.start]),
        between=tuple(ids[query.stop : chunk.start]),
        after=tuple(ids[chunk.stop :]),
        two_segments=probe.type_ids[chunk.start] == 1,
    )


def _last(sides: Sequence[int | None], side: int) -> int:
    return len(sides) - 1 - sides[::-1].index(side)


def _head(text: str, limit: int) -> str:
    """Cut a text to at most ``limit`` characters, before white space where there is some near.

    >>> _head("one two three", 9), _head("unbroken", 4), _head("short", 9)
    ('one two', 'unbr', 'short')
    """
    if len(text) <= limit:
        return text
    near = max(0, limit - _BOUNDARY_CHARACTERS)
    boundary = max(text.rfind(space, near, limit) for space in " \n\t\u3000")
    return text[: boundary if boundary > 0 else limit]


def _sound(text: str) -> str:
    """Replace lone surrogates, which have no UTF-8, by U+FFFD."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
