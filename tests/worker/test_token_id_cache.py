"""The cache of token ids stays within its bytes, and evicts the least recently used."""

import os
import threading
import tracemalloc

from rerankq_worker.engine.tokenising import token_id_cache
from rerankq_worker.engine.tokenising.token_id_cache import TokenIdCache, TokenPrefix, text_hash


def entries(names, size=100):
    return {name.encode().ljust(16, b"."): TokenPrefix(os.urandom(size), True) for name in names}


def names(cache, asked):
    return "".join(key[:1].decode() for key in cache.get_many(entries(asked)))


def bytes_of_one(size=100):
    cache = TokenIdCache(1 << 30)
    cache.put_many(entries("a", size))
    return cache.size_bytes


def test_texts_with_lone_surrogates_have_hashes_of_their_own():
    assert len({text_hash(text) for text in ("\ud800", "\ud801", "?", "\ufffd", "")}) == 5


def test_the_cache_evicts_the_least_recently_used():
    cache = TokenIdCache(3 * bytes_of_one())
    cache.put_many(entries("abc"))
    cache.get_many(entries("a"))
    cache.put_many(entries("d"))
    assert names(cache, "abcd") == "acd"
    cache.put_many(entries("a"))
    cache.put_many(entries("ef"))
    assert names(cache, "abcdef") == "aef"


def test_an_entry_that_is_replaced_is_not_counted_twice():
    cache = TokenIdCache(1 << 30)
    cache.put_many(entries("ab"))
    cache.put_many(entries("a", 700))
    cache.put_many(entries("a", 100))
    assert cache.size_bytes == 2 * bytes_of_one()


def test_an_entry_larger_than_the_cache_is_left_out_and_evicts_nothing():
    cache = TokenIdCache(2 * bytes_of_one())
    cache.put_many(entries("ab"))
    cache.put_many(entries("c", 5_000))
    assert names(cache, "abc") == "ab"
    assert TokenIdCache(0).get_many(entries("a")) == {}


def test_the_counted_bytes_cover_the_memory_taken():
    tracemalloc.start()
    try:
        cache = TokenIdCache(2_000_000)
        for _ in range(5_000):
            cache.put_many({os.urandom(16): TokenPrefix(os.urandom(600), True)})
        # Other threads of this process take memory too.
        ours = [tracemalloc.Filter(True, path) for path in (__file__, token_id_cache.__file__)]
        taken = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces)
    finally:
        tracemalloc.stop()
    assert cache.size_bytes <= 2_000_000
    assert 0.8 * cache.size_bytes < taken < 1.02 * cache.size_bytes


def test_the_counted_bytes_stay_exact_under_many_threads():
    cache = TokenIdCache(40 * bytes_of_one())
    wrong = []

    def work(seed):
        mine = entries([chr(97 + (seed * 7 + step) % 26) for step in range(13)])
        for _ in range(200):
            cache.put_many(mine)
            found = cache.get_many(mine)
            if any(len(first.ids) != 100 for first in found.values()):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.size_bytes == len(cache) * bytes_of_one()
