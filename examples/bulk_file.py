"""Rank every job of a file in the background: one RerankJob a line in, one ranking a line out.

RERANKQ_BROKER_URL=redis://localhost:6379/0 python examples/bulk_file.py jobs.jsonl rankings.jsonl
"""

import sys
from pathlib import Path

from rerankq import Client, Ranking, RerankJob


def main(source: str, goal: str) -> int:
    failed = 0
    with Client() as client, Path(source).open() as lines, Path(goal).open("w") as rankings:
        jobs = (RerankJob.model_validate_json(line).model_copy(update={"priority": "bulk"}) for line in lines)
        # A generator: a few hundred jobs are in memory at a time.
        ids = client.submit_many(jobs)
        for job_id, outcome in client.as_completed(ids):
            if isinstance(outcome, Ranking):
                rankings.write(outcome.model_dump_json() + "\n")
            else:
                failed += 1
                print(f"{job_id}: {outcome}", file=sys.stderr)
        # Rankings that were read need not stay in the ledger.
        client.forget(*ids)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
