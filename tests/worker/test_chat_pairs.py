"""Pairs in a chat template: ids equal to those of the whole text, joined where that is safe, else encoded whole."""

import logging

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rerankq_worker.engine import ModelUnusable
from rerankq_worker.engine.tokenising.chat_pairs import ChatPairs
from rerankq_worker.engine.tokenising.pair_format import rendered_pairs
from rerankq_worker.engine.tokenising.rendering import Rendering, find_rendering, qwen3, renders_both_texts
from rerankq_worker.engine.tokenising.whole_pairs import WholeChats

QWEN3 = qwen3()
TEXTS = [
    "Aspirin reduces fever, pain and inflammation in adults.",
    "The capital of France is Paris; its population was 2,102,650 in 2023.\n\nIt lies on the Seine.",
    "深度学习模型在检索任务中表现出色。重排序器读取查询与段落。",
    "Größere Straßen führen über Brücken: naïve café façade!",
    "def score(pairs):\n\treturn [model(q, c) for q, c in pairs]  # O(n)",
    "emoji 👩‍👩‍👧‍👦 and ﬁ ligatures, हिन्दी और العربية\r\n",
]
QUERY = "which drug reduces fever?"
MARKS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
#: Where tokenisers of the Qwen family cut a text into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(tokenizer, texts, **options):
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, **options)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, special="think" not in mark, normalized=False) for mark in MARKS])
    return tokenizer


@pytest.fixture(scope="module")
def qwen():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [QWEN3(QUERY, text) for text in TEXTS] * 3
    return trained(tokenizer, texts, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def gemma():
    """Merges across words: spaces are letters like others."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    texts = [QWEN3(QUERY, text).replace(" ", "▁") for text in TEXTS] * 3
    return trained(tokenizer, texts, special_tokens=["<unk>"])


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def listed(pairs):
    return [(pair.ids.tolist(), pair.second_from, pair.truncated) for pair in pairs]


any_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from([*" ".join(TEXTS).split(), " ", "\n", "\n\n", ":", "?", "<|im_end|>"]), max_size=25).map(
        "".join
    ),
)
by_property = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


#: Chunks behind a space, behind a line break, and between special tokens.
RENDERINGS = [
    QWEN3,
    Rendering("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    Rendering("Which chunk answers this?\n", "<|im_start|>", "<|im_end|>"),
]
#: Openings of their chunks.
OPENINGS = [" ", "\n", ""]
#: Beyond what any query below has.
WHOLE_QUERY = 512


@pytest.fixture(scope="module")
def joined(qwen):
    """Ones that go on remembering from example to example."""
    return [ChatPairs(qwen, rendering, max_length=1024) for rendering in RENDERINGS]


@pytest.mark.parametrize("at", range(len(RENDERINGS)))
@given(query=any_text, chunk=any_text)
@by_property
def test_joined_ids_equal_those_of_the_whole_text(qwen, joined, at, query, chunk):
    [pair] = joined[at].pairs(query, [chunk], query_max_tokens=WHOLE_QUERY)
    assert pair.ids.tolist() == ids_of(qwen, RENDERINGS[at](query, chunk))
    assert (pair.second_from, pair.truncated) == (pair.length, False)


@pytest.mark.parametrize("at", range(len(RENDERINGS)))
@given(
    query=st.sampled_from(["", "q", "fever?", "pain\n", " 痛"]),
    begin=any_text,
    words=st.lists(st.sampled_from(" ".join(TEXTS).split()), min_size=30, max_size=60),
    kept=st.integers(20, 30),
)
@settings(by_property, max_examples=60)
def test_a_chunk_too_long_is_cut_before_the_fixed_end_and_nowhere_else(qwen, joined, at, query, begin, words, kept):
    chunk, render = begin + " ".join(words), RENDERINGS[at]
    whole, end = ids_of(qwen, render(query, chunk)), ids_of(qwen, render.after)
    length = len(ids_of(qwen, render(query, ""))) + kept
    [pair] = joined[at].pairs(query, [chunk], max_length=length)
    assert pair.ids.tolist() == whole[: length - len(end)] + end
    assert pair.truncated


@pytest.mark.parametrize(("max_length", "query_max_tokens"), [(200, 128), (200, 4), (150, 128)])
def test_a_long_query_keeps_half_the_room_at_most_and_the_chunk_gets_the_rest(
    qwen, joined, max_length, query_max_tokens
):
    # Without a chunk the space before it is a token of its own.
    room = max_length - len(ids_of(qwen, QWEN3("", ""))) + 1
    limit = min(query_max_tokens, room // 2)
    query, chunk = "fever pain and adults " * 40, TEXTS[1] * 20
    [pair] = joined[0].pairs(query, [chunk], max_length=max_length, query_max_tokens=query_max_tokens)
    text = qwen.decode(pair.ids.tolist(), skip_special_tokens=False)
    begin, end = text.index("<Query>: ") + 9, text.rindex("\n<Document>: ")
    kept = text[begin:end]
    assert query.startswith(kept)
    assert limit - 2 <= len(ids_of(qwen, " " + kept)) <= limit
    assert text[end + 13 :].startswith(TEXTS[1][:20])
    assert text.endswith(QWEN3.after)
    assert (pair.length, pair.truncated) == (max_length, True)


#: One word where nothing stands between, which tokens of a query part into more.
PARTED = Rendering("<|im_start|> requir", "ements<|im_end|>", "<|im_end|>")
#: The same before a longer end, whose tokens are not the query's either.
PARTED_BEFORE_MORE = Rendering(PARTED.before, PARTED.between, "<|im_end|>\n<|im_start|>assistant\n<think>")


@pytest.mark.parametrize("render", [QWEN3, PARTED, PARTED_BEFORE_MORE])
@pytest.mark.parametrize("query", ["x", "\n", "?\n\n", "痛み", "which drug reduces fever and pain?"])
def test_a_pair_in_a_tight_length_is_no_longer_than_that(qwen, render, query):
    ours, chunk = ChatPairs(qwen, render, max_length=128), TEXTS[1] * 3
    frame, end = len(ids_of(qwen, render("", ""))), ids_of(qwen, render.after)
    for length in range(frame + 2, frame + 9):
        [short, long] = ours.pairs(query, ["a", chunk], max_length=length)
        assert max(short.length, long.length) <= length
        assert long.ids[-len(end) :].tolist() == end
        assert long.truncated


@pytest.mark.parametrize(("render", "opening"), list(zip(RENDERINGS, OPENINGS, strict=True)))
def test_a_chunk_begins_at_the_last_boundary_before_it_where_tokens_never_merge(qwen, render, opening):
    ours = ChatPairs(qwen, render, max_length=512)
    ours._chunks._tokenizer = Recording(qwen, calls := [])
    ours.pairs(QUERY, ["a chunk"])
    assert calls == [[f"{opening}a chunk"]]


GREEDY = [
    AddedToken("<mask>", lstrip=True, special=True),
    AddedToken("<|end|>", rstrip=True, special=True),
    AddedToken("<both>", lstrip=True, rstrip=True, special=False, normalized=True),
    AddedToken("alone", single_word=True, special=False),
    AddedToken(": {", special=False, normalized=False),
    AddedToken("}<|im_end|>", special=False, normalized=False),
]
SEAMS = [
    QWEN3,
    Rendering("<|im_start|>query ", " passage ", " yes?"),
    Rendering("<|im_start|>query", "passage: ", "<|im_end|> yes?"),
    Rendering("", "<|im_end|>", "end"),
]


@pytest.fixture(scope="module")
def greedy(qwen):
    """A tokeniser whose added tokens take the white space beside them, mind their neighbours, or begin in a frame."""
    copy = Tokenizer.from_str(qwen.to_str())
    copy.add_tokens(GREEDY)
    return [rendered_pairs(copy, rendering, max_length=1024) for rendering in SEAMS], copy


beside_added_tokens = st.lists(
    st.sampled_from(
        ["<mask>", "<|end|>", "<both>", "alone", " ", "  ", "\n", "word", "{", "}", "é", "<", "<|", "e", "x", "_", "1"]
    ),
    max_size=5,
).map("".join)


@pytest.mark.parametrize("at", range(len(SEAMS)))
@given(query=beside_added_tokens, chunk=beside_added_tokens)
@example(query="what", chunk="x <|end|>")
@example(query="what", chunk="alone")
@example(query="what", chunk="{ is }")
@example(query="what", chunk="is }")
@settings(by_property, max_examples=150)
def test_added_tokens_that_reach_across_a_boundary_are_read_as_in_the_whole_text(greedy, at, query, chunk):
    ours, tokenizer = greedy
    [pair, plain] = ours[at].pairs(query, [chunk, "plain"], query_max_tokens=WHOLE_QUERY)
    assert pair.ids.tolist() == ids_of(tokenizer, SEAMS[at](query, chunk))
    assert plain.ids.tolist() == ids_of(tokenizer, SEAMS[at](query, "plain"))
    assert not pair.truncated


@pytest.mark.parametrize("query_max_tokens", [3, 20])
@pytest.mark.parametrize("max_length", [100, 150])
def test_pairs_with_such_tokens_are_cut_to_the_limits_asked_for(greedy, query_max_tokens, max_length):
    ours, tokenizer = greedy
    assert ours[1].caches_chunks
    query, chunk = "fever pain and adults " * 20, TEXTS[1] * 6
    options = {"max_length": max_length, "query_max_tokens": query_max_tokens}
    for pair in ours[1].pairs(query, [chunk, f"<both> {chunk}"], **options):
        assert (pair.length, pair.truncated) == (max_length, True)
        text = tokenizer.decode(pair.ids.tolist(), skip_special_tokens=False)
        kept = text.partition(" passage")[0].removeprefix("<|im_start|>query ")
        assert query.startswith(kept)
        assert query_max_tokens - 2 < len(ids_of(tokenizer, f" {kept}")) <= query_max_tokens


def test_chunks_are_cached_across_queries(qwen):
    ours = ChatPairs(qwen, QWEN3, max_length=512)
    first = ours.pairs(QUERY, TEXTS)
    ours._chunks._tokenizer = Recording(qwen, calls := [])
    again = ours.pairs("another one", [*TEXTS, "a new one"])
    assert calls == [[" a new one"]]
    assert [pair.ids[-1] for pair in first] == [pair.ids[-1] for pair in again[:-1]]
    assert [pair.ids.tolist() for pair in again] == [
        ids_of(qwen, QWEN3("another one", text)) for text in [*TEXTS, "a new one"]
    ]


class Recording:
    def __init__(self, tokenizer, calls):
        self.tokenizer, self.calls = tokenizer, calls

    def encode_batch_fast(self, texts, **options):
        self.calls.append(texts)
        return self.tokenizer.encode_batch_fast(texts, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_of_an_endless_chunk_and_query_only_the_beginning_is_read(joined):
    endless = "word and another " * 600_000
    [pair] = joined[0].pairs(endless, [endless])
    assert (pair.length, pair.truncated) == (1024, True)


# -- encoded whole -------------------------------------------------------------------------------------------------


@given(query=any_text, chunk=any_text)
@settings(by_property, max_examples=50)
def test_whole_chats_equal_joined_ones_wherever_nothing_is_cut(qwen, joined, query, chunk):
    whole = WholeChats(qwen, QWEN3, max_length=1024)
    options = {"query_max_tokens": WHOLE_QUERY}
    assert listed(whole.pairs(query, [chunk], **options)) == listed(joined[0].pairs(query, [chunk], **options))


def test_a_tokeniser_that_merges_across_words_encodes_whole_texts_with_a_warning(gemma, caplog):
    with caplog.at_level(logging.WARNING):
        ours = rendered_pairs(gemma, QWEN3, max_length=512)
    assert not ours.caches_chunks
    assert "tokens of chunks merge" in caplog.text
    assert [pair.ids.tolist() for pair in ours.pairs(QUERY, TEXTS)] == [
        ids_of(gemma, QWEN3(QUERY, text)) for text in TEXTS
    ]


def test_whole_texts_are_cut_by_the_same_rule(gemma):
    ours = rendered_pairs(gemma, QWEN3, max_length=512)
    empty = len(ids_of(gemma, QWEN3("", "")))
    query, chunk = "fever pain and adults " * 10, TEXTS[0] * 10
    [long] = ours.pairs(query, [chunk], max_length=empty + 40, query_max_tokens=128)
    text = gemma.decode(long.ids.tolist(), skip_special_tokens=False)
    asked, _, read = text.partition("<Query>: ")[2].partition("\n<Document>: ")
    assert query.startswith(asked)
    assert 15 <= len(ids_of(gemma, asked)) <= 20
    assert (chunk + QWEN3.after).startswith(read.removesuffix(QWEN3.after))
    assert text.endswith(QWEN3.after)
    assert empty + 30 < long.length <= empty + 40
    assert long.truncated
    assert [pair.truncated for pair in ours.pairs("q", ["short", chunk * 50])] == [False, True]


def test_a_length_without_tokens_for_a_chunk_is_a_clear_error(joined, gemma):
    for ours in (joined[0], rendered_pairs(gemma, QWEN3, max_length=512)):
        with pytest.raises(ValueError, match="leaves no token"):
            ours.pairs("q", ["c"], max_length=20)


# -- renderings ----------------------------------------------------------------------------------------------------


def test_a_template_that_trims_is_recognised(qwen):
    trimming = find_rendering(lambda query, chunk: QWEN3(query.strip(), chunk.strip()))
    assert trimming == Rendering(QWEN3.before, QWEN3.between, QWEN3.after, trims=True)
    ours = ChatPairs(qwen, trimming, max_length=512)
    pairs = ours.pairs("  q\n", ["\n text ", "text"])
    assert [pair.ids.tolist() for pair in pairs] == [ids_of(qwen, QWEN3("q", "text"))] * 2


@pytest.mark.parametrize(
    "render",
    [
        lambda query, chunk: f"{chunk} answers {query}",
        lambda query, chunk: f"{query} {chunk} {query}",
        lambda query, chunk: f"{query.lower()}: {chunk.replace('  ', ' ')}",
    ],
)
def test_a_template_that_does_more_than_frame_two_texts_is_rendered_for_every_pair(qwen, caplog, render):
    with pytest.raises(ModelUnusable, match="more than"):
        find_rendering(render)
    ours = rendered_pairs(qwen, render, max_length=512)
    assert not ours.caches_chunks
    assert "more than" in caplog.text
    assert [pair.ids.tolist() for pair in ours.pairs(QUERY, TEXTS)] == [
        ids_of(qwen, render(QUERY, text)) for text in TEXTS
    ]


def test_templates_differ_by_name_where_pairs_differ(qwen, gemma):
    made = [
        rendered_pairs(tokenizer, render, max_length=512)
        for tokenizer in (qwen, gemma)
        for render in (QWEN3, qwen3("Find what contradicts the claim"))
    ]
    assert len({str(one.template) for one in made}) == 4


def test_a_template_without_both_texts_is_recognised():
    def refuses(query, chunk):
        raise TypeError("no such role")

    assert renders_both_texts(QWEN3)
    assert not renders_both_texts(lambda query, chunk: query)
    assert not renders_both_texts(refuses)
