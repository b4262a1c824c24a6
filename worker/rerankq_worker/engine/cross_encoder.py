"""A sentence-transformers cross-encoder on one device, through torch, in padded batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from transformers.utils import logging as transformers_logging

from .checkpoint import fingerprint, weight_names
from .cores import available_cores, has_amx_bf16
from .errors import EngineError, ModelUnusable
from .pair_tokeniser import special_token_pairs
from .protocol import QUERY_MAX_TOKENS, Landed, Logits, TokenisedPair, checked_length, score_in_batches

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Padded tokens per batch. On a CPU tokens per second hardly change from 512 to 4096 (measured, 22 M parameters), and
#: the smaller the batch, the sooner an interactive pair gets its turn; a GPU needs many to be busy.
_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_ACCELERATOR = 32_768


class CrossEncoderEngine:
    """Scores pairs with a cross-encoder of one label; raw logits whatever activation the checkpoint asks for.

    In a reduced precision the body runs in that type and the last layer in float32, so that logits which differ do
    not fall on the same sixteen bits. One thread at a time may call ``forward``.
    """

    padded = True

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        device: str = "auto",
        dtype: str = "auto",
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        threads: int | None = None,
    ) -> None:
        where = choose_device(device)
        kind = choose_dtype(dtype, where)
        if where.type == "cpu":
            torch.set_num_threads(threads or available_cores())
        model = _load(folder, name, where, kind)
        self._model = model
        self._device = where
        self._tokeniser = special_token_pairs(
            _fast_tokeniser(model, name), max_length=_readable_length(model, max_length)
        )
        self._pad = int(model.tokenizer.pad_token_id or 0)
        self._wants_types = "token_type_ids" in model.tokenizer.model_input_names
        self.name = name
        self.max_length = self._tokeniser.max_length
        self.max_batch_tokens = max_batch_tokens or _BATCH_TOKENS.get(where.type, _BATCH_TOKENS_ACCELERATOR)
        self.dtype = str(kind).removeprefix("torch.")
        self.device = str(where)
        precision = "fp32" if kind is torch.float32 else "reduced"
        template = f"{self._tokeniser.template} types={self._wants_types}"
        self.fingerprint = fingerprint(folder, precision=precision, template=template)

    def tokenise(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
        hashes: Sequence[bytes] | None = None,
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order, cut to ``max_length`` tokens; from any thread."""
        return self._tokeniser.pairs(
            query, chunks, max_length=max_length, query_max_tokens=query_max_tokens, hashes=hashes
        )

    def launch(self, batch: Sequence[TokenisedPair]) -> Landed:
        """Run one padded batch; it is done when this returns."""
        return Landed(self.forward(batch))

    def forward(self, batch: Sequence[TokenisedPair]) -> Logits:
        """Run one padded batch: raw logits, shape ``(len(batch),)``."""
        if not batch:
            return np.empty(0, dtype=np.float32)
        inputs = {name: torch.from_numpy(values).to(self._device) for name, values in self._padded(batch).items()}
        with torch.inference_mode():
            logits: torch.Tensor = self._model(inputs)["scores"]
            return logits.reshape(len(batch)).float().cpu().numpy()

    def score(self, pairs: Sequence[tuple[str, str]]) -> Logits:
        """Score ``(query, chunk)`` pairs: raw logits, same order, same length."""
        return score_in_batches(self, pairs)

    def warm_up(self) -> None:
        """Run a small batch: kernels are chosen, threads started; raises what the device raises."""
        self.forward(self.tokenise("warm up", ["one chunk", "and a longer one"]))

    def release_memory(self) -> None:
        """Give the device's cached blocks back."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _padded(self, batch: Sequence[TokenisedPair]) -> dict[str, NDArray[np.int64]]:
        lengths = np.array([pair.length for pair in batch])
        columns = np.arange(lengths.max())
        real = columns < lengths[:, None]
        ids = np.full(real.shape, self._pad, dtype=np.int64)
        ids[real] = np.concatenate([pair.ids for pair in batch])
        inputs = {"input_ids": ids, "attention_mask": real.astype(np.int64)}
        if self._wants_types:
            second = columns >= np.array([pair.second_from for pair in batch])[:, None]
            inputs["token_type_ids"] = (second & real).astype(np.int64)
        return inputs


def choose_device(device: str) -> torch.device:
    """Take the named device, or a CUDA device if there is one, else the CPU; raises EngineError if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise EngineError(f"device {device!r} is not usable here: {error}") from error
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Take the named type, or bfloat16 where the device computes it several times faster, else float32."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r} is none of auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and has_amx_bf16()
    return torch.bfloat16 if fast else torch.float32


def _load(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Any:
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
    head = _head(model, name)
    if not _is_stored(folder, head):
        raise ModelUnusable(f"model {name!r} has no trained weights for its last layer: not a reranker")
    if dtype is not torch.float32:
        _run_in_float32(model.get_submodule(head))
    return model


def _head(model: Any, name: str) -> str:
    """Find the layer that makes the one logit, by its path."""
    if model.num_labels != 1:
        raise ModelUnusable(f"model {name!r} gives {model.num_labels} scores per pair; a reranker gives one")
    linear = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    heads = [path for path, layer in linear if layer.out_features == 1]
    if not heads:
        raise ModelUnusable(
            f"model {name!r} has no layer with one output; decoders that say yes or no are not supported"
        )
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


def _fast_tokeniser(model: Any, name: str) -> Any:
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ModelUnusable(f"model {name!r} has no tokenizer.json: only fast tokenisers are supported")
    return tokenizer.backend_tokenizer


def _readable_length(model: Any, asked: int | None) -> int:
    """Take the least of what the tokeniser states, the position table holds, and the caller asks, in tokens."""
    stated = [length for length in (model.max_seq_length, _positions(model)) if length]
    if not stated:
        raise ModelUnusable("this model states no maximum length; give one")
    return checked_length(asked, min(stated))


def _positions(model: Any) -> int | None:
    for layer_name, layer in model.named_modules():
        if layer_name.endswith("position_embeddings") and isinstance(layer, torch.nn.Embedding):
            # Models of the RoBERTa family count positions from behind the padding's own.
            reserved = 0 if layer.padding_idx is None else layer.padding_idx + 1
            return int(layer.num_embeddings) - reserved
    return None
