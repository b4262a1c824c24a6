"""Token ids of pairs that cannot be joined: every pair is encoded anew, query and chunk cut before by the same rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding, Tokenizer

from .errors import ModelUnusable
from .pair_tokeniser import PROBES, as_it_is
from .protocol import QUERY_MAX_TOKENS, TokenisedPair, checked_length, room_for
from .rendering import CHUNK, QUERY, Render
from .text_reading import characters_for, encode_heads, head_of, sound


class WholePairs:
    """Leaves every pair to the tokeniser's own post-processing: for pairs that are not made by a plain template.

    Query and chunk are cut before, by the same rule. Raises ModelUnusable where the two segments of a pair do not
    follow each other.
    """

    joins = False

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, query_prompt: str = "") -> None:
        self._tokenizer = as_it_is(tokenizer)
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
        hashes: Sequence[bytes] | None = None,  # noqa: ARG002 - nothing is remembered
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order, each pair anew."""
        length = checked_length(max_length, self.max_length)
        room = room_for(length, self._special_tokens + self._prompt_tokens, query_max_tokens)
        most = self._prompt_tokens + room.query
        [asked] = encode_heads(self._tokenizer, [self._query_prompt + query], most)
        query_cut = _cut(asked, most)
        left = length - self._special_tokens - len(asked[0])
        pairs = []
        for read in encode_heads(self._tokenizer, chunks, left):
            chunk_cut = _cut(read, left)
            whole = self._tokenizer.post_process(asked[0], read[0])
            second_from = len(whole) - sum(whole.type_ids)
            pairs.append(TokenisedPair(np.array(whole.ids, np.int32), second_from, query_cut or chunk_cut))
        return pairs


class WholeChats:
    """Encodes the rendered text of every pair: right for every template, and slow."""

    joins = False

    def __init__(self, tokenizer: Tokenizer, render: Render, *, max_length: int) -> None:
        self._tokenizer = as_it_is(tokenizer)
        self._render = render
        self.max_length = max_length
        self.template = f"whole chats, such as {render(QUERY, CHUNK)!r}"
        self._special_tokens = len(self._ids(render("", "")))

    def pairs(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
        hashes: Sequence[bytes] | None = None,  # noqa: ARG002 - nothing is remembered
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order, each pair anew."""
        length = checked_length(max_length, self.max_length)
        room = room_for(length, self._special_tokens, query_max_tokens)
        text = sound(query)
        asked = head_of(text, characters_for(room.query))
        asked = self._shorter(asked, max(0, self._count(asked) - room.query))
        return self._cut_to(length, asked, [sound(chunk) for chunk in chunks], query_cut=len(asked) < len(text))

    def _cut_to(self, length: int, query: str, chunks: Sequence[str], *, query_cut: bool) -> list[TokenisedPair]:
        """Cut chunks again and again until the whole is no longer than it may be: a cut moves tokens about."""
        shown = [head_of(chunk, characters_for(length)) for chunk in chunks]
        ids: list[list[int]] = [[]] * len(chunks)
        longer = list(range(len(chunks)))
        while longer:
            whole = [self._render(query, shown[at]) for at in longer]
            for at, encoding in zip(
                longer, self._tokenizer.encode_batch_fast(whole, add_special_tokens=False), strict=True
            ):
                ids[at] = encoding.ids
            longer = [at for at in longer if len(ids[at]) > length]
            for at in longer:
                if not shown[at]:
                    raise ValueError(f"max_length {length} leaves no room for a chunk beside this query")
                shown[at] = self._shorter(shown[at], len(ids[at]) - length)
        return [
            TokenisedPair(np.array(ids[at], np.int32), len(ids[at]), query_cut or len(shown[at]) < len(chunks[at]))
            for at in range(len(chunks))
        ]

    def _shorter(self, text: str, tokens: int) -> str:
        """Cut so many tokens, or a little more, off the end of a text."""
        if not tokens:
            return text
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return text[: offsets[-tokens][0]] if tokens < len(offsets) else ""

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _cut(read: tuple[Encoding, bool], count: int) -> bool:
    """Cut an encoding in place; tell whether anything is missing."""
    encoding, shortened = read
    longer = len(encoding) > count
    encoding.truncate(count)
    return shortened or longer
