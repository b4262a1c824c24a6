"""Token ids of pairs that are one rendered text, as decoders read them: instruction, query and chunk in a chat."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from .errors import ModelUnusable
from .pair_tokeniser import as_it_is, join
from .protocol import QUERY_MAX_TOKENS, TokenisedPair, checked_length, room_for
from .rendering import CHUNK, PROBES, QUERY, Rendering
from .text_reading import KNOWN_BYTES, ChunkReader, characters_for, head_of, sound


class ChatPairs:
    """Reads the text up to the chunk once per query, chunks apart, and joins them into what the whole text gives.

    The chunk begins at the last place before it where the tokeniser never lets tokens run together; that may be a
    space or a line break early. Raises ModelUnusable where there is no such place, or none behind the chunk.
    """

    joins = True

    def __init__(
        self, tokenizer: Tokenizer, rendering: Rendering, *, max_length: int, known_bytes: int = KNOWN_BYTES
    ) -> None:
        self._tokenizer = as_it_is(tokenizer)
        self._rendering = rendering
        self.max_length = max_length
        self.template = repr(rendering)
        self._between, opening = self._parted()
        self._after = self._ids(rendering.after)
        self._special_tokens = len(self._ids(rendering.before + self._between)) + len(self._after)
        self._chunks = ChunkReader(tokenizer, longest=max_length, opening=opening, known_bytes=known_bytes)

    def pairs(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
        hashes: Sequence[bytes] | None = None,
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order; chunks that are remembered cost a hundredth of the others."""
        length = checked_length(max_length, self.max_length)
        room = room_for(length, self._special_tokens, query_max_tokens)
        most = length - len(self._after) - 1
        head, query_cut = self._head(query, room.query, most)
        left = length - len(head) - len(self._after)
        shown = [self._rendering.shown(chunk) for chunk in chunks] if self._rendering.trims else chunks
        return join(
            head,
            self._chunks.read(shown, max(room.total, left), hashes=hashes),
            self._after,
            room=left,
            dtype=self._chunks.dtype,
            second_from=None,
            query_cut=query_cut,
        )

    def _head(self, query: str, limit: int, most: int) -> tuple[list[int], bool]:
        """Encode everything before the chunk, with at most ``limit`` tokens of the query and ``most`` in all."""
        text = sound(self._rendering.shown(query))
        shown = head_of(text, characters_for(limit))
        begin = len(self._rendering.before)
        while True:
            encoding = self._tokenizer.encode(self._rendering.before + shown + self._between, add_special_tokens=False)
            end = begin + len(shown)
            starts = [start for start, stop in encoding.offsets if stop > begin and start < end]
            excess = max(len(starts) - limit, len(encoding) - most)
            if excess <= 0 or not shown:
                return encoding.ids, len(shown) < len(text)
            shown = shown[: max(0, starts[max(0, len(starts) - excess)] - begin)]

    def _parted(self) -> tuple[str, str]:
        between = self._rendering.between
        for at in range(len(between), 0, -1):
            if self._comes_apart(between[:at], between[at:]):
                return between[:at], between[at:]
        raise ModelUnusable("tokens of chunks run together with the text that stands round them")

    def _comes_apart(self, between: str, opening: str) -> bool:
        rendering = self._rendering
        tail = self._ids(rendering.after)
        for query, probe in [*((QUERY, probe) for probe in PROBES), *((probe, CHUNK) for probe in PROBES)]:
            head, chunk = rendering.before + rendering.shown(query) + between, opening + rendering.shown(probe)
            if not (_cuts(self._tokenizer, between, chunk) and _cuts(self._tokenizer, chunk, rendering.after)):
                return False
            if self._ids(head) + self._ids(chunk) + tail != self._ids(rendering(query, probe)):
                return False
        return True

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _cuts(tokenizer: Tokenizer, left: str, right: str) -> bool:
    """Tell whether the tokeniser always cuts between two texts: at a token added to its vocabulary, or between words.

    Equal ids would not show it: without a cut, it takes but one merge that no probe knows.
    """
    marks = [mark.content for mark in tokenizer.get_added_tokens_decoder().values() if not (mark.lstrip or mark.rstrip)]
    if left.endswith(tuple(marks)) or right.startswith(tuple(marks)) or not left or not right:
        return True
    return _words(tokenizer, left + right) == _words(tokenizer, left) + _words(tokenizer, right)


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    return [text] if tokenizer.pre_tokenizer is None else [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
