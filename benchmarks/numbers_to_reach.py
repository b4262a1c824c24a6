"""Which of the numbers to reach are reached? One table out of what the benchmarks left in ``results/``.

    python benchmarks/numbers_to_reach.py [--quick]

Measures nothing: each row names the command that does. Prints a table, and writes it to ``results/numbers.md``. With
``--quick`` it reads the quick results, which show only that a row can be read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gear.report import RESULTS

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A number to reach: where it is found, and between which bounds it should lie."""

    what: str
    result: str
    read: Callable[[Answer], float]
    command: str
    least: float | None = None
    most: float | None = None

    def target(self) -> str:
        return " and ".join(
            f"{sign} {bound:,g}" for sign, bound in (("≥", self.least), ("≤", self.most)) if bound is not None
        )

    def reached(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def ratio(name: str) -> Callable[[Answer], float]:
    return lambda answer: float(answer["ratios"][name])


def deeper(what: str) -> Callable[[Answer], float]:
    """What something costs with the most jobs waiting, against the least."""
    return lambda answer: float(next(value for name, value in answer["ratios"].items() if name.startswith(what)))


def fastest_share(answer: Answer) -> float:
    return float(max(way["share_of_matrix_product"] for way in answer["bfloat16"]["ways"].values()))


def padding(way: str) -> Callable[[Answer], float]:
    return lambda answer: float(answer["float32"]["ways"][way]["padding"])


def known(fusion: str) -> Callable[[Answer], float]:
    return lambda answer: float(answer["known_pairs_per_second"][fusion]["worker"]["median"])


def full_length_share(answer: Answer) -> float:
    ways = answer["shapes"]["bge-m3"]["ways"]
    return float(next(way["share_of_ceiling"] for name, way in ways.items() if "as long as they can be" in name))


def least_gain(answer: Answer) -> float:
    return float(min(shape["ratios"]["unpadded ÷ padded"] for shape in answer["shapes"].values()))


THROUGHPUT = "throughput.py"
WITH_INFINITY = "throughput.py --infinity ENV"
OURS = "throughput.py --dtype auto"
ROWS = (
    Row("bulk jobs ÷ the same engine, no queue", "throughput", ratio("rerankq ÷ the engine"), THROUGHPUT, 0.95),
    Row("bulk jobs ÷ one plain predict, float32", "throughput", ratio("rerankq ÷ one predict"), THROUGHPUT, 1.4),
    Row("bulk jobs, our defaults ÷ the usual task", "throughput.auto", ratio("rerankq ÷ the usual task"), OURS, 3.5),
    Row("bulk jobs ÷ infinity over HTTP", "throughput", ratio("rerankq ÷ infinity over HTTP"), WITH_INFINITY, 2.5),
    Row("forward passes ÷ bf16 matrix product", "forward", fastest_share, "forward.py", 0.6),
    Row("tokens computed ÷ real, padded", "forward", padding("padded"), "forward.py", most=1.03),
    Row("tokens computed ÷ real, unpadded", "forward", padding("unpadded"), "forward.py", most=1.0),
    Row("known pairs ÷ computing them", "cached", ratio("known ÷ computed, model, worker's clock"), "cached.py", 30),
    Row("known pairs/s, fusion model", "cached", known("model"), "cached.py", 20_000),
    Row("known pairs/s, with the token signal", "cached", known("default"), "cached.py", 10_000),
    Row("idle: ms beyond the forward pass, median", "latency", lambda a: a["beyond_inference_ms"]["median"],
        "latency.py", most=10),
    Row("interactive p95 under a bulk backlog ÷ idle", "priorities", ratio("p95 under a bulk backlog ÷ idle p95"),
        "priorities.py", most=3),
    Row("bulk's share under an interactive flood", "priorities", lambda a: a["flood"]["bulk_share_of_tokens"],
        "priorities.py", 0.15, 0.25),
    Row("ledger's cost a job, most waiting ÷ least", "depth", deeper("a whole job, the server's CPU"), "depth.py",
        most=1.5),
    Row("a worker's CPU a job, most waiting ÷ least", "depth", deeper("a worker, its CPU time"), "depth.py", most=1.5),
    Row("jobs of 20 KB submitted a second", "submitting", lambda a: a["jobs_per_second"]["RerankJob"]["median"],
        "submitting.py", 4000),
    Row("8 workers with the stub ÷ linear", "scaling", ratio("8 workers ÷ linear"), "scaling.py", 0.95),
    Row("import rerankq: seconds", "memory", lambda a: a["import_rerankq"]["seconds"], "memory.py", most=0.5),
    Row("import rerankq: MB", "memory", lambda a: a["import_rerankq"]["resident_mib"] * 1.048576, "memory.py", most=60),
    Row("GPU: engine ÷ bf16 ceiling, bge-m3, 512 tokens", "gpu_engine", full_length_share, "gpu_engine.py", 0.5),
    Row("GPU: unpadded ÷ padded, least of the shapes", "gpu_engine", least_gain, "gpu_engine.py", 1.3),
    Row("GPU: worker end to end ÷ engine alone", "gpu_worker", ratio("worker, end to end ÷ engine alone"),
        "gpu_worker.py", 0.9),
)  # fmt: skip


def line_of(row: Row, answer: Answer | None) -> tuple[str, ...]:
    """Write a row of the table.

    >>> row = Row("a share", "x", ratio("ours"), "x.py", least=0.5)
    >>> line_of(row, {"ratios": {"ours": 0.61}, "machine": {"load_before": 0.1}})
    ('a share', '≥ 0.5', '0.61', 'yes', '0.1', '`x.py`')
    >>> line_of(row, None)
    ('a share', '≥ 0.5', 'not measured', '', '', '`x.py`')
    """
    head, command = (row.what, row.target()), f"`{row.command}`"
    try:
        value = row.read(answer or {})
    except (KeyError, StopIteration):
        return (*head, "not measured", "", "", command)
    load = (answer or {}).get("machine", {}).get("load_before", "")
    return (*head, f"{value:,.4g}", "yes" if row.reached(value) else "NO", str(load), command)


def answer_of(name: str, *, quick: bool) -> Answer | None:
    path = RESULTS / (f"{name}.quick.json" if quick else f"{name}.json")
    answer: Answer | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return answer


def table(*, quick: bool) -> str:
    head = ("what", "target", "measured", "reached", "load before", "measured by")
    lines = [head, ("---",) * len(head), *(line_of(row, answer_of(row.result, quick=quick)) for row in ROWS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="read the quick results")
    args = parser.parse_args()
    said = table(quick=args.quick)
    print(said)
    (RESULTS / ("numbers.quick.md" if args.quick else "numbers.md")).write_text(said, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
