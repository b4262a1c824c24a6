"""Every forward pass gives a pair the logit that it gets alone, from the model's own forward pass."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankq_worker.engine.models import probing
from rerankq_worker.engine.models.architectures import architecture_of
from rerankq_worker.engine.models.attention import runs_of
from rerankq_worker.engine.models.cls_layer import ClsLayer, reduce_to_cls, restore_last_layer
from rerankq_worker.engine.models.openvino_pass import OpenVinoPass
from rerankq_worker.engine.models.passes import InputFormat, PaddedPass, UnpaddedPass
from rerankq_worker.engine.models.probing import Probe
from rerankq_worker.engine.protocol import TokenisedPair

WORDS = 200
WINDOW = 16  # tokens on both sides together; most pairs here are longer
YES, NO = 17, 23
CPU = torch.device("cpu")

#: Drawn wide: with the usual weights a tiny model answers nearly the same logit to everything.
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "num_labels": 1,
    "max_position_embeddings": 128,
}
SHARED_KEYS = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}


class Family(NamedTuple):
    kind: str
    options: dict[str, Any]
    types: bool = False
    yes_or_no: tuple[int, int | None] | None = None
    pad: int = 0


FAMILIES = {
    "bert": Family("BertForSequenceClassification", {"pad_token_id": 0}, types=True),
    "bert without segments": Family("BertForSequenceClassification", {"pad_token_id": 0}),
    "bert, causal": Family("BertForSequenceClassification", {"pad_token_id": 0, "is_decoder": True}),
    "roberta": Family("RobertaForSequenceClassification", {"pad_token_id": 1}, pad=1),
    "xlm-r": Family("XLMRobertaForSequenceClassification", {"pad_token_id": 1}, pad=1),
    "camembert": Family("CamembertForSequenceClassification", {"pad_token_id": 1}, pad=1),
    "gte": Family("GteForSequenceClassification", {"pad_token_id": 0}),
    "modernbert": Family(
        "ModernBertForSequenceClassification", {"local_attention": WINDOW, "initializer_cutoff_factor": 9.0}
    ),
    "modernbert, mean": Family(
        "ModernBertForSequenceClassification",
        {"local_attention": WINDOW, "initializer_cutoff_factor": 9.0, "classifier_pooling": "mean"},
    ),
    "llama": Family("LlamaForSequenceClassification", SHARED_KEYS),
    "qwen2": Family("Qwen2ForSequenceClassification", SHARED_KEYS),
    "qwen2, sliding": Family(
        "Qwen2ForSequenceClassification",
        {**SHARED_KEYS, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": Family("Qwen3ForSequenceClassification", SHARED_KEYS),
    "qwen3, yes or no": Family("Qwen3ForCausalLM", SHARED_KEYS, yes_or_no=(YES, NO)),
    "qwen3, yes or the first token": Family("Qwen3ForCausalLM", SHARED_KEYS, yes_or_no=(YES, 0)),
    "qwen3, yes alone": Family("Qwen3ForCausalLM", SHARED_KEYS, yes_or_no=(YES, None)),
}


def model_of(family: Family) -> Any:
    torch.manual_seed(3)
    kind = getattr(transformers, family.kind)
    sizes = SIZES if family.yes_or_no is None else {**SIZES, "num_labels": 2}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    modern = family.kind.startswith("ModernBert")
    options = {"pad_token_id": 0, **ids, **family.options} if modern else family.options
    return kind(kind.config_class(**sizes, **options)).eval()


def alone(family: Family, model: Any, pair: TokenisedPair) -> float:
    """The slow twin: one pair, no padding, transformers' own forward pass."""
    ids = torch.from_numpy(pair.ids.astype(np.int64))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.types:
        inputs["token_type_ids"] = (torch.arange(pair.length) >= pair.second_from).long()[None]
    logits = model(**inputs).logits
    if family.yes_or_no is None:
        return logits.item()
    yes, no = family.yes_or_no
    return (logits[0, -1, yes] - (logits[0, -1, no] if no is not None else 0)).item()


def pairs_of(lengths: list[int], seed: int = 5, lowest: int = 4) -> list[TokenisedPair]:
    chance = np.random.default_rng(seed)
    return [
        TokenisedPair(chance.integers(lowest, WORDS, length, dtype=np.int32), int(chance.integers(1, length)), False)
        for length in lengths
    ]


@pytest.fixture(scope="module")
def run() -> Callable[[str, Callable[..., Any], list[TokenisedPair]], np.ndarray]:
    """Run a batch through a pass of a family; answers its logits."""
    made: dict[tuple[str, Callable[..., Any]], Any] = {}

    def make(name: str, kind: Callable[..., Any]) -> Any:
        family = FAMILIES[name]
        model = model_of(family)
        architecture = architecture_of(model, family.yes_or_no)
        assert architecture is not None
        reduce_to_cls(model, architecture)
        return kind(model, architecture, InputFormat(CPU, pad=family.pad, token_types=family.types))

    def run(name: str, kind: Callable[..., Any], batch: list[TokenisedPair]) -> np.ndarray:
        if (name, kind) not in made:
            made[name, kind] = make(name, kind)
        with torch.inference_mode():
            return made[name, kind](batch).numpy()

    return run


@pytest.fixture(scope="module")
def expected_of() -> Callable[[str, list[TokenisedPair]], np.ndarray]:
    """Give the logits of each pair alone; every pass of a family is held against the same."""
    twins = cache(lambda name: model_of(FAMILIES[name]))

    @cache
    def logit(name: str, ids: bytes, second_from: int) -> float:
        pair = TokenisedPair(np.frombuffer(ids, dtype=np.int32), second_from, False)
        with torch.inference_mode():
            return alone(FAMILIES[name], twins(name), pair)

    return lambda name, batch: np.array([logit(name, pair.ids.tobytes(), pair.second_from) for pair in batch])


def compiled(model: Any, architecture: Any, inputs: InputFormat) -> OpenVinoPass:
    return OpenVinoPass(PaddedPass(model, architecture, inputs), inputs, dtype="float32", threads=1)


# Windows of attention hold their tokens exactly, one less and one more among others.
LENGTHS = [[17, 90, 90, 64, 33, 2, 110], [9, 8, 10, 16, 15], [40, 40, 40], [2, 2], [100, 3]]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in FAMILIES for kind in (UnpaddedPass, PaddedPass)),
        *((name, compiled) for name in ("bert", "xlm-r", "modernbert, mean", "qwen3, yes or no")),
    ],
)
def test_logits_equal_those_of_each_pair_alone(run, expected_of, name, kind):
    for lengths in LENGTHS:
        logits, expected = run(name, kind, pairs_of(lengths)), expected_of(name, pairs_of(lengths))
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 0.05, "pairs that differ must not all score alike, or this compares nothing"


@pytest.mark.parametrize("name", ["bert", "xlm-r", "modernbert", "qwen3"])
@given(lengths=st.lists(st.integers(2, 120), min_size=1, max_size=9), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_unpadded_logits_equal_padded_ones_whatever_the_lengths(run, name, lengths, seed):
    batch = pairs_of(lengths, seed)
    np.testing.assert_allclose(run(name, UnpaddedPass, batch), run(name, PaddedPass, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["roberta", "xlm-r"])
def test_a_padding_id_in_a_text_has_no_position_in_an_unpadded_batch_either(run, expected_of, name):
    (pair,) = pairs_of([40])
    pair.ids[[7, 8, 30]] = FAMILIES[name].pad
    # The model takes the padding's id in a text for padding when it counts positions; its mask does not.
    batch = [pair, *pairs_of([12], seed=6)]
    np.testing.assert_allclose(run(name, UnpaddedPass, batch), expected_of(name, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", [UnpaddedPass, PaddedPass, compiled])
def test_a_padding_id_at_the_end_of_a_text_is_not_pooled(run, expected_of, name, kind):
    ends, all_of_it, other = pairs_of([20, 4, 31])
    ends.ids[[3, 17, 18, 19]] = FAMILIES[name].pad
    all_of_it.ids[:] = FAMILIES[name].pad
    batch = [ends, all_of_it, other]
    np.testing.assert_allclose(run(name, kind, batch), expected_of(name, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "reduced"), [("bert", True), ("xlm-r", True), ("modernbert", False), ("gte", False)])
def test_the_last_layer_of_bert_like_models_is_reduced_to_the_first_token_and_restored(name, reduced):
    model = model_of(FAMILIES[name])
    architecture = architecture_of(model)

    def has_cls_layer():
        return any(isinstance(layer, ClsLayer) for layer in model.modules())

    assert reduce_to_cls(model, architecture) is reduced
    assert reduce_to_cls(model, architecture) is False, "not twice"
    assert has_cls_layer() is reduced
    restore_last_layer(model, architecture)
    assert not has_cls_layer()


def test_the_last_layer_of_a_decoder_is_not_reduced():
    # Its first token attends to itself only, which the reduced layer would not respect without padding.
    model = model_of(FAMILIES["bert, causal"])
    assert reduce_to_cls(model, architecture_of(model)) is False


def test_openvino_compiles_a_model_whose_padding_has_the_last_id():
    model, inputs = model_of(FAMILIES["qwen3"]), InputFormat(CPU, pad=WORDS - 1, token_types=False)
    batch = pairs_of([9, 30])
    logits = compiled(model, architecture_of(model), inputs)(batch)
    expected = [alone(FAMILIES["qwen3"], model_of(FAMILIES["qwen3"]), pair) for pair in batch]
    np.testing.assert_allclose(logits.detach(), expected, rtol=0, atol=1e-5)


def test_a_probe_rejects_a_pass_with_one_logit_that_is_not_finite():
    pairs = tuple(pairs_of([5, 9, 12, 30, 70]))
    probe = Probe(pairs, np.zeros(len(pairs)), 1e-4)
    assert probe.disagreement(lambda batch: torch.zeros(len(batch))) == ""
    for sick in pairs:
        holds = [torch.nan if pair is sick else 0.0 for pair in pairs]
        logit = dict(zip(map(id, pairs), holds, strict=True))
        assert probe.disagreement(lambda batch, logit=logit: torch.tensor([logit[id(pair)] for pair in batch]))


@pytest.mark.parametrize(("window", "longest"), [(None, 160), (64, 160), (256, 321), (4096, 160)])
def test_probe_pairs_are_longer_than_a_sliding_window_that_is_not_too_large(window, longest):
    config = SimpleNamespace(sliding_window=window)
    model = [SimpleNamespace(auto_model=SimpleNamespace(config=config))]
    assert probing._longest(model, 8192) == longest
    assert probing._longest(model, 100) == 100
    pairs = probing._random_pairs(pairs_of([30, 40]), InputFormat(CPU, pad=3, token_types=False), longest)
    assert max(pair.length for pair in pairs) == longest
    assert any(3 in pair.ids for pair in pairs), "the padding's own id may stand in a text"


def test_a_model_class_without_a_row_has_no_architecture():
    assert architecture_of(torch.nn.Linear(2, 1)) is None
    assert architecture_of(model_of(FAMILIES["qwen3"]), (YES, NO)) is None, "a classifier is not asked for yes or no"


@given(st.lists(st.integers(1, 5), max_size=30))
def test_runs_cover_every_pair_in_order(lengths):
    runs = runs_of(lengths)
    assert [length for _, pairs, length in runs for _ in range(pairs)] == lengths
    assert [start for start, _, _ in runs] == np.cumsum([0, *(pairs * length for _, pairs, length in runs)])[
        :-1
    ].tolist()
