"""What do a waiting job, a ranking and a score take of Redis's memory, by chunks?

    python benchmarks/ledger_size.py [--characters 1000] [--chunks 1 10 50 100 200] [--pairs 5000] [--quick]

Jobs of chunks of so many characters are submitted while no worker runs, then ranked by one with the stub engine under
the profile ``default``. Counted is what Redis says of each key (``MEMORY USAGE``), keys that all jobs share among them;
buffers of connections are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import redis
from gear.report import keep, machine, show, verdict
from gear.workers import forget_settings, kept_running, until, worker_part

from rerankq import Client, Ranking, RerankJob, Settings
from rerankq.local.embedded import EmbeddedRedis
from rerankq.local.stack import settings_for

WORDS = "tide moon sea water coast sun pull rise fall day night wind wave sand ship".split()  # noqa: SIM905
PATIENCE_S = 600


def text(number: int, characters: int) -> str:
    """A text of so many characters, like no other."""
    words = [WORDS[(number + place * place) % len(WORDS)] for place in range(characters // 4)]
    return f"{number} {' '.join(words)}"[:characters]


def jobs_of(count: int, chunks: int, characters: int) -> Iterator[RerankJob]:
    for number in range(count):
        texts = [text(number * chunks + at, characters) for at in range(chunks)]
        yield RerankJob(query=f"why does the tide rise on day {number}?", chunks=texts, priority="bulk")


def held(database: redis.Redis) -> int:
    """Bytes of all keys of ours."""
    return sum(database.memory_usage(key, samples=0) or 0 for key in database.scan_iter("rerankq:*", count=1000))


def measured(count: int, chunks: int, characters: int) -> tuple[dict[str, float], list[str]]:
    """Bytes of a job that waits and of one that is done, and of a pair's score."""
    with EmbeddedRedis() as server:
        settings = settings_for(server.url, Settings(_env_file=None, model="stub:0", result_ttl_s=36_000))
        ledger, scores = redis.Redis.from_url(settings.ledger), redis.Redis.from_url(settings.cache)
        with Client(settings) as client:
            ids = client.submit_many(jobs_of(count, chunks, characters))
            waiting = held(ledger)
            with kept_running(worker_part(settings, "w")) as worker:
                until(lambda: bool(client.workers()), [worker], seconds=180)
                endings = dict(client.as_completed(ids, timeout=PATIENCE_S))
            done = held(ledger)
        faults = [f"{one}: {ending}" for one, ending in endings.items() if not isinstance(ending, Ranking)]
        cached = held(scores)
        ledger.close()
        scores.close()
    return {
        "waiting_bytes": round(waiting / count),
        "done_bytes": round(done / count),
        "score_bytes": round(cached / count / chunks, 1),
    }, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--characters", type=int, default=1000, help="of a chunk")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 10, 50, 100, 200], help="of a job")
    parser.add_argument("--pairs", type=int, default=5_000, help="for each number of chunks")
    parser.add_argument("--quick", action="store_true", help="1000 pairs, of 1 and 50 chunks")
    args = parser.parse_args()
    if args.quick:
        args.chunks, args.pairs = [1, 50], 1000
    here = machine()
    forget_settings()
    by_chunks: dict[str, Any] = {}
    wrong: list[str] = []
    for chunks in args.chunks:
        count = max(20, min(500, args.pairs // chunks))
        by_chunks[str(chunks)], faults = measured(count, chunks, args.characters)
        wrong += faults
        print(chunks, by_chunks[str(chunks)], flush=True)
    answer = {"characters": args.characters, "by_chunks": by_chunks}
    show(answer)
    keep("ledger_size", answer, here, quick=args.quick)
    return verdict(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
