"""The last layer of an encoder, reduced to what its head reads: the first token of each pair.

Every token is still attended to; but queries, feed-forward and norms are computed for one token of a pair instead of
hundreds. The logits are the same. No layer before the last can be reduced so: the next one attends to all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .attention import AttentionSpan, UnpaddedBatch, attend


def reduce_to_cls(backbone: torch.nn.Module) -> bool:
    """Reduce the last layer of a BERT-like backbone, in place; answers False where it is none of those.

    What the backbone gives then holds the first tokens alone: shape (pairs, 1, hidden), or (1, pairs, hidden) where it
    is called with a flattened ``layout``.
    """
    layers = getattr(getattr(backbone, "encoder", None), "layer", None)
    if not isinstance(layers, torch.nn.ModuleList) or type(layers[-1]).__name__ not in _LAYERS:
        return False
    if layers[-1].is_decoder:
        return False
    layers[-1] = FirstTokenLayer(layers[-1])
    return True


def lengthen(backbone: torch.nn.Module) -> None:
    """Take ``shorten`` back, where it was done."""
    layers = getattr(getattr(backbone, "encoder", None), "layer", None)
    if isinstance(layers, torch.nn.ModuleList) and isinstance(layers[-1], FirstTokenLayer):
        layers[-1] = layers[-1].layer


_LAYERS = {"BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer"}


class FirstTokenLayer(torch.nn.Module):
    """A BERT-like layer that computes the first token of each pair and no other."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *_: Any,
        layout: UnpaddedBatch | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """Take the hidden states of all tokens, and give those of the first ones."""
        attention = self.layer.attention.self
        first = hidden_states[:, :1] if layout is None else hidden_states[:, layout.first]
        query, key, value = (
            linear(states).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for linear, states in (
                (attention.query, first),
                (attention.key, hidden_states),
                (attention.value, hidden_states),
            )
        )
        if layout is not None:
            context = attend(query, key, value, layout, AttentionSpan(attention.scaling, first_only=True))
        else:
            mask = None if attention_mask is None else attention_mask[:, :, :1]
            context = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scaling)
            context = context.transpose(1, 2)
        attended = self.layer.attention.output(context.flatten(-2), first)
        reduced: torch.Tensor = self.layer.feed_forward_chunk(attended)
        return reduced
