"""Ask every question, one after the other, and print the table of numbers to reach.

    python benchmarks/every.py [--minutes 20] [--infinity ENV] [--quick]

Most wanted first: what does not begin within the minutes is left out, and said so. A question whose texts, programs or
device are absent is skipped with its own words; one that finds something wrong makes the whole fail in the end.
``crash.py`` (the chaos tests ask more) and ``flower_picture.py`` (a picture, not a number) are run by themselves.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
THROUGHPUT = "throughput.py"
QUESTIONS = (
    (THROUGHPUT,),
    ("priorities.py",),
    ("latency.py",),
    ("cached.py", "--jobs", "12"),
    ("forward.py",),
    ("runtimes.py",),
    (THROUGHPUT, "--dtype", "auto", "--rounds", "2"),
    ("depth.py",),
    ("scaling.py",),
    ("submitting.py",),
    ("memory.py",),
    ("gateway_load.py",),
    ("gpu_engine.py",),
    ("gpu_worker.py",),
    ("together.py", "--jobs", "40"),
    ("tokenising.py",),
    ("pipeline.py",),
)
DONE, WRONG, ABSENT = 0, 1, 2


def ask(command: Sequence[str]) -> int:
    """Run one question; answers its exit status."""
    print(f"\n== {' '.join(command)}", flush=True)
    began = time.monotonic()
    status = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=False).returncode
    print(f"   {time.monotonic() - began:.0f} s, {'skipped' if status == ABSENT else f'status {status}'}", flush=True)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20, help="after which no question is begun")
    parser.add_argument("--infinity", help="for throughput.py: an environment with infinity_emb in it")
    parser.add_argument("--quick", action="store_true", help="each question's own --quick")
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes
    failed, left_out = [], []
    for question in QUESTIONS:
        more = ["--infinity", args.infinity] if args.infinity and question == (THROUGHPUT,) else []
        if time.monotonic() > ends:
            left_out.append(" ".join(question))
        elif ask([*question, *more, *(["--quick"] if args.quick else [])]) not in {DONE, ABSENT}:
            failed.append(" ".join(question))
    ask(["numbers_to_reach.py", *(["--quick"] if args.quick else [])])
    if left_out:
        print(f"left out, no time: {', '.join(left_out)}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return WRONG if failed else DONE


if __name__ == "__main__":
    raise SystemExit(main())
