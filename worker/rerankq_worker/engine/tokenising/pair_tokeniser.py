"""Token ids of pairs: query and chunks encoded separately, then joined by the model's own template."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ..errors import ModelUnusable
from ..protocol import QUERY_MAX_TOKENS, PairLimits, TokenisedPair, checked_length
from .text_reading import CACHE_BYTES, ChunkReader, characters_of, encode_prefixes
from .token_id_cache import TokenPrefix

#: Queries and chunks of scripts and lengths that templates may treat differently.
PROBES = (("probe", "another one"), ("Wie groß?", "Größer: 你好, 世界!"), ("a b c", ""), ("", "d"))


class Tokeniser(Protocol):
    """Makes the token ids of pairs from a query and chunks, from any number of threads at once.

    ``caches_chunks`` says that chunks are encoded separately and their ids cached; else every pair is encoded as a
    whole, which takes a hundred times as long for chunks that would be in the cache.
    """

    max_length: int
    caches_chunks: bool

    @property
    def template(self) -> object:
        """A value whose ``repr`` identifies how pairs are built; part of the score fingerprint."""

    def pairs(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
        hashes: Sequence[bytes] | None = None,
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order, as model input of at most ``max_length`` tokens.

        What does not fit is cut by PairLimits; a prompt does not count against the query's limit. ``hashes``, one per
        chunk, are those of the chunks' texts, if the caller knows them. A very long text is read only as far as the
        tokens that are kept need, and never beyond a million characters: the rest counts as cut.

        Raises PairFailed for a pair of no tokens.
        """


@dataclass(frozen=True, slots=True)
class Template:
    """The special token ids before the query, between query and chunk, and after the chunk.

    ``two_segments`` says that the chunk and what follows it are marked as the second segment. ``query_prompt`` is text
    that is put before every query. Its ``repr`` is part of the score fingerprint: renaming a field loses all cached
    scores.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    two_segments: bool
    query_prompt: str = ""

    @property
    def special_tokens(self) -> int:
        """The number of special tokens of a pair."""
        return len(self.before) + len(self.between) + len(self.after)


class PairTokeniser:
    """Joins separately encoded queries and chunks into the ids that the tokeniser itself gives for the pair.

    Takes over the tokeniser: its saved truncation and padding are switched off, and it is not changed afterwards, so
    that any number of threads may encode at once. Raises ModelUnusable where pairs are not built by a template of
    special tokens around first the query and then the chunk.
    """

    caches_chunks = True

    def __init__(
        self, tokenizer: Tokenizer, *, max_length: int, query_prompt: str = "", cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._tokenizer = prepare(tokenizer)
        self.max_length = max_length
        self.template = _derive_template(tokenizer, query_prompt)
        self._prompt_tokens = len(tokenizer.encode(query_prompt, add_special_tokens=False))
        # One token more than fits, to tell whether there are more.
        longest = max(1, max_length - self.template.special_tokens) + 1
        self._chunks = ChunkReader(tokenizer, longest=longest, cache_bytes=cache_bytes)
        for query, chunk in PROBES:
            self._verify(query, chunk)

    def pairs(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
        hashes: Sequence[bytes] | None = None,
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order; cached chunks take a hundredth of the time."""
        marks = self.template
        fixed = marks.special_tokens + self._prompt_tokens
        limits = self._limits(max_length, query_max_tokens)
        most = self._prompt_tokens + limits.total
        [asked] = encode_prefixes(self._tokenizer, [marks.query_prompt + query], most)
        whole, cut = (
            [*marks.before, *asked.ids(tokens), *marks.between] for tokens in (most, self._prompt_tokens + limits.query)
        )
        frame = fixed - len(marks.after)
        return join(
            PairPrefixes(whole if asked.fits(most) else None, cut, frame, two_segments=marks.two_segments),
            self._chunks.read(chunks, limits.total + 1, hashes=hashes),
            marks.after,
            limits,
            dtype=self._chunks.dtype,
        )

    def characters_read(
        self, query: str, chunk: str, *, max_length: int | None = None, query_max_tokens: int = QUERY_MAX_TOKENS
    ) -> int | None:
        """Tell how many characters of a chunk are kept in a pair that does not fit."""
        limits = self._limits(max_length, query_max_tokens)
        [asked] = encode_prefixes(
            self._tokenizer, [self.template.query_prompt + query], self._prompt_tokens + limits.total
        )
        kept = len(asked.ids(self._prompt_tokens + limits.query)) - self._prompt_tokens
        return characters_of(self._tokenizer, chunk, limits.beside(kept))

    def _limits(self, max_length: int | None, query_max_tokens: int) -> PairLimits:
        length = checked_length(max_length, self.max_length)
        fixed = self.template.special_tokens + self._prompt_tokens
        return PairLimits.within(length, special_tokens=fixed, query_max_tokens=query_max_tokens)

    def _verify(self, query: str, chunk: str) -> None:
        whole = self._tokenizer.encode(self.template.query_prompt + query, chunk)
        if len(whole) > self.max_length:
            return
        [pair] = self.pairs(query, [chunk])
        types = np.arange(pair.length) >= pair.second_from
        if whole.ids != pair.ids.tolist() or whole.type_ids != types.astype(int).tolist():
            raise ModelUnusable(
                "this model's tokeniser does more to a pair than put special tokens around its two texts; "
                f"tried on {query!r} and {chunk!r}"
            )


@dataclass(frozen=True, slots=True)
class PairPrefixes:
    """The token ids before a chunk: with the whole query, for pairs that fit, and with the cut one, for all others.

    ``whole`` is None where the query is too long for any pair to fit. ``fixed`` ids of either are not the query's.
    """

    whole: Sequence[int] | None
    cut: Sequence[int]
    fixed: int
    two_segments: bool = False


def join(
    prefixes: PairPrefixes,
    chunks: Sequence[TokenPrefix],
    suffix: Sequence[int],
    limits: PairLimits,
    *,
    dtype: np.dtype[Any],
) -> list[TokenisedPair]:
    """Put each chunk between prefix and suffix, cut to the limits; the pairs are slices of one array."""
    width = dtype.itemsize
    whole, cut, ending = (np.array(ids, dtype).tobytes() for ids in (prefixes.whole or (), prefixes.cut, suffix))
    fitting = -1 if prefixes.whole is None else width * limits.beside(len(prefixes.whole) - prefixes.fixed)
    left = width * limits.beside(len(prefixes.cut) - prefixes.fixed)
    pieces, shapes = [], []
    for first in chunks:
        fits = first.whole and len(first.ids) <= fitting
        opening, ids = (whole, first.ids) if fits else (cut, first.ids[:left])
        pieces += [opening, ids, ending]
        shapes.append(((len(opening) + len(ids) + len(ending)) // width, len(opening) // width, not fits))
    flat = _widened(pieces, dtype)
    pairs, begin = [], 0
    for tokens, second_from, truncated in shapes:
        end = begin + tokens
        pairs.append(TokenisedPair(flat[begin:end], second_from if prefixes.two_segments else tokens, truncated))
        begin = end
    return pairs


def _widened(pieces: Sequence[bytes], dtype: np.dtype[Any]) -> NDArray[np.int32]:
    return np.frombuffer(b"".join(pieces), dtype).astype(np.int32)


def prepare(tokenizer: Tokenizer) -> Tokenizer:
    """Switch off the truncation and padding that a tokeniser may have been saved with, and let it use threads."""
    # Unset, tokenisers switch their threads off after a fork and report it on standard error each time.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Only where it is on: a tokeniser that other threads use cannot be changed meanwhile.
    if tokenizer.truncation is not None:
        tokenizer.no_truncation()
    if tokenizer.padding is not None:
        tokenizer.no_padding()
    return tokenizer


def _derive_template(tokenizer: Tokenizer, query_prompt: str) -> Template:
    probe: Encoding = tokenizer.encode(*PROBES[0])
    sides, ids = probe.sequence_ids, probe.ids
    if sides.count(0) == 0 or sides.count(1) == 0:
        raise ModelUnusable("this model's tokeniser does not read pairs")
    query = slice(sides.index(0), _last(sides, 0) + 1)
    chunk = slice(sides.index(1), _last(sides, 1) + 1)
    if set(sides[query]) != {0} or set(sides[chunk]) != {1} or query.stop > chunk.start:
        raise ModelUnusable("this model's tokeniser does not put the query before the chunk, each contiguous")
    return Template(
        before=tuple(ids[: query.start]),
        between=tuple(ids[query.stop : chunk.start]),
        after=tuple(ids[chunk.stop :]),
        two_segments=probe.type_ids[chunk.start] == 1,
        query_prompt=query_prompt,
    )


def _last(sides: Sequence[int | None], side: int) -> int:
    return len(sides) - 1 - sides[::-1].index(side)
