"""Token ids of pairs equal to the tokenisers' own, for several families, whatever is remembered of the chunks."""

import logging
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from rerankq_worker.engine import ModelUnusable, text_hash
from rerankq_worker.engine.tokenising.pair_format import special_token_pairs
from rerankq_worker.engine.tokenising.pair_tokeniser import PairTokeniser
from rerankq_worker.engine.tokenising.text_reading import MAX_CHARACTERS
from rerankq_worker.engine.tokenising.whole_pairs import WholePairs

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "minilm-l6-rerank" / "tokenizer.json"

#: Text with a spread of lengths, scripts and oddities; the tokenisers below are trained on it.
TEXTS = [
    "Aspirin inhibits the production of prostaglandins, and so reduces fever, pain and inflammation in adults.",
    "The capital of France is Paris; its population was 2,102,650 in 2023.",
    "深度学习模型在检索任务中表现出色。重排序器读取查询与段落,并给出一个分数。",
    "Größere Straßen führen über Brücken: naïve café façade coöperate, señor!",
    "def score(pairs): return [model(q, c) for q, c in pairs]  # O(n)",
    "हिन्दी और العربية ייִדיש ελληνικά русский язык 한국어 日本語テキスト",
    "emoji 👩‍👩‍👧‍👦 and ﬁ ligatures, zero\u200bwidth, soft\u00adhyphen, tabs\tand\nnew lines",
    "short",
    "A very long sentence that goes on, " * 12,
]
QUERY = "which drug reduces fever in adults?"
FAMILIES = ["bert", "modernbert", "xlm-r"]
NAMES = [*FAMILIES, "bundled"]


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=400, special_tokens=BERT, show_progress=False)


def unigrams():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=ROBERTA, unk_token="<unk>", show_progress=False
    )


def byte_pairs():
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=500, special_tokens=BERT, initial_alphabet=alphabet, show_progress=False
    )


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
#: How a family's tokens are made, and how its pairs look.
KINDS = {
    "bert": (word_pieces, "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "modernbert": (byte_pairs, "[CLS] $A [SEP] $B [SEP]"),
    "xlm-r": (unigrams, "<s> $A </s> </s> $B </s>"),
}


def with_pairs(tokenizer, pair):
    marks = {mark.partition(":")[0] for mark in pair.split() if not mark.startswith("$")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=pair, special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in marks]
    )
    return tokenizer


def trained(family):
    make, pair = KINDS[family]
    tokenizer, trainer = make()
    tokenizer.train_from_iterator(TEXTS, trainer)
    return with_pairs(tokenizer, pair)


def copy_of(tokenizer):
    return Tokenizer.from_str(tokenizer.to_str())


@pytest.fixture(scope="module")
def plain():
    """The tokenisers as they are, to hold ours against."""
    made = {family: trained(family) for family in FAMILIES} | {"bundled": Tokenizer.from_file(str(BUNDLED))}
    for tokenizer in made.values():
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return made


@pytest.fixture(scope="module")
def saved(plain):
    """The same with the trap of checkpoints that were saved after use: a truncation and a padding of their own."""
    copies = {name: copy_of(tokenizer) for name, tokenizer in plain.items()}
    for tokenizer in copies.values():
        tokenizer.enable_truncation(max_length=11)
        tokenizer.enable_padding(length=24)
    return {name: tokenizer.to_str() for name, tokenizer in copies.items()}


@pytest.fixture(scope="module")
def tokenisers(plain, saved):
    """Ours, and a second copy of each to hold it against."""
    return {name: (PairTokeniser(Tokenizer.from_str(saved[name]), max_length=64), plain[name]) for name in NAMES}


def listed(pairs):
    return [(pair.ids.tolist(), pair.second_from, pair.truncated) for pair in pairs]


class CountingTokenizer:
    """Stands for the tokeniser and counts the texts and characters that it is given."""

    def __init__(self, tokenizer):
        self.inner = tokenizer
        self.texts = []

    @property
    def characters(self):
        return sum(map(len, self.texts))

    def encode_batch_fast(self, texts, **options):
        self.texts += texts
        return self.inner.encode_batch_fast(texts, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


ALPHABET = st.characters(exclude_categories=["Cs"])
any_text = st.one_of(
    st.text(ALPHABET, max_size=80),
    st.lists(st.sampled_from(" ".join(TEXTS).split()), max_size=30).map(" ".join),
    st.sampled_from(["", " ", "\n\t ", "[SEP]", "a [MASK] b", "<s> x </s>", "e\u0301", "\u0301", "▁", "##ing"]),
)
by_property = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# -- equal to the tokeniser's own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(query=any_text, chunk=any_text)
@by_property
def test_joined_ids_equal_the_tokenisers_own_wherever_the_query_is_not_cut(tokenisers, name, query, chunk):
    ours, whole = tokenisers[name]
    room = 64 - whole.num_special_tokens_to_add(is_pair=True)
    expected = whole.encode(query, chunk)
    fits = len(expected.ids) <= 64
    if not fits and len(whole.encode(query, add_special_tokens=False).ids) > room // 2:
        return
    pair = ours.pairs(query, [chunk])[0]
    assert pair.truncated is not fits
    if fits:
        ids, types = expected.ids, expected.type_ids
    else:
        whole.enable_truncation(64, strategy="longest_first")
        cut = whole.encode(query, chunk)
        whole.no_truncation()
        ids, types = cut.ids, cut.type_ids
    assert pair.ids.tolist() == ids
    assert (np.arange(pair.length) >= pair.second_from).astype(int).tolist() == types


@pytest.mark.parametrize("name", NAMES)
def test_a_long_query_keeps_half_the_room_at_most_and_the_chunk_gets_the_rest(tokenisers, name):
    ours, whole = tokenisers[name]
    query, chunk = TEXTS[8], TEXTS[0] * 3
    ids = {text: whole.encode(text, add_special_tokens=False).ids for text in (query, chunk)}
    marks = ours.template
    for max_length, budget in ((64, 128), (64, 5), (40, 128)):
        room = max_length - marks.special_tokens
        kept = min(budget, room // 2)
        pair = ours.pairs(query, [chunk], max_length=max_length, query_max_tokens=budget)[0]
        read = ids[query][:kept], ids[chunk][: room - kept]
        assert pair.ids.tolist() == [*marks.before, *read[0], *marks.between, *read[1], *marks.after]
        assert pair.truncated
        assert pair.length == max_length


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_query_flags_every_pair_even_where_the_chunk_is_whole(tokenisers, name):
    ours, _ = tokenisers[name]
    assert [pair.truncated for pair in ours.pairs("word " * 100, ["tiny", ""])] == [True, True]
    assert [pair.truncated for pair in ours.pairs("word", ["tiny", ""])] == [False, False]


@pytest.mark.parametrize("query", [QUERY, QUERY * 9], ids=["short query", "cut query"])
@pytest.mark.parametrize("name", NAMES)
def test_characters_read_are_all_that_the_pair_depends_on(tokenisers, name, query):
    ours, _ = tokenisers[name]
    chunk = " ".join("abcdefghij" * 40)
    end = ours.characters_read(query, chunk)
    assert 0 < end < len(chunk)
    read = chunk[:end].rstrip()
    whole, other, shorter = ours.pairs(query, [chunk, read + " z" * 100, read[:-4] + " z" * 100])
    assert whole.ids.tolist() == other.ids.tolist() != shorter.ids.tolist()
    assert ours.characters_read(query, "short") == len("short"), "only the query is cut"
    assert ours.characters_read("q", chunk, max_length=32) < ours.characters_read("q", chunk)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_reading_only_the_head_of_a_huge_chunk_changes_no_id(tokenisers, name, text):
    ours, whole = tokenisers[name]
    huge = text * (25_000 // len(text))
    room = 64 - ours.template.special_tokens
    asked = whole.encode("query", add_special_tokens=False).ids
    expected = whole.encode(huge, add_special_tokens=False).ids[: room - len(asked)]
    pair = ours.pairs("query", [huge])[0]
    begin = len(ours.template.before) + len(asked) + len(ours.template.between)
    assert pair.ids.tolist()[begin : pair.length - len(ours.template.after)] == expected
    assert pair.truncated is (len(whole.encode("query", huge).ids) > 64)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_in_the_middle_of_an_endless_word_changes_no_id(tokenisers, name):
    ours, whole = tokenisers[name]
    for letters in range(600, 740, 14):
        huge = f"{'x' * letters} " * 80
        pair = ours.pairs("", [huge])[0]
        kept = pair.ids.tolist()[ours.template.special_tokens - len(ours.template.after) :]
        room = 64 - ours.template.special_tokens
        assert kept[:room] == whole.encode(huge, add_special_tokens=False).ids[:room]


@pytest.mark.parametrize(
    ("text", "characters"),
    # The last three give one token or none however long they are: they are read to the limit.
    [("word and ", 11_000), ("汉字", 11_000), ("a", 2_000_000), (" ", 2_000_000), ("\U00012000", 2_000_000)],
)
def test_a_chunk_of_ten_million_characters_is_not_read_through(text, characters):
    counting = CountingTokenizer(Tokenizer.from_file(str(BUNDLED)))
    ours = PairTokeniser(counting, max_length=512)
    counting.texts.clear()
    pairs = ours.pairs("query", [text * (10_000_000 // len(text)), "small"])
    assert counting.characters < characters
    assert max(map(len, counting.texts)) <= MAX_CHARACTERS
    assert [pair.truncated for pair in pairs] == [True, False]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "poor", ["x" * 100_000, " " * 60_000, "\u200b" * 60_000, f"{'x' * 2000} " * 100, "\u0301" * 30_000]
)
def test_texts_of_few_tokens_read_the_same_after_any_other_request(plain, saved, name, poor):
    chunk, used = (
        f"intro{poor} A batch is a set of pairs.",
        PairTokeniser(Tokenizer.from_str(saved[name]), max_length=64),
    )
    whole = plain[name].encode(chunk, add_special_tokens=False).ids
    for length in (25, 64, 7, 25, 40):
        [pair] = used.pairs("", [chunk], max_length=length)
        room = length - used.template.special_tokens
        begin = len(used.template.before) + len(used.template.between)
        assert pair.ids.tolist()[begin : pair.length - len(used.template.after)] == whole[:room]
        assert pair.truncated is (len(whole) > room)


@pytest.mark.parametrize("space", [" ", "\n", " \t\n", "\u3000"])
def test_white_space_of_an_added_token_is_read_within_limits(plain, space):
    tokenizer = copy_of(plain["modernbert"])
    tokenizer.add_special_tokens([AddedToken("<blank>", lstrip=True, special=True)])
    ours, chunk = (
        PairTokeniser(copy_of(tokenizer), max_length=64),
        f"one{space * 15_000}<blank> other" + " word" * 5_000,
    )
    for length in (64, 20):
        [pair] = ours.pairs("", [chunk], max_length=length)
        whole = tokenizer.encode(chunk, add_special_tokens=False).ids
        assert pair.ids.tolist()[2:-1] == whole[: length - 3]


@pytest.mark.parametrize("letters", [100, 150, 2_000])
def test_a_word_that_a_cut_makes_shorter_changes_no_id_however_long_words_may_be(letters):
    tokenizer, trainer = word_pieces()
    tokenizer.model = models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=letters)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer = with_pairs(tokenizer, KINDS["bert"][1])
    ours = PairTokeniser(copy_of(tokenizer), max_length=64)
    for longer in (-1, 0, 1, 500):
        # A word that is too long is one token, and many when a cut makes it shorter, if the tokeniser knows its pieces.
        pieces = "an" if longer > 0 else "xy"
        chunk = f"{pieces * ((letters + longer + 1) // 2)} pain fever " * (60 if letters > 150 else 400)
        [pair] = ours.pairs("", [chunk])
        assert pair.ids.tolist()[2:-1] == tokenizer.encode(chunk, add_special_tokens=False).ids[:61]


def test_lone_surrogates_read_as_replacement_characters(tokenisers):
    for ours, _ in tokenisers.values():
        broken = ours.pairs("a \ud800 b", ["\udfffc", "\ud83d"])
        mended = ours.pairs("a \ufffd b", ["\ufffdc", "\ufffd"])
        assert [pair.ids.tolist() for pair in broken] == [pair.ids.tolist() for pair in mended]


def test_thirty_two_threads_tokenise_at_once_without_a_mistake(tokenisers):
    ours, _ = tokenisers["bundled"]
    expected = [pair.ids.tolist() for pair in ours.pairs(QUERY, TEXTS)]
    wrong = []

    def work(number):
        length = 30 + number % 3 * 10
        for _ in range(5):
            if [pair.ids.tolist() for pair in ours.pairs(QUERY, TEXTS)] != expected:
                wrong.append(number)
            if max(pair.length for pair in ours.pairs(QUERY, TEXTS, max_length=length)) > length:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_length": 4}, "leaves no token"),
        ({"max_length": 65}, "more than"),
        ({"query_max_tokens": 0}, "at least 1"),
    ],
)
def test_invalid_lengths_are_rejected(tokenisers, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        tokenisers["bundled"][0].pairs("q", ["c"], **options)


# -- chunks that are remembered ------------------------------------------------------------------------------------

requests = st.lists(
    st.tuples(
        any_text,
        st.lists(st.sampled_from([*TEXTS, "", "Aspirininhibitsfever" * 300, "a b " * 2000]), min_size=1, max_size=4),
        st.integers(8, 64),
        st.sampled_from([1, 5, 128]),
    ),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def forgetful(saved):
    return {name: PairTokeniser(Tokenizer.from_str(saved[name]), max_length=64, cache_bytes=0) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@given(requests=requests)
@settings(by_property, max_examples=40)
def test_cached_token_ids_change_no_pair(tokenisers, forgetful, name, requests):
    remembers, _ = tokenisers[name]
    for query, chunks, max_length, query_max_tokens in requests:
        options = {"max_length": max_length, "query_max_tokens": query_max_tokens}
        expected = listed(forgetful[name].pairs(query, chunks, **options))
        assert listed(remembers.pairs(query, chunks, **options)) == expected


@pytest.fixture
def counted():
    counting = CountingTokenizer(Tokenizer.from_file(str(BUNDLED)))
    ours = PairTokeniser(counting, max_length=512)
    counting.texts.clear()
    return ours, counting


def test_a_chunk_is_encoded_once_however_many_jobs_and_positions_it_comes_in(counted):
    ours, counting = counted
    first = ours.pairs("one query", [*TEXTS, *TEXTS])
    again = ours.pairs("another", TEXTS[::-1])
    assert sorted(counting.texts) == sorted([*TEXTS, "one query", "another"])
    assert listed(first[: len(TEXTS)]) == listed(first[len(TEXTS) :])
    assert [pair.truncated for pair in again] == [False] * len(TEXTS)


def test_a_cached_chunk_is_used_for_other_lengths_and_queries(counted):
    ours, counting = counted
    long = " ".join(TEXTS * 20)
    whole = ours.pairs("", [long])[0]
    counting.texts.clear()
    shorter = ours.pairs("two words", [long], max_length=40, query_max_tokens=1)[0]
    assert counting.texts == ["two words"]
    assert shorter.ids[3:-1].tolist() == whole.ids[2:].tolist()[:36]
    assert shorter.truncated
    assert whole.truncated


def test_a_chunk_cached_in_part_is_encoded_again_for_a_longer_pair(counted):
    ours, counting = counted
    endless = "word and another " * 2_000
    short = ours.pairs("q", [endless], max_length=16)[0]
    long = ours.pairs("q", [endless])[0]
    assert len(counting.texts) == 4
    assert (short.length, long.length) == (16, 512)
    assert (short.truncated, long.truncated) == (True, True)


def test_the_callers_hashes_are_the_keys_of_the_cache(counted):
    ours, counting = counted
    ours.pairs("q", TEXTS, hashes=[text_hash(text) for text in TEXTS])
    counting.texts.clear()
    assert listed(ours.pairs("q", TEXTS)) == listed(ours.pairs("q", TEXTS, hashes=[text_hash(text) for text in TEXTS]))
    assert set(counting.texts) == {"q"}
    with pytest.raises(ValueError, match="zip"):
        ours.pairs("q", TEXTS, hashes=[b"too few"])


def test_pairs_of_a_job_are_slices_of_one_array(tokenisers):
    ours, _ = tokenisers["bundled"]
    pairs = ours.pairs(QUERY, TEXTS)
    assert {pair.ids.dtype for pair in pairs} == {np.dtype(np.int32)}
    assert all(one.ids.base is other.ids.base is not None for one, other in pairwise(pairs))


def test_ids_beyond_sixteen_bits_are_kept_whole(plain):
    tokenizer = copy_of(plain["bert"])
    tokenizer.add_tokens([f"filler{number}" for number in range(70_000)])
    pair = PairTokeniser(tokenizer, max_length=16).pairs("q", ["filler3 filler69999"])[0]
    assert pair.ids.tolist() == tokenizer.encode("q", "filler3 filler69999").ids
    assert pair.ids.max() > 1 << 16


# -- pairs that are encoded whole ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_pairs(plain):
    return {name: WholePairs(copy_of(tokenizer), max_length=64) for name, tokenizer in plain.items()}


@pytest.mark.parametrize("name", NAMES)
@given(query=any_text, chunks=st.lists(any_text, max_size=3), max_length=st.integers(8, 64))
@settings(by_property, max_examples=60)
def test_whole_pairs_equal_joined_ones_wherever_both_are_possible(
    tokenisers, whole_pairs, name, query, chunks, max_length
):
    ours, _ = tokenisers[name]
    assert listed(whole_pairs[name].pairs(query, chunks, max_length=max_length)) == listed(
        ours.pairs(query, chunks, max_length=max_length)
    )


ODD = ["[CLS] $B [SEP] $A:1", "[CLS] $A $B [SEP] [CLS]", "$B:1 $A:1"]


@pytest.mark.parametrize("pair", ODD[::2])
def test_pairs_in_another_order_are_encoded_whole_with_a_warning(plain, caplog, pair):
    tokenizer = with_pairs(copy_of(plain["bundled"]), pair)
    with caplog.at_level(logging.WARNING):
        ours = special_token_pairs(copy_of(tokenizer), max_length=64)
    assert not ours.caches_chunks
    assert "encoded whole" in caplog.text
    for query, chunk in [(QUERY, TEXTS[0]), ("", TEXTS[3]), ("q", "")]:
        [one] = ours.pairs(query, [chunk])
        expected = tokenizer.encode(query, chunk)
        assert one.ids.tolist() == expected.ids
        assert (np.arange(one.length) >= one.second_from).astype(int).tolist() == expected.type_ids
        assert not one.truncated


def test_whole_pairs_are_cut_by_the_same_rule(plain):
    tokenizer = with_pairs(copy_of(plain["bundled"]), ODD[0])
    ids = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in (TEXTS[8], TEXTS[0])}
    [one] = special_token_pairs(tokenizer, max_length=64).pairs(TEXTS[8], [TEXTS[0]], max_length=30)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    assert one.ids.tolist() == [cls, *ids[TEXTS[0]][:14], sep, *ids[TEXTS[8]][:14]]
    assert (one.second_from, one.truncated) == (16, True)


def test_a_plain_template_is_joined_without_a_warning(plain, caplog):
    ours = special_token_pairs(with_pairs(copy_of(plain["bundled"]), ODD[1]), max_length=64)
    assert ours.caches_chunks
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        ("$A $B $A", "one query and one chunk"),
        ("$B:1 [SEP] $A", "mixes the segments"),
    ],
)
def test_unusable_pair_templates_are_rejected(plain, pair, complaint):
    with pytest.raises(ModelUnusable, match=complaint):
        special_token_pairs(with_pairs(copy_of(plain["bundled"]), pair), max_length=64)
