"""What the families of models have in common, as a table: a backbone, a place that is read, a head that scores it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Pooling = Literal["first", "last", "mean"]
Head = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a model makes a logit out of the hidden states of its backbone.

    The hidden states at ``place`` of each pair, shape (pairs, hidden), go through ``head(model, states)``, which gives
    logits of shape (pairs,) or (pairs, 1). ``position_offset`` is the first token's position; where
    ``skips_padding_ids``, a token with the padding's id in the text is given the padding's position, and is not
    counted. ``causal`` backbones look back only. The last place is that of the last token that is not ``unread_id``,
    the first one where there is no other.
    """

    backbone: str
    place: Pooling
    head: Head
    position_offset: int = 0
    skips_padding_ids: bool = False
    causal: bool = False
    unread_id: int | None = None


def architecture_of(model: Any, yes_or_no: tuple[int, int | None] | None = None) -> Architecture | None:
    """Find the form of a transformers model; None where only its own forward pass knows.

    ``yes_or_no`` are the ids of the tokens whose logits a decoder is asked for, the second one's taken off the first's.
    """
    if yes_or_no is not None:
        return _decoder(model, *yes_or_no)
    make = _FORMS.get(type(model).__name__)
    return make(model) if make is not None else None


def _bert(_: Any) -> Architecture:
    return Architecture("bert", "first", lambda model, states: model.classifier(model.bert.pooler(states[:, None])))


def _roberta(model: Any) -> Architecture:
    # Positions start behind the padding's own.
    return Architecture(
        "roberta",
        "first",
        lambda model, states: model.classifier(states[:, None]),
        position_offset=model.config.pad_token_id + 1,
        skips_padding_ids=True,
    )


def _gte(_: Any) -> Architecture:
    return Architecture("gte", "first", lambda model, states: model.classifier(model.gte.pooler(states[:, None])))


def _modernbert(model: Any) -> Architecture:
    place: Pooling = "mean" if model.config.classifier_pooling == "mean" else "first"
    return Architecture("model", place, lambda model, states: model.classifier(model.drop(model.head(states))))


def _scored_at_the_end(model: Any) -> Architecture:
    # Transformers takes whatever has the padding's id for padding, in a text too.
    pad = model.config.pad_token_id
    return Architecture("model", "last", lambda model, states: model.score(states), causal=True, unread_id=pad)


_FORMS: dict[str, Callable[[Any], Architecture]] = {
    "BertForSequenceClassification": _bert,
    "RobertaForSequenceClassification": _roberta,
    "XLMRobertaForSequenceClassification": _roberta,
    "CamembertForSequenceClassification": _roberta,
    "GteForSequenceClassification": _gte,
    "ModernBertForSequenceClassification": _modernbert,
    "LlamaForSequenceClassification": _scored_at_the_end,
    "Qwen2ForSequenceClassification": _scored_at_the_end,
    "Qwen3ForSequenceClassification": _scored_at_the_end,
}
_DECODERS = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def _decoder(model: Any, yes: int, no: int | None) -> Architecture | None:
    if type(model).__name__ not in _DECODERS:
        return None
    # Two rows of the vocabulary's layer are all that is asked for: their difference, once, in float32.
    rows = model.lm_head.weight.detach()
    asked = rows[yes].float() - (rows[no].float() if no is not None else 0)
    return Architecture("model", "last", lambda _, states: states.float() @ asked, causal=True)
