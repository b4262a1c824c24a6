"""Tiny rerankers of every family with random weights, made on the spot, and texts that are hard to read.

``write(name, folder)`` makes one of ``RECIPES`` as sentence-transformers loads it; nothing is fetched. The tokenisers
are trained on ``TEXTS``, so that the vocabularies hold pieces of many scripts and no text is read as one token.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

#: Texts of many scripts, lengths and oddities.
TEXTS = (
    "Aspirin inhibits the production of prostaglandins, and so reduces fever, pain and inflammation in adults.",
    "The capital of France is Paris; its population was 2,102,650 in 2023. What's more, it isn't small.",
    "深度学习模型在检索任务中表现出色。重排序器读取查询与段落,并给出一个分数。",
    "Größere Straßen führen über Brücken: naïve café façade coöperate, señor!",
    "def score(pairs): return [model(q, c) for q, c in pairs]  # O(n)\n\tif x == 1:\n\t\tpass",
    "हिन्दी और العربية مرحبا بالعالم ייִדיש ελληνικά русский язык 한국어 문장 日本語テキスト カタカナ ภาษาไทยไม่มีช่องว่าง",
    "emoji 👩‍👩‍👧‍👦 and 😀 ﬁ ligatures, zero\u200bwidth, soft\u00adhyphen, tabs\tand\nnew lines",
    "Query: what is a batch? Document: a set of pairs that are computed together. Answer yes or no.",
    "<Instruct>: Judge whether the passage answers. <Query>: which way? <Document>: that way. system user assistant",
    "yes no yes no true false relevant irrelevant",
)
QUERY = "which drug reduces fever in adults?"

BERT_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_MARKS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CHAT_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# -- tokenisers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A tokeniser, the roles of its special tokens, and the ids that a model's configuration names."""

    tokenizer: Tokenizer
    roles: Mapping[str, str]

    def id_of(self, role: str) -> int | None:
        return self.tokenizer.token_to_id(self.roles[role]) if role in self.roles else None


def _trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def _with_pairs(tokenizer: Tokenizer, pair: str) -> Tokenizer:
    marks = {mark.partition(":")[0] for mark in pair.split() if not mark.startswith("$")}
    single = pair.partition("$B")[0].split(":")[0].rstrip()
    single = pair[: pair.index("$A") + 2] + " " + pair.rsplit(maxsplit=1)[-1].partition(":")[0] if marks else single
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in sorted(marks)]
    )
    return tokenizer


def _word_pieces(*, lowercase: bool = True, longest_word: int = 100, pair: str) -> Reading:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=longest_word))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=700, special_tokens=list(BERT_MARKS), show_progress=False))
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return Reading(_with_pairs(tokenizer, pair), roles | {"mask_token": "[MASK]"})


def _unigrams(*, pair: str) -> Reading:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    _trained(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=600, special_tokens=list(ROBERTA_MARKS), unk_token="<unk>", show_progress=False
        ),
    )
    return Reading(_with_pairs(tokenizer, pair), _ROBERTA_ROLES)


_ROBERTA_ROLES = {
    "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>",
    "sep_token": "</s>", "mask_token": "<mask>",
}  # fmt: skip


def _bytes(marks: tuple[str, ...], splitter: Any, *, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        tokenizer,
        trainers.BpeTrainer(vocab_size=900, special_tokens=list(marks), initial_alphabet=alphabet, show_progress=False),
    )


def _roberta_bytes(*, prefix: bool) -> Reading:
    tokenizer = _bytes(ROBERTA_MARKS, pre_tokenizers.ByteLevel(add_prefix_space=prefix))
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")),
        ("<s>", tokenizer.token_to_id("<s>")),
        trim_offsets=True,
        add_prefix_space=prefix,
    )
    return Reading(tokenizer, _ROBERTA_ROLES)


def _modern_bytes(*, pair: str) -> Reading:
    tokenizer = _bytes(BERT_MARKS, pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC())
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return Reading(_with_pairs(tokenizer, pair), roles | {"mask_token": "[MASK]"})


def _chat_bytes(*, pad: bool = True, normalizer: Any = None) -> Reading:
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = _bytes(CHAT_MARKS, splitter, normalizer=normalizer or normalizers.NFC())
    roles = {"eos_token": "<|im_end|>"} | ({"pad_token": "<|endoftext|>"} if pad else {})
    return Reading(tokenizer, roles)


def _llama_pieces(*, start: bool = True) -> Reading:
    """Byte pairs over whole texts, spaces written as U+2581 and bytes for what is unknown: no word boundaries."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    marks = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    splitter = pre_tokenizers.Split("▁", behavior="merged_with_next")  # in training alone
    tokenizer.pre_tokenizer = splitter
    _trained(tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=marks[:4], show_progress=False))
    tokenizer.pre_tokenizer = None
    saved = json.loads(tokenizer.to_str())
    vocabulary = saved["model"]["vocab"]
    for piece in marks[4:]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return Reading(tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})


_BERT_PAIR = "[CLS] $A [SEP] $B:1 [SEP]:1"
READINGS: Mapping[str, Callable[[], Reading]] = MappingProxyType(
    {
        "word pieces": lambda: _word_pieces(pair=_BERT_PAIR),
        "cased word pieces": lambda: _word_pieces(lowercase=False, pair=_BERT_PAIR),
        "word pieces of long words": lambda: _word_pieces(longest_word=2000, pair=_BERT_PAIR),
        "unigrams": lambda: _unigrams(pair="<s> $A </s> </s> $B </s>"),
        "unigrams of albert": lambda: _unigrams(pair="<s> $A </s> $B:1 </s>:1"),
        "unigrams of t5": lambda: _unigrams(pair="$A </s> $B </s>"),
        "roberta bytes": lambda: _roberta_bytes(prefix=False),
        "roberta bytes, a space before": lambda: _roberta_bytes(prefix=True),
        "modern bytes": lambda: _modern_bytes(pair="[CLS] $A [SEP] $B [SEP]"),
        "chat bytes": _chat_bytes,
        "chat bytes without padding": lambda: _chat_bytes(pad=False),
        "llama pieces": _llama_pieces,
    }
)


@cache
def _saved_reading(name: str) -> tuple[str, Mapping[str, str]]:
    made = READINGS[name]()
    return made.tokenizer.to_str(), made.roles


def reading(name: str) -> Reading:
    """Give a tokeniser of ``READINGS`` of one's own; each is trained once."""
    saved, roles = _saved_reading(name)
    return Reading(Tokenizer.from_str(saved), roles)


# -- checkpoints ---------------------------------------------------------------------------------------------------

_QUERY = "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}"
_CHUNK = "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
CHATS = MappingProxyType(
    {
        "qwen": "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\n<Instruct>: rank\n"
        f"<Query>: {_QUERY}\n<Document>: {_CHUNK}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "plain": f"Query: {_QUERY}\nDocument: {_CHUNK}\nAnswer:",
        "trimmed": f"Query: {_QUERY.replace(' }}', ' | trim }}')} Document: {_CHUNK.replace(' }}', ' | trim }}')}\n\n",
        "chunk first": f"Document: {_CHUNK} Query: {_QUERY} Answer:",
        "in marks": f"<|im_start|>{_QUERY}<|im_end|><|im_start|>{_CHUNK}<|im_end|>",
    }
)


@dataclass(frozen=True)
class Recipe:
    """How to make a checkpoint: its family's name in transformers, its tokeniser, and what is special about it.

    ``says`` names a chat of ``CHATS``, for a decoder that answers yes or no; ``pools`` is the pooling of a backbone
    with sentence-transformers' own head. ``max_length`` is what the tokeniser states.
    """

    family: str
    reads: str
    config: Mapping[str, Any] = field(default_factory=dict)
    types: bool = False
    max_length: int = 96
    says: str | None = None
    pools: str | None = None


_ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 96,
}  # fmt: skip
_DECODER = _ENCODER | {"num_key_value_heads": 2, "max_position_embeddings": 512}
_ROBERTA = _ENCODER | {"max_position_embeddings": 98, "type_vocab_size": 1}
_MODERN = _ENCODER | {
    "max_position_embeddings": 256, "local_attention": 12, "global_attn_every_n_layers": 2, "num_hidden_layers": 3,
}  # fmt: skip
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 96}
_DEBERTA = _ENCODER | {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "position_biased_input": False,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "type_vocab_size": 0, "pooler_hidden_size": 32,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_HEAD_8 = {"head_dim": 8}
_PHI3 = {"original_max_position_embeddings": 512}

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "bert": Recipe("Bert", "word pieces", _ENCODER, types=True),
        "bert, cased": Recipe("Bert", "cased word pieces", _ENCODER, types=True),
        "bert without types": Recipe("Bert", "word pieces", _ENCODER),
        "bert of long words": Recipe("Bert", "word pieces of long words", _ENCODER, types=True),
        "electra": Recipe("Electra", "word pieces", _ENCODER | {"embedding_size": 16}, types=True),
        "albert": Recipe("Albert", "unigrams of albert", _ENCODER | {"embedding_size": 16}, types=True),
        "distilbert": Recipe("DistilBert", "word pieces", _DISTIL),
        "mpnet": Recipe("MPNet", "word pieces", _ENCODER | {"max_position_embeddings": 98}),
        "deberta": Recipe("DebertaV2", "word pieces", _DEBERTA, types=True),
        "roberta": Recipe("Roberta", "roberta bytes", _ROBERTA),
        "roberta, a space before": Recipe("Roberta", "roberta bytes, a space before", _ROBERTA),
        "xlm-r": Recipe("XLMRoberta", "unigrams", _ROBERTA),
        "camembert": Recipe("Camembert", "unigrams", _ROBERTA),
        "gte": Recipe("Gte", "word pieces", _ENCODER | {"type_vocab_size": 2}, types=True),
        "modernbert": Recipe("ModernBert", "modern bytes", _MODERN | {"classifier_pooling": "cls"}),
        "modernbert, mean": Recipe("ModernBert", "modern bytes", _MODERN | {"classifier_pooling": "mean"}),
        "t5": Recipe("T5", "unigrams of t5", _T5),
        "llama": Recipe("Llama", "llama pieces", _DECODER),
        "llama, bytes": Recipe("Llama", "chat bytes", _DECODER),
        "llama, no padding": Recipe("Llama", "chat bytes without padding", _DECODER),
        "mistral": Recipe("Mistral", "llama pieces", _DECODER | {"sliding_window": None}),
        "qwen2": Recipe("Qwen2", "chat bytes", _DECODER),
        "qwen2, sliding": Recipe(
            "Qwen2",
            "chat bytes",
            _DECODER | {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
        ),
        "qwen3": Recipe("Qwen3", "chat bytes", _DECODER | _HEAD_8),
        "gemma": Recipe("Gemma", "chat bytes", _DECODER | _HEAD_8),
        "gemma2": Recipe("Gemma2", "chat bytes", _DECODER | _HEAD_8 | {"sliding_window": 16}),
        "phi3": Recipe("Phi3", "chat bytes", _DECODER | _PHI3),
        "gpt2": Recipe("GPT2", "chat bytes", _GPT2),
        "qwen3 says": Recipe("Qwen3", "chat bytes", _DECODER | _HEAD_8, says="qwen", max_length=192),
        "qwen3 says, plain": Recipe("Qwen3", "chat bytes", _DECODER | _HEAD_8, says="plain", max_length=192),
        "qwen2 says, in marks": Recipe("Qwen2", "chat bytes", _DECODER, says="in marks", max_length=128),
        "qwen2 says, chunk first": Recipe("Qwen2", "chat bytes", _DECODER, says="chunk first", max_length=192),
        "llama says": Recipe("Llama", "chat bytes", _DECODER, says="trimmed", max_length=192),
        "llama pieces say": Recipe("Llama", "llama pieces", _DECODER, says="plain", max_length=192),
        "mistral says": Recipe(
            "Mistral", "chat bytes", _DECODER | {"sliding_window": None}, says="qwen", max_length=192
        ),
        "gemma says": Recipe("Gemma", "chat bytes", _DECODER | _HEAD_8, says="qwen", max_length=192),
        "gemma2 says": Recipe(
            "Gemma2", "chat bytes", _DECODER | _HEAD_8 | {"sliding_window": 16}, says="qwen", max_length=192
        ),
        "phi3 says": Recipe("Phi3", "chat bytes", _DECODER | _PHI3, says="qwen", max_length=192),
        "gpt2 says": Recipe("GPT2", "chat bytes", _GPT2, says="plain", max_length=192),
        "modular modernbert": Recipe("ModernBert", "modern bytes", _MODERN, pools="cls"),
        "modular bert, mean": Recipe("Bert", "word pieces", _ENCODER, types=True, pools="mean"),
        "modular qwen3": Recipe("Qwen3", "chat bytes", _DECODER | _HEAD_8, pools="lasttoken"),
    }
)


def write(name: str, folder: Path, *, seed: int = 7, **config: Any) -> Path:
    """Write the checkpoint of a recipe into a folder; ``config`` is put over the recipe's own."""
    recipe = RECIPES[name]
    read = reading(recipe.reads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn about what a tiny checkpoint lacks
        _tokenizer(read, recipe).save_pretrained(folder)
        model = _model(recipe, read, config)
        _draw_weights(model, seed)
        model.save_pretrained(folder)
        if recipe.says is not None:
            _add_yes_or_no(read.tokenizer, folder)
        if recipe.pools is not None:
            _add_pooled_head(folder, recipe.pools, seed)
    return folder


def _tokenizer(read: Reading, recipe: Recipe) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=read.tokenizer,
        model_max_length=recipe.max_length,
        model_input_names=["input_ids", *(["token_type_ids"] if recipe.types else []), "attention_mask"],
        **read.roles,
    )
    if recipe.says is not None:
        tokenizer.chat_template = CHATS[recipe.says]
    return tokenizer


def _model(recipe: Recipe, read: Reading, config: Mapping[str, Any]) -> Any:
    ids = {f"{role}_id": read.id_of(role) for role in ("pad_token", "bos_token", "eos_token", "cls_token", "sep_token")}
    if recipe.family == "T5":
        ids["bos_token_id"] = None
    ids = {name: at for name, at in ids.items() if at is not None} | (
        {"pad_token_id": None} if ids["pad_token_id"] is None else {}
    )
    size = {"vocab_size": read.tokenizer.get_vocab_size(), "num_labels": 1, "bos_token_id": None, "eos_token_id": None}
    if recipe.says is not None or recipe.pools is not None:
        size.pop("num_labels")
    made = getattr(transformers, f"{recipe.family}Config")(**{**size, **ids, **recipe.config, **config})
    if recipe.pools is not None:
        return getattr(transformers, f"{recipe.family}Model")(made)
    if recipe.says is None:
        return getattr(transformers, f"{recipe.family}ForSequenceClassification")(made)
    kind = "GPT2LMHeadModel" if recipe.family == "GPT2" else f"{recipe.family}ForCausalLM"
    return getattr(transformers, kind)(made)


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    # Drawn wide: with the usual ones a tiny model answers nearly the same logit to everything.
    dice = torch.Generator().manual_seed(seed)

    def drawn(like: torch.Tensor, spread: float) -> torch.Tensor:
        return spread * torch.randn(like.shape, generator=dice)

    with torch.no_grad():
        for path, weights in model.named_parameters():
            if weights.dim() > 1:
                wide = "embed" in path or "shared" in path or "wte" in path or "wpe" in path
                weights.copy_(drawn(weights, 0.7 if wide else max(weights.shape) ** -0.5))
            elif "norm" in path.lower() or "ln_" in path:
                weights.copy_(drawn(weights, 0.2) + (1.0 if path.endswith("weight") else 0.0))
            else:
                weights.copy_(drawn(weights, 0.2))


_MODULE = "sentence_transformers.{}"


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _add_yes_or_no(tokenizer: Tokenizer, folder: Path) -> None:
    """Make a checkpoint one whose logit is that of "yes" less that of "no"."""
    yes, no = (tokenizer.encode(word, add_special_tokens=False).ids[-1] for word in ("yes", "no"))
    _write_modules(folder, ("1_LogitScore", "cross_encoder.modules.logit_score.LogitScore"))
    score = {"true_token_id": yes, "false_token_id": no, "module_input_name": "causal_logits"}
    _write_json(folder / "1_LogitScore" / "config.json", score)
    method = {"method": "forward", "method_output_name": "logits"}
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "text-generation",
            "modality_config": {"text": method, "message": method | {"format": "flat"}},
            "module_output_name": "causal_logits",
        },
    )


def _write_modules(folder: Path, *behind: tuple[str, str]) -> None:
    rows = [("", "base.modules.transformer.Transformer"), *behind]
    _write_json(
        folder / "modules.json",
        [
            {"idx": at, "name": str(at), "path": path, "type": _MODULE.format(kind)}
            for at, (path, kind) in enumerate(rows)
        ],
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "CrossEncoder",
            "prompts": {},
            "default_prompt_name": None,
            "activation_fn": "torch.nn.modules.linear.Identity",
        },
    )


def _add_pooled_head(folder: Path, pools: str, seed: int) -> None:
    """Put sentence-transformers' own pooling and dense layers behind a backbone."""
    from sentence_transformers.base.modules import Dense  # noqa: PLC0415 - slow to import
    from sentence_transformers.sentence_transformer.modules import Pooling  # noqa: PLC0415

    _write_modules(
        folder,
        ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling".partition(".")[2]),
        ("2_Dense", "base.modules.dense.Dense"),
        ("3_Dense", "base.modules.dense.Dense"),
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    Pooling(32, pooling_mode=pools).save(str(folder / "1_Pooling"))
    layers = (
        Dense(32, 16, activation_function=torch.nn.GELU()),
        Dense(16, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
    )
    for at, layer in enumerate(layers, 2):
        _draw_weights(layer, seed + at)
        place = folder / f"{at}_Dense"
        place.mkdir(exist_ok=True)
        layer.save(str(place))
