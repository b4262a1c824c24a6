"""Token ids of pairs that are rendered as one text, as decoders read them: instruction, query and chunk in a chat."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Encoding, Tokenizer

from ..errors import ModelUnusable
from ..protocol import QUERY_MAX_TOKENS, PairLimits, TokenisedPair, checked_length
from .pair_tokeniser import PairPrefixes, join, prepare
from .rendering import CHUNK, PROBES, QUERY, Rendering
from .text_reading import CACHE_BYTES, MAX_CHARACTERS, ChunkReader, prefix_with_tokens, replace_surrogates
from .whole_pairs import WholeChats


class ChatPairs:
    """Encodes the text before the chunk once per query, chunks separately, and joins them into the ids of the whole.

    The chunk's part begins at the last position before the chunk where the tokeniser never merges tokens; that may be a
    space or a line break earlier. Raises ModelUnusable where there is no such position, or none after the chunk. Pairs
    whose texts contain what may reach across these boundaries are encoded whole.
    """

    caches_chunks = True

    def __init__(
        self, tokenizer: Tokenizer, rendering: Rendering, *, max_length: int, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._tokenizer = prepare(tokenizer)
        self._rendering = rendering
        self.max_length = max_length
        self.template = repr(rendering)
        self._between, opening = self._split_between()
        self._after = self._ids(rendering.after)
        self._fixed = len(self._ids(rendering.before + self._between))
        self._whole = WholeChats(tokenizer, rendering, max_length=max_length)
        self._boundaries = Boundaries(tokenizer, left=self._between, opening=opening, right=rendering.after)
        self._chunks = ChunkReader(tokenizer, longest=max_length + 1, opening=opening, cache_bytes=cache_bytes)

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
        length = checked_length(max_length, self.max_length)
        limits = PairLimits.within(
            length, special_tokens=self._fixed + len(self._after), query_max_tokens=query_max_tokens
        )
        rendered = [self._rendering.rendered(chunk) for chunk in chunks] if self._rendering.trims else chunks
        pairs = join(
            self._prefixes(query, limits),
            self._chunks.read(rendered, length + 1, hashes=hashes),
            self._after,
            limits,
            dtype=self._chunks.dtype,
        )
        unsafe_chunks = self._boundaries.unsafe_chunks(self._rendering.rendered(query), rendered)
        if unsafe_chunks:
            encoded = self._whole.pairs(
                query, [chunks[at] for at in unsafe_chunks], max_length=max_length, query_max_tokens=query_max_tokens
            )
            for at, pair in zip(unsafe_chunks, encoded, strict=True):
                pairs[at] = pair
        return pairs

    def _prefixes(self, query: str, limits: PairLimits) -> PairPrefixes:
        """Encode everything before the chunk: with the whole query, and with no more of it than its limit."""
        text = replace_surrogates(self._rendering.rendered(query))
        query_text = prefix_with_tokens(self._tokenizer, text, limits.total)
        whole = self._before_chunk(query_text).ids if len(query_text) == len(text) else None
        fits = whole is not None and limits.beside(len(whole) - self._fixed) >= 0
        return PairPrefixes(whole if fits else None, self._cut(query_text, limits), self._fixed)

    def _cut(self, query_text: str, limits: PairLimits) -> list[int]:
        begin = len(self._rendering.before)
        while True:
            encoding = self._before_chunk(query_text)
            end = begin + len(query_text)
            starts = [start for start, stop in encoding.offsets if stop > begin and start < end]
            # One token at least is the chunk's.
            excess = max(len(starts) - limits.query, 1 - limits.beside(len(encoding) - self._fixed))
            if excess <= 0 or not query_text:
                return list(encoding.ids)
            query_text = query_text[: max(0, starts[max(0, len(starts) - excess)] - begin)]

    def _before_chunk(self, query_text: str) -> Encoding:
        return self._tokenizer.encode(self._rendering.before + query_text + self._between, add_special_tokens=False)

    def _split_between(self) -> tuple[str, str]:
        between = self._rendering.between
        for at in range(len(between), 0, -1):
            if self._splits(between[:at], between[at:]):
                return between[:at], between[at:]
        raise ModelUnusable("tokens of chunks merge with the text around them")

    def _splits(self, between: str, opening: str) -> bool:
        rendering = self._rendering
        tail = self._ids(rendering.after)
        for query, probe in [*((QUERY, probe) for probe in PROBES), *((probe, CHUNK) for probe in PROBES)]:
            head, chunk = rendering.before + rendering.rendered(query) + between, opening + rendering.rendered(probe)
            if not (_cuts(self._tokenizer, between, chunk) and _cuts(self._tokenizer, chunk, rendering.after)):
                return False
            if self._ids(head) + self._ids(chunk) + tail != self._ids(rendering(query, probe)):
                return False
        return True

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


class Boundaries:
    """Finds texts in which an added token may reach across a boundary: one that includes white space, or a part of one.

    A chunk is placed after ``left`` and ``opening``, and before ``right``; the boundaries are before ``opening`` and
    before ``right``.
    """

    def __init__(self, tokenizer: Tokenizer, *, left: str, opening: str, right: str) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        greedy = [mark for mark in added if mark.lstrip or mark.rstrip or mark.single_word]
        #: Those that depend on their neighbours, as they appear in a text before and after normalisation.
        self._normalise = tokenizer.normalizer.normalize_str if any(mark.normalized for mark in greedy) else None
        self._greedy = {mark.content for mark in greedy}
        if self._normalise is not None:
            self._greedy |= {self._normalise(content) for content in self._greedy} - {""}
        contents = [mark.content for mark in added]
        self._opening = opening
        self._beginnings = tuple(rest for begun, rest in _parts(contents) if left.endswith(begun))
        self._endings = tuple(begun for begun, rest in _parts(contents) if right.startswith(rest))

    def unsafe_chunks(self, query: str, chunks: Sequence[str]) -> list[int]:
        """List the positions of chunks that cannot be encoded separately with this query."""
        if self._greedy and self._is_greedy(query):
            return list(range(len(chunks)))
        if not (self._greedy or self._beginnings or self._endings):
            return []
        return [at for at, chunk in enumerate(chunks) if self._is_unsafe(chunk)]

    def _is_unsafe(self, chunk: str) -> bool:
        text = self._opening + chunk[:MAX_CHARACTERS]
        return text.startswith(self._beginnings) or chunk.endswith(self._endings) or self._is_greedy(text)

    def _is_greedy(self, text: str) -> bool:
        read = [text] if self._normalise is None else [text, self._normalise(replace_surrogates(text))]
        return any(content in one for one in read for content in self._greedy)


def _parts(contents: Sequence[str]) -> list[tuple[str, str]]:
    return [(content[:at], content[at:]) for content in contents for at in range(1, len(content))]


def _cuts(tokenizer: Tokenizer, left: str, right: str) -> bool:
    """Tell whether the tokeniser always separates two texts: at an added token, or between words.

    Equal ids of probes would not prove it: one merge that no probe contains is enough.
    """
    marks = [mark.content for mark in tokenizer.get_added_tokens_decoder().values() if not (mark.lstrip or mark.rstrip)]
    if left.endswith(tuple(marks)) or right.startswith(tuple(marks)) or not left or not right:
        return True
    return _words(tokenizer, left + right) == _words(tokenizer, left) + _words(tokenizer, right)


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    return [text] if tokenizer.pre_tokenizer is None else [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
