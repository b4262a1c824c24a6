"""Private words stay out: code, scripts, keys, settings, messages, tests and documents use the terms of the trade."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# A word that is not used any more, and what is written instead. Words are compared whole, in lower case, and names are
# taken apart at underscores and capitals: `ring` is found in `ring_on` and in `RingOn`, and not in `string`.
INSTEAD = {
    "bell": "doorbell",
    "bells": "doorbells",
    "ring": "send",
    "rings": "sends",
    "ringing": "sending",
    "rung": "sent",
    "unrung": "unsent",
    "deaf": "not connected, receives nothing",
    "deafened": "connection failed",
    "ears": "CompletionListener",
    "crowded": "memory_full",
    "placing": "routing",
    "sponge": "hasher",
    "breathe": "yield_to_loop",
    "heeded": "reraise_cancelled",
    "leash": "process guard",
    "lifeline": "process guard",
    "befell": "happened to",
}
# Names of several words, or of one that is free otherwise; as they are written.
NAMES = {
    "hang up": "close",
    "other hands": "from outside, damaged",
    "find_place": "resolve_route",
    "terms_of": "LedgerLimits.of",
    "room_for": "PairLimits",
    "KnownIds": "TokenIdCache",
    "FirstIds": "TokenPrefix",
    "BulkTurn": "FairShare",
    "Flights": "InFlightBatches",
    "BELIEVE_S": "REGISTRY_TTL_S",
    "live_for": "LeasePolicy.alive_for_s",
    "calls.bury": "calls.sign_off",
    "calls.look": "calls.snapshot",
}
# One of them, or a part of another word: lines without are not looked at closely.
PERHAPS = re.compile("|".join(map(re.escape, [*INSTEAD, *NAMES])), re.IGNORECASE)
# Where a word means something else.
ALLOWED: set[tuple[str, str]] = set()

FOLDERS = ("producer", "worker", "tests", "benchmarks", "conf", "docker", "docs", "examples")
KINDS = {".py", ".lua", ".toml", ".md", ".yml", ".conf", ".sh", ".cfg"}
PAGES = ("README.md", "SECURITY.md", "Makefile", "pyproject.toml", "docker-compose.yml", "docker-compose.cpu.yml")


def files(repository: Path) -> Iterator[Path]:
    """Every file that is read by people. The changelog tells of former names, and this file holds them."""
    for folder in FOLDERS:
        yield from sorted(path for path in (repository / folder).rglob("*") if path.suffix in KINDS)
    yield from (repository / page for page in PAGES if (repository / page).exists())


def words_of(line: str) -> Iterator[str]:
    """Split a line into words, and names into the words that they are made of.

    >>> list(words_of("RingOn, ring_on(HTTPServer2) of a string"))
    ['ring', 'on', 'ring', 'on', 'http', 'server', 'of', 'a', 'string']
    """
    for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", line):
        yield word.lower()


def old_words(repository: Path) -> list[str]:
    """Say where an old word stands, and what to write instead."""
    found = []
    for path in files(repository):
        name = path.relative_to(repository).as_posix()
        if name == "tests/test_words.py":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not PERHAPS.search(line):
                continue
            there = [(word, INSTEAD[word]) for word in words_of(line) if word in INSTEAD]
            there += [(old, new) for old, new in NAMES.items() if re.search(rf"\b{re.escape(old)}\b", line)]
            found += [f"{name}:{number}: {old!r}; write {new!r}" for old, new in there if (name, old) not in ALLOWED]
    return found


def test_old_words_stay_out():
    assert "\n".join(old_words(REPOSITORY)) == ""


@pytest.mark.parametrize(
    ("place", "line", "complaint"),
    [
        ("producer/rerankq/ledger/scripts/renew.lua", "-- Ring on from the backlog", "'ring'; write 'send'"),
        ("worker/rerankq_worker/slots.py", "    def ring_on(self): ...", "'ring'; write 'send'"),
        ("worker/rerankq_worker/slots.py", "class LostBells: ...", "'bells'; write 'doorbells'"),
        ("producer/rerankq/settings.py", '"RERANKQ_RING_WINDOW"', "'ring'; write 'send'"),
        ("docs/ledger.md", "The bell is rung.", "'rung'; write 'sent'"),
        ("README.md", "Workers hang up.", "'hang up'; write 'close'"),
        ("tests/worker/test_slots.py", "def test_a_worker_is_deaf(): ...", "'deaf'"),
    ],
)
def test_a_planted_word_is_found(tmp_path, place, line, complaint):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(f"a line before\n{line}\n")
    assert any(said.startswith(f"{place}:2: ") and complaint in said for said in old_words(tmp_path))


@pytest.mark.parametrize("line", ["a string of doorbells", "during the years, filtering", "bring, spring, hearsay"])
def test_a_word_inside_another_is_free(tmp_path, line):
    (tmp_path / "README.md").write_text(line)
    assert old_words(tmp_path) == []
