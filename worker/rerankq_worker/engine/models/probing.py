"""Check that a forward pass gives each pair of a batch the logit that it gets alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelUnusable
from ..protocol import TokenisedPair
from ..tokenising.pair_tokeniser import Tokeniser
from .passes import InputFormat, Pass

#: Tolerated differences between the logits of a pair in two passes, by precision, for logits of usual size: rounding.
TOLERANCES = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.25, "int8": 1.0}
#: Above this size the tolerance grows with the largest logit: rounding is relative.
_USUAL_SIZE = 8.0

_QUERY = "which way is shorter?"
_CHUNKS = ("one", "the other, with a few words more", "a third " * 40, "深度学习 Größe 1, 2, 3: (naïve) café? 👍 " * 6)
#: Tokens of the random pairs, drawn from the ids of those texts; ``_longest`` adds the longest one.
_LENGTHS = (1, 2, 3, 17, 17, 40)
_LONGEST = 160
#: Sliding windows of attention are probed with a longer pair, if that takes no more than this many tokens.
_LONGEST_FOR_WINDOW = 640


@dataclass(frozen=True, slots=True)
class Probe:
    """Pairs of many lengths with the logit that each gets alone, and the tolerated difference."""

    pairs: tuple[TokenisedPair, ...]
    alone: NDArray[np.float64]
    tolerance: float

    def disagreement(self, forward_pass: Pass) -> str:
        """Describe in one line how a pass differs in batches of many lengths; empty where it agrees."""
        worst = max(self._difference(forward_pass, batch) for batch in self._batches())
        return "" if worst <= self.tolerance else f"its logits differ by {worst:.2g} from those of each pair alone"

    def _difference(self, forward_pass: Pass, batch: Sequence[int]) -> float:
        with torch.inference_mode():
            logits = forward_pass([self.pairs[at] for at in batch]).cpu().numpy()
        difference = float(np.abs(logits - self.alone[list(batch)]).max())
        return difference if np.isfinite(difference) else np.inf

    def _batches(self) -> Iterator[Sequence[int]]:
        shuffled: list[int] = np.random.default_rng(4).permutation(len(self.pairs)).tolist()
        by_length = sorted(shuffled, key=lambda at: self.pairs[at].length)
        yield shuffled
        # The longest pair is in one batch only: that batch takes most of the time that a model needs to load.
        yield by_length[-2::-2]
        yield by_length[: len(by_length) // 2]
        yield by_length[len(by_length) // 2 :][:1]


def probe_of(model: Any, tokeniser: Tokeniser, inputs: InputFormat, dtype: str, reset: Callable[[], None]) -> Probe:
    """Score pairs alone, by the model's own forward pass without padding; raises ModelUnusable where it cannot.

    ``reset()`` is called before each of them. To be called for a model as loaded, before anything in it is replaced.
    """
    texts = tokeniser.pairs(_QUERY, _CHUNKS)
    random = _random_pairs(texts, inputs, _longest(model, tokeniser.max_length))

    def alone(pair: TokenisedPair) -> float:
        reset()
        with torch.inference_mode():
            return float(model(_inputs_of(pair, inputs))["scores"].reshape(-1).float())

    logits = [alone(pair) for pair in texts]
    if not np.isfinite(logits).all():
        raise ModelUnusable(f"this model gives logits that are not finite in {dtype}")
    known = [*zip(texts, logits, strict=True), *_computable(alone, random)]
    tolerance = TOLERANCES[dtype] * max(1.0, max(abs(logit) for _, logit in known) / _USUAL_SIZE)
    if abs(alone(texts[0]) - logits[0]) > tolerance:
        raise ModelUnusable("this model is not deterministic: it gives the same pair different logits")
    return Probe(tuple(pair for pair, _ in known), np.array([logit for _, logit in known]), tolerance)


def _computable(
    alone: Callable[[TokenisedPair], float], pairs: Sequence[TokenisedPair]
) -> Iterator[tuple[TokenisedPair, float]]:
    """Leave out pairs that the model itself cannot compute: some need a certain token in every text."""
    for pair in pairs:
        try:
            logit = alone(pair)
        except (IndexError, RuntimeError, ValueError):
            continue
        if np.isfinite(logit):
            yield pair, logit


def _inputs_of(pair: TokenisedPair, inputs: InputFormat) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(pair.ids.astype(np.int64))[None].to(inputs.device)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if inputs.token_types:
        tensors["token_type_ids"] = (torch.arange(pair.length) >= pair.second_from).long()[None].to(inputs.device)
    return tensors


def _random_pairs(texts: Sequence[TokenisedPair], inputs: InputFormat, longest: int) -> list[TokenisedPair]:
    rng = np.random.default_rng(3)
    known = np.unique(np.concatenate([pair.ids for pair in texts]))
    lengths = [length for length in _LENGTHS if length < longest] + [longest]
    pairs = [_random_pair(rng, known, length) for length in lengths]
    # A text may contain the padding's id, which is a token like others then.
    with_padding_id = _random_pair(rng, known, min(9, longest))
    with_padding_id.ids[[with_padding_id.length // 2, -1]] = inputs.pad
    return [*pairs, with_padding_id]


def _random_pair(rng: np.random.Generator, ids: NDArray[np.int32], length: int) -> TokenisedPair:
    return TokenisedPair(rng.choice(ids, length), int(rng.integers(1, length + 1)), truncated=False)


def _longest(model: Any, max_length: int) -> int:
    config = model[0].auto_model.config
    windows = [getattr(config, name, None) or 0 for name in ("sliding_window", "local_attention", "attention_window")]
    beyond = [window + window // 4 + 1 for window in windows if isinstance(window, int)]
    return min(max_length, max([_LONGEST, *(length for length in beyond if length <= _LONGEST_FOR_WINDOW)]))
