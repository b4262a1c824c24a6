"""The last layer of an encoder, reduced to the token that its head reads: the first one of each pair (CLS).

Every token is still attended to; but queries, feed-forward and norms are computed for one token of a pair instead of
hundreds. The logits are the same. No earlier layer can be reduced so: the layer after it attends to all of its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .architectures import Architecture
from .attention import AttentionSpan, UnpaddedBatch, attend


def reduce_to_cls(model: Any, architecture: Architecture) -> bool:
    """Reduce the last layer of a model's backbone in place; returns False where that is not possible.

    The backbone then returns the first tokens only: shape (pairs, 1, hidden), or (1, pairs, hidden) where it is called
    with an ``unpadded`` batch.
    """
    if architecture.pooling != "cls" or not architecture.bert_layers:
        return False
    layers = _layers(model, architecture)
    if isinstance(layers[-1], ClsLayer) or layers[-1].is_decoder:
        return False
    layers[-1] = ClsLayer(layers[-1])
    return True


def restore_last_layer(model: Any, architecture: Architecture) -> None:
    """Undo ``reduce_to_cls``, where it was done."""
    if architecture.bert_layers:
        layers = _layers(model, architecture)
        if isinstance(layers[-1], ClsLayer):
            layers[-1] = layers[-1].layer


def _layers(model: Any, architecture: Architecture) -> Any:
    return getattr(model, architecture.backbone).encoder.layer


class ClsLayer(torch.nn.Module):
    """A layer of BERT that computes the first token of each pair only."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *_: Any,
        unpadded: UnpaddedBatch | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """Take the hidden states of all tokens; return those of the first tokens."""
        attention = self.layer.attention.self
        first = hidden_states[:, :1] if unpadded is None else hidden_states[:, unpadded.starts]
        query, key, value = (
            linear(states).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for linear, states in (
                (attention.query, first),
                (attention.key, hidden_states),
                (attention.value, hidden_states),
            )
        )
        if unpadded is not None:
            context = attend(query, key, value, unpadded, AttentionSpan(attention.scaling, cls_only=True))
        else:
            mask = None if attention_mask is None else attention_mask[:, :, :1]
            context = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scaling)
            context = context.transpose(1, 2)
        attended = self.layer.attention.output(context.flatten(-2), first)
        reduced: torch.Tensor = self.layer.feed_forward_chunk(attended)
        return reduced
