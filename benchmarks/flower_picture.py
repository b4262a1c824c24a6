"""What does a person see of jobs in Flower?

    python benchmarks/flower_picture.py [PICTURE.png] [--page tasks]

Starts Redis, a worker and Flower as ``rerankq up`` does, has about thirty jobs ranked, some of them failing, expiring,
cancelled or known already, and takes a picture of Flower's page with a headless Chromium. Leaves with status 2 where
there is none.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gear.texts import DATA, Question, need, questions
from gear.workers import POISONABLE, deployment, kept_running, python_path

from rerankq import Client, RerankJob
from rerankq.local import worker_command
from rerankq.local.embedded import free_port
from rerankq.local.processes import SupervisedProcess
from rerankq.local.stack import FLOWER_ENVIRONMENT, flower_command, flower_is_installed

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 300


def jobs(asked: list[Question]) -> list[RerankJob]:
    """Thirty jobs of all sorts; the known ones rank pairs that others have had scored."""
    plain = [one.job(priority="bulk" if n % 2 else "interactive") for n, one in enumerate(asked[:22])]
    failing = [RerankJob(query=one.query, chunks=["broken", *one.chunks]) for one in asked[22:24]]
    expiring = [one.job(priority="bulk", deadline_s=0.001) for one in asked[24:26]]
    skipped = [one.job(skip_at_or_below=1000) for one in asked[26:27]]
    return [*plain, *failing, *expiring, *skipped]


def known(asked: list[Question]) -> list[RerankJob]:
    return [one.job(top_k=3) for one in asked[:3]]


def wait_for_flower(port: int) -> None:
    ends = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=2):
                return
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)


def take_picture(browser: str, url: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={profile}", "--window-size=1600,1000", "--virtual-time-budget=8000"]
        subprocess.run([*command, f"--screenshot={path}", url], check=True, timeout=120, capture_output=True)


@contextmanager
def busy_flower(asked: list[Question]) -> Iterator[str]:
    port = free_port(5555)
    with deployment(app="poisonable", PYTHONPATH=python_path(POISONABLE)) as (client, _):
        environment = {**worker_command.environment(client.settings), **FLOWER_ENVIRONMENT}
        with kept_running(SupervisedProcess("Flower", flower_command(port), environment, quiet=True)):
            # Flower knows only what happened while it was there.
            wait_for_flower(port)
            rank_all_sorts(client, asked)
            yield f"http://127.0.0.1:{port}"


def rank_all_sorts(client: Client, asked: list[Question]) -> None:
    ids = client.submit_many(jobs(asked))
    cancelled = client.submit(asked[27].job(priority="bulk"))
    client.cancel(cancelled)
    endings = list(client.as_completed([*ids, cancelled], timeout=PATIENCE_S))
    endings += client.as_completed(client.submit_many(known(asked)), timeout=PATIENCE_S)
    kinds = collections.Counter(type(ending).__name__ for _, ending in endings)
    print(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    time.sleep(1.0)  # events travel in batches


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("picture", type=Path, nargs="?", default=Path(tempfile.gettempdir()) / "flower.png")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--page", default="tasks", help="tasks, workers, or task/ID")
    parser.add_argument("--quick", action="store_true", help="the same: it is quick")
    args = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None or not flower_is_installed():
        print("skipped: needs Flower (pip install 'rerankq[flower]') and a Chromium", file=sys.stderr)
        return 2
    need(args.data, "selqa")
    asked = questions(args.data, "selqa", count=28, depth=12)
    with busy_flower(asked) as url:
        take_picture(browser, f"{url}/{args.page}", args.picture)
    print(f"Flower's page: {args.picture}")
    return 0 if args.picture.is_file() else 1


if __name__ == "__main__":
    raise SystemExit(main())
