"""A pair gets the logit that it gets alone whatever is beside it, by a way that a probe found right, or none at all."""

import itertools
import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints
import torch
from differential import TOLERANCES, WAYS
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder

from rerankq_worker import engine
from rerankq_worker.engine import Batcher, ModelUnusable, PairFailed, cross_encoder
from rerankq_worker.engine.models import loading
from rerankq_worker.engine.models.passes import EqualLengthPass, WholeModelPass

pytestmark = pytest.mark.slow

QUERY = tiny_checkpoints.QUERY
TEXTS = (*tiny_checkpoints.TEXTS, "", "a", "word " * 60)
PATIENCE_S = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Give the folder of a tiny checkpoint, made when first asked for; ``config`` is put over its recipe's."""
    found = {}

    def make(name, **config):
        key = name, json.dumps(config, sort_keys=True)
        if key not in found:
            found[key] = tiny_checkpoints.write(name, tmp_path_factory.mktemp("model"), **config)
        return found[key]

    return make


@pytest.fixture
def copied(made, tmp_path):
    """Give a copy of a tiny checkpoint that may be spoilt."""
    return lambda name, **config: shutil.copytree(made(name, **config), tmp_path / "copy")


def load(folder, dtype="float32", runtime="torch", **options):
    return engine.load(str(folder), "cpu", dtype, runtime=runtime, threads=1, **options)


def plain_logits(folder, pairs, dtype=torch.float32):
    """The slow twin: the ids of each pair by themselves through sentence-transformers' model as it loads it."""
    model = CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity(), model_kwargs={"dtype": dtype})
    model.eval()
    with torch.inference_mode():
        return np.array([_alone(model, pair) for pair in pairs])


def _alone(model, pair):
    ids = torch.from_numpy(pair.ids.astype(np.int64))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in model.tokenizer.model_input_names:
        inputs["token_type_ids"] = (torch.arange(pair.length) >= pair.second_from).long()[None]
    return float(model(inputs)["scores"].reshape(-1))


def shuffled_batches(count, seed=0):
    dice = np.random.default_rng(seed)
    for size in (count, 1, 2, count // 2, count):
        yield dice.permutation(count)[:size]


def assert_scores_as_alone(loaded, folder, pairs, atol=1e-5):
    expected = plain_logits(folder, pairs)
    assert np.ptp(expected) > 0.05, "pairs that differ must not all score alike, or this compares nothing"
    for order in shuffled_batches(len(pairs)):
        logits = loaded.forward([pairs[at] for at in order])
        np.testing.assert_allclose(logits, expected[order], rtol=1e-5, atol=atol)


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("gemma says", WholeModelPass),
        ("gemma2 says", WholeModelPass),  # soft caps on its logits, windows of attention
        ("mistral says", WholeModelPass),
        ("gpt2 says", WholeModelPass),  # left to itself it counts the padding before a pair
        ("gpt2", WholeModelPass),
        ("phi3", WholeModelPass),
        ("llama, no padding", None),
        ("modular qwen3", WholeModelPass),
    ],
)
def test_a_pair_beside_longer_ones_scores_as_alone(made, name, way):
    loaded = load(made(name))
    assert way is None or type(loaded._forward_pass) is way
    assert_scores_as_alone(loaded, made(name), loaded.tokenise(QUERY, TEXTS))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt2"])
def test_a_decoder_without_a_padding_id_pools_the_last_token(copied, made, name):
    folder = copied(name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    loaded = load(folder)
    pairs = loaded.tokenise(QUERY, TEXTS)
    assert_scores_as_alone(loaded, folder, pairs)


LONG_ROPE = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 40,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 40,
        "factor": 3.2,
    },
}
DYNAMIC_ROPE = {
    "max_position_embeddings": 40,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
}


@pytest.mark.parametrize(("name", "config"), [("phi3", LONG_ROPE), ("llama, bytes", DYNAMIC_ROPE)])
def test_a_short_pair_does_not_get_the_rotary_frequencies_of_a_longer_one(copied, name, config):
    folder = copied(name, **config)
    # Without this the tokeniser's length is capped at the configuration's, before the second kind does anything.
    stated = {"max_seq_length": 96, "transformer_task": "sequence-classification"}
    (folder / "sentence_bert_config.json").write_text(json.dumps(stated))
    tiny_checkpoints._write_modules(folder)
    loaded = load(folder)
    pairs = loaded.tokenise(QUERY, TEXTS)
    lengths = [pair.length for pair in pairs]
    assert min(lengths) < 40 < max(lengths)
    # Each through a model of its own, which has seen no other.
    expected = np.array([plain_logits(folder, [pair]).item() for pair in pairs[:6]])
    for order in shuffled_batches(6):
        np.testing.assert_allclose(loaded.forward([pairs[at] for at in order]), expected[order], rtol=0, atol=1e-5)


def test_short_pairs_alone_of_a_model_of_long_positions_are_batched_as_others(copied):
    assert type(load(copied("phi3", **LONG_ROPE), max_length=40)._forward_pass) is WholeModelPass


@pytest.mark.parametrize("name", ["gemma says", "bert", "deberta", "modular qwen3"])
def test_in_reduced_precision_a_pair_scores_beside_longer_ones_nearly_as_alone(made, name):
    loaded = load(made(name), "bfloat16")
    pairs = loaded.tokenise(QUERY, TEXTS)
    alone = np.array([loaded.forward([pair]).item() for pair in pairs])
    for order in shuffled_batches(len(pairs)):
        logits = loaded.forward([pairs[at] for at in order])
        np.testing.assert_allclose(logits, alone[order], rtol=0, atol=0.03 * max(1, np.abs(alone).max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_last_layer_of_a_decoder_that_says_yes_or_no_computes_in_float32(made, dtype):
    loaded = load(made("gemma says"), dtype)
    logits = loaded.forward(loaded.tokenise(QUERY, [f"chunk {number}" for number in range(40)]))
    in_sixteen_bits = torch.from_numpy(logits).to(getattr(torch, dtype)).float().numpy()
    assert (logits != in_sixteen_bits).mean() > 0.5


# -- refused -------------------------------------------------------------------------------------------------------


def spoil(monkeypatch, hook, module="classifier"):
    honest = cross_encoder.load_model

    def load_model(*args):
        model = honest(*args)
        model[0].auto_model.get_submodule(module).register_forward_hook(hook)
        return model

    monkeypatch.setattr(cross_encoder, "load_model", load_model)


def test_a_model_whose_pairs_change_each_other_even_at_equal_lengths_is_rejected(made, monkeypatch):
    spoil(monkeypatch, lambda _, __, out: out - out.mean(0, keepdim=True))
    with pytest.raises(ModelUnusable, match=r"in a batch as alone: .*equal lengths, its logits"):
        load(made("bert"))


def test_a_model_that_is_not_deterministic_is_rejected(made, monkeypatch):
    spoil(monkeypatch, lambda _, __, out: out + torch.rand(1))
    with pytest.raises(ModelUnusable, match="not deterministic"):
        load(made("bert"))


def test_a_model_that_is_changed_by_any_padding_runs_pairs_of_equal_length(made, monkeypatch, caplog):
    spoil(monkeypatch, lambda _, __, out: out + 0.1 * out.shape[1], "bert.embeddings.LayerNorm")
    loaded = load(made("bert"), padded=True)
    assert type(loaded._forward_pass) is EqualLengthPass
    assert not loaded.padded
    assert "uses the pass 'whole model, equal lengths'" in caplog.text


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("roberta", "classifier.dense"),
        ("distilbert", "pre_classifier"),
        ("bert", "bert.pooler.dense"),
        ("bert", "classifier"),
        ("modernbert", "head.dense"),
        ("xlm-r", "roberta.encoder.layer.1.output.dense"),
        ("qwen3 says", "model.layers.0.self_attn.q_proj"),
        ("modular bert, mean", "encoder.layer.0.attention.self.key"),
    ],
)
def test_a_checkpoint_without_a_weight_is_rejected_with_the_weights_name(copied, name, gone):
    folder = copied(name)
    rewrite(folder, lambda weights: {key: value for key, value in weights.items() if not key.startswith(gone)})
    with pytest.raises(ModelUnusable, match=rf"no trained weights for {gone}\."):
        load(folder)


def rewrite(folder, change, file="model.safetensors"):
    weights = change(load_file(folder / file))
    save_file({key: value.clone() for key, value in weights.items()}, folder / file, metadata={"format": "pt"})


def test_a_weight_of_another_shape_is_rejected_with_its_name(copied):
    folder = copied("bert")
    rewrite(folder, lambda weights: weights | {"bert.pooler.dense.weight": torch.zeros(32, 31)})
    with pytest.raises(ModelUnusable, match=r"no trained weights for bert\.pooler\.dense\.weight"):
        load(folder)


def test_weights_under_another_prefix_are_missing_and_unknown_ones_do_not_matter(copied):
    folder = copied("bert")
    rewrite(folder, lambda weights: weights | {"nobody.asks": torch.zeros(3)})
    load(folder)
    rewrite(folder, lambda weights: {key.replace("bert.", "student.bert."): value for key, value in weights.items()})
    with pytest.raises(ModelUnusable, match=r"no trained weights for bert\.embeddings.* and \d+ more"):
        load(folder)


def test_a_dense_layer_without_its_weight_is_rejected(copied):
    folder = copied("modular modernbert")
    rewrite(folder / "2_Dense", lambda weights: {"linear.bias": weights["linear.bias"]})
    with pytest.raises(ModelUnusable, match=r"linear\.weight"):
        load(folder)


def test_tied_weights_are_stored_once_and_a_shard_that_is_gone_is_named(made, tmp_path):
    model = CrossEncoder(str(made("qwen3 says")), device="cpu")
    tied = shutil.copytree(made("qwen3 says"), tmp_path / "tied")
    body = model[0].auto_model
    body.config.tie_word_embeddings = True
    body.tie_weights()
    (tied / "model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body.save_pretrained(tied, max_shard_size="20KB")
    shards = sorted(tied.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_scores_as_alone(load(tied), tied, load(tied).tokenise(QUERY, TEXTS[:5]))
    shards[0].unlink()
    with pytest.raises(ModelUnusable, match=shards[0].name):
        load(tied)


def without_words(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


SPOILT = {
    "a configuration that is no JSON": lambda folder: (folder / "config.json").write_text("{nope"),
    "a configuration that is a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "an unknown kind of model": lambda folder: change_config(folder, model_type="nope"),
    "code of its own": lambda folder: change_config(folder, model_type="own", auto_map={"AutoConfig": "x.C"}),
    "heads that do not divide": lambda folder: change_config(folder, num_attention_heads=5),
    "a padding that is no token": lambda folder: change_config(folder, pad_token_id=99_999),
    "a tokeniser that is no JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "no tokeniser": without_words,
    "tokens beyond the table": lambda folder: add_token(folder, 5000),
    "weights cut short": lambda folder: cut(folder / "model.safetensors"),
    "weights that are none": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
    "no weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "pickled weights beside": lambda folder: pickled(folder / "2_Dense"),
}


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def add_token(folder, token_id):
    saved = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    saved["added_tokens"].append({"id": token_id, "content": "<far>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(saved))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(folder):
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize("what", SPOILT)
def test_a_folder_without_a_model_is_rejected_in_one_line(copied, what):
    folder = copied("bert")
    SPOILT[what](folder)
    with pytest.raises(ModelUnusable) as said:
        load(folder)
    assert str(folder) in str(said.value)
    assert "\n" not in str(said.value)


# -- files that change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r+b", "wb"])
@pytest.mark.parametrize(
    ("name", "runtime", "dtype"),
    [
        ("bert", "torch", "float32"),
        ("qwen3", "torch", "bfloat16"),
        ("modular modernbert", "torch", "float32"),
        ("bert", "openvino", "float32"),
    ],
)
def test_scores_do_not_follow_files_that_are_overwritten(copied, tmp_path, name, runtime, dtype, mode):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    folder = copied(name)
    loaded = load(folder, dtype, runtime)
    pairs = loaded.tokenise(QUERY, TEXTS)
    before = loaded.forward(pairs)
    for file in folder.rglob("*.safetensors"):
        content = bytes(byte ^ 1 for byte in file.read_bytes())
        with file.open(mode) as opened:
            opened.write(content)
    np.testing.assert_array_equal(loaded.forward(pairs), before)


@pytest.mark.skipif(sys.platform != "linux", reason="mapped files are listed by Linux alone")
@pytest.mark.parametrize("name", ["bert", "qwen3 says"])
def test_weights_are_read_and_not_mapped_so_that_a_truncated_file_is_harmless(copied, monkeypatch, name):
    # A folder of its own: the shared one may still be mapped by a model that another test holds against ours.
    folder, mapped = copied(name), []

    def look(_):
        mapped.append(str(folder) in Path("/proc/self/maps").read_text())

    monkeypatch.setattr(loading, "_copy_out_of_files", look)
    load(folder)
    assert mapped == [False]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_whose_file_is_replaced_while_it_is_read_is_rejected(copied, monkeypatch, file):
    folder = copied("bert")
    honest = cross_encoder.load_model

    def load_model(*args):
        model = honest(*args)
        other = folder / "other"
        other.write_bytes((folder / file).read_bytes())
        other.replace(folder / file)
        return model

    monkeypatch.setattr(cross_encoder, "load_model", load_model)
    with pytest.raises(ModelUnusable, match="changed while they were read"):
        load(folder)


# -- no numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pair_without_a_finite_logit_fails_alone_and_not_as_out_of_memory(copied, runtime, alone):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    folder = copied("bert")
    word = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["brucken"]
    rewrite(folder, lambda weights: with_nan(weights, "bert.embeddings.word_embeddings.weight", word))
    loaded = load(folder, runtime=runtime)
    spoilt, good = loaded.tokenise(QUERY, ["brucken"]), loaded.tokenise(QUERY, ["a", "b c", "d"])
    with Batcher(loaded) as batcher:
        failing = batcher.submit(spoilt * 3) if alone else batcher.submit([*good, *spoilt])
        others = batcher.submit(good)
        with pytest.raises(PairFailed, match="logit is not finite"):
            failing.result(PATIENCE_S)
        assert np.isfinite(others.result(PATIENCE_S)).all()
        stats = batcher.stats()
    assert (stats.out_of_memory, stats.batch_tokens, stats.alive) == (0, loaded.max_batch_tokens, True)


def with_nan(weights, key, row):
    weights[key][row] = torch.nan
    return weights


# -- precisions ----------------------------------------------------------------------------------------------------


def test_precisions_that_round_differently_do_not_share_scores(made):
    prints = [load(made("bert"), dtype).fingerprint for dtype in ("float32", "bfloat16", "float16")]
    assert len(set(prints)) == 3
    assert load(made("bert"), padded=True).fingerprint == prints[0]


@pytest.mark.parametrize("name", ["bert", "qwen3 says"])
def test_engines_with_one_fingerprint_differ_by_no_more_than_the_tolerance(made, name):
    pytest.importorskip("openvino")
    asked = [(*way, {}) for way in WAYS] + [("torch", dtype, {"padded": True}) for dtype in ("float32", "bfloat16")]
    alike = {}
    for runtime, dtype, options in asked:
        loaded = load(made(name), dtype, runtime, **options)
        logits = loaded.forward(loaded.tokenise(QUERY, TEXTS))
        alike.setdefault(loaded.fingerprint, []).append((loaded.dtype, logits))
    assert {len(ways) for ways in alike.values()} >= {1, 2}
    for ways in alike.values():
        for (dtype, one), (same, other) in itertools.combinations(ways, 2):
            assert dtype == same
            np.testing.assert_allclose(one, other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
