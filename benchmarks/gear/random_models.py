"""Rerankers with the shapes of well-known ones and random weights, and text for them: the work is the real ones'.

Needs torch, transformers and numpy; nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rerankq_worker.engine.protocol import TokenisedPair

LONGEST, SHORTEST, MEDIAN, SPREAD = 512, 16, 200, 0.6
QUERY_TOKENS = 16

# Wide weights: with the usual ones a random model answers nearly the same logit to everything.
COMMON = {"num_labels": 1, "attn_implementation": "sdpa", "initializer_range": 0.05}
XLM_R = COMMON | {
    "vocab_size": 250_002, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1,
}  # fmt: skip
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 300,
}
MODERN_IDS = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}

# Widths and depths as those models' own configurations state them.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "minilm-l6": ("Bert", COMMON | SMALL),
    "bge-base": ("XLMRoberta", XLM_R | BASE | {"max_position_embeddings": 514}),
    "bge-m3": ("XLMRoberta", XLM_R | LARGE | {"max_position_embeddings": 8194}),
    "gte-modernbert": ("ModernBert", COMMON | MODERN_IDS | {"classifier_pooling": "mean"}),
}
# Special tokens in the order of their ids: padding, unknown, first and last, where each family has them.
SPECIALS = {
    "Bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
    "ModernBert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
    "XLMRoberta": ("<s>", "<pad>", "</s>", "<unk>"),
}
WORDS = 250


def model_of(name: str, device: str, *, tiny: bool = False) -> Any:
    """Make a model with random weights, on the device, in bfloat16."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    family, options = SHAPES[name]
    config = getattr(transformers, f"{family}Config")(**options | (TINY if tiny else {}))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def real_lengths(count: int, longest: int = LONGEST) -> list[int]:
    """Draw lengths in tokens as text has them: log-normal, most between 80 and 400, cut at the longest."""
    drawn = np.random.default_rng(2).lognormal(np.log(MEDIAN * longest / LONGEST), SPREAD, count)
    lengths: list[int] = np.clip(drawn, SHORTEST, longest).astype(int).tolist()
    return lengths


def pairs_of(lengths: Sequence[int], vocabulary: int, *, with_types: bool) -> list[TokenisedPair]:
    """Make pairs of random ids."""
    dice = np.random.default_rng(1)
    return [
        TokenisedPair(
            dice.integers(5, vocabulary, length, dtype=np.int32),
            min(QUERY_TOKENS, length // 2) if with_types else int(length),
            truncated=False,
        )
        for length in lengths
    ]


def write_checkpoint(name: str, folder: Path, device: str, *, tiny: bool = False) -> None:
    """Write a model with a tokeniser that knows the words w0, w1, ...: one token each."""
    model_of(name, device, tiny=tiny).save_pretrained(folder)
    family = SHAPES[name][0]
    tokeniser_of(family).save_pretrained(folder)


def tokeniser_of(family: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: PLC0415 - only for whole checkpoints

    specials = SPECIALS[family]
    vocabulary = {word: number for number, word in enumerate([*specials, *(f"w{n}" for n in range(WORDS))])}
    roberta = family == "XLMRoberta"
    pad, unknown, first, last = (specials[at] for at in ((1, 3, 0, 2) if roberta else (0, 1, 2, 3)))
    tokeniser = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokeniser.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"Bert": "$B:1 {last}:1", "ModernBert": "$B {last}", "XLMRoberta": "{last} $B {last}"}[family]
    tokeniser.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {ends.format(last=last)}",
        special_tokens=[(token, vocabulary[token]) for token in (first, last)],
    )
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if family == "Bert" else [])]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokeniser, pad_token=pad, unk_token=unknown, cls_token=first, sep_token=last,
        model_max_length=LONGEST, model_input_names=inputs,
    )  # fmt: skip


def text_of(tokens: int, dice: np.random.Generator) -> str:
    """Write so many words, each a token of :func:`tokeniser_of`."""
    return " ".join(f"w{number}" for number in dice.integers(0, WORDS, max(1, tokens)))
