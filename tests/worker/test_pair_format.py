"""Pairs in the format that sentence-transformers gives them, whatever the checkpoint was saved with."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from rerankq_worker import engine
from rerankq_worker.engine import ModelUnusable, PairFailed
from rerankq_worker.engine.tokenising.chat_pairs import ChatPairs
from rerankq_worker.engine.tokenising.pair_format import KEPT_INSTRUCTIONS, InstructedTokenisers, pair_tokeniser_for
from rerankq_worker.engine.tokenising.pair_tokeniser import PairTokeniser
from rerankq_worker.engine.tokenising.rendering import qwen3
from rerankq_worker.engine.tokenising.whole_pairs import WholePairs

TEXTS = [
    "Aspirin reduces fever, pain and inflammation in adults.",
    "\nThe capital of France is Paris; its population was 2,102,650 in 2023.\n",
    "深度学习模型在检索任务中表现出色。",
    "",
    "A very long sentence that goes on, " * 12,
]
QUERY = "which drug reduces fever?"
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

#: A reranker's: a prompt of the checkpoint or a default one, then the roles that pairs have.
RERANKER_CHAT = """\
{%- set task = messages | selectattr("role", "eq", "system") | map(attribute="content") | first | default("Find it") -%}
<|im_start|>system
Answer yes or no.<|im_end|>
<|im_start|>user
<Instruct>: {{ task }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
<|im_start|>assistant
"""
#: A chatbot's, which knows no such roles.
CHATBOT_CHAT = """\
{%- for message in messages if message.role in ("user", "assistant") -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
"""


def decoder_tokenizer(chat, marks=MARKS):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([qwen3()(QUERY, text) for text in [*TEXTS, "yes no"]] * 3, trainer)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=marks[0], eos_token=marks[0], model_max_length=256, chat_template=chat
    )


def decoder(folder, chat, *, marks=MARKS, kind=Qwen3ForCausalLM):
    torch.manual_seed(7)
    tokenizer = decoder_tokenizer(chat, marks)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        num_labels=1,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encoder(folder):
    torch.manual_seed(7)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "which", "drug", "fever", "pain", "find", "the", ":", "?"]
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, num_labels=1, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def loaded(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn about what a tiny checkpoint lacks
        return CrossEncoder(str(folder), device="cpu", **options)


def read_by(peer, query, chunks, **options):
    """What sentence-transformers itself gives the model to read.

    It switches padding on in the tokeniser that it shares with ours: to be asked before ours is made.
    """
    rows = []
    for chunk in chunks:
        features = peer.preprocess([(query, chunk)], **options)
        rows.append(features["input_ids"][0][features["attention_mask"][0].bool()].tolist())
    return rows


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    return loaded(decoder(tmp_path_factory.mktemp("reranker"), RERANKER_CHAT))


@pytest.mark.parametrize("kind", [Qwen3ForCausalLM, Qwen3ForSequenceClassification])
def test_a_decoder_reads_what_its_own_chat_template_renders(tmp_path, kind):
    peer = loaded(decoder(tmp_path, RERANKER_CHAT, kind=kind))
    expected = read_by(peer, QUERY, TEXTS)
    ours = pair_tokeniser_for(peer, max_length=256)
    pairs = ours.pairs(QUERY, TEXTS)
    assert isinstance(ours, ChatPairs)
    assert [pair.ids.tolist() for pair in pairs] == expected
    assert [pair.second_from for pair in pairs] == [pair.length for pair in pairs]


def test_a_pair_that_is_cut_reads_as_sentence_transformers_cuts_it(reranker):
    whole = read_by(reranker, QUERY, TEXTS)
    length = sorted(map(len, whole))[2]
    expected = read_by(reranker, QUERY, TEXTS, max_length=length)
    pairs = pair_tokeniser_for(reranker, max_length=256).pairs(QUERY, TEXTS, max_length=length)
    assert [pair.ids.tolist() for pair in pairs] == expected
    assert [pair.truncated for pair in pairs] == [len(ids) > length for ids in whole]


def test_the_prompt_of_the_checkpoint_is_its_instruction_and_the_callers_goes_before_it(tmp_path):
    peer = loaded(
        decoder(tmp_path, RERANKER_CHAT), prompts={"claims": "Find what refutes it"}, default_prompt_name="claims"
    )
    prompts = ["Find what refutes it", "Find what supports it"]
    expected = [read_by(peer, QUERY, TEXTS, prompt=prompt) for prompt in prompts]
    saved = pair_tokeniser_for(peer, max_length=256)
    asked = pair_tokeniser_for(peer, max_length=256, instruction=prompts[1])
    for ours, theirs in zip((saved, asked), expected, strict=True):
        assert [pair.ids.tolist() for pair in ours.pairs(QUERY, TEXTS)] == theirs
    assert saved.template != asked.template


@pytest.mark.parametrize("kind", [Qwen3ForCausalLM, Qwen3ForSequenceClassification])
def test_a_decoder_with_a_chat_template_for_chatbots_uses_the_format_of_qwen3(tmp_path, kind):
    peer = loaded(decoder(tmp_path, CHATBOT_CHAT, kind=kind))
    with pytest.raises(ValueError, match="cannot carry"):
        read_by(peer, QUERY, TEXTS)
    ours = pair_tokeniser_for(peer, max_length=256, instruction="Find it")
    whole = [peer.tokenizer.encode(qwen3("Find it")(QUERY, text), add_special_tokens=False) for text in TEXTS]
    assert [pair.ids.tolist() for pair in ours.pairs(QUERY, TEXTS)] == whole
    assert ours.caches_chunks


def test_an_instruction_takes_the_place_of_the_checkpoints_own_and_few_tokenisers_are_kept(reranker):
    told = InstructedTokenisers(reranker, max_length=256)
    assert told.takes_instruction
    for instruction in ("Find what supports it", "Find what refutes it"):
        expected = pair_tokeniser_for(reranker, max_length=256, instruction=instruction).pairs(QUERY, TEXTS)
        found = told.of(instruction).pairs(QUERY, TEXTS)
        assert [pair.ids.tolist() for pair in found] == [pair.ids.tolist() for pair in expected]
    kept = told.of("Find what supports it")
    for number in range(KEPT_INSTRUCTIONS - 1):
        told.of(str(number))
    assert told.of("Find what supports it") is kept
    for number in range(KEPT_INSTRUCTIONS):
        told.of(str(number))
    assert told.of("Find what supports it") is not kept


def test_a_model_without_a_place_for_an_instruction_takes_none(tmp_path):
    silent = (
        "{% for message in messages %}{% if message.role != 'system' %}{{ message.content }}\n{% endif %}{% endfor %}"
    )
    chatbot = InstructedTokenisers(loaded(decoder(tmp_path / "chatbot", CHATBOT_CHAT)), max_length=256)
    assert chatbot.takes_instruction, "Qwen3's format has a place"
    for peer in (loaded(encoder(tmp_path / "pairs")), loaded(decoder(tmp_path / "silent", silent))):
        told = InstructedTokenisers(peer, max_length=64)
        assert not told.takes_instruction
        with pytest.raises(PairFailed, match="takes no instruction"):
            told.of("Find it")


def test_a_decoder_without_a_known_format_is_rejected_unless_one_is_given(tmp_path):
    peer = loaded(decoder(tmp_path, CHATBOT_CHAT, marks=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    with pytest.raises(ModelUnusable, match=r"lacks <think> </think>"):
        pair_tokeniser_for(peer, max_length=256)
    named = pair_tokeniser_for(peer, max_length=256, pair_format="pair")
    assert [pair.ids.tolist() for pair in named.pairs(QUERY, TEXTS[:1])] == [
        peer.tokenizer(QUERY, TEXTS[0])["input_ids"]
    ]


def test_a_given_format_overrides_the_checkpoints_own(reranker):
    ours = pair_tokeniser_for(reranker, max_length=256, pair_format="qwen3")
    [pair] = ours.pairs(QUERY, TEXTS[:1])
    assert pair.ids.tolist() == reranker.tokenizer.encode(qwen3()(QUERY, TEXTS[0]), add_special_tokens=False)
    with pytest.raises(ValueError, match=r"pair_format must be.*not 'chat'"):
        pair_tokeniser_for(reranker, max_length=256, pair_format="chat")


def test_an_encoder_reads_pairs_with_special_tokens_and_its_prompt_before_the_query(tmp_path):
    plain = loaded(encoder(tmp_path))
    prompted = loaded(tmp_path, prompts={"find": "find the drug: "}, default_prompt_name="find")
    chunks = ["pain. fever?", "", "the pain " * 40]
    for peer, prompt in ((plain, None), (prompted, "find the drug: ")):
        expected = read_by(peer, QUERY, chunks, prompt=prompt)
        ours = pair_tokeniser_for(peer, max_length=64)
        assert isinstance(ours, PairTokeniser)
        pairs = ours.pairs(QUERY, chunks)
        assert [pair.ids.tolist() for pair in pairs] == expected
        assert [pair.truncated for pair in pairs] == [False, False, True]


@pytest.mark.parametrize("kind", [PairTokeniser, WholePairs])
def test_a_long_prompt_does_not_count_against_the_query(tmp_path, kind):
    tokenizer = loaded(encoder(tmp_path)).tokenizer.backend_tokenizer
    prompt, query, chunk = "find the drug: " * 6, "which drug? the pain: fever", "the pain " * 40
    read = [tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, query, chunk)]
    prompted = kind(tokenizer, max_length=64, query_prompt=prompt)
    [short] = prompted.pairs(query, ["pain"])
    assert short.ids[1 : 1 + len(read[0]) + len(read[1])].tolist() == read[0] + read[1]
    assert not short.truncated
    [pair] = prompted.pairs(query, [chunk], query_max_tokens=4)
    before = [2, *read[0], *read[1][:4], 3]
    assert pair.ids.tolist() == [*before, *read[2][: 63 - len(before)], 3]
    assert pair.truncated
    with pytest.raises(ValueError, match="leaves no token for query and chunk beside 27 others"):
        prompted.pairs(query, [chunk], max_length=28)


def test_a_saved_configuration_reaches_the_template(tmp_path):
    folder = decoder(tmp_path / "made", RERANKER_CHAT + "{% if thinking %}<think>{% endif %}")
    loaded(folder).save_pretrained(str(tmp_path / "saved"))
    config = tmp_path / "saved" / "sentence_bert_config.json"
    asked = {"processing_kwargs": {"chat_template": {"thinking": True, "restore_suffix": True}}}
    config.write_text(json.dumps(json.loads(config.read_text()) | asked))
    peer = loaded(tmp_path / "saved")
    expected = read_by(peer, QUERY, TEXTS[:1])
    [pair] = pair_tokeniser_for(peer, max_length=256).pairs(QUERY, TEXTS[:1])
    assert pair.ids.tolist() == expected[0]
    assert pair.ids[-1] == peer.tokenizer.convert_tokens_to_ids("<think>")
    assert pair.ids.dtype == np.int32


def test_a_slow_tokeniser_is_rejected():
    slow = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False))
    with pytest.raises(ModelUnusable, match=r"no tokenizer\.json"):
        pair_tokeniser_for(slow, max_length=256)


@pytest.mark.parametrize("kind", [Qwen3ForCausalLM, Qwen3ForSequenceClassification])
def test_a_decoder_scores_as_sentence_transformers_scores_it(tmp_path, kind):
    folder = decoder(tmp_path, RERANKER_CHAT, kind=kind)
    chunks = [text for text in TEXTS if text]
    expected = loaded(folder, model_kwargs={"dtype": torch.float32}).predict(
        [(QUERY, text) for text in chunks], activation_fn=torch.nn.Identity(), show_progress_bar=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = engine.load(str(folder), dtype="float32", threads=1, runtime="torch")
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(ours.score([(QUERY, text) for text in chunks]), expected, atol=1e-5)
