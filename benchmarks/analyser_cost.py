"""What does it cost to analyse a chunk, against which libraries, and how much of it does remembering save?

    python benchmarks/analyser_cost.py [--data ../shared/data] [--chunks 400] [--rounds 5]

Real abstracts (scifact, English) and articles of law (stard-zh, Chinese). Every figure is the median over the rounds,
in which the rivals take turns. Prints ratios and writes benchmarks/results/analyser_cost.json. The rivals that the
package does not need, jieba and snowballstemmer, are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import rjieba
import Stemmer

from rerankq_worker.fusion import Analyser, analyse, token_signal, warm
from rerankq_worker.fusion.analyser import _word

HERE = Path(__file__).parent
COVERAGE = SimpleNamespace(
    token_rule="coverage", boosts={"title": 2.0, "keywords": 5.0, "questions": 6.0, "content": 1.0}
)
RAGFLOW = SimpleNamespace(token_rule="ragflow", boosts={})


def corpus(folder: Path, chunks: int) -> list[SimpleNamespace]:
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(chunks), strict=False)]
    return [SimpleNamespace(text=r["text"], title=r["title"], keywords=[], questions=[], tokens=None) for r in rows]


def queries(folder: Path, count: int) -> list[str]:
    with gzip.open(folder / "queries.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turns(rivals: dict[str, Callable[[], object]], rounds: int, chunks: int) -> dict[str, float]:
    """Median microseconds per chunk, by rival."""
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, work in rivals.items():
            taken[name].append(seconds(work))
    return {name: round(statistics.median(times) / chunks * 1e6, 1) for name, times in taken.items()}


def stemmers(words: list[list[str]]) -> dict[str, Callable[[], object]]:
    fast = Stemmer.Stemmer("english", 0)
    rivals: dict[str, Callable[[], object]] = {"PyStemmer": lambda: [fast.stemWords(chunk) for chunk in words]}
    if importlib.util.find_spec("snowballstemmer"):
        # Not snowballstemmer.stemmer(): that one hands out PyStemmer where it is installed.
        from snowballstemmer.english_stemmer import EnglishStemmer  # noqa: PLC0415 - may not be installed

        slow = EnglishStemmer()
        if [fast.stemWords(chunk) for chunk in words[:50]] != [slow.stemWords(chunk) for chunk in words[:50]]:
            print("  the two stemmers disagree")
        rivals["snowballstemmer"] = lambda: [slow.stemWords(chunk) for chunk in words]
    return rivals


def segmenters(texts: list[str]) -> dict[str, Callable[[], object]]:
    rivals: dict[str, Callable[[], object]] = {"rjieba": lambda: [rjieba.cut_for_search(text) for text in texts]}
    if importlib.util.find_spec("jieba"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import jieba  # noqa: PLC0415 - may not be installed
        jieba.setLogLevel(60)
        jieba.initialize()
        same = sum(jieba.lcut_for_search(text) == rjieba.cut_for_search(text) for text in texts)
        print(f"  rjieba and jieba cut {same} of {len(texts)} chunks alike")
        rivals["jieba"] = lambda: [jieba.lcut_for_search(text) for text in texts]
    return rivals


def analysis(chunks: list[SimpleNamespace], asked: list[str]) -> dict[str, Callable[[], object]]:
    """From nothing known to everything known, then the whole signal of jobs of all chunks."""
    texts = [f"{chunk.title}\n{chunk.text}" for chunk in chunks]
    known = Analyser()

    def from_nothing() -> None:
        _word.cache_clear()
        for text in texts:
            analyse(text)

    def signal(fusion: SimpleNamespace) -> None:
        for query in asked:
            token_signal(query, None, chunks, fusion, known)

    for fusion in (COVERAGE, RAGFLOW):
        signal(fusion)
    return {
        "analyse, no word known": from_nothing,
        "analyse, words known": lambda: [analyse(text) for text in texts],
        "token signal, chunks known": lambda: signal(COVERAGE),
        "token signal by RAGFlow's rule, chunks known": lambda: signal(RAGFLOW),
    }


def machine() -> dict[str, object]:
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text(encoding="utf-8")) if cpu.exists() else None
    names = ("rjieba", "jieba", "PyStemmer", "snowballstemmer", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(_module(name))}
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "libraries": versions,
    }


def _module(distribution: str) -> str:
    return "Stemmer" if distribution == "PyStemmer" else distribution


def measure(folder: Path, rivals_of: Callable[[list[SimpleNamespace]], dict[str, Callable[[], object]]], args) -> dict:
    chunks = corpus(folder, args.chunks)
    asked = queries(folder, 5)
    characters = sum(len(chunk.title) + len(chunk.text) for chunk in chunks) / len(chunks)
    print(f"{folder.name}: {len(chunks)} chunks, {characters:.0f} characters each")
    per_chunk = in_turns(rivals_of(chunks), args.rounds, len(chunks))
    stages = analysis(chunks, asked)
    per_chunk |= in_turns({n: w for n, w in stages.items() if n.startswith("analyse")}, args.rounds, len(chunks))
    signals = {n: w for n, w in stages.items() if n.startswith("token signal")}
    per_chunk |= in_turns(signals, args.rounds, len(chunks) * len(asked))
    for name, cost in per_chunk.items():
        print(f"  {name:<45} {cost:>9.1f} µs a chunk {1e6 / cost:>12,.0f} chunks/s")
    return {"chunks": len(chunks), "characters_per_chunk": round(characters), "microseconds_per_chunk": per_chunk}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--chunks", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not (args.data / "scifact").is_dir():
        print(f"no judged collections in {args.data}: name their folder with --data")
        return 2
    warm()
    english = measure(
        args.data / "scifact", lambda c: stemmers([re.findall("[a-z]+", x.text.lower()) for x in c]), args
    )
    chinese = measure(args.data / "stard-zh", lambda c: segmenters([x.text for x in c]), args)
    ratios = {}
    for cost, fast, slow in (
        (english["microseconds_per_chunk"], "PyStemmer", "snowballstemmer"),
        (chinese["microseconds_per_chunk"], "rjieba", "jieba"),
    ):
        if slow in cost:
            ratios[f"{slow} / {fast}"] = round(cost[slow] / cost[fast], 1)
    for language, answer in (("English", english), ("Chinese", chinese)):
        cost = answer["microseconds_per_chunk"]
        ratio = cost["analyse, words known"] / cost["token signal, chunks known"]
        ratios[f"analysing / token signal of known chunks, {language}"] = round(ratio, 1)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio}")
    answer = {"machine": machine(), "english": english, "chinese": chinese, "ratios": ratios}
    (HERE / "results").mkdir(exist_ok=True)
    path = HERE / "results" / "analyser_cost.json"
    path.write_text(json.dumps(answer, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{machine()['cpu']}, {machine()['cores']} cores; written to {path.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
