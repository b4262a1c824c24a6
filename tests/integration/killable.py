"""A worker that is killed at a named stage of a job: `celery -A killable worker`. Only for tests of crashes.

The job ``killed-STAGE``, whose query is the same, kills its worker at that stage the first time it gets there.
"""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rerankq.ledger import Call
from rerankq.ledger.runner import Ledger
from rerankq_worker import engine, tasks
from rerankq_worker.cache import ScoreCache
from rerankq_worker.engine import Batcher, text_hash

app = tasks.app
MARKS = Path(os.environ["KILLED_MARKS"])
STAGES = ("received", "waiting", "tokenising", "batched", "scoring", "unstored", "stored", "completed")
HASHES = {text_hash(f"killed-{stage}"): f"killed-{stage}" for stage in STAGES}
# The tokens of the jobs that kill, by which the batches know them.
marked: dict[bytes, str] = {}


def reach(stage: str, job: str | None) -> None:
    """Die here if this is the job that kills at this stage, and it has not done so before."""
    if job != f"killed-{stage}":
        return
    try:
        (MARKS / stage).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def job_of(batch: Sequence[Any], stage: str) -> str | None:
    return next((job for pair in batch if (job := marked.get(pair.ids.tobytes())) == f"killed-{stage}"), None)


def around(owner: Any, name: str, wrap: Callable[..., Any]) -> None:
    inner = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: wrap(inner, *args, **options))


def tokenise(inner: Callable, query: str, chunks: Sequence[str], **options: Any) -> Any:
    reach("tokenising", query)
    pairs = inner(query, chunks, **options)
    if query in HASHES.values():
        marked.update((pair.ids.tobytes(), query) for pair in pairs)
    return pairs


def launch(inner: Callable, batch: Sequence[Any]) -> Any:
    reach("scoring", job_of(batch, "scoring"))
    return inner(batch)


def load(inner: Callable, *args: Any, **options: Any) -> Any:
    loaded = inner(*args, **options)
    around(loaded, "tokenise", tokenise)
    around(loaded, "launch", launch)
    return loaded


def ask(inner: Callable, ledger: Ledger, call: Call) -> Any:
    if call.script == "claim":
        reach("received", call.args[0])
    answer = inner(ledger, call)
    if call.script == "claim":
        reach("waiting", call.args[0])
    if call.script == "complete":
        reach("completed", call.args[0])
    return answer


def submit(inner: Callable, batcher: Batcher, pairs: Sequence[Any], **options: Any) -> Any:
    ticket = inner(batcher, pairs, **options)
    reach("batched", job_of(pairs, "batched"))
    return ticket


def write(inner: Callable, scores: ScoreCache, fingerprint: str, query: bytes, *rest: Any) -> None:
    reach("unstored", HASHES.get(query))
    inner(scores, fingerprint, query, *rest)
    reach("stored", HASHES.get(query))


around(engine, "load", load)
around(Ledger, "ask", ask)
around(Batcher, "submit", submit)
around(ScoreCache, "write", write)
