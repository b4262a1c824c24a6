"""A sentence-transformers cross-encoder on one device, through torch or what is compiled from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import ModelUnusable
from .models.checkpoint import files_of, fingerprint
from .models.cores import available_cores, short_number_instructions
from .models.device import choose_device, multiplies_bfloat16_faster, tokens_that_fit
from .models.last_layer import compute_last_layer_in_float32
from .models.loading import hash_of_weights, load_model, readable_length, refusing, vocabulary_size
from .models.long_positions import LongPositions
from .models.pass_selection import LoadedModel, make_openvino_pass, select_torch_pass
from .models.passes import InputFormat, Pass
from .models.probing import probe_of
from .models.runtimes import Choice, Environment, choose, openvino_installed, precision_of
from .protocol import QUERY_MAX_TOKENS, Logits, LogitsFuture, TokenisedPair, finished
from .scheduling.unqueued import score_in_batches
from .tokenising.pair_format import InstructedTokenisers, pair_tokeniser_for
from .tokenising.pair_tokeniser import PairTokeniser, Tokeniser

#: Default tokens per batch. On a CPU tokens per second hardly change from 512 to 4096 (measured, 22 M parameters), and
#: the smaller the batch, the shorter an interactive pair waits; a GPU needs many tokens to be busy.
_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_ACCELERATOR = 32_768


class CrossEncoderEngine:
    """Scores pairs with a cross-encoder of one label; raw logits whatever activation the checkpoint asks for.

    Batches are unpadded, so that nothing is computed for padding, where the model's architecture is known and a probe
    confirms the logits; else they are padded. ``padded`` asks for one of the two. On a CPU OpenVINO may compute the
    padded batches instead of torch, after the same probe; raises Unconvertible where it cannot. In a reduced precision
    all layers but the last run in that type, and the last one in float32. One thread at a time may call ``launch`` or
    ``forward``.
    """

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
        padded: bool | None = None,
        runtime: str = "auto",
    ) -> None:
        chosen = choose_device(device)
        environment = Environment(chosen.type, multiplies_bfloat16_faster(chosen), openvino_installed())
        if runtime == "auto" and padded is not None:
            runtime = "torch"  # OpenVINO runs padded batches only
        self.runtime, self.dtype = astuple(choose(runtime, dtype, environment))
        self._threads = threads or available_cores()
        if chosen.type == "cpu":
            torch.set_num_threads(self._threads)
        # OpenVINO converts float32 weights to its own precision.
        torch_dtype = torch.float32 if self.runtime == "openvino" else getattr(torch, self.dtype)
        files = files_of(folder)
        model = load_model(folder, name, chosen, torch_dtype)
        weights = hash_of_weights(model)
        if files_of(folder) != files:
            raise ModelUnusable(f"files of model {name!r} changed while they were read; load it again")
        self._device = chosen
        longest = readable_length(model, max_length)
        with refusing(name, "cannot be used"):
            self._tokeniser = pair_tokeniser_for(model, max_length=longest)
            self._instructed = InstructedTokenisers(model, max_length=longest)
            loaded = _probed(model, name, self._tokeniser, chosen, self.dtype)
            self._forward_pass = self._select_pass(loaded, padded=padded)
        self.name = name
        self.vocabulary = vocabulary_size(model)
        self.max_length = self._tokeniser.max_length
        self.takes_instruction = self._instructed.takes_instruction
        self.max_batch_tokens = max_batch_tokens or _BATCH_TOKENS.get(chosen.type, _BATCH_TOKENS_ACCELERATOR)
        self.device = str(chosen)
        self.padded = self._forward_pass.padded
        self.fingerprint = fingerprint(
            files,
            weights,
            precision=precision_of(Choice(self.runtime, self.dtype), chosen.type, short_number_instructions()),
            template=f"{self._tokeniser.template} types={loaded.inputs.token_types}",
        )

    def _select_pass(self, loaded: LoadedModel, *, padded: bool | None) -> Pass:
        if self.runtime == "openvino":
            compiled = make_openvino_pass(loaded, dtype=self.dtype, threads=self._threads)
            self.dtype = compiled.dtype
            return compiled
        # On CUDA the kernel for unpadded attention supports the reduced precisions only.
        unpadded = not padded and not (self._device.type == "cuda" and self.dtype == "float32")
        return select_torch_pass(loaded, unpadded=unpadded)

    def tokenise(
        self,
        query: str,
        chunks: Sequence[str],
        *,
        max_length: int | None = None,
        query_max_tokens: int = QUERY_MAX_TOKENS,
        hashes: Sequence[bytes] | None = None,
        instruction: str = "",
    ) -> list[TokenisedPair]:
        """Pair the query with each chunk, in order, cut to ``max_length`` tokens; from any thread."""
        tokeniser = self._instructed.of(instruction) if instruction else self._tokeniser
        return tokeniser.pairs(query, chunks, max_length=max_length, query_max_tokens=query_max_tokens, hashes=hashes)

    def characters_read(
        self, query: str, chunk: str, *, max_length: int | None = None, query_max_tokens: int = QUERY_MAX_TOKENS
    ) -> int | None:
        """Tell how many characters of a chunk are kept in a pair that does not fit; None where pairs are read whole."""
        if not isinstance(self._tokeniser, PairTokeniser):
            return None
        return self._tokeniser.characters_read(query, chunk, max_length=max_length, query_max_tokens=query_max_tokens)

    def launch(self, batch: Sequence[TokenisedPair]) -> LogitsFuture:
        """Start one batch; asynchronous on CUDA, finished on return elsewhere."""
        if not batch:
            return finished(np.empty(0, dtype=np.float32))
        with torch.inference_mode():
            logits = self._forward_pass(batch)
            return CudaLogits(logits) if logits.is_cuda else finished(finite(logits.cpu().numpy()))

    def forward(self, batch: Sequence[TokenisedPair]) -> Logits:
        """Run one batch: raw logits, shape ``(len(batch),)``."""
        return self.launch(batch).result()

    def score(self, pairs: Sequence[tuple[str, str]]) -> Logits:
        """Score ``(query, chunk)`` pairs: raw logits, same order, same length."""
        return score_in_batches(self, pairs)

    def warm_up(self) -> None:
        """Run a small batch, so that kernels are chosen and threads started; raises what the device raises.

        Raises ModelUnusable where its logits are not finite.
        """
        try:
            self.forward(self.tokenise("warm up", ["one chunk", "and a longer one"]))
        except FloatingPointError as error:
            raise ModelUnusable(f"model {self.name!r} gives logits that are not finite in {self.dtype}") from error

    def most_tokens(self, batch: Sequence[TokenisedPair]) -> float:
        """Estimate the tokens of the largest batch that fits into free memory, from what this batch takes."""
        cost = sum(pair.length for pair in batch)
        return tokens_that_fit(self._device, cost, lambda: self.forward(batch))

    def release_memory(self) -> None:
        """Return the cached blocks of CUDA's allocator to the device."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class CudaLogits:
    """Logits that are copied from a CUDA device while it computes the next batch."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        self._host.copy_(logits, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # The stream of the logits' device, which need not be the current device.
        self._copied.record(torch.cuda.current_stream(logits.device))

    def done(self) -> bool:
        """Tell whether the logits are copied."""
        return bool(self._copied.query())  # type: ignore[no-untyped-call]

    def result(self) -> Logits:
        """Wait for the logits."""
        self._copied.synchronize()
        return finite(self._host.numpy())


def finite(logits: Logits) -> Logits:
    """Return the logits; raises FloatingPointError where one is not finite, so that the batch is retried in halves."""
    if np.isfinite(logits).all():
        return logits
    raise FloatingPointError("a logit is not finite")


def _probed(model: Any, name: str, tokeniser: Tokeniser, device: torch.device, dtype: str) -> LoadedModel:
    """Probe the model as it was loaded, then convert its last layer to float32."""
    inputs, positions = _input_format_of(model, device), LongPositions(model)
    _set_padding_id(model[0].auto_model.config.get_text_config())
    probe = probe_of(model, tokeniser, inputs, dtype, positions.reset)
    compute_last_layer_in_float32(model)
    return LoadedModel(name, model, inputs, positions, tokeniser.max_length, probe)


def _input_format_of(model: Any, device: torch.device) -> InputFormat:
    tokenizer, config = model.tokenizer, model[0].auto_model.config.get_text_config()
    # The configuration's first: models recognise padding by it.
    candidates = [getattr(config, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id]
    ids = range(len(tokenizer))
    return InputFormat(
        device,
        pad=next((int(one) for one in candidates if isinstance(one, int) and one in ids), 0),
        token_types="token_type_ids" in tokenizer.model_input_names,
        pads_left=tokenizer.padding_side == "left",
    )


def _set_padding_id(config: Any) -> None:
    """Give transformers' decoders a padding id, without which they refuse more than one pair.

    No token has this id, so that they read the last token of each pair.
    """
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = -1
