"""A sentence-transformers cross-encoder on one device, through torch or what is compiled from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore

from .checkpoint import fingerprint
from .cores import available_cores
from .device import choose_device, multiplies_bfloat16_faster, tokens_that_fit
from .errors import ModelUnusable, Unconvertible
from .first_token import shorten
from .forms import Form, form_of
from .loading import load_model, readable_length
from .pair_format import pair_tokeniser_for
from .passes import FlattenedPass, Inputs, PaddedPass, Pass, WholeModel
from .protocol import QUERY_MAX_TOKENS, Flight, Landed, Logits, TokenisedPair, score_in_batches
from .runtimes import PRECISIONS, Facts, choose, openvino_installed

logger = logging.getLogger(__name__)

#: Tokens per batch. On a CPU tokens per second hardly change from 512 to 4096 (measured, 22 M parameters), and
#: the smaller the batch, the sooner an interactive pair gets its turn; a GPU needs many to be busy.
_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_ACCELERATOR = 32_768
#: Two ways through a model may differ by this much: rounding, in float32 and in the reduced precisions.
_SAME = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.25, "int8": 1.0}
_PROBE = ("which way is shorter?", ["one", "the other, with a few words more", "a third " * 40])


class CrossEncoderEngine:
    """Scores pairs with a cross-encoder of one label; raw logits whatever activation the checkpoint asks for.

    Batches are flattened, so that nothing is computed for padding, where the model's family allows it and a probe
    gives the same logits either way; else they are padded. ``padded`` asks for one of the two. On a CPU OpenVINO may
    compute the padded batches in torch's place, after the same probe; raises Unconvertible where it cannot. In a
    reduced precision the body runs in that type and the last layer in float32. One thread at a time may call ``launch``
    or ``forward``.
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
        where = choose_device(device)
        facts = Facts(where.type, multiplies_bfloat16_faster(where), openvino_installed())
        if runtime == "auto" and padded is not None:
            runtime = "torch"  # OpenVINO has one way only
        self.runtime, self.dtype = astuple(choose(runtime, dtype, facts))
        self._threads = threads or available_cores()
        if where.type == "cpu":
            torch.set_num_threads(self._threads)
        # OpenVINO converts float32 weights into what it computes in.
        kind = torch.float32 if self.runtime == "openvino" else getattr(torch, self.dtype)
        model = load_model(folder, name, where, kind)
        self._device = where
        self._tokeniser = pair_tokeniser_for(model, max_length=readable_length(model, max_length))
        with_types = "token_type_ids" in model.tokenizer.model_input_names
        self.name = name
        self.max_length = self._tokeniser.max_length
        self.max_batch_tokens = max_batch_tokens or _BATCH_TOKENS.get(where.type, _BATCH_TOKENS_ACCELERATOR)
        self.device = str(where)
        template = f"{self._tokeniser.template} types={with_types}"
        self.fingerprint = fingerprint(folder, precision=PRECISIONS[self.dtype], template=template)
        self._run = self._choose_pass(model, padded, with_types=with_types)
        self.padded = self._run.padded

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

    def launch(self, batch: Sequence[TokenisedPair]) -> Flight:
        """Start one batch; a CUDA device goes on with it by itself."""
        if not batch:
            return Landed(np.empty(0, dtype=np.float32))
        with torch.inference_mode():
            logits = self._run(batch)
            return CudaFlight(logits) if logits.is_cuda else Landed(logits.cpu().numpy())

    def forward(self, batch: Sequence[TokenisedPair]) -> Logits:
        """Run one batch: raw logits, shape ``(len(batch),)``."""
        return self.launch(batch).logits()

    def score(self, pairs: Sequence[tuple[str, str]]) -> Logits:
        """Score ``(query, chunk)`` pairs: raw logits, same order, same length."""
        return score_in_batches(self, pairs)

    def warm_up(self) -> None:
        """Run a small batch: kernels are chosen, threads started; raises what the device raises.

        Raises ModelUnusable where its logits are not finite: every job's would be missing, and none would fail.
        """
        if not np.isfinite(self.forward(self.tokenise("warm up", ["one chunk", "and a longer one"]))).all():
            raise ModelUnusable(f"model {self.name!r} gives logits that are not finite, computed in {self.dtype}")

    def most_tokens(self, batch: Sequence[TokenisedPair]) -> float:
        """Tell how many tokens a batch may cost within the device's free memory, judged by what this one takes."""
        cost = sum(pair.length for pair in batch)
        return tokens_that_fit(self._device, cost, lambda: self.forward(batch))

    def release_memory(self) -> None:
        """Give the device's cached blocks back."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _choose_pass(self, model: Any, padded: bool | None, *, with_types: bool) -> Pass:
        inputs = Inputs(self._device, pad=int(model.tokenizer.pad_token_id or 0), with_types=with_types)
        says = model[-1] if isinstance(model[-1], LogitScore) else None
        body = model[0].auto_model
        form = form_of(body, (says.true_token_id, says.false_token_id) if says is not None else None)
        # Whatever follows the transformer (pooling, a layer of its own) is known to the whole model alone.
        if form is None or len(model) != (2 if says is not None else 1):
            if self.runtime == "openvino":
                raise Unconvertible("its parts are not known apart")
            return WholeModel(model, inputs)
        if form.place == "first":
            shorten(getattr(body, form.backbone))
        across = PaddedPass(body, form, inputs)
        if self.runtime == "openvino":
            return self._compiled(across, inputs)
        # On CUDA the kernel for unpadded pairs knows the reduced precisions only.
        if padded or (self._device.type == "cuda" and self.dtype == "float32"):
            return across
        return self._flattened_or(across, body, form, inputs)

    def _compiled(self, across: PaddedPass, inputs: Inputs) -> Pass:
        """Take the pass that OpenVINO compiles, once a probe has shown that it agrees with torch."""
        from .openvino_pass import OpenVinoPass  # noqa: PLC0415 - an extra

        expected = self._probed(across)
        compiled = OpenVinoPass(across, inputs, dtype=self.dtype, threads=self._threads)
        if why := self._disagreement(compiled, expected):
            raise Unconvertible(why)
        return compiled

    def _flattened_or(self, across: PaddedPass, body: Any, form: Form, inputs: Inputs) -> Pass:
        """Take the flattened pass where a probe shows that it agrees with the padded one."""
        expected, before = self._probed(across), body.config._attn_implementation
        try:
            flattened = FlattenedPass(body, form, inputs)
            why = self._disagreement(flattened, expected)
        except Exception as error:  # noqa: BLE001 - whatever it is, the padded way is open
            why = repr(error)
        if not why:
            return flattened
        body.set_attn_implementation(before)
        logger.warning("model %s runs padded: flattened, %s", self.name, why)
        return across

    def _probed(self, way: Pass) -> torch.Tensor:
        with torch.inference_mode():
            return way(self.tokenise(*_PROBE))

    def _disagreement(self, way: Pass, expected: torch.Tensor) -> str:
        """Say by how much a way's logits for the probe differ, if that is more than rounding."""
        difference = (self._probed(way) - expected).abs().max().item()
        return "" if difference <= _SAME[self.dtype] else f"its logits differ by {difference:.2g}"


class CudaFlight:
    """Logits on their way from a CUDA device, copied while it goes on with the next batch."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        self._host.copy_(logits, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # That of the logits' device, which need not be the current one.
        self._arrived.record(torch.cuda.current_stream(logits.device))

    @property
    def done(self) -> bool:
        """Whether the logits are there already."""
        return bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def logits(self) -> Logits:
        """Wait for the logits."""
        self._arrived.synchronize()
        return self._host.numpy()
