"""Remembered token ids stay within their bytes, and the least recently used go first."""

import os
import threading
import tracemalloc

from rerankq_worker.engine.tokenising.token_id_cache import TokenIdCache, TokenPrefix, text_hash


def entries(names, size=100):
    return {name.encode().ljust(16, b"."): TokenPrefix(os.urandom(size), True) for name in names}


def names(known, asked):
    return "".join(key[:1].decode() for key in known.find(entries(asked)))


def bytes_of_one(size=100):
    known = TokenIdCache(1 << 30)
    known.keep(entries("a", size))
    return known.held_bytes


def test_texts_with_lone_surrogates_have_hashes_of_their_own():
    assert len({text_hash(text) for text in ("\ud800", "\ud801", "?", "\ufffd", "")}) == 5


def test_the_least_recently_used_go_first():
    known = TokenIdCache(3 * bytes_of_one())
    known.keep(entries("abc"))
    known.find(entries("a"))
    known.keep(entries("d"))
    assert names(known, "abcd") == "acd"
    known.keep(entries("a"))
    known.keep(entries("ef"))
    assert names(known, "abcdef") == "aef"


def test_what_is_replaced_is_not_counted_twice():
    known = TokenIdCache(1 << 30)
    known.keep(entries("ab"))
    known.keep(entries("a", 700))
    known.keep(entries("a", 100))
    assert known.held_bytes == 2 * bytes_of_one()


def test_an_entry_larger_than_everything_is_left_out_and_drives_nothing_out():
    known = TokenIdCache(2 * bytes_of_one())
    known.keep(entries("ab"))
    known.keep(entries("c", 5_000))
    assert names(known, "abc") == "ab"
    assert TokenIdCache(0).find(entries("a")) == {}


def test_the_bytes_counted_cover_the_bytes_taken():
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        known = TokenIdCache(2_000_000)
        for _ in range(5_000):
            known.keep({os.urandom(16): TokenPrefix(os.urandom(600), True)})
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert known.held_bytes <= 2_000_000
    assert 0.8 * known.held_bytes < taken < 1.02 * known.held_bytes


def test_many_threads_lose_no_count():
    known = TokenIdCache(40 * bytes_of_one())
    wrong = []

    def work(seed):
        mine = entries([chr(97 + (seed * 7 + step) % 26) for step in range(13)])
        for _ in range(200):
            known.keep(mine)
            found = known.find(mine)
            if any(len(first.ids) != 100 for first in found.values()):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert known.held_bytes == len(known) * bytes_of_one()
