"""A producer for the soak: the same mix of jobs round after round, for as long as it is let live.

    python steady.py JOBS_PER_ROUND

One client lives all the time, another one for a round alone, as a web server's and a script's do. A round is bulk and
interactive jobs with texts of their own, a cancellation, a deadline that passes, a job that is answered from the
ledger, and rankings that are forgotten; those that are not, time out.
"""

from __future__ import annotations

import itertools
import sys
import time

from rerankq import Client, Ranking, RerankJob, RerankqError

ROUND_S = 1.0
# The first round is a flood: a worker's threads and connections come as they are needed, and shall all be there.
FLOOD = 400


def jobs(turn: int, count: int) -> list[RerankJob]:
    return [
        RerankJob(
            query=f"query {turn} {number}",
            chunks=[f"chunk {at} of {turn} {number} " + "word " * (at % 20) for at in range(16)],
            fusion="default" if number % 4 else "model",
            priority="bulk" if number % 2 else "interactive",
            tenant=("", "north", "south")[number % 3],
        )
        for number in range(count)
    ]


def one_round(client: Client, turn: int, count: int) -> int:
    wanted = jobs(turn, count)
    ids = client.submit_many(wanted)
    cancelled = client.submit(wanted[0].model_copy(update={"query": f"cancelled {turn}", "priority": "bulk"}))
    client.submit(wanted[0].model_copy(update={"query": f"late {turn}", "deadline_s": 0.001}))
    try:
        client.cancel(cancelled)
    except RerankqError as error:
        print(f"not cancelled: {error}", file=sys.stderr)
    ranked = sum(isinstance(answer, Ranking) for _, answer in client.as_completed(ids, timeout=120))
    client.submit(wanted[0])
    client.forget(*ids[1 : count // 2])
    with Client(client.settings) as short_lived:
        short_lived.result(ids[0], timeout=60)
    return ranked


def main(count: int) -> None:
    with Client() as client:
        for turn in itertools.count():
            began = time.monotonic()
            print(one_round(client, turn, count if turn else FLOOD), flush=True)
            time.sleep(max(0.0, ROUND_S - (time.monotonic() - began)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
