"""Token ids of pairs that are one rendered text, as decoders read them: instruction, query and chunk in a chat."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Encoding, Tokenizer

from ..errors import ModelUnusable
from ..protocol import QUERY_MAX_TOKENS, PairLimits, TokenisedPair, checked_length
from .pair_tokeniser import Heads, as_it_is, join
from .rendering import CHUNK, PROBES, QUERY, Rendering
from .text_reading import KNOWN_BYTES, MOST_CHARACTERS, ChunkReader, first_tokens, sound
from .whole_pairs import WholeChats


class ChatPairs:
    """Reads the text up to the chunk once per query, chunks apart, and joins them into what the whole text gives.

    The chunk begins at the last place before it where the tokeniser never lets tokens run together; that may be a
    space or a line break early. Raises ModelUnusable where there is no such place, or none behind the chunk. Pairs
    whose texts hold what may reach across these places are encoded whole.
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
        self._frame = len(self._ids(rendering.before + self._between))
        self._whole = WholeChats(tokenizer, rendering, max_length=max_length)
        self._seams = Seams(tokenizer, left=self._between, opening=opening, right=rendering.after)
        self._chunks = ChunkReader(tokenizer, longest=max_length + 1, opening=opening, known_bytes=known_bytes)

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
        limits = PairLimits.within(
            length, special_tokens=self._frame + len(self._after), query_max_tokens=query_max_tokens
        )
        shown = [self._rendering.shown(chunk) for chunk in chunks] if self._rendering.trims else chunks
        pairs = join(
            self._heads(query, limits),
            self._chunks.read(shown, length + 1, hashes=hashes),
            self._after,
            limits,
            dtype=self._chunks.dtype,
        )
        astray = self._seams.astray(self._rendering.shown(query), shown)
        if astray:
            anew = self._whole.pairs(
                query, [chunks[at] for at in astray], max_length=max_length, query_max_tokens=query_max_tokens
            )
            for at, pair in zip(astray, anew, strict=True):
                pairs[at] = pair
        return pairs

    def _heads(self, query: str, limits: PairLimits) -> Heads:
        """Encode everything before the chunk: with the whole query, and with no more of it than its limit."""
        text = sound(self._rendering.shown(query))
        shown = first_tokens(self._tokenizer, text, limits.total)
        whole = self._head(shown).ids if len(shown) == len(text) else None
        fits = whole is not None and limits.beside(len(whole) - self._frame) >= 0
        return Heads(whole if fits else None, self._cut(shown, limits), self._frame)

    def _cut(self, shown: str, limits: PairLimits) -> list[int]:
        begin = len(self._rendering.before)
        while True:
            encoding = self._head(shown)
            end = begin + len(shown)
            starts = [start for start, stop in encoding.offsets if stop > begin and start < end]
            # One token at least is the chunk's.
            excess = max(len(starts) - limits.query, 1 - limits.beside(len(encoding) - self._frame))
            if excess <= 0 or not shown:
                return list(encoding.ids)
            shown = shown[: max(0, starts[max(0, len(starts) - excess)] - begin)]

    def _head(self, shown: str) -> Encoding:
        return self._tokenizer.encode(self._rendering.before + shown + self._between, add_special_tokens=False)

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


class Seams:
    """Finds texts that hold more of an added token than they seem to: one that takes the space beside it, or a part.

    A chunk stands behind ``left`` and ``opening``, and before ``right``; the tokeniser's own cuts are before
    ``opening`` and before ``right``.
    """

    def __init__(self, tokenizer: Tokenizer, *, left: str, opening: str, right: str) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        greedy = [mark for mark in added if mark.lstrip or mark.rstrip or mark.single_word]
        #: Those that look at their neighbours, as they stand in a text that was normalised or not.
        self._normalise = tokenizer.normalizer.normalize_str if any(mark.normalized for mark in greedy) else None
        self._greedy = {mark.content for mark in greedy}
        if self._normalise is not None:
            self._greedy |= {self._normalise(content) for content in self._greedy} - {""}
        contents = [mark.content for mark in added]
        self._opening = opening
        self._beginnings = tuple(rest for begun, rest in _parts(contents) if left.endswith(begun))
        self._endings = tuple(begun for begun, rest in _parts(contents) if right.startswith(rest))

    def astray(self, query: str, chunks: Sequence[str]) -> list[int]:
        """List the places of chunks that are not to be read apart beside this query."""
        if self._greedy and self._is_greedy(query):
            return list(range(len(chunks)))
        if not (self._greedy or self._beginnings or self._endings):
            return []
        return [at for at, chunk in enumerate(chunks) if self._strays(chunk)]

    def _strays(self, chunk: str) -> bool:
        text = self._opening + chunk[:MOST_CHARACTERS]
        return text.startswith(self._beginnings) or chunk.endswith(self._endings) or self._is_greedy(text)

    def _is_greedy(self, text: str) -> bool:
        read = [text] if self._normalise is None else [text, self._normalise(sound(text))]
        return any(content in one for one in read for content in self._greedy)


def _parts(contents: Sequence[str]) -> list[tuple[str, str]]:
    return [(content[:at], content[at:]) for content in contents for at in range(1, len(content))]


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
