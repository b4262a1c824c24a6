"""What the model families have in common, as a table: a backbone, a pooling, and a head that scores the pooled state.

A new family is a row of ``_CLASSIFIERS`` or ``_DECODERS``. A model without a row runs through its own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

Pooling = Literal["cls", "last", "mean"]
Head = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a model computes a logit from the hidden states of its backbone.

    ``backbone`` is the attribute of the model that holds it. ``pooling`` takes the hidden state of each pair's first
    token, of its last one, or the mean of all; ``head(model, states)`` makes logits of shape (pairs,) or (pairs, 1) out
    of these, shape (pairs, hidden). ``last`` is the last token whose id is not ``ignored_id``, or the first token where
    there is no other. ``causal`` backbones attend to earlier tokens only.

    ``position_offset`` is the position of a pair's first token; with ``padding_has_no_position``, tokens of a text that
    have the padding's id get the padding's position, and are not counted. ``bert_layers`` says that the last layer has
    the parts of BERT's, so that it can be reduced to the first token (``cls_layer``).
    """

    backbone: str
    pooling: Pooling
    head: Head
    position_offset: int = 0
    padding_has_no_position: bool = False
    causal: bool = False
    ignored_id: int | None = None
    bert_layers: bool = False


def architecture_of(model: Any, yes_or_no: tuple[int, int | None] | None = None) -> Architecture | None:
    """Look up the architecture of a transformers model by its class; None where there is no row for it.

    ``yes_or_no`` are the token ids whose logits make a decoder's score: the first one's minus the second one's.
    """
    name = type(model).__name__
    if yes_or_no is not None:
        return _yes_or_no_decoder(model, *yes_or_no) if name in _DECODERS else None
    make = _CLASSIFIERS.get(name)
    return make(model) if make is not None else None


def _bert(_: Any) -> Architecture:
    return Architecture(
        "bert", "cls", lambda model, states: model.classifier(model.bert.pooler(states[:, None])), bert_layers=True
    )


def _roberta(model: Any) -> Architecture:
    return Architecture(
        "roberta",
        "cls",
        lambda model, states: model.classifier(states[:, None]),
        # Positions are counted from behind the padding's id.
        position_offset=model.config.pad_token_id + 1,
        padding_has_no_position=True,
        bert_layers=True,
    )


def _gte(_: Any) -> Architecture:
    return Architecture("gte", "cls", lambda model, states: model.classifier(model.gte.pooler(states[:, None])))


def _modernbert(model: Any) -> Architecture:
    pooling: Pooling = "mean" if model.config.classifier_pooling == "mean" else "cls"
    return Architecture("model", pooling, lambda model, states: model.classifier(model.drop(model.head(states))))


def _decoder_classifier(model: Any) -> Architecture:
    # Transformers takes every token that has the padding's id for padding, in a text too.
    pad = model.config.pad_token_id
    return Architecture("model", "last", lambda model, states: model.score(states), causal=True, ignored_id=pad)


def _yes_or_no_decoder(model: Any, yes: int, no: int | None) -> Architecture:
    # Two rows of the output embeddings are needed: their difference, computed once, in float32.
    rows = model.lm_head.weight.detach()
    difference = rows[yes].float() - (rows[no].float() if no is not None else 0)
    return Architecture("model", "last", lambda _, states: states.float() @ difference, causal=True)


#: Models with a head of one output, by the name of their class.
_CLASSIFIERS = MappingProxyType[str, Callable[[Any], Architecture]](
    {
        "BertForSequenceClassification": _bert,
        "RobertaForSequenceClassification": _roberta,
        "XLMRobertaForSequenceClassification": _roberta,
        "CamembertForSequenceClassification": _roberta,
        "GteForSequenceClassification": _gte,
        "ModernBertForSequenceClassification": _modernbert,
        "LlamaForSequenceClassification": _decoder_classifier,
        "Qwen2ForSequenceClassification": _decoder_classifier,
        "Qwen3ForSequenceClassification": _decoder_classifier,
    }
)
#: Language models whose score is the logit of "yes" minus that of "no", by the name of their class.
_DECODERS = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
