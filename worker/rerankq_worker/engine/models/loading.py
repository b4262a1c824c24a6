"""A checkpoint made into a sentence-transformers model in memory, or a clear reason why it is no reranker."""

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

#: What tokenisers state where they know of no maximum is beyond this many tokens.
_UNSTATED = 10**9
#: So many missing weights are named.
_NAMED = 5

_loading = threading.Lock()


def load_model(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a cross-encoder that gives one score per pair, ready for inference; raises ModelUnusable.

    Every weight comes from the checkpoint, and lies in memory of its own: what is written into the files afterwards
    changes no score.
    """
    transformers_logging.disable_progress_bar()
    with refusing(name, "does not load as a cross-encoder"), _what_lacks() as lacking:
        model = CrossEncoder(
            str(folder),
            device=str(device),
            trust_remote_code=False,
            local_files_only=True,
            activation_fn=torch.nn.Identity(),
            # A mapped file that somebody cuts short ends the process. Read whole, a file lies in memory for a moment,
            # as a model on a CPU does anyway; one that only goes through to a GPU is mapped.
            model_kwargs={"use_safetensors": True, "dtype": dtype, "disable_mmap": device.type == "cpu"},
        )
        model.eval()
        _move_out_of_files(model)
        labels = model.num_labels
        ids, rows = _ids(model, name), known_ids(model)
    if lacking:
        more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
        named = ", ".join(sorted(lacking)[:_NAMED]) + more
        raise ModelUnusable(f"model {name!r} has no trained weights for {named}: not a reranker, or not all of it")
    if labels != 1:
        raise ModelUnusable(f"model {name!r} gives {labels} scores per pair; a reranker gives one")
    if rows and ids > rows:
        raise ModelUnusable(f"model {name!r} knows {rows} token ids, and its tokeniser gives {ids}")
    return model


@contextmanager
def refusing(name: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises about a model into ModelUnusable, in one sentence."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise ModelUnusable(f"model {name!r} {what}: {in_one_line(error)}") from error


def hash_of_weights(model: Any) -> bytes:
    """Hash the weights as they are in memory: names, shapes, types and numbers."""
    whole = blake2b(digest_size=16)
    for name, weights in sorted(model.state_dict().items()):
        whole.update(f"{name} {tuple(weights.shape)} {weights.dtype}\n".encode())
        whole.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return whole.digest()


def readable_length(model: Any, asked: int | None) -> int:
    """Take the least of what the tokeniser states, the position table holds, and the caller asks, in tokens."""
    stated = [length for length in (model.max_seq_length, _positions(model)) if length and length < _UNSTATED]
    if stated:
        return checked_length(asked, min(stated))
    if asked is None:
        raise ModelUnusable("this model states no maximum length; give one")
    return asked


@contextmanager
def _what_lacks() -> Iterator[set[str]]:
    """Collect the weights that a checkpoint lacks or has in another shape, while a model is loaded from it.

    Transformers fills them with noise, and says so in its log or to who asks; sentence-transformers does not ask.
    """
    lacking: set[str] = set()
    theirs = vars(PreTrainedModel)["from_pretrained"]

    def from_pretrained(kind: Any, *args: Any, **options: Any) -> Any:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = theirs.__func__(kind, *args, **options)
        lacking.update(report["missing_keys"], (key for key, *_ in report["mismatched_keys"]))
        return model

    with _loading:
        PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        try:
            yield lacking
        finally:
            PreTrainedModel.from_pretrained = theirs


def _move_out_of_files(model: torch.nn.Module) -> None:
    """Copy every tensor that may be a view of a mapped file, one at a time."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _ids(model: Any, name: str) -> int:
    vocabulary = model.tokenizer.get_vocab()
    # Where its files are missing transformers makes a tokeniser of the special tokens alone.
    if vocabulary.keys() <= set(model.tokenizer.all_special_tokens):
        raise ModelUnusable(f"the tokeniser of model {name!r} knows no words: its files are missing or empty")
    return 1 + int(max(vocabulary.values()))


def known_ids(model: Any) -> int | None:
    """Tell how many token ids a model's embeddings know; None where that cannot be seen."""
    try:
        table = model[0].auto_model.get_input_embeddings()
    except NotImplementedError:
        return None
    return int(table.num_embeddings) if isinstance(table, torch.nn.Embedding) else None


def _positions(model: Any) -> int | None:
    for layer_name, layer in model.named_modules():
        if layer_name.endswith("position_embeddings") and isinstance(layer, torch.nn.Embedding):
            # Models of the RoBERTa family count positions from behind the padding's own.
            reserved = 0 if layer.padding_idx is None else layer.padding_idx + 1
            return int(layer.num_embeddings) - reserved
    return None
