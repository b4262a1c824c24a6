"""A client for batches that answers at once."""

from rerankq import BrokerUnavailable, Ranking


class FakeClient:
    """Ranks what is submitted; without a broker nothing can be asked."""

    def __init__(self, *, broker: bool = True) -> None:
        self.broker = broker
        self.jobs: dict = {}
        #: What was submitted, and how many jobs had been answered before it.
        self.order: list[tuple[str, int]] = []
        self.answered = 0

    def workers(self):
        if not self.broker:
            raise BrokerUnavailable("no broker")
        return []

    def submit_many(self, jobs):
        jobs = list(jobs)
        self.order += [(job.query, self.answered) for job in jobs]
        self.jobs |= {job.id: job for job in jobs}
        return [job.id for job in jobs]

    def as_completed(self, job_ids, timeout=None):
        for name in job_ids:
            chunks = [
                {"id": str(at), "index": at, "rank": at, "score": 0.5, "scores": {}, "model_logit": 0.0}
                for at in range(len(self.jobs[name].chunks))
            ]
            self.answered += 1
            yield name, Ranking(job_id=name, model={"name": "stub", "fingerprint": ""}, chunks=chunks)

    def forget(self, *job_ids):
        pass

    cancel = forget
