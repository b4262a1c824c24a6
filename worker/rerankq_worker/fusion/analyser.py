"""Text into tokens for the token signal: English, Chinese, mixed, and any other script well enough.

English is stemmed (Snowball English, "Porter2") by PyStemmer, Chinese cut for search by rjieba, whose words are those
of jieba. Words of other alphabets stay whole; scripts without blanks that have no dictionary here (kana, Hangul, Thai
and their neighbours) become pairs of neighbouring characters. What analysing costs, and what the pure Python peers of
both libraries cost, is measured in ``benchmarks/analyser_cost.py``.

An :class:`Analyser` remembers what it analysed as 64-bit token hashes, so that a chunk that many jobs bring costs once.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

import numpy as np
import rjieba
import Stemmer
from numpy.typing import NDArray

from .bigrams import chunk_keys
from .stopwords import CHINESE, ENGLISH

Hashes = NDArray[np.int64]

#: Characters of a text that are analysed, up to the white space before: 16 for each of the 8192 tokens that the longest
#: models read. What lies beyond is read by no model, and a text of megabytes would take seconds.
READ_CHARACTERS = 1 << 17
# A text is analysed in pieces of about so many characters, and the dictionary asked for runs of so many at most (text
# has no longer ones): meanwhile other threads of the process stand still, for some milliseconds each time.
_PIECE, _LONGEST_RUN = 8192, 2048
# Within so many characters a cut moves back to white space.
_NEAR = 512
# Where a text may be parted without parting a word, before and after it is normalised.
_BETWEEN_WORDS = re.compile(r"[ \t\n\r。，、！？；：]")
# A word longer than this is a hash, a blob or an attack: its beginning is name enough.
MAX_TOKEN_CHARACTERS = 64
MAX_COMPOUND_PARTS = 16

_HAN = "々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_PAIRED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3041-\u3096\u3099-\u309f"
    "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uac00-\ud7a3"
)
# Vowel signs and accents, which \w leaves out though they are inside words.
_MARKS = (
    "\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed"
    "\u0900-\u0903\u093a-\u0963\u0981-\u0dff"
)
_LETTER = rf"[^\W_{_HAN}{_PAIRED}{_MARKS}]"
_JOINT = "['’_.\\-‐‑]"
_WORD = (
    rf"{_LETTER}++(?:(?:[{_MARKS}]++{_JOINT}?+|{_JOINT}){_LETTER}++){{0,{MAX_COMPOUND_PARTS - 1}}}+[{_MARKS}]*+"
    rf"(?:(?:\+\+|\#)(?!\w))?"
)
_RUNS = re.compile(rf"[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]+)?(?![\w])|{_WORD}|[{_HAN}]++|[{_PAIRED}]++")
_IS_HAN = re.compile(f"[{_HAN}]")
_IS_PAIRED = re.compile(f"[{_PAIRED}]")
_JOINTS = re.compile(_JOINT)
_ENGLISH_WORD = re.compile("[a-z]+")
_DECIMAL = re.compile(r"\d+(?:\.\d+)+")
_ENCLITICS = frozenset({"s", "d", "m", "ll", "re", "ve"})

# Text in which NFKC changes nothing that is inside a word: ASCII, unified ideographs, punctuation but for full-width
# forms of what joins words. Most Chinese text is that, and normalising it for its commas costs more than cutting it.
_SETTLED = re.compile(
    "[\x00-\x7f\u2000-\u2023\u2025-\u206f\u3000-\u302f\u3400-\u4dbf\u4e00-\u9fff\uff01\uff02\uff04-\uff06\uff08-\uff0a\uff0c"
    "\uff0f\uff1a-\uff20\uff3b-\uff3e\uff40\uff5b-\uff64]*+"
)
# ASCII never composes with what stands before it, so a piece may end there, or in need after 256 characters.
_PIECES = re.compile(r"[\s\S]{1,192}+[^\x00-\x7f]{0,64}+")

_stemmers = threading.local()


def analyse(text: str) -> list[str]:
    """Cut a text into its tokens, in order and with repeats; function words are left out.

    Of a text the first ``READ_CHARACTERS`` are read. Compounds with a digit, a dot or an underscore are kept whole
    besides their parts; others give their parts.

    >>> analyse("Running COVID-19 tests: C++ and the user_id of GPT-4, long-term")
    ['run', 'covid-19', 'covid', '19', 'test', 'c++', 'user_id', 'user', 'id', 'gpt-4', 'gpt', '4', 'long', 'term']
    >>> analyse("如何设置ＧＰＵ的批大小？")
    ['设置', 'gpu', '批', '大小']
    """
    tokens: list[str] = []
    for piece in _parted(read_part(text)):
        for run in _RUNS.findall(_normalised(piece)):
            if run[0] >= "\u0e00" and _IS_HAN.match(run):
                tokens += (word for word in _cut(run) if word not in CHINESE)
            elif run[0] >= "\u0e00" and _IS_PAIRED.match(run):
                tokens += _pairs(run)
            else:
                tokens += _word(run) if len(run) <= MAX_TOKEN_CHARACTERS else _word.__wrapped__(run)
    return tokens


def read_part(text: str) -> str:
    """Give the part of a text that is analysed: all of it, unless it has more than ``READ_CHARACTERS``."""
    if len(text) <= READ_CHARACTERS:
        return text
    boundary = max(text.rfind(space, READ_CHARACTERS - _NEAR, READ_CHARACTERS) for space in " \n\t\u3000")
    return text[: boundary if boundary > 0 else READ_CHARACTERS]


def warm() -> None:
    """Load the dictionary and the stemmer now, so that the first job does not wait for them."""
    analyse("warm 预热")


class Analyser:
    """Analyses texts and remembers the outcome, for many threads at once.

    What is remembered stays under ``capacity_bytes``, least recently used first to go. Hashes have 64 bits and hold
    within this process only.
    """

    def __init__(self, *, capacity_bytes: int = 64 * 2**20) -> None:
        self._capacity = capacity_bytes
        self._known: OrderedDict[int, Hashes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def analyse(self, text: str) -> list[str]:
        """Cut a text into its tokens; see :func:`analyse`."""
        return analyse(text)

    def token_hashes(self, texts: Sequence[str]) -> list[Hashes]:
        """Hash the distinct tokens of each text; arrays are read-only, in no order."""
        texts = [read_part(text) for text in texts]
        keys = [hash(("tokens", text)) if text else _NO_TEXT for text in texts]
        return self._remember(keys, lambda at: token_hashes(analyse(texts[at])))

    def bigram_hashes(self, chunks: Sequence[tuple[str, ...]]) -> list[Hashes]:
        """Hash the unigrams and bigrams of each chunk's fields, which follow each other; arrays are read-only.

        Fields in RAGFlow's order: content, title, and each keyword.
        """
        chunks = [tuple(map(read_part, fields)) for fields in chunks]
        keys = [hash(("bigrams", *fields)) for fields in chunks]
        return self._remember(
            keys, lambda at: token_hashes(chunk_keys([token for field in chunks[at] for token in analyse(field)]))
        )

    def warm(self) -> None:
        """Load what analysing needs; see :func:`warm`."""
        warm()

    def _remember(self, keys: Sequence[int], compute: Callable[[int], Hashes]) -> list[Hashes]:
        # Under Python's own hash, keyed per process as those of the tokens are: a collision-resistant digest costs more
        # than all the rest of a job whose texts are known.
        with self._lock:
            known = [_NO_HASHES if key == _NO_TEXT else self._recall(key) for key in keys]
        # Outside the lock: two threads may analyse the same text at once, which costs less than waiting for another's.
        unknown = {key: at for at, key in enumerate(keys) if known[at] is None}
        fresh = {key: compute(at) for key, at in unknown.items()}
        if fresh:
            with self._lock:
                for key, hashes in fresh.items():
                    self._keep(key, hashes)
        return [fresh[key] if hashes is None else hashes for key, hashes in zip(keys, known, strict=True)]

    def _recall(self, key: int) -> Hashes | None:
        hashes = self._known.get(key)
        if hashes is not None:
            self._known.move_to_end(key)
        return hashes

    def _keep(self, key: int, hashes: Hashes) -> None:
        # A text of the size of the whole memory would throw out everything for one entry.
        if key in self._known or _size(hashes) > self._capacity // 8:
            return
        self._known[key] = hashes
        self._bytes += _size(hashes)
        while self._bytes > self._capacity:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _size(oldest)


_NO_HASHES: Hashes = np.zeros(0, dtype=np.int64)
_NO_HASHES.flags.writeable = False


def token_hashes(tokens: Iterable[str]) -> Hashes:
    """Hash distinct tokens: Python's own 64-bit hash, keyed per process and already inside each string."""
    distinct: set[str] = set()
    rest = iter(tokens)
    # In pieces, between which other threads get their turn: a caller may bring millions.
    while piece := list(islice(rest, _PIECE)):
        distinct.update(piece)
    held = iter(distinct)
    parts = [_NO_HASHES]
    while piece := list(islice(held, _PIECE)):
        parts.append(np.fromiter(map(hash, piece), dtype=np.int64, count=len(piece)))
    hashes = np.concatenate(parts)
    hashes.flags.writeable = False
    return hashes


# Stands for the empty text, which is not worth an entry. No hash is -1.
_NO_TEXT = -1


def _size(hashes: Hashes) -> int:
    # What an entry costs besides its numbers: array, key, its slot of the mapping (rounded up).
    return hashes.nbytes + 400


def _parted(text: str) -> Iterator[str]:
    """Part a text between words, after about so many characters each."""
    start = 0
    while start < len(text):
        between = _BETWEEN_WORDS.search(text, start + _PIECE)
        end = between.end() if between else len(text)
        yield text[start:end]
        start = end


def _cut(run: str) -> Iterator[str]:
    for start in range(0, len(run), _LONGEST_RUN):
        yield from rjieba.cut_for_search(run[start : start + _LONGEST_RUN])


def _normalised(text: str) -> str:
    if not _SETTLED.fullmatch(text):
        # Else a comma between Chinese clauses would become the one inside "1,000". In pieces, because ordering a run of
        # combining marks takes the square of its length.
        pieces = _PIECES.findall(text.replace("，", " "))
        text = "".join(unicodedata.normalize("NFKC", piece) for piece in pieces)
    return text.lower()


def _pairs(run: str) -> list[str]:
    return [run] if len(run) == 1 else [run[at : at + 2] for at in range(len(run) - 1)]


# Words repeat: remembering one costs less than looking at it again.
@lru_cache(maxsize=2**15)
def _word(run: str) -> tuple[str, ...]:
    """Analyse one word or compound, already in lower case."""
    if "," in run:
        return (run.replace(",", ""),)
    if run.endswith(("++", "#")) or _DECIMAL.fullmatch(run):
        return (run[:MAX_TOKEN_CHARACTERS],)
    run = run.replace("’", "'")
    if run.endswith("n't"):
        return ()
    parts = _JOINTS.split(run)
    if len(parts) == 1:
        return tuple(_stems(parts))
    if "'" in run and parts[-1] in _ENCLITICS:
        parts.pop()
    if not _is_name(run):
        return tuple(_stems(parts))
    # Beside the whole, a single letter says nothing.
    return (run[:MAX_TOKEN_CHARACTERS], *_stems(part for part in parts if len(part) > 1 or part.isdigit()))


def _is_name(run: str) -> bool:
    return "_" in run or "." in run or any(map(str.isdigit, run))


def _stems(words: Iterable[str]) -> list[str]:
    kept = [word[:MAX_TOKEN_CHARACTERS] for word in words if word not in ENGLISH]
    return [_stemmer().stemWord(word) if _ENGLISH_WORD.fullmatch(word) else word for word in kept]


def _stemmer() -> Stemmer.Stemmer:
    # One for each thread, because it may not be shared; without its own cache, because _word has one.
    stemmer = getattr(_stemmers, "english", None)
    if stemmer is None:
        stemmer = _stemmers.english = Stemmer.Stemmer("english", 0)
    return stemmer
