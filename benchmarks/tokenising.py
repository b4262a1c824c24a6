"""How fast do pairs become token ids, against encoding each pair, and what does remembering chunks save?

    python benchmarks/tokenising.py [--collection scifact] [--jobs 20] [--chunks 50] [--rounds 5] [--quick]

One thread, the bundled model's tokeniser, jobs with the chunks that BM25 found. The rivals take turns within every
round over the same jobs: the tokeniser called as sentence-transformers calls it (32 pairs at a time, padded), its bare
encoding of pairs, the query once and no chunk remembered, and all chunks remembered, with their texts hashed or hashes
given. All ids must be equal.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Both are read when the tokenisers are loaded.
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

from gear.report import keep, machine, spread
from gear.texts import DATA, Question, need, questions
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from rerankq_worker.engine import TokenisedPair, text_hash
from rerankq_worker.engine.tokenising.pair_tokeniser import PairTokeniser

MODEL = Path(__file__).resolve().parents[1] / "models" / "minilm-l6-rerank"
MAX_LENGTH, BATCH = 512, 32


def rivals(asked: Sequence[Question]) -> dict[str, Callable[[], object]]:
    wrapped = AutoTokenizer.from_pretrained(MODEL)
    bare = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    bare.no_padding()
    bare.enable_truncation(MAX_LENGTH)
    forgets, remembers = ours(cache_bytes=0), ours(cache_bytes=64 << 20)
    texts = [[chunk.model_text for chunk in one.chunks] for one in asked]
    hashes = [[text_hash(text) for text in found] for found in texts]

    def usual() -> None:
        for one in asked:
            for at in range(0, len(one.pairs), BATCH):
                wrapped(one.pairs[at : at + BATCH], padding=True, truncation=True, return_tensors="pt")

    def joined(tokeniser: PairTokeniser, known: Sequence[Sequence[bytes] | None]) -> list[TokenisedPair]:
        return [
            pair
            for one, found, keys in zip(asked, texts, known, strict=True)
            for pair in tokeniser.pairs(one.query, found, hashes=keys)
        ]

    unknown = [None] * len(asked)
    check(joined(forgets, unknown), joined(remembers, unknown), [bare.encode_batch(one.pairs) for one in asked])
    return {
        "as sentence-transformers": usual,
        "encode_batch of pairs": lambda: [[e.ids for e in bare.encode_batch(one.pairs)] for one in asked],
        "query once": lambda: joined(forgets, unknown),
        "chunks remembered": lambda: joined(remembers, unknown),
        "chunks remembered, hashes given": lambda: joined(remembers, hashes),
    }


def ours(*, cache_bytes: int) -> PairTokeniser:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return PairTokeniser(tokenizer, max_length=MAX_LENGTH, cache_bytes=cache_bytes)


def check(fresh: Sequence[TokenisedPair], known: Sequence[TokenisedPair], theirs: Sequence[Sequence[Any]]) -> None:
    expected = [encoding.ids for job in theirs for encoding in job]
    for one, other, ids in zip(fresh, known, expected, strict=True):
        if not one.ids.tolist() == other.ids.tolist() == ids:
            raise SystemExit(f"other ids than the tokeniser's own: {one.ids.tolist()}, {ids}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    asked = questions(args.data, args.collection, count=args.jobs, depth=args.chunks)
    ways = rivals(asked)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, work in ways.items():
            began = time.perf_counter()
            work()
            rates[name].append(args.jobs * args.chunks / (time.perf_counter() - began))
    figures = {name: spread(values, 0) for name, values in rates.items()}
    slow = figures["as sentence-transformers"]["median"]
    for name, figure in figures.items():
        print(f"{name:<34}{figure['median']:>12,.0f} pairs/s{figure['median'] / slow:>10.1f} times")
    ratios = {name: round(figure["median"] / slow, 1) for name, figure in figures.items()}
    return {"jobs": args.jobs, "chunks_per_job": args.chunks, "pairs_per_second": figures, "times_the_usual": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--collection", default="scifact")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--chunks", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    need(args.data, args.collection)
    if args.quick:
        args.jobs, args.rounds = 2, 1
    where = machine()
    keep("tokenising", measure(args), where, quick=args.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
