"""A checkpoint made into a sentence-transformers model in memory, or a clear reason why it is no reranker."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore
from transformers.utils import logging as transformers_logging

from .checkpoint import weight_names
from .errors import ModelUnusable
from .protocol import checked_length

logger = logging.getLogger(__name__)


def load_model(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a cross-encoder with one trained label, ready for inference; raises ModelUnusable.

    In a reduced precision its last layer runs in float32, so that logits which differ do not fall on the same
    sixteen bits.
    """
    transformers_logging.disable_progress_bar()
    try:
        model = CrossEncoder(
            str(folder),
            device=str(device),
            trust_remote_code=False,
            local_files_only=True,
            activation_fn=torch.nn.Identity(),
            model_kwargs={"use_safetensors": True, "dtype": dtype},
        )
    except Exception as error:
        raise ModelUnusable(f"model {name!r} does not load as a cross-encoder: {error}") from error
    model.eval()
    if isinstance(model[-1], LogitScore):
        # A decoder that says yes or no: its last layer is the vocabulary's, and often the same as the first.
        return model
    head = _head(model, name)
    if not _is_stored(folder, head):
        raise ModelUnusable(f"model {name!r} has no trained weights for its last layer: not a reranker")
    if dtype is not torch.float32:
        _run_in_float32(model.get_submodule(head))
    return model


def readable_length(model: Any, asked: int | None) -> int:
    """Take the least of what the tokeniser states, the position table holds, and the caller asks, in tokens."""
    stated = [length for length in (model.max_seq_length, _positions(model)) if length]
    if not stated:
        raise ModelUnusable("this model states no maximum length; give one")
    return checked_length(asked, min(stated))


def _head(model: Any, name: str) -> str:
    """Find the layer that makes the one logit, by its path."""
    if model.num_labels != 1:
        raise ModelUnusable(f"model {name!r} gives {model.num_labels} scores per pair; a reranker gives one")
    linear = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    heads = [path for path, layer in linear if layer.out_features == 1]
    if not heads:
        raise ModelUnusable(f"model {name!r} has no layer with one output, and does not say yes or no")
    return str(heads[-1])


def _is_stored(folder: Path, head: str) -> bool:
    """Tell whether the layer's weight is in the checkpoint; loaders fill a missing one with noise, and only warn.

    Stored names may lack leading parts of the layer's path, never its end.
    """
    end = head.rpartition(".")[2] + ".weight"
    return any(stored == end or stored.endswith("." + end) for stored in weight_names(folder))


def _run_in_float32(layer: torch.nn.Module) -> None:
    layer.float()
    layer.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))


def _positions(model: Any) -> int | None:
    for layer_name, layer in model.named_modules():
        if layer_name.endswith("position_embeddings") and isinstance(layer, torch.nn.Embedding):
            # Models of the RoBERTa family count positions from behind the padding's own.
            reserved = 0 if layer.padding_idx is None else layer.padding_idx + 1
            return int(layer.num_embeddings) - reserved
    return None
