"""Load a checkpoint as a sentence-transformers model, or say why it is not a reranker."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..errors import EngineError, ModelUnusable, in_one_line
from ..protocol import checked_length

#: Tokenisers without a maximum length state a number above this one.
_UNLIMITED = 10**9
#: The most missing weights that a message names.
_NAMED = 5

#: Held while a method of transformers, which is one for the whole process, is replaced.
_patching = threading.Lock()


def load_model(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a cross-encoder that gives one score per pair, ready for inference; raises ModelUnusable.

    Every weight comes from the checkpoint and is copied into memory: later writes to the files change no score.
    """
    transformers_logging.disable_progress_bar()
    with refusing(name, "cannot be loaded as a cross-encoder"), _missing_weights() as missing:
        model = CrossEncoder(
            str(folder),
            device=str(device),
            trust_remote_code=False,
            local_files_only=True,
            activation_fn=torch.nn.Identity(),
            # A mapped file that is truncated later kills the process. A model on a CPU stays in memory anyway, so its
            # files are read; those that only pass through to a GPU are mapped.
            model_kwargs={"use_safetensors": True, "dtype": dtype, "disable_mmap": device.type == "cpu"},
        )
        model.eval()
        _copy_out_of_files(model)
        labels = model.num_labels
        ids, rows = _token_ids(model, name), vocabulary_size(model)
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        named = ", ".join(sorted(missing)[:_NAMED]) + more
        raise ModelUnusable(f"model {name!r} has no trained weights for {named}: not a reranker, or incomplete")
    if labels != 1:
        raise ModelUnusable(f"model {name!r} gives {labels} scores per pair; a reranker gives one")
    if rows and ids > rows:
        raise ModelUnusable(f"model {name!r} has embeddings for {rows} token ids, but its tokeniser has {ids}")
    return model


@contextmanager
def refusing(name: str, what: str) -> Iterator[None]:
    """Translate whatever a library raises about a model into ModelUnusable, in one sentence."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise ModelUnusable(f"model {name!r} {what}: {in_one_line(error)}") from error


def hash_of_weights(model: Any) -> bytes:
    """Hash the weights in memory: names, shapes, types and values."""
    whole = blake2b(digest_size=16)
    for name, weights in sorted(model.state_dict().items()):
        whole.update(f"{name} {tuple(weights.shape)} {weights.dtype}\n".encode())
        whole.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return whole.digest()


def readable_length(model: Any, asked: int | None) -> int:
    """Return the maximum length in tokens: the least of the tokeniser's, the position table's and ``asked``."""
    stated = [length for length in (model.max_seq_length, _positions(model)) if length and length < _UNLIMITED]
    if stated:
        return checked_length(asked, min(stated))
    if asked is None:
        raise ModelUnusable("this model states no maximum length; set max_length")
    return asked


@contextmanager
def _missing_weights() -> Iterator[set[str]]:
    """Collect the weights that a checkpoint lacks or has in another shape, while a model is loaded from it.

    Transformers initialises them randomly, and reports it in its log, or to a caller that asks; sentence-transformers
    does not ask.
    """
    missing: set[str] = set()
    original = vars(PreTrainedModel)["from_pretrained"]

    def from_pretrained(kind: Any, *args: Any, **options: Any) -> Any:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = original.__func__(kind, *args, **options)
        missing.update(report["missing_keys"], (key for key, *_ in report["mismatched_keys"]))
        return model

    with _patching:
        PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        try:
            yield missing
        finally:
            PreTrainedModel.from_pretrained = original


def _copy_out_of_files(model: torch.nn.Module) -> None:
    """Copy every tensor that may be a view of a mapped file, one at a time."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _token_ids(model: Any, name: str) -> int:
    vocabulary = model.tokenizer.get_vocab()
    # Where its files are missing, transformers makes a tokeniser of the special tokens only.
    if vocabulary.keys() <= set(model.tokenizer.all_special_tokens):
        raise ModelUnusable(f"the tokeniser of model {name!r} has an empty vocabulary: its files are missing or empty")
    return 1 + int(max(vocabulary.values()))


def vocabulary_size(model: Any) -> int | None:
    """Return the number of token ids that a model has embeddings for; None where that is not known."""
    try:
        table = model[0].auto_model.get_input_embeddings()
    except NotImplementedError:
        return None
    return int(table.num_embeddings) if isinstance(table, torch.nn.Embedding) else None


def _positions(model: Any) -> int | None:
    for layer_name, layer in model.named_modules():
        if layer_name.endswith("position_embeddings") and isinstance(layer, torch.nn.Embedding):
            # RoBERTa and its relatives count positions from behind the padding's id.
            reserved = 0 if layer.padding_idx is None else layer.padding_idx + 1
            return int(layer.num_embeddings) - reserved
    return None
