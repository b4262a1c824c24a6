"""Token ids of pairs that cannot be joined: each is encoded as a whole, its texts cut before by the same rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from tokenizers import Encoding, Tokenizer

from ..errors import ModelUnusable
from ..protocol import QUERY_MAX_TOKENS, PairLimits, TokenisedPair, checked_length
from .pair_tokeniser import PROBES, prepare
from .rendering import CHUNK, QUERY, Render
from .text_reading import encode_prefixes, prefix_with_tokens, replace_surrogates


class WholePairs:
    """Builds every pair with the tokeniser's own post-processing: for pairs that no plain template describes.

    Query and chunk are cut before, by the same rule. Raises ModelUnusable where the two segments of a pair are mixed.
    """

    caches_chunks = False

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, query_prompt: str = "") -> None:
        self._tokenizer = prepare(tokenizer)
        self.max_length = max_length
        self._query_prompt = query_prompt
        self._prompt_tokens = len(tokenizer.encode(query_prompt, add_special_tokens=False))
        probe = tokenizer.encode(*PROBES[0])
        self.template = f"whole pairs, such as {probe.ids} {probe.type_ids}, queries after {query_prompt!r}"
        sides = [tokenizer.encode(text, add_special_tokens=False) for text in PROBES[0]]
        self._special_tokens = len(probe) - sum(map(len, sides))
        if self._special_tokens != tokenizer.num_special_tokens_to_add(True):
            raise ModelUnusable("this model's tokeniser does not read pairs of one query and one chunk")
        if probe.type_ids != sorted(probe.type_ids):
            raise ModelUnusable("this model's tokeniser mixes the segments of a pair")

    def pairs(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
        hashes: Sequence[bytes] | None = None,  # noqa: ARG002 - nothing is cached
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order, without a cache."""
        length = checked_length(max_length, self.max_length)
        fixed = self._special_tokens + self._prompt_tokens
        limits = PairLimits.within(length, special_tokens=fixed, query_max_tokens=query_max_tokens)
        most, kept = self._prompt_tokens + limits.total, self._prompt_tokens + limits.query
        [asked] = encode_prefixes(self._tokenizer, [self._query_prompt + query], most)
        cut = _cut(asked.encoding, min(kept, asked.sure))
        pairs = []
        for read in encode_prefixes(self._tokenizer, chunks, limits.total + 1):
            fits = asked.whole and read.fits(limits.beside(asked.sure - self._prompt_tokens))
            head = asked.encoding if fits else cut
            left = min(read.sure, limits.beside(len(head) - self._prompt_tokens))
            whole = self._tokenizer.post_process(head, _cut(read.encoding, left))
            pairs.append(TokenisedPair(np.array(whole.ids, np.int32), len(whole) - sum(whole.type_ids), not fits))
        return pairs


class WholeChats:
    """Encodes the rendered text of every pair: right for every template, and slow."""

    caches_chunks = False

    def __init__(self, tokenizer: Tokenizer, render: Render, *, max_length: int) -> None:
        self._tokenizer = prepare(tokenizer)
        self._render = render
        self.max_length = max_length
        self.template = f"whole chats, such as {render(QUERY, CHUNK)!r}"
        self._special_tokens = len(self._ids(render("", "")))
        self._tail = self._fixed_end()

    def pairs(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
        hashes: Sequence[bytes] | None = None,  # noqa: ARG002 - nothing is cached
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order, without a cache."""
        length = checked_length(max_length, self.max_length)
        limits = PairLimits.within(length, special_tokens=self._special_tokens, query_max_tokens=query_max_tokens)
        asked = prefix_with_tokens(self._tokenizer, query, limits.total)
        cut_chunks = [prefix_with_tokens(self._tokenizer, chunk, length) for chunk in chunks]
        ids: dict[int, list[int]] = {}
        if len(asked) == len(query):
            complete = [at for at, chunk in enumerate(chunks) if len(cut_chunks[at]) == len(chunk)]
            ids = {at: whole for at, whole in self._read(asked, cut_chunks, complete).items() if len(whole) <= length}
        longer = [at for at in range(len(chunks)) if at not in ids]
        if longer:
            cut = self._shorter(asked, max(0, self._count(asked) - limits.query))
            ids |= self._cut_to(length, cut, cut_chunks, longer)
        return [TokenisedPair(np.array(ids[at], np.int32), len(ids[at]), at in longer) for at in range(len(chunks))]

    def _fixed_end(self) -> list[int] | None:
        """Find the tokens that end every pair; None where the chunk is not the last of the two texts."""
        whole = self._render(QUERY, CHUNK)
        if whole.rfind(CHUNK) < whole.rfind(QUERY):
            return None
        # As sentence-transformers finds them: the common end of two pairs whose texts differ.
        one, other = (self._ids(self._render(text, text)) for text in ("0", "1 2 3 4"))
        same = list(takewhile(lambda ends: ends[0] == ends[1], zip(reversed(one), reversed(other), strict=False)))
        return one[len(one) - len(same) :]

    def _cut_to(self, length: int, query: str, cut_chunks: list[str], longer: list[int]) -> dict[int, list[int]]:
        """Cut chunks until no pair is longer than ``length``."""
        if self._tail is not None:
            begin = length - len(self._tail)
            ids = self._read(query, cut_chunks, longer)
            return {at: one if len(one) <= length else one[:begin] + self._tail for at, one in ids.items()}
        # A cut before the query may change the tokens after it: repeat until every pair fits.
        ids = {}
        while longer:
            ids |= self._read(query, cut_chunks, longer)
            longer = [at for at in longer if len(ids[at]) > length]
            for at in longer:
                if not cut_chunks[at]:
                    raise ValueError(f"max_length {length} leaves no token for a chunk beside this query")
                cut_chunks[at] = self._shorter(cut_chunks[at], len(ids[at]) - length)
        return ids

    def _read(self, query: str, cut_chunks: Sequence[str], positions: Sequence[int]) -> dict[int, list[int]]:
        texts = [replace_surrogates(self._render(query, cut_chunks[at])) for at in positions]
        read = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {at: list(encoding.ids) for at, encoding in zip(positions, read, strict=True)}

    def _shorter(self, text: str, tokens: int) -> str:
        """Cut so many tokens, or a few more, off the end of a text."""
        if not tokens:
            return text
        offsets = self._tokenizer.encode(replace_surrogates(text), add_special_tokens=False).offsets
        return text[: offsets[-tokens][0]] if tokens < len(offsets) else ""

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(replace_surrogates(text), add_special_tokens=False))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _cut(encoding: Encoding, count: int) -> Encoding:
    """Return the first ``count`` ids of an encoding as a new encoding without overflow.

    A truncated encoding keeps the rest, in pieces, and a pair's post-processing combines each piece of the one with
    each of the other: minutes for two long texts.
    """
    if len(encoding) <= count:
        return encoding
    rows = {
        "ids": encoding.ids[:count], "type_ids": [0] * count, "tokens": [""] * count, "words": [None] * count,
        "offsets": [[0, 0]] * count, "special_tokens_mask": [0] * count, "attention_mask": [1] * count,
    }  # fmt: skip
    cut = Encoding()
    cut.__setstate__(json.dumps(rows | {"overflowing": [], "sequence_ranges": {}}).encode())
    return cut
