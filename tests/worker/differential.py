"""The engine against sentence-transformers' own ``predict``, one pair at a time: hard texts, every family, every way.

As a program (``make differential``) it goes on for as long as it is told and writes a report; the tests import it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from tiny_checkpoints import QUERY, RECIPES, TEXTS, write

from rerankq_worker import engine
from rerankq_worker.engine import QUERY_MAX_TOKENS, EngineError

#: Runtimes and precisions, the exact one of each runtime first.
WAYS = (
    ("torch", "float32"), ("torch", "bfloat16"), ("torch", "float16"),
    ("openvino", "float32"), ("openvino", "bfloat16"), ("openvino", "int8"),
)  # fmt: skip
#: By how much a logit may differ from that of ``predict`` in float32, per unit of its size and of one.
TOLERANCES = {"float32": 1e-5, "float16": 0.05, "bfloat16": 0.2, "int8": 0.2}

MARKS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>",
    "<|im_start|>", "<|im_end|>", "<think>", "</think>",
)  # fmt: skip
ODDITIES = (
    " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u3000", "\u00a0", "\u200b", "\u200d", "\ufeff", "\u00ad", "\u0301",
    "e\u0301", "\u1100\u1161\u11a8", "ﬁ", "①", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "🇫🇷", "👍🏽", "שלום",
    "\u202eمرحبا\u202c", "ก็", "क्षि", "\U00012000", "\ue000", "\x00", "\x07", "�", "▁", "Ġ", "##ing", "'s", "'S", "7",
    "12345", "1,234.5", "...", "?!", "<", "|", ">", "ß", "İ", "ǅ", "Σ", "ΑΣ",
)  # fmt: skip
_WORDS = " ".join(TEXTS).split()


def hard_text(dice: random.Random, prefix_of: Callable[[int], str], longest: int) -> str:
    """Draw a text; ``prefix_of(tokens)`` gives one of so many tokens, and ``longest`` are those that a model reads."""
    kind = dice.choice(("empty", "blank", "marks", "words", "words", "odd", "odd", "even", "even", "even", "long"))
    if kind == "empty":
        return ""
    if kind == "blank":
        return "".join(dice.choice(ODDITIES[:12]) for _ in range(dice.randint(1, 5)))
    if kind == "marks":
        return dice.choice(("", " ")).join(dice.choice(MARKS) for _ in range(dice.randint(1, 4)))
    if kind == "words":
        return " ".join(dice.choice(_WORDS) for _ in range(dice.randint(1, 40)))
    if kind == "even":
        near = dice.choice((1, longest // 4, longest // 2, 3 * longest // 4, longest, QUERY_MAX_TOKENS))
        return prefix_of(max(1, near + dice.randint(-4, 4)))
    pieces = [dice.choice(ODDITIES + MARKS + tuple(_WORDS[:40])) for _ in range(dice.randint(1, 25))]
    odd = dice.choice(("", " ")).join(pieces)
    if kind == "long":
        return odd * (dice.choice((3_000, 20_000, 100_000)) // max(1, len(odd)))
    return odd


@dataclass(frozen=True)
class Drawn:
    """A query, its chunks, and the tokens of a pair at most."""

    query: str
    chunks: tuple[str, ...]
    max_length: int


@dataclass
class Found:
    """What one way through one family gave: pairs held against ``predict``, and the greatest difference."""

    family: str
    runtime: str
    dtype: str
    pairs: int = 0
    greatest: float = 0.0
    of_logit: float = 0.0
    beyond: list[str] = field(default_factory=list)
    flags_wrong: list[str] = field(default_factory=list)


class Peer:
    """A checkpoint through sentence-transformers alone, in float32."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model = CrossEncoder(
                str(folder),
                device="cpu",
                local_files_only=True,
                activation_fn=torch.nn.Identity(),
                model_kwargs={"dtype": torch.float32},
            )
        if self._model.tokenizer.pad_token is None:
            self._model.tokenizer.pad_token = self._model.tokenizer.eos_token  # else it does not read one pair
        self.max_length = int(self._model.max_seq_length)
        long = " ".join(TEXTS) * 4
        encoding = self._model.tokenizer(long, add_special_tokens=False, truncation=False, return_offsets_mapping=True)
        self._long, self._ends = long, [end for _, end in encoding["offset_mapping"]]
        chat = RECIPES[family].says is not None
        self.special_tokens = (
            self.length("", "") if chat else self._model.tokenizer.num_special_tokens_to_add(pair=True)
        )

    def prefix_of(self, tokens: int) -> str:
        return self._long[: self._ends[min(tokens, len(self._ends)) - 1]]

    def length(self, query: str, chunk: str) -> int:
        """Tokens of the whole pair."""
        self._model.max_seq_length = 10**6
        return int(self._model.preprocess([(query, chunk)])["input_ids"].shape[1])

    def cuts_alike(self, query: str, max_length: int) -> bool:
        """Tell whether a pair that does not fit is cut by the rule of ``predict``: of its chunk alone."""
        if RECIPES[self.family].says == "chunk first":
            return False  # predict cuts the query off, and everything behind it
        asked = len(self._model.tokenizer(query, add_special_tokens=False, truncation=False)["input_ids"])
        return asked <= min(QUERY_MAX_TOKENS, (max_length - self.special_tokens) // 2)

    def logit(self, query: str, chunk: str, max_length: int) -> float:
        self._model.max_seq_length = max_length
        return float(self._model.predict([(query, chunk)], show_progress_bar=False)[0])


def draw(dice: random.Random, peer: Peer) -> Drawn:
    least = peer.special_tokens + 2
    near = dice.choice((least, least + dice.randint(1, 20), peer.max_length, peer.max_length, peer.max_length))
    max_length = min(peer.max_length, near)
    texts = [hard_text(dice, peer.prefix_of, max_length) for _ in range(dice.randint(2, 7))]
    return Drawn(texts[0] if texts[0].strip() else QUERY, tuple(texts[1:]), max_length)


@dataclass(frozen=True)
class Expected:
    """What ``predict`` says of a pair: its logit, None where it cuts by another rule; and whether the pair is cut."""

    logit: float | None
    cut: bool


def expect(peer: Peer, drawn: Drawn) -> list[Expected]:
    expected = []
    for chunk in drawn.chunks:
        length = peer.length(drawn.query, chunk)
        comparable = length > 0 and (length <= drawn.max_length or peer.cuts_alike(drawn.query, drawn.max_length))
        logit = peer.logit(drawn.query, chunk, drawn.max_length) if comparable else None
        expected.append(Expected(logit, length > drawn.max_length))
    return expected


def hold(ours: engine.Engine, drawn: Drawn, expected: Sequence[Expected], found: Found) -> None:
    """Score all chunks in one batch, and note how far each logit is from the expected."""
    pairs = ours.tokenise(drawn.query, drawn.chunks, max_length=drawn.max_length)
    logits = _together(ours, pairs)
    for chunk, pair, logit, right in zip(drawn.chunks, pairs, logits.tolist(), expected, strict=True):
        seen = f"max_length={drawn.max_length} {drawn.query[:200]!r} {chunk[:200]!r} ({len(chunk)} characters)"
        if pair.truncated is not right.cut:
            found.flags_wrong.append(seen)
        if right.logit is None:
            continue
        found.pairs += 1
        difference = abs(logit - right.logit)
        if not difference <= TOLERANCES[found.dtype] * (1 + abs(right.logit)):
            found.beyond.append(f"{logit:.6g} for {right.logit:.6g}: {seen}")
        if not difference <= found.greatest:
            found.greatest, found.of_logit = difference, right.logit


def _together(ours: engine.Engine, pairs: Sequence[engine.TokenisedPair]) -> Any:
    try:
        return ours.forward(pairs)
    except ValueError:
        # T5 refuses pairs with unequal numbers of end tokens in one batch: as the batcher does, each by itself.
        return np.concatenate([ours.forward([pair]) for pair in pairs])


def load(folder: Path, runtime: str, dtype: str) -> engine.Engine | str:
    """Load for one way, or say why this model does not go that way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return engine.load(str(folder), device="cpu", dtype=dtype, runtime=runtime, threads=1)
        except EngineError as refused:
            return str(refused)


def run(families: Sequence[str], seed: int, minutes: float, report: Path) -> int:
    """Go through family after family, each for its share of the time; answers how many pairs were wrong."""
    held: list[Found] = []
    refused: dict[str, str] = {}
    for family in families:
        with tempfile.TemporaryDirectory() as room:
            folder = write(family, Path(room))
            loaded = {way: load(folder, *way) for way in WAYS}
            refused |= {f"{family}, {' '.join(way)}": one for way, one in loaded.items() if isinstance(one, str)}
            ways = [(one, Found(family, *way)) for way, one in loaded.items() if not isinstance(one, str)]
            peer = Peer(family, folder)
        held += [found for _, found in ways]
        ends = time.monotonic() + 60 * minutes / len(families)
        for turn in itertools.count():
            if time.monotonic() > ends:
                break
            drawn = draw(random.Random(f"{seed} {turn} {family}"), peer)
            expected = expect(peer, drawn)
            for ours, found in ways:
                hold(ours, drawn, expected, found)
        for _, found in ways:
            print(_line(found), flush=True)
    _write_report(report, held, refused, seed)
    return sum(len(found.beyond) + len(found.flags_wrong) for found in held)


def _line(found: Found) -> str:
    said = f"{found.family:26} {found.runtime:8} {found.dtype:8} {found.pairs:6} pairs, greatest {found.greatest:.2g}"
    for name in ("beyond", "flags_wrong"):
        if wrong := getattr(found, name):
            said += f"; {len(wrong)} {name}, such as {wrong[0]}"
    return said


def _write_report(path: Path, held: list[Found], refused: dict[str, str], seed: int) -> None:
    ways: dict[str, dict[str, Any]] = {}
    for found in held:
        way = ways.setdefault(
            f"{found.runtime} {found.dtype}",
            {"families": 0, "pairs": 0, "beyond": 0, "flags_wrong": 0, "greatest": 0.0, "in": "", "of_logit": 0.0},
        )
        way["families"] += 1
        way["pairs"] += found.pairs
        way["beyond"] += len(found.beyond)
        way["flags_wrong"] += len(found.flags_wrong)
        if found.greatest > way["greatest"]:
            way |= {"greatest": found.greatest, "in": found.family, "of_logit": found.of_logit}
    for name, way in ways.items():
        print(name, json.dumps(way))
    content = {
        "seed": seed,
        "tolerances": TOLERANCES,
        "ways": ways,
        "found": list(map(asdict, held)),
        "refused": refused,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--minutes", type=float, default=10)
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--families", nargs="*", default=list(RECIPES))
    asked.add_argument("--report", type=Path, default=Path("benchmarks/results/differential.json"))
    options = asked.parse_args()
    logging.disable(logging.WARNING)
    return 1 if run(options.families, options.seed, options.minutes, options.report) else 0


if __name__ == "__main__":
    sys.exit(main())
