"""infinity_emb as its users run it: a server of its own environment, asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rerankq.local.processes import SupervisedProcess

from .model_process import BUNDLED, Logits
from .texts import Question
from .workers import kept_running, until

START_S, PATIENCE_S = 180, 1800
# Requests in flight at a time; the server forms its batches from all of them.
AT_ONCE = 32


def program_of(environment: Path) -> Path:
    """Find the server's program; leaves with status 2 where it is not there."""
    program = environment / "bin" / "infinity_emb"
    if not program.is_file():
        print(f"skipped: no {program}; --infinity names a virtual environment with infinity_emb[server,torch] in it")
        sys.exit(2)
    return program


def version_of(environment: Path) -> str:
    """Ask the environment which version it has."""
    ask = "import importlib.metadata as m; print(m.version('infinity_emb'), 'torch', m.version('torch'))"
    return subprocess.run(
        [environment / "bin" / "python", "-c", ask], check=True, capture_output=True, text=True
    ).stdout.strip()


@contextmanager
def infinity(environment: Path) -> Iterator[Callable[[Sequence[Question]], Logits]]:
    """Serve the bundled model in float32, everything else as it comes, for as long as a ``with`` block.

    Gives a function that asks for the raw logits of questions, many requests at a time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"v2 --model-id {BUNDLED} --served-model-name bundled --device cpu --engine torch --dtype float32"
    # Its warm-up times batches of the greatest length, minutes on a CPU; it is warmed as all others.
    words += f" --no-model-warmup --host 127.0.0.1 --port {port}"
    command = [str(program_of(environment)), *words.split()]
    # Its environment, not ours: packages of ours on its path would be imported before its own.
    variables = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": "", "PATH": _path_with(environment)}
    part = SupervisedProcess("infinity", command, variables, quiet=True)
    address = f"http://127.0.0.1:{port}"
    with kept_running(part), ThreadPoolExecutor(AT_ONCE) as pool:
        until(lambda: _answers(f"{address}/health"), [part], seconds=START_S)
        yield lambda asked: list(pool.map(lambda one: _rerank(address, one), asked))


def _path_with(environment: Path) -> str:
    return os.pathsep.join([str(environment / "bin"), os.environ.get("PATH", "")])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _rerank(address: str, question: Question) -> list[float]:
    texts = [text for _, text in question.pairs]
    body = {"model": "bundled", "query": question.query, "documents": texts, "raw_scores": True}
    request = urllib.request.Request(
        f"{address}/rerank", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        found = json.load(answer)["results"]
    by_index = {one["index"]: float(one["relevance_score"]) for one in found}
    return [by_index[at] for at in range(len(texts))]
