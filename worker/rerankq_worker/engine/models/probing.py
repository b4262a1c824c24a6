"""Whether a way through a model gives each pair the logit that it gets alone, whatever is beside it."""

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
from .passes import Inputs, Pass

#: Logits of one pair may differ by this much from one way to the other: rounding, where the logits are of usual size.
SAME = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.25, "int8": 1.0}
#: Beyond this the tolerance grows with the largest logit: rounding is relative.
_USUAL = 8.0

_QUERY = "which way is shorter?"
_CHUNKS = ("one", "the other, with a few words more", "a third " * 40, "深度学习 Größe 1, 2, 3: (naïve) café? 👍 " * 6)
#: Tokens of pairs made up of the ids of those texts; the longest takes what is left.
_LENGTHS = (1, 2, 3, 17, 17, 40)
_LONGEST = 160
#: Windows of attention are tried with pairs that are longer, where that costs no more than this many tokens.
_LONGEST_FOR_WINDOW = 640


@dataclass(frozen=True, slots=True)
class Probe:
    """Pairs of many lengths with the logit that each gets alone, and by how much a way may differ from it."""

    pairs: tuple[TokenisedPair, ...]
    alone: NDArray[np.float64]
    tolerance: float

    def disagreement(self, way: Pass) -> str:
        """Say what a way does differently in batches of many lengths, in one line; nothing where it is right."""
        worst = max(self._difference(way, batch) for batch in self._batches())
        return "" if worst <= self.tolerance else f"its logits differ by {worst:.2g} from those of each pair alone"

    def _difference(self, way: Pass, batch: Sequence[int]) -> float:
        with torch.inference_mode():
            logits = way([self.pairs[at] for at in batch]).cpu().numpy()
        difference = float(np.abs(logits - self.alone[list(batch)]).max())
        return difference if np.isfinite(difference) else np.inf

    def _batches(self) -> Iterator[Sequence[int]]:
        shuffled: list[int] = np.random.default_rng(4).permutation(len(self.pairs)).tolist()
        by_length = sorted(shuffled, key=lambda at: self.pairs[at].length)
        yield shuffled
        # Of the longest one batch is enough: what it costs is most of the time that a model takes to load.
        yield by_length[-2::-2]
        yield by_length[: len(by_length) // 2]
        yield by_length[len(by_length) // 2 :][:1]


def probe_of(model: Any, tokeniser: Tokeniser, inputs: Inputs, dtype: str, forget: Callable[[], None]) -> Probe:
    """Compute pairs alone, by the model's own forward pass without padding; raises ModelUnusable where it cannot.

    ``forget`` is called before each of them. For a model as it was loaded: nothing in it is ours yet.
    """
    texts = tokeniser.pairs(_QUERY, _CHUNKS)
    made_up = _made_up(texts, inputs, _longest(model, tokeniser.max_length))

    def alone(pair: TokenisedPair) -> float:
        forget()
        with torch.inference_mode():
            return float(model(_inputs_of(pair, inputs))["scores"].reshape(-1).float())

    logits = [alone(pair) for pair in texts]
    if not np.isfinite(logits).all():
        raise ModelUnusable(f"this model gives logits that are not finite, computed in {dtype}")
    known = [*zip(texts, logits, strict=True), *_computable(alone, made_up)]
    tolerance = SAME[dtype] * max(1.0, max(abs(logit) for _, logit in known) / _USUAL)
    if abs(alone(texts[0]) - logits[0]) > tolerance:
        raise ModelUnusable("this model gives a pair another logit every time")
    return Probe(tuple(pair for pair, _ in known), np.array([logit for _, logit in known]), tolerance)


def _computable(
    alone: Callable[[TokenisedPair], float], pairs: Sequence[TokenisedPair]
) -> Iterator[tuple[TokenisedPair, float]]:
    """Leave out what the model itself cannot compute: some need a certain token in every text."""
    for pair in pairs:
        try:
            logit = alone(pair)
        except (IndexError, RuntimeError, ValueError):
            continue
        if np.isfinite(logit):
            yield pair, logit


def _inputs_of(pair: TokenisedPair, inputs: Inputs) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(pair.ids.astype(np.int64))[None].to(inputs.device)
    written = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if inputs.with_types:
        written["token_type_ids"] = (torch.arange(pair.length) >= pair.second_from).long()[None].to(inputs.device)
    return written


def _made_up(texts: Sequence[TokenisedPair], inputs: Inputs, longest: int) -> list[TokenisedPair]:
    dice = np.random.default_rng(3)
    known = np.unique(np.concatenate([pair.ids for pair in texts]))
    lengths = [length for length in _LENGTHS if length < longest] + [longest]
    made = [_drawn(dice, known, length) for length in lengths]
    # The padding's own id is a token like others where a text holds it.
    spoilt = _drawn(dice, known, min(9, longest))
    spoilt.ids[[spoilt.length // 2, -1]] = inputs.pad
    return [*made, spoilt]


def _drawn(dice: np.random.Generator, ids: NDArray[np.int32], length: int) -> TokenisedPair:
    return TokenisedPair(dice.choice(ids, length), int(dice.integers(1, length + 1)), truncated=False)


def _longest(model: Any, max_length: int) -> int:
    config = model[0].auto_model.config
    windows = [getattr(config, name, None) or 0 for name in ("sliding_window", "local_attention", "attention_window")]
    beyond = [window + window // 4 + 1 for window in windows if isinstance(window, int)]
    return min(max_length, max([_LONGEST, *(length for length in beyond if length <= _LONGEST_FOR_WINDOW)]))
