"""Text into tokens."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
import types
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq_worker.fusion import analyser as module
from rerankq_worker.fusion.analyser import Analyser, analyse, read_part, token_hashes


@pytest.mark.parametrize(
    "text", ["", " ", "\n\t\u3000", "?!", "😀😀", "\x00", "\ud800", "\u0301" * 9, "the of and", "的了"]
)
def test_texts_without_words_give_no_tokens(text):
    assert analyse(text) == []


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Running runs RUN", ["run", "run", "run"]),
        ("children's toys, aren't they", ["children", "toy"]),
        ("C++ and C# or C", ["c++", "c#", "c"]),
        ("GPT-4", ["gpt-4", "gpt", "4"]),
        ("user_id", ["user_id", "user", "id"]),
        ("1,000,000 or 1000000", ["1000000", "1000000"]),
        ("version 3.14 of", ["version", "3.14"]),
        ("long-term", ["long", "term"]),
        ("Naïve café", ["naïve", "café"]),
        ("ＧＰＴ－４", ["gpt-4", "gpt", "4"]),
        ("设置GPT－4、3．14，C＋＋", ["设置", "gpt-4", "gpt", "4", "3.14", "c++"]),
        ("第1，100页Ａ", analyse("第1，100页a")),
        ("ｶﾞｶ・ド", ["ガカ", "ド"]),
        ("a\x00b\ud800c", ["b", "c"]),
        ("हिन्दी", ["हिन्दी"]),
        ("데이터베이스", ["데이", "이터", "터베", "베이", "이스"]),
        ("東", ["東"]),
        ("中华人民共和国", ["中华", "华人", "人民", "共和", "共和国", "中华人民共和国"]),
        ("使用GPU加速", ["使用", "gpu", "加速"]),
        ("设置批大小", ["设置", "批", "大小"]),
    ],
)
def test_words_of_many_kinds_become_tokens(text, tokens):
    assert analyse(text) == tokens


def test_spelling_variants_give_the_same_token():
    for one, other in [("COVID 19", "covid-19"), ("long term effect", "long-term effects"), ("don’t tides", "tide")]:
        assert set(analyse(one)) <= set(analyse(other))


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=60))
def test_any_text_gives_nonempty_tokens_of_bounded_length(text):
    tokens = analyse(text)
    assert all(0 < len(token) <= module.MAX_TOKEN_CHARACTERS for token in tokens if token.isascii())
    assert tokens == analyse(text)


@given(st.lists(st.text(max_size=20), max_size=40).map(" ".join))
def test_shortcuts_of_normalisation_change_no_token(text):
    normal = unicodedata.normalize("NFKC", text.replace("，", " "))
    assert analyse(text) == analyse(normal)


REPETITIVE = [
    "a",
    "a-",
    "1,000",
    "我们的",
    "鬱",
    "데",
    "\u0301\u0316",
    "\ud800",
    " ",
    "'",
    "a.",
    "हि",
    "，Ａ",
    "a中",
    "\x00",
    "é",
]


def cpu_seconds(text):
    started = time.thread_time()
    analyse(text)
    return time.thread_time() - started


@pytest.mark.parametrize("unit", REPETITIVE)
def test_analysis_of_repetitive_text_takes_linear_time(unit):
    # Eight times the text may take eight times as long, and far from sixty-four; the constant forgives tiny timings.
    short, long = unit * 25_000, unit * 200_000
    assert cpu_seconds(long) < 30 * min(cpu_seconds(short) for _ in range(3)) + 0.5


_SENTENCES = [
    "the moon pulls the sea, 1,000 times;",
    "don’t 设置GPT－4、3．14，C＋＋ 的批大小。",
    "カタカナと한국어 ไทย",
    "naïve cafe\u0301 Ａ１，第1，100页Ａ！",
    "user_id=x.y.z C# a\u00a0b\u3000c",
    "如何设置批大小？我们的模型在这里；",
]


@given(st.lists(st.sampled_from(_SENTENCES), min_size=1, max_size=40), st.integers(1, 60))
def test_a_text_in_pieces_gives_the_tokens_of_the_whole(sentences, piece):
    text = "".join(sentences)
    whole = analyse(text)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_PIECE", piece)
        assert analyse(text) == whole


def test_text_beyond_read_characters_is_not_analysed():
    read = "tide " * (module.READ_CHARACTERS // 5)
    assert len(read) <= module.READ_CHARACTERS
    whole = analyse(read)
    assert len(whole) == module.READ_CHARACTERS // 5
    assert analyse(read + "wave " * 3_000_000) == whole
    assert len(set(analyse("moon" * module.READ_CHARACTERS))) == 1
    analyser = Analyser()
    alike = [read + "wave " * 100_000, read + "beach " * 100_000]
    assert [hashes.tolist() for hashes in analyser.token_hashes(alike)] == [token_hashes(["tide"]).tolist()] * 2
    [hashes] = analyser.bigram_hashes([(alike[0], "", "moon " * 100_000)])
    assert set(hashes.tolist()) == set(token_hashes(["tide", "moon", "tidetide", "tidemoon", "moonmoon"]).tolist())


@pytest.mark.parametrize("space", [" ", "\n", "\t", "\u3000"])
def test_the_part_of_a_text_that_is_read_ends_at_the_last_white_space_near_its_end(space):
    most, near = module.READ_CHARACTERS, module._NEAR
    assert len(read_part("a" * most)) == most
    assert len(read_part("a" * most + "b")) == most
    for position, end in ((most - 1, most - 1), (most, most), (most - near, most - near), (most - near - 1, most)):
        assert len(read_part("a" * position + space + "b" * 2 * near)) == end
    assert len(read_part("a" * (most - 300) + " " + "b" * 99 + space + "c" * 600)) == most - 200


@pytest.mark.parametrize(
    "text", ["moon " * 200_000, "月亮" * 200_000, "月亮，" * 200_000, "x1_" * 300_000, "가나" * 300_000]
)
def test_no_call_that_holds_the_interpreter_is_given_more_than_a_piece(text, monkeypatch):
    given_run, given_text = [], []
    cut, normalised = module.rjieba.cut_for_search, module._normalised
    monkeypatch.setattr(
        module, "rjieba", types.SimpleNamespace(cut_for_search=lambda run: given_run.append(run) or cut(run))
    )
    monkeypatch.setattr(module, "_normalised", lambda piece: given_text.append(piece) or normalised(piece))
    analyse(text)
    assert max(map(len, given_run), default=0) <= module._LONGEST_RUN
    # Where nothing stands between words, there is but what is read.
    parted = " " in text or "，" in text
    assert max(map(len, given_text)) <= (module._PIECE + 8 if parted else module.READ_CHARACTERS)


def test_a_very_long_word_is_represented_by_its_beginning():
    assert analyse("z" * 100_000) == ["z" * module.MAX_TOKEN_CHARACTERS]


def test_remembered_hashes_equal_those_of_a_new_analysis():
    analyser = Analyser()
    for text in ["The moon pulls the sea.", "潮汐由月球引起。", "", "\ud800"]:
        for _ in range(2):
            np.testing.assert_array_equal(
                np.sort(analyser.token_hashes([text])[0]), np.sort(token_hashes(set(analyse(text))))
            )


def test_a_text_is_analysed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "analyse", lambda text: calls.append(text) or ["token"])
    analyser = Analyser()
    for _ in range(3):
        analyser.token_hashes(["one", "two", "one"])
        analyser.token_hashes(["two"])
    assert sorted(calls) == ["one", "two"]


def test_fields_of_chunks_are_kept_apart():
    analyser = Analyser()
    one = analyser.bigram_hashes([("moon", "sea")])[0]
    other = analyser.bigram_hashes([("moonsea", "")])[0]
    assert set(one.tolist()) != set(other.tolist())
    assert set(analyser.token_hashes(["moon sea"])[0].tolist()) < set(one.tolist())


def test_remembered_bytes_stay_bounded_and_the_least_recently_used_are_evicted(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "analyse", lambda text: calls.append(text) or [text])
    entry = 8 + 400
    analyser = Analyser(capacity_bytes=10 * entry)
    for text in "abcdefghij":
        analyser.token_hashes([text])
    analyser.token_hashes(["a"])
    analyser.token_hashes(["k"])
    analyser.token_hashes(["a"])
    assert calls == list("abcdefghijk")
    analyser.token_hashes(["b"])
    assert calls[-1] == "b"
    assert analyser._bytes <= 10 * entry
    assert analyser._bytes == sum(module._size(hashes) for hashes in analyser._known.values())


def test_a_text_too_large_to_remember_is_analysed():
    analyser = Analyser(capacity_bytes=100)
    assert analyser.token_hashes(["moon sea"])[0].size == 2
    assert not analyser._known


def test_an_entry_of_an_eighth_of_the_memory_is_the_largest_that_is_remembered():
    for capacity, remembered in ((8 * (8 + 400), True), (8 * (8 + 400) - 1, False)):
        analyser = Analyser(capacity_bytes=capacity)
        analyser.token_hashes(["moon"])
        assert bool(analyser._known) == remembered


def test_an_empty_text_is_not_remembered():
    analyser = Analyser()
    assert [hashes.size for hashes in analyser.token_hashes(["", "moon", ""])] == [0, 1, 0]
    assert len(analyser._known) == 1


def test_token_hashes_of_many_tokens_contain_each_once():
    hashes = token_hashes(f"word{number % 9_000}" for number in range(30_000))
    assert sorted(hashes.tolist()) == sorted(hash(f"word{number}") for number in range(9_000))


def test_remembered_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        Analyser().token_hashes(["moon"])[0][0] = 1


def test_threads_see_the_same_tokens():
    texts = [f"running tests {number} 中华人民共和国第{number}条 connection-{number}" for number in range(50)]
    expected = [analyse(text) for text in texts]
    analyser = Analyser(capacity_bytes=5_000)
    wrong = []

    def work(seed):
        order = random.Random(seed).choices(range(50), k=300)
        module._word.cache_clear()
        wrong.extend(position for position in order if analyse(texts[position]) != expected[position])
        wrong.extend(
            p for p in order if set(analyser.token_hashes([texts[p]])[0].tolist()) != set(map(hash, expected[p]))
        )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert analyser._bytes == sum(module._size(hashes) for hashes in analyser._known.values()) <= 5_000


def test_loading_is_silent_even_with_warnings_as_errors():
    code = "from rerankq_worker.fusion import Analyser; Analyser().warm()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(module.__file__).rpartition("/rerankq_worker/")[0]},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_fusion_imports_neither_torch_nor_celery_nor_redis_nor_the_contract():
    code = (
        "import sys, rerankq_worker.fusion; "
        "print([n for n in ('torch', 'celery', 'redis', 'pydantic', 'rerankq', 'sklearn') if n in sys.modules])"
    )
    root = str(module.__file__).rpartition("/rerankq_worker/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": root}
    )
    assert done.stdout.strip() == "[]"
