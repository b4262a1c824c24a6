"""A producer: submits its orders when they are due, waits for their endings, and keeps a journal of what it was told.

    python producing.py ORDERS.jsonl JOURNAL.jsonl STARTS_AT PATIENCE_S

It behaves as ``docs/reliability.md`` asks of producers: what was refused for now is submitted again, and a job that was
accepted and is unknown later (Redis lost its last second) too. Times are seconds since the epoch.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rerankq import Client, JobTimedOut, JobUnknown, Ranking, RerankJob, RerankqError

TRY_AGAIN_S = 0.3


class Journal:
    """Lines of JSON, each written whole."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def note(self, event: str, order: int, **more: Any) -> None:
        with self._lock:
            self._file.write(json.dumps({"event": event, "order": order, "at": time.time(), **more}) + "\n")
            self._file.flush()


def told(ending: Ranking | RerankqError) -> dict[str, Any]:
    """Write an ending down: how it was called, and for a ranking its chunks' places, logits and fused scores."""
    if not isinstance(ending, Ranking):
        return {"kind": type(ending).__name__, "said": str(ending)}
    chunks = ending.chunks
    return {
        "kind": "ranking",
        "order_of_chunks": [chunk.index for chunk in chunks],
        "logits": [chunk.model_logit for chunk in chunks],
        "scores": [chunk.score for chunk in chunks],
        "cached_pairs": ending.usage.cached_pairs,
        "pairs": ending.usage.pairs,
    }


class Bunch:
    """Orders that are submitted together."""

    def __init__(self, client: Client, journal: Journal, orders: Sequence[dict[str, Any]], patience_s: float) -> None:
        self._client = client
        self._journal = journal
        self._orders = orders
        self._ends = time.monotonic() + patience_s

    def see_through(self) -> None:
        """Submit, cancel what is to be cancelled, and wait; what is unknown is submitted again."""
        wanted = {order["number"]: order for order in self._orders}
        while wanted:
            ids = self._submit(wanted)
            self._cancel(wanted, ids)
            by_id = {one: number for number, one in ids.items()}
            try:
                for one, ending in self._client.as_completed(by_id, timeout=self._ends - time.monotonic()):
                    number = by_id[one]
                    if isinstance(ending, JobUnknown):
                        self._journal.note("unknown", number, id=one)
                        continue
                    self._journal.note("ended", number, id=one, **told(ending))
                    del wanted[number]
            except JobTimedOut:
                for number in wanted:
                    self._journal.note("unanswered", number, id=ids[number])
                return
            except RerankqError as error:
                self._journal.note("waiting-failed", next(iter(wanted)), said=str(error))
                time.sleep(TRY_AGAIN_S)

    def _submit(self, wanted: dict[int, dict[str, Any]]) -> dict[int, str]:
        jobs = [RerankJob.model_validate(order["job"]) for order in wanted.values()]
        while True:
            try:
                ids = self._client.submit_many(jobs) if len(jobs) > 1 else [self._client.submit(jobs[0])]
            except RerankqError as error:
                if not error.retryable:
                    raise
                self._journal.note("refused", next(iter(wanted)), kind=type(error).__name__)
                time.sleep(TRY_AGAIN_S)
                continue
            answer = dict(zip(wanted, ids, strict=True))
            for number, one in answer.items():
                self._journal.note("accepted", number, id=one)
            return answer

    def _cancel(self, wanted: dict[int, dict[str, Any]], ids: dict[int, str]) -> None:
        for number, order in wanted.items():
            if order["cancel_after_s"] is None:
                continue
            time.sleep(order["cancel_after_s"])
            try:
                self._journal.note("cancelled", number, state=self._client.cancel(ids[number]))
            except RerankqError as error:
                self._journal.note("not-cancelled", number, kind=type(error).__name__)


def bunches(orders: Sequence[dict[str, Any]]) -> Iterator[tuple[float, list[dict[str, Any]]]]:
    """Group orders that are due at the same moment; a cancelled one waits for nobody. Contents are told apart by job.

    >>> [(at, len(some)) for at, some in bunches([
    ...     {"at_s": 1, "cancel_after_s": None, "job": 1}, {"at_s": 1, "cancel_after_s": None, "job": 2},
    ...     {"at_s": 1, "cancel_after_s": 0.5, "job": 3}, {"at_s": 2, "cancel_after_s": None, "job": 4}])]
    [(1, 1), (1, 2), (2, 1)]
    """
    for at_s, due in groupby(sorted(orders, key=lambda order: order["at_s"]), key=lambda order: order["at_s"]):
        together = []
        for order in due:
            if order["cancel_after_s"] is None:
                together.append(order)
            else:
                yield at_s, [order]
        if together:
            yield at_s, together


def main(orders: str, journal: str, starts_at: str, patience_s: str) -> None:
    mine = [json.loads(line) for line in Path(orders).read_text(encoding="utf-8").splitlines()]
    book = Journal(Path(journal))
    threads = []
    with Client() as client:
        for at_s, some in sorted(bunches(mine), key=lambda bunch: bunch[0]):
            time.sleep(max(0.0, float(starts_at) + at_s - time.time()))
            bunch = Bunch(client, book, some, float(patience_s))
            threads.append(threading.Thread(target=bunch.see_through))
            threads[-1].start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
