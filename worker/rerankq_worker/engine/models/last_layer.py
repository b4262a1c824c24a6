"""The last layer in float32, so that logits which differ do not fall on the same sixteen bits."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore

from ..errors import ModelUnusable


def compute_last_layer_in_float32(model: Any) -> None:
    """Let what makes the logit compute in float32, in place, whatever the body computes in.

    Of the vocabulary's layer of a decoder that says yes or no two rows are left, those of its two words: it is often
    the same as the first layer, which stays as it is. Raises ModelUnusable where there is no such layer.
    """
    if isinstance(model[-1], LogitScore):
        _keep_two_words(model[0].auto_model, model[-1])
    else:
        layer = _head(model)
        layer.float()
        layer.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))


class TwoWords(torch.nn.Module):
    """The rows of a vocabulary's layer that are asked for, in float32."""

    def __init__(self, layer: torch.nn.Linear, words: list[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(layer.weight.detach()[words].float(), requires_grad=False)
        bias = layer.bias
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach()[words].float(), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Give the logits of the words alone."""
        return torch.nn.functional.linear(states.float(), self.weight, self.bias)


def _keep_two_words(body: Any, score: LogitScore) -> None:
    layer = body.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        return
    words = [word for word in (score.true_token_id, score.false_token_id) if word is not None]
    body.set_output_embeddings(TwoWords(layer, words))
    score.true_token_id, score.false_token_id = 0, 1 if len(words) > 1 else None


def _head(model: Any) -> torch.nn.Linear:
    heads = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 1]
    if not heads:
        raise ModelUnusable("this model has no layer with one output, and does not say yes or no")
    return heads[-1]
