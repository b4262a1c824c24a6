"""Scores and token ids equal to sentence-transformers' own, for several families of model and tokeniser."""

import gzip
import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from rerankq_worker import engine
from rerankq_worker.engine import ModelUnusable, cross_encoder
from rerankq_worker.engine.models import device, loading
from rerankq_worker.engine.models.device import tokens_that_fit
from rerankq_worker.engine.models.last_layer import TwoRowHead, compute_last_layer_in_float32
from rerankq_worker.engine.models.passes import UnpaddedPass

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLED = REPOSITORY / "models" / "minilm-l6-rerank"
SCIFACT = REPOSITORY.parent / "shared" / "data" / "scifact"

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
SPECIALS = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "xlm-r": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "modernbert": ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"],
    "deberta": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
}
NAMED = {
    "bert": {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
    "xlm-r": {"unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"},
    "modernbert": {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
    "deberta": {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
}
FAMILIES = sorted(SPECIALS)


def load(model, **options):
    """Load for torch, whatever else is installed."""
    return engine.load(model, runtime="torch", **options)


def template(tokenizer, first, last, pair):
    return processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )


def tokenizer_of(family):
    specials = SPECIALS[family]
    if family in {"bert", "deberta"}:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    elif family == "xlm-r":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = (
        template(tokenizer, "<s>", "</s>", "<s> $A </s> </s> $B </s>")
        if family == "xlm-r"
        else template(tokenizer, "[CLS]", "[SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
        if family in {"bert", "deberta"}
        else template(tokenizer, "[CLS]", "[SEP]", "[CLS] $A [SEP] $B [SEP]")
    )
    return tokenizer


def model_of(family, tokenizer, labels=1):
    # Weights drawn wide: with the usual ones a tiny model answers nearly the same logit to everything.
    sizes = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": labels,
        "initializer_range": 0.3,
    }
    if family == "deberta":
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        return DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, **relative, max_position_embeddings=96))
    if family == "bert":
        return BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=96, pad_token_id=0))
    if family == "xlm-r":
        config = XLMRobertaConfig(**sizes, max_position_embeddings=98, type_vocab_size=1, pad_token_id=1)
        return XLMRobertaForSequenceClassification(config)
    ids = {"cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 3}
    return ModernBertForSequenceClassification(
        ModernBertConfig(**sizes, **ids, max_position_embeddings=96, local_attention=16, initializer_cutoff_factor=9.0)
    )


def save_checkpoint(folder, family, *, labels=1, max_length=96):
    torch.manual_seed(7)
    tokenizer = tokenizer_of(family)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"] + ["token_type_ids"] * (family in {"bert", "deberta"}),
        **NAMED[family],
    )
    model_of(family, tokenizer, labels).eval().save_pretrained(folder)
    wrapped.save_pretrained(folder)
    # The trap of checkpoints that were saved after use: the file carries a truncation and a padding of its own.
    file = folder / "tokenizer.json"
    saved = Tokenizer.from_file(str(file))
    saved.enable_truncation(max_length=11)
    saved.enable_padding(length=24)
    saved.save(str(file))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn about what a tiny checkpoint lacks
        return {family: save_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def engines(folders):
    return {family: load(str(folder), dtype="float32", threads=1) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def bundled():
    return load("bundled", dtype="float32", threads=1)


@pytest.fixture(scope="module")
def peers(folders):
    """The same checkpoints through sentence-transformers alone."""
    places = {**folders, "bundled": BUNDLED}
    return {
        name: CrossEncoder(str(place), device="cpu", model_kwargs={"dtype": torch.float32})
        for name, place in places.items()
    }


def predicted(peer, pairs):
    return peer.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False, batch_size=4)


def json_lines(name):
    with gzip.open(SCIFACT / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def real_pairs(count):
    if not SCIFACT.is_dir():
        return [(QUERY, text) for text in TEXTS]
    queries, corpus = json_lines("queries.jsonl.gz")[:4], json_lines("corpus.jsonl.gz")[: count // 4]
    return [(query["text"], f"{chunk['title']} {chunk['text']}".strip()) for query in queries for chunk in corpus]


# -- logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_predict(engines, peers, family):
    pairs = [(query, text) for query in (QUERY, "深度学习", "Straße") for text in TEXTS]
    ours, theirs = engines[family].score(pairs), predicted(peers[family], pairs)
    assert ours.dtype == np.float32
    assert np.ptp(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_logits_of_the_bundled_model_on_real_text_equal_those_of_predict(bundled, peers):
    pairs = real_pairs(8)
    ours, theirs = bundled.score(pairs), predicted(peers["bundled"], pairs)
    assert np.ptp(theirs) > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_known_architectures_run_unpadded(engines, bundled):
    padded = {family: engine.padded for family, engine in engines.items()}
    assert padded == {"bert": False, "modernbert": False, "xlm-r": False, "deberta": True}
    assert bundled.padded is False


def test_padding_can_be_asked_for_and_changes_no_logit(engines, folders):
    asked, unpadded = load(str(folders["bert"]), dtype="float32", padded=True), engines["bert"]
    pairs = [(QUERY, text) for text in TEXTS]
    assert asked.padded
    assert asked.fingerprint == unpadded.fingerprint
    np.testing.assert_allclose(asked.score(pairs), unpadded.score(pairs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", [lambda out: out * 1.5, lambda out: 1 / 0])
def test_a_model_whose_logits_change_without_padding_runs_padded_with_a_warning(
    folders, engines, monkeypatch, caplog, fault
):
    pairs = [(QUERY, text) for text in TEXTS]
    expected = engines["bert"].score(pairs)
    honest = UnpaddedPass.__call__
    monkeypatch.setattr(UnpaddedPass, "__call__", lambda self, batch: fault(honest(self, batch)))
    wary = load(str(folders["bert"]), dtype="float32")
    assert wary.padded
    assert "uses the pass 'padded'" in caplog.text
    np.testing.assert_allclose(wary.score(pairs), expected, rtol=0, atol=1e-5)


def test_logits_are_raw_although_the_checkpoint_asks_for_a_sigmoid(bundled):
    saved = json.loads((BUNDLED / "config.json").read_text())
    assert "Sigmoid" in saved["sentence_transformers"]["activation_fn"]
    assert bundled.score([(QUERY, TEXTS[0])])[0] > 1


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_logits_in_reduced_precision_stay_near_and_apart(bundled, dtype, tolerance):
    # Measured on 96 pairs of SciFact: at most 0.034 in bfloat16 and 0.003 in float16, where the logits spread by 0.8.
    pairs = [(query, text[:120]) for query, text in real_pairs(12)]  # a CPU is slow in these
    reduced = load("bundled", dtype=dtype, threads=1, max_length=96)
    assert not any(reduced.tokenise(query, [text])[0].truncated for query, text in pairs)
    logits = reduced.score(pairs)
    np.testing.assert_allclose(logits, bundled.score(pairs), atol=tolerance)
    # A last layer in sixteen bits would make many of them equal, and none of more bits.
    assert len(set(logits.tolist())) == len(pairs)
    in_sixteen_bits = torch.from_numpy(logits).to(getattr(torch, dtype)).float().numpy()
    assert (logits != in_sixteen_bits).mean() > 0.5
    assert reduced.dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_its_batch_mates(engines, family):
    one = engines[family]
    pairs = one.tokenise(QUERY, TEXTS)
    together = one.forward(pairs)
    alone = np.concatenate([one.forward([pair]) for pair in pairs])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_scores_come_in_the_order_of_the_pairs_whatever_their_batches(engines, folders):
    pairs = [(query, text) for text in TEXTS for query in (QUERY, "q")]
    small = load(str(folders["bert"]), dtype="float32", threads=1, max_batch_tokens=64)
    expected = engines["bert"].score(pairs)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(small.score(pairs), expected, atol=1e-5)
    np.testing.assert_allclose(small.score(pairs[::-1]), expected[::-1], atol=1e-5)


def test_an_empty_list_of_pairs_has_no_logits(bundled):
    assert bundled.score([]).shape == bundled.forward([]).shape == (0,)


# -- loading -------------------------------------------------------------------------------------------------------


def test_the_maximum_length_is_what_position_table_and_tokeniser_allow(engines, bundled, folders):
    assert {family: one.max_length for family, one in engines.items()} == dict.fromkeys(FAMILIES, 96)
    assert bundled.max_length == 512
    assert load(str(folders["bert"]), max_length=40, threads=1).max_length == 40
    with pytest.raises(ValueError, match="more than this model reads"):
        load(str(folders["bert"]), max_length=97, threads=1)


def test_positions_of_the_roberta_family_end_before_the_table(tmp_path):
    folder = save_checkpoint(tmp_path, "xlm-r", max_length=10_000)
    one = load(str(folder), threads=1)
    assert one.max_length == 96
    assert np.isfinite(one.score([("q", TEXTS[8] * 5)])).all()


def test_a_model_with_several_labels_is_rejected(tmp_path):
    folder = save_checkpoint(tmp_path, "bert", labels=3)
    with pytest.raises(ModelUnusable, match="3 scores per pair"):
        load(str(folder), threads=1)


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_without_a_trained_last_layer_is_rejected(tmp_path):
    folder = save_checkpoint(tmp_path, "bert")
    config = BertConfig.from_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    with pytest.raises(ModelUnusable, match="no trained weights"):
        load(str(folder), threads=1)


def test_pickled_weights_are_not_loaded(tmp_path):
    folder = save_checkpoint(tmp_path, "bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelUnusable, match="safetensors"):
        load(str(folder), threads=1)


def test_a_broken_weights_file_is_one_clear_error(tmp_path):
    folder = save_checkpoint(tmp_path, "bert")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelUnusable, match=str(folder)):
        load(str(folder), threads=1)


def test_the_fingerprint_follows_the_content_and_the_precision_and_nothing_else(folders, engines, tmp_path):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in folders["bert"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    known = engines["bert"].fingerprint
    moved = load(str(copy), dtype="float32", threads=1, max_batch_tokens=99, max_length=32)
    assert (moved.fingerprint, moved.max_batch_tokens, torch.get_num_threads()) == (known, 99, 1)
    assert load(str(copy), dtype="bfloat16", threads=1).fingerprint != known
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert load(str(copy), dtype="float32", threads=1).fingerprint != known
    assert len({one.fingerprint for one in engines.values()}) == len(engines)


def test_an_engine_describes_itself(engines, folders):
    one = engines["modernbert"]
    assert (one.name, one.dtype, one.device) == (str(folders["modernbert"]), "float32", "cpu")
    assert one.max_batch_tokens == 2048
    assert one.vocabulary == json.loads((folders["modernbert"] / "config.json").read_text())["vocab_size"]


def test_a_callers_maximum_length_is_respected(engines):
    [pair] = engines["bert"].tokenise("drug " * 30, ["fever " * 90], max_length=40, query_max_tokens=4)
    assert (pair.length, pair.second_from, pair.truncated) == (40, 1 + 4 + 1, True)


def test_the_memory_that_a_batch_takes_is_judged_by_its_tokens(engines, monkeypatch):
    batch = engines["bert"].tokenise(QUERY, TEXTS)
    monkeypatch.setattr(cross_encoder, "tokens_that_fit", lambda device, tokens, run: (device.type, tokens, len(run())))
    assert engines["bert"].most_tokens(batch) == ("cpu", sum(pair.length for pair in batch), len(batch))


def test_half_of_the_free_memory_is_for_a_batch_by_what_a_small_one_took_beyond_the_weights(monkeypatch):
    runs = []
    told = {
        "reset_peak_memory_stats": None, "memory_allocated": 1_000, "max_memory_allocated": 5_000, "empty_cache": None,
        "mem_get_info": (80_000, 10**6),
    }  # fmt: skip
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert tokens_that_fit(torch.device("cuda"), 40, lambda: runs.append(1)) == 0.5 * 80_000 / 100
    assert len(runs) == 2, "the first takes what libraries take once"
    assert tokens_that_fit(torch.device("cpu"), 40, lambda: runs.append(1)) == np.inf


def test_a_cpu_is_fast_in_bfloat16_where_it_has_the_instructions(monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(device, "multiplies_bfloat16", lambda has=has: has)
        assert device.multiplies_bfloat16_faster(torch.device("cpu")) is has
        assert device.multiplies_bfloat16_faster(torch.device("meta")) is False


def test_the_hash_of_weights_follows_names_shapes_types_and_every_number():
    def hashed(**weights):
        return loading.hash_of_weights(SimpleNamespace(state_dict=lambda: weights))

    first, second = torch.arange(6.0), torch.ones(2)
    others = [
        hashed(b=second, a=first), hashed(a=first, c=second), hashed(a=first.reshape(2, 3), b=second),
        hashed(a=first.view(torch.int32), b=second), hashed(a=first + 1, b=second), hashed(a=first, b=second * 2),
    ]  # fmt: skip
    assert others[0] == hashed(a=first, b=second)
    assert len(set(others)) == len(others)


def test_a_model_without_a_stated_length_needs_a_maximum_length():
    wordless = SimpleNamespace(max_seq_length=10**30, named_modules=list)
    with pytest.raises(ModelUnusable, match="no maximum length"):
        loading.readable_length(wordless, None)
    assert loading.readable_length(wordless, 700) == 700
    table = ("embeddings.position_embeddings", torch.nn.Embedding(64, 2))
    assert loading.readable_length(SimpleNamespace(max_seq_length=90, named_modules=lambda: [table]), None) == 64


@pytest.mark.parametrize("bias", [True, False])
def test_the_two_row_head_computes_in_float32(bias):
    whole, words = torch.nn.Linear(8, 9, bias=bias), TwoRowHead(linear := torch.nn.Linear(8, 9, bias=bias), [7, 2])
    whole.load_state_dict(linear.state_dict())
    states = torch.randn(3, 8)
    torch.testing.assert_close(words(states), whole(states)[:, [7, 2]])
    assert TwoRowHead(whole.bfloat16(), [7, 2])(states.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("no", "left"), [(2, (0, 1)), (0, (0, 1)), (None, (0, None))])
def test_a_decoder_with_one_answer_token_keeps_one_row(no, left):
    kept, score = [], LogitScore(true_token_id=7, false_token_id=no)
    layer = torch.nn.Linear(8, 9)
    body = SimpleNamespace(get_output_embeddings=lambda: layer, set_output_embeddings=kept.append)
    compute_last_layer_in_float32([SimpleNamespace(auto_model=body), score])
    assert (score.true_token_id, score.false_token_id) == left
    assert len(kept[0].weight) == (2 if no is not None else 1)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"device": "abacus"}, "abacus"), ({"dtype": "int4"}, "int4"), ({"max_batch_tokens": "many"}, "many")],
)
def test_a_wrong_option_is_a_clear_error(folders, options, complaint):
    with pytest.raises((engine.EngineError, ValueError), match=complaint):
        load(str(folders["bert"]), threads=1, **options)


def test_tokenisers_do_not_warn_after_a_fork(bundled):
    bundled.tokenise("q", TEXTS)
    assert os.environ["TOKENIZERS_PARALLELISM"] in {"true", "false"}


def test_jobs_through_the_batcher_score_as_alone(bundled):
    with engine.Batcher(bundled, max_batch_tokens=512) as batcher:
        queries = [QUERY, "population of the capital", "重排序"]
        tickets = [batcher.submit(bundled.tokenise(query, TEXTS), priority="bulk") for query in queries]
        for query, ticket in zip(queries, tickets, strict=True):
            alone = bundled.score([(query, text) for text in TEXTS])
            np.testing.assert_allclose(ticket.result(60), alone, atol=1e-5)


def test_a_model_without_finite_logits_is_rejected_when_loaded(folders, tmp_path):
    spoilt = shutil.copytree(folders["bert"], tmp_path / "spoilt")
    weights = load_file(spoilt / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][0, 0] = torch.nan
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnusable, match="not finite in float32"):
        load(str(spoilt), dtype="float32", threads=1)
