"""The last layer in float32, so that different logits are not rounded to the same 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore

from ..errors import ModelUnusable


def compute_last_layer_in_float32(model: Any) -> None:
    """Convert the layer that computes the logit to float32, in place, whatever the precision of the other layers.

    Of the output embeddings of a yes-or-no decoder only the rows of the two tokens are kept, as a copy: the output
    embeddings are often the input embeddings, which stay unchanged. Raises ModelUnusable where there is no such layer.
    """
    if isinstance(model[-1], LogitScore):
        _keep_two_rows(model[0].auto_model, model[-1])
    else:
        layer = _head(model)
        layer.float()
        layer.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))


class TwoRowHead(torch.nn.Module):
    """The rows of a decoder's output embeddings that are needed for its score, in float32."""

    def __init__(self, layer: torch.nn.Linear, rows: list[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(layer.weight.detach()[rows].float(), requires_grad=False)
        bias = layer.bias
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach()[rows].float(), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Compute the logits of these rows."""
        return torch.nn.functional.linear(states.float(), self.weight, self.bias)


def _keep_two_rows(body: Any, score: LogitScore) -> None:
    layer = body.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        return
    rows = [token_id for token_id in (score.true_token_id, score.false_token_id) if token_id is not None]
    body.set_output_embeddings(TwoRowHead(layer, rows))
    score.true_token_id, score.false_token_id = 0, 1 if len(rows) > 1 else None


def _head(model: Any) -> torch.nn.Linear:
    heads = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 1]
    if not heads:
        raise ModelUnusable("this model has neither a layer with one output nor a yes-or-no score")
    return heads[-1]
