"""The ledger against a slow and obvious twin: whatever is asked of both, in any order, they stay equal."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rerankq.contract import ENDED, ModelName, Ranking
from rerankq.ledger import Ledger, LedgerLimits, NewJob, calls, connect
from rerankq.ledger.lease_policy import SPARED_AT_MOST

TERMS = LedgerLimits("twin", result_ttl_s=1_000, doorbell_window=2, max_queued_pairs=14, max_attempts=2, lease_s=1_000)
QUEUES = ("rerankq.interactive", "rerankq.bulk")
TENANTS = ("", "a")
LINES = tuple(itertools.product(QUEUES, TENANTS))
WORKERS = ("w1", "w2")
IDS = tuple(f"j{number}" for number in range(6))
# Seconds that no example lives to see; how they pass is told, not waited for.
FAR, FARTHER = 1_000.0, 2_000.0
#: Sequences of up to 50 steps; `make stateful` goes on for longer.
EXAMPLES = int(os.environ.get("STATEFUL_EXAMPLES", "60"))


@dataclasses.dataclass
class TwinJob:
    content: str
    queue: str
    tenant: str
    pairs: int
    priority: str
    deadline: float | None
    order: int
    payload: bytes
    state: str = "queued"
    sent: int = 0
    lost: bool = False
    owner: str = ""
    fence: int = 0
    claims: int = 0
    deaths: int = 0
    forgiven: int = 0
    suspect: int = 0
    spared: int = 0
    lease_over: bool = False
    pairs_done: int = 0
    error_type: str = ""
    ranked: bool = False

    @property
    def line(self) -> tuple[str, str]:
        return self.queue, self.tenant

    @property
    def expires(self) -> bool:
        return self.deadline == 0

    @property
    def ahead(self) -> bool:
        return self.claims > 0 or self.lost


class Twin:
    """The table of states, as plainly as it can be written."""

    def __init__(self) -> None:
        self.jobs: dict[str, TwinJob] = {}
        self.alone: dict[str, str] = {}
        self.registered: set[str] = set()
        self.accused: dict[str, list[tuple[str, int, bool]]] = defaultdict(list)
        self.clock = itertools.count(1)

    def waiting(self, queue: str, tenant: str) -> list[str]:
        line = [(not job.ahead, job.order, name) for name, job in self._line(queue, tenant, sent=False)]
        return [name for *_, name in sorted(line)]

    def sent(self, queue: str, tenant: str) -> list[str]:
        return [name for name, _ in self._line(queue, tenant, sent=True)]

    def _line(self, queue: str, tenant: str, *, sent: bool) -> Iterator[tuple[str, TwinJob]]:
        for name, job in self.jobs.items():
            if job.state == "queued" and bool(job.sent) == sent and job.line == (queue, tenant):
                yield name, job

    def room(self, queue: str, tenant: str) -> int:
        again = sum(job.ahead for _, job in self._line(queue, tenant, sent=False))
        free = TERMS.doorbell_window - len(self.sent(queue, tenant))
        return min(len(self.waiting(queue, tenant)), max(free, again))

    def backlog(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for job in self.jobs.values():
            if job.state == "queued":
                for field in ("*", job.queue, f"{job.queue}|{job.tenant}"):
                    counts[field] += job.pairs
        return counts

    def state(self, name: str) -> str:
        self.settle(name)
        return self.jobs[name].state if name in self.jobs else "unknown"

    def settle(self, name: str) -> None:
        job = self.jobs.get(name)
        if job is not None and job.state == "queued" and job.deadline == 0:
            self.end(job, "expired", "JobExpired")

    def end(self, job: TwinJob, state: str, error_type: str = "") -> None:
        job.state, job.error_type, job.owner, job.sent = state, error_type, "", 0

    def queue_again(self, job: TwinJob, *, suspect: int) -> None:
        job.state, job.owner, job.suspect, job.lease_over, job.sent = "queued", "", suspect, False, 0

    def take_back(self, owner: str) -> None:
        """It lives: whatever was accused because of its silence is not any more."""
        if self.alone.get(owner) == "":
            del self.alone[owner]
        for name, fence, death in self.accused.pop(owner, []):
            job = self.jobs.get(name)
            if job is None or job.state not in {"queued", "running", "dead"} or fence <= job.forgiven:
                continue
            job.suspect = max(0, job.suspect - 1)
            if death:
                job.deaths = max(0, job.deaths - 1)
                if job.state == "dead":
                    job.error_type = ""
                    self.queue_again(job, suspect=job.suspect)

    def leave_device(self, name: str) -> None:
        owner = self.jobs[name].owner
        if self.alone.get(owner) == name:
            del self.alone[owner]

    def may_send(self, name: str) -> bool:
        job = self.jobs[name]
        first = self.waiting(*job.line)[0] == name
        if first and len(self.sent(*job.line)) < TERMS.doorbell_window:
            job.sent = next(self.clock)
        return bool(job.sent)

    def submit(self, new_job: NewJob) -> tuple[str, bool]:
        job = self.jobs.get(new_job.id)
        if job is not None:
            if job.content != new_job.content:
                return "conflict", False
            state = self.state(new_job.id)
            if state == "queued":
                if job.deadline is not None:
                    job.deadline = None if new_job.deadline_s is None else max(job.deadline, new_job.deadline_s)
                if new_job.priority == "interactive" and job.priority == "bulk":
                    job.priority, job.queue, job.sent = "interactive", new_job.queue, 0
                    return state, self.may_send(new_job.id)
                return state, False
            if state in {"running", "done", "dead"}:
                return state, False
        waiting = self.backlog()["*"]
        if waiting and waiting + new_job.pairs > TERMS.max_queued_pairs:
            return "full", False
        self.jobs[new_job.id] = TwinJob(
            *(new_job.content, new_job.queue, new_job.tenant, new_job.pairs, new_job.priority, new_job.deadline_s),
            order=next(self.clock),
            payload=new_job.payload,
        )
        return "queued", self.may_send(new_job.id)

    def claim(self, name: str, owner: str) -> str | TwinJob:
        state = self.state(name)
        if state != "queued":
            return state
        self.take_back(owner)
        job = self.jobs[name]
        job.state, job.owner, job.sent, job.pairs_done, job.lease_over = "running", owner, 0, 0, False
        job.deadline = None  # started in time
        job.claims += 1
        return job

    def holds(self, name: str, fence: int) -> bool:
        job = self.jobs.get(name)
        return job is not None and job.state == "running" and job.fence == fence

    def refusal(self, name: str) -> str:
        return self.jobs[name].state if name in self.jobs else "unknown"

    def renew(self, name: str, fence: int, done: int) -> bool:
        if self.holds(name, fence):
            self.jobs[name].lease_over, self.jobs[name].pairs_done = False, done
            return True
        return False

    def isolate(self, name: str, fence: int, owner: str) -> bool:
        if self.holds(name, fence):
            self.alone[owner] = name
            return True
        return False

    def complete(self, name: str, fence: int) -> str:
        if not self.holds(name, fence):
            return self.refusal(name)
        job = self.jobs[name]
        self.leave_device(name)
        self.end(job, "done")
        job.pairs_done, job.ranked = job.pairs, True
        return "done"

    def fail(self, name: str, fence: int) -> str:
        if not self.holds(name, fence):
            return self.refusal(name)
        self.leave_device(name)
        self.end(self.jobs[name], "failed", "JobFailed")
        return "failed"

    def hand_back(self, held: Iterable[tuple[str, int]]) -> int:
        handed = [name for name, fence in held if self.holds(name, fence)]
        for name in handed:
            self.leave_device(name)
            self.queue_again(self.jobs[name], suspect=self.jobs[name].suspect)
        return len(handed)

    def cancel(self, name: str) -> str:
        state = self.state(name)
        if state not in {"queued", "running"}:
            return state
        if state == "running":
            self.leave_device(name)
        self.end(self.jobs[name], "cancelled", "JobCancelled")
        return "cancelled"

    def forget(self, name: str, *, dead: bool) -> str:
        state = self.state(name)
        if state in ({"dead"} if dead else {"done", "failed", "expired", "cancelled"}):
            del self.jobs[name]
        return state

    def retry_dead(self, name: str) -> tuple[str, bool]:
        state = self.state(name)
        if state != "dead":
            return state, False
        job = self.jobs[name]
        self.queue_again(job, suspect=1)
        job.forgiven = job.fence
        job.claims, job.deaths, job.spared, job.pairs_done, job.error_type, job.lost = 0, 0, 0, 0, "", False
        return "queued", self.may_send(name)

    def recover(self, worker: str, waiting: list[tuple[str, int]]) -> tuple[int, int, int]:
        """It has ended for certain: nothing is waited for, and nothing is ever taken back."""
        self.registered.discard(worker)
        self.accused.pop(worker, None)
        alone = self.alone.pop(worker, None)
        spared = suspects = dead = 0
        for name, job in self.jobs.items():
            if job.state != "running" or job.owner != worker:
                continue
            only_waited = (name, job.fence) in waiting and alone is None and job.spared < SPARED_AT_MOST
            job.spared += only_waited
            innocent = only_waited or alone not in {None, name}
            job.suspect += not innocent
            job.deaths += alone == name
            spared += innocent
            if alone == name and job.deaths >= TERMS.max_attempts:
                dead += 1
                self.end(job, "dead", "JobDead")
                continue
            suspects += not innocent
            self.queue_again(job, suspect=job.suspect)
        return spared, suspects, dead

    def sweep(self, *, watched: bool, held_by_broker: dict[str, int]) -> tuple[int, int, int, int]:
        lapsed = dead = 0
        for name, job in self.jobs.items():
            if job.state != "running" or not job.lease_over:
                continue
            alone = self.alone.get(job.owner)
            last = alone == name and job.deaths + 1 >= TERMS.max_attempts
            if not watched or (last and job.owner in self.registered):
                job.lease_over = False  # it has a while yet
                continue
            lapsed += 1
            if alone not in {None, name}:
                self.queue_again(job, suspect=job.suspect)
                continue
            job.suspect += 1
            self.accused[job.owner].append((name, job.fence, alone == name))
            if alone == name:
                self.alone[job.owner] = ""
                job.deaths += 1
                if job.deaths >= TERMS.max_attempts:
                    dead += 1
                    self.end(job, "dead", "JobDead")
                    continue
            self.queue_again(job, suspect=job.suspect)
        self.alone = {
            owner: name
            for owner, name in self.alone.items()
            if owner in self.registered or (name in self.jobs and self.jobs[name].owner == owner)
        }
        before = Counter(job.state for job in self.jobs.values())["expired"]
        for name in self.jobs:
            self.settle(name)
        expired = Counter(job.state for job in self.jobs.values())["expired"] - before
        doorbells = 0
        for queue, messages in held_by_broker.items():
            out = sorted(
                (job for job in self.jobs.values() if job.state == "queued" and job.sent and job.queue == queue),
                key=lambda job: job.sent,
            )
            for job in out[: max(0, len(out) - messages)]:
                job.sent, job.lost = 0, True
                doorbells += 1
        return lapsed, dead, expired, doorbells


@dataclasses.dataclass(frozen=True)
class Held:
    """All that the ledger's keys hold, read in one round trip: it is read after every step."""

    now: int
    names: set[str]
    jobs: dict[str, tuple[dict[str, str], int]]
    waiting: dict[tuple[str, str], list[str]]
    sent: dict[tuple[str, str], list[str]]
    backlog: dict[str, str]
    running: set[str]
    dead: set[str]
    deadlines: set[str]
    alone: dict[str, str]
    accused: dict[str, set[str]]
    tenants: dict[str, set[str]]
    queues: set[str]

    @classmethod
    def read(cls, ledger: Ledger, names: set[str]) -> Held:
        """Read these jobs' records, the names of all there are, and every line, set and counter."""
        pipe = ledger.redis.pipeline(transaction=False)
        pipe.time()
        pipe.keys("rerankq:job:*")
        ordered = sorted(names)
        for name in ordered:
            pipe.hgetall(f"rerankq:job:{name}")
            pipe.ttl(f"rerankq:job:{name}")
        for field, line in itertools.product(("waiting", "sent"), LINES):
            pipe.zrange(":".join(["rerankq", field, *filter(None, line)]), 0, -1)
        pipe.hgetall("rerankq:backlog")
        for key in ("running", "dead", "deadlines"):
            pipe.zrange(f"rerankq:{key}", 0, -1)
        pipe.hgetall("rerankq:alone")
        for worker in WORKERS:
            pipe.smembers(f"rerankq:accused:{worker}")
        for queue in QUEUES:
            pipe.smembers(f"rerankq:tenants:{queue}")
        pipe.smembers("rerankq:queues")
        answers = iter(_words(pipe.execute()))
        return cls(
            now=next(answers)[0],
            names={key.removeprefix("rerankq:job:") for key in next(answers)},
            jobs={name: (next(answers), next(answers)) for name in ordered},
            **{field: {line: next(answers) for line in LINES} for field in ("waiting", "sent")},
            backlog=next(answers),
            running=set(next(answers)),
            dead=set(next(answers)),
            deadlines=set(next(answers)),
            alone=next(answers),
            accused={worker: next(answers) for worker in WORKERS},
            tenants={queue: next(answers) for queue in QUEUES},
            queues=next(answers),
        )


def _words(answer: Any) -> Any:
    """Bytes as text, wherever they are in an answer."""
    kind = type(answer)
    if kind is bytes:
        return answer.decode()
    if kind is dict:
        return {_words(key): _words(value) for key, value in answer.items()}
    if kind in {list, set, tuple}:
        return kind(map(_words, answer))
    return answer


@contextmanager
def at(url: str) -> Iterator[Ledger]:
    connection = connect(url)
    yield Ledger(connection)
    connection.close()


def a_ranking(name: str) -> Ranking:
    return Ranking(job_id=name, model=ModelName(name="m", fingerprint="f"), chunks=[])


ids = st.sampled_from(IDS)
owners = st.sampled_from(WORKERS)
shapes = st.builds(
    SimpleNamespace,
    content=st.sampled_from(["one", "one", "one", "two"]),
    priority=st.sampled_from(["interactive", "bulk"]),
    deadline_s=st.sampled_from([None, FAR, FARTHER]),
)


class BothLedgers(RuleBasedStateMachine):
    """Asks the twin and the real ledger the same, and compares all that they hold after each step."""

    ledger: Ledger

    def __init__(self) -> None:
        super().__init__()
        self.twin = Twin()
        self.fences: list[tuple[str, int]] = [("j0", 1)]

    @initialize(of=st.lists(shapes, min_size=len(IDS), max_size=len(IDS)))
    def begin(self, of: list[SimpleNamespace]) -> None:
        self.ledger.redis.flushall()
        # With few jobs most calls are refused. The first is larger than the whole limit: beside it there would be none.
        for name, shape in list(zip(IDS, of, strict=True))[1:]:
            self.submit(name, shape)

    def ask(self, call: calls.Call):
        return self.ledger.ask(call)

    def leases(self) -> st.SearchStrategy[tuple[str, int]]:
        """Leases that hold, mostly; also any that ever was given."""
        held = [(name, fence) for name, fence in self.fences if self.twin.holds(name, fence)]
        return st.sampled_from(self.fences) | st.sampled_from(held) if held else st.sampled_from(self.fences)

    def names(self, *states: str) -> st.SearchStrategy[str]:
        """Jobs in these states, mostly; also any."""
        fitting = [name for name, job in self.twin.jobs.items() if job.state in states]
        return st.one_of(ids, *[st.sampled_from(fitting)] * 3) if fitting else ids

    @rule(shape=shapes, first=st.integers(0, 1))
    def flood(self, shape: SimpleNamespace, first: int) -> None:
        for name in IDS[first::2]:
            self.submit(name, shape)

    @rule(name=ids, shape=shapes)
    def submit(self, name: str, shape: SimpleNamespace) -> None:
        # A tenant and the number of pairs are part of the content: they follow from it.
        number = int(name[1:]) + (shape.content == "two")
        new_job = NewJob(
            id=name,
            content=shape.content,
            queue=f"rerankq.{shape.priority}",
            tenant=TENANTS[number % 2],
            priority=shape.priority,
            # One is larger than the whole limit.
            pairs=30 if number == 0 else number,
            deadline_s=shape.deadline_s,
            label=f"label of {name}",
            model="m",
            payload=f"payload {name} {shape.content}".encode(),
        )
        answer = self.ask(calls.submit(new_job, TERMS))
        assert (answer.state, answer.send) == self.twin.submit(new_job)

    @rule(data=st.data(), owner=owners)
    def claim(self, data: st.DataObject, owner: str) -> None:
        self._claim(data.draw(self.names("queued")), owner)

    def _claim(self, name: str, owner: str) -> None:
        call = calls.claim(name, owner, TERMS)
        answer, expected = self.ask(call), self.twin.claim(name, owner)
        if isinstance(expected, str):
            assert answer == expected
            return
        assert isinstance(answer, calls.Claim)
        assert answer.fence > expected.fence
        assert all(answer.fence > fence for one, fence in self.fences if one == name), "no fence is ever given twice"
        expected.fence = answer.fence
        self.fences.append((name, answer.fence))
        given = (answer.suspect, answer.priority, answer.payload)
        assert given == (expected.suspect > 0, expected.priority, expected.payload)
        room = 2 * len(self.twin.sent(*expected.line)) < TERMS.doorbell_window
        assert answer.refill_window == bool(room and self.twin.waiting(*expected.line))
        # Its answer may be lost on the way: asked again, it is the same.
        again = self.ask(call)
        assert isinstance(again, calls.Claim)
        assert again._replace(waited_s=0) == answer._replace(waited_s=0)

    @rule(data=st.data(), done=st.integers(0, 5))
    def renew(self, data: st.DataObject, done: int) -> None:
        held = data.draw(st.lists(self.leases(), max_size=3))
        lost = self.ask(calls.renew([(name, fence, done) for name, fence in held], TERMS))
        assert lost == [name for name, fence in held if not self.twin.renew(name, fence, done)]

    @rule(data=st.data())
    def isolate(self, data: st.DataObject) -> None:
        name, fence = data.draw(self.leases())
        # Only its owner says so of a job.
        owner = self.twin.jobs[name].owner if self.twin.holds(name, fence) else "w1"
        assert self.ask(calls.isolate(name, fence, owner)) == self.twin.isolate(name, fence, owner)

    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        name, fence = data.draw(self.leases())
        assert self.ask(calls.complete(name, fence, a_ranking(name), TERMS)) == self.twin.complete(name, fence)

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        name, fence = data.draw(self.leases())
        assert self.ask(calls.fail(name, fence, "JobFailed", "why", TERMS)) == self.twin.fail(name, fence)

    @rule(data=st.data())
    def hand_back(self, data: st.DataObject) -> None:
        held = data.draw(st.lists(self.leases(), max_size=3, unique=True))
        assert self.ask(calls.hand_back(held)) == self.twin.hand_back(held)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(self.names("queued", "running"))
        assert self.ask(calls.cancel(name, TERMS)) == self.twin.cancel(name)

    @rule(data=st.data(), dead=st.booleans())
    def forget(self, data: st.DataObject, dead: bool) -> None:
        name = data.draw(self.names(*ENDED))
        assert self.ask(calls.forget(name, TERMS, dead=dead)) == self.twin.forget(name, dead=dead)

    @rule(data=st.data())
    def retry_dead(self, data: st.DataObject) -> None:
        self._retry_dead(data.draw(self.names("dead")))

    def _retry_dead(self, name: str) -> None:
        answer = self.ask(calls.retry(name, TERMS))
        assert (answer.state, answer.doorbell is not None) == self.twin.retry_dead(name)
        if answer.doorbell is not None:
            assert answer.doorbell == calls.Doorbell(name, self.twin.jobs[name].queue, f"label of {name}")

    @rule(data=st.data())
    def look_into(self, data: st.DataObject) -> None:
        name = data.draw(self.names("dead"))
        found, job = self.ask(calls.record(name, with_payload=True)), self.twin.jobs.get(name)
        if job is None or job.state != "dead":
            assert found == (job.state if job else "unknown")
        else:
            assert (found.queue, found.tenant, found.pairs, found.deaths) == (*job.line, job.pairs, job.deaths)
            assert (found.payload, found.label) == (job.payload.decode(), f"label of {name}")
            assert found.history[-1].event in {"lease-over", "worker-ended", "came-back"}

    @rule(name=ids)
    def snapshot(self, name: str) -> None:
        snapshot = self.ask(calls.snapshot(name, TERMS, with_ranking=True))
        assert snapshot.status.state == self.twin.state(name)
        job = self.twin.jobs.get(name)
        if job is not None:
            status = snapshot.status
            assert (status.pairs_done, status.pairs_total, status.attempts) == (job.pairs_done, job.pairs, job.claims)
            assert (snapshot.error_type, snapshot.ranking is not None) == (job.error_type, job.ranked)
            assert (status.started_at is not None, status.ended_at is not None) == (job.claims > 0, job.state in ENDED)

    @rule(worker=owners, lives=st.booleans())
    def beat(self, worker: str, lives: bool) -> None:
        if lives:
            self.ask(calls.beat(worker, "{}", forget_after_s=1_000))
            self.twin.take_back(worker)
            self.twin.registered.add(worker)
        else:
            assert self.ask(calls.sign_off([worker])) == (worker in self.twin.registered)
            self.twin.registered.discard(worker)

    @rule(
        watched=st.sampled_from([True, True, False]),
        held_by_broker=st.dictionaries(st.sampled_from(QUEUES), st.integers(0, 3)),
    )
    def sweep(self, watched: bool, held_by_broker: dict[str, int]) -> None:
        self.ledger.redis.delete("rerankq:sweeper")
        counted = calls.Counted(self.now(), held_by_broker)
        out = {job.queue for job in self.twin.jobs.values() if job.state == "queued" and job.sent and not job.expires}
        swept = self.ask(calls.sweep("s", TERMS, watched_s=1e6 if watched else 0, counted=counted, grace_s=0))
        assert set(swept.overdue) == out
        assert swept[:4] == self.twin.sweep(watched=watched, held_by_broker=held_by_broker)
        # What has a while yet has it for as long as the example lasts.
        for name, job in self.twin.jobs.items():
            if job.state == "running" and not job.lease_over:
                self.ledger.redis.zadd("rerankq:running", {name: self.now() + FAR})

    def now(self) -> float:
        seconds, micros = self.ledger.redis.time()
        return seconds + micros / 1e6

    @rule(most=st.sampled_from([1, 4, 100]), queues=st.sampled_from([QUEUES, QUEUES[:1], QUEUES[1:]]))
    def refill_window(self, most: int, queues: tuple[str, ...]) -> None:
        room = {line: self.twin.room(*line) for line in itertools.product(queues, TENANTS)}
        doorbells = self.ask(calls.refill_window(queues, TERMS, most=most))
        sent = defaultdict(list)
        for doorbell in doorbells:
            job = self.twin.jobs[doorbell.id]
            assert (doorbell.queue, doorbell.label, doorbell.ahead) == (job.queue, f"label of {doorbell.id}", job.ahead)
            sent[job.line].append(doorbell.id)
        for line, names in sent.items():
            assert names == self.twin.waiting(*line)[: len(names)], "the longest waiting first"
            assert len(names) <= room[line]
            for name in names:
                self.twin.jobs[name].sent = next(self.twin.clock)
        for queue in queues:
            there = sum(room[queue, tenant] for tenant in TENANTS)
            assert sum(len(sent[queue, tenant]) for tenant in TENANTS) == min(most, there), "nothing is left unsent"

    @precondition(lambda self: any(job.state == "running" for job in self.twin.jobs.values()))
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        running = [job.owner for job in self.twin.jobs.values() if job.state == "running"]
        self._die(data.draw(st.sampled_from(sorted(set(running)))))

    @rule(data=st.data(), worker=owners)
    def worker_is_found_ended(self, data: st.DataObject, worker: str) -> None:
        self._recover(worker, data.draw(st.lists(self.leases(), max_size=4)))

    def _recover(self, worker: str, waiting: list[tuple[str, int]]) -> None:
        assert self.ask(calls.recover(worker, waiting, TERMS)) == self.twin.recover(worker, waiting)

    @precondition(lambda self: any(job.state == "queued" for job in self.twin.jobs.values()))
    @rule(data=st.data(), owner=owners, alone=st.booleans(), times=st.integers(1, SPARED_AT_MOST + 1))
    def worker_takes_some_and_is_found_ended(self, data: st.DataObject, owner: str, alone: bool, times: int) -> None:
        queued = [name for name, job in self.twin.jobs.items() if job.state == "queued" and not job.expires]
        if not queued:
            return
        taken = data.draw(st.lists(st.sampled_from(queued), min_size=1, max_size=4, unique=True))
        for _ in range(times):
            for name in taken:
                self._claim(name, owner)
            held = [(name, self.twin.jobs[name].fence) for name in taken if self.twin.jobs[name].state == "running"]
            if alone and held:
                name, fence = held[-1]
                assert self.ask(calls.isolate(name, fence, owner)) == self.twin.isolate(name, fence, owner)
            self._recover(owner, held[: data.draw(st.integers(0, len(held)))])

    @precondition(lambda self: any(job.state == "queued" for job in self.twin.jobs.values()))
    @rule(data=st.data(), owner=owners, alone=st.booleans())
    def worker_takes_some_and_dies(self, data: st.DataObject, owner: str, alone: bool) -> None:
        queued = [name for name, job in self.twin.jobs.items() if job.state == "queued"]
        for name in data.draw(st.lists(st.sampled_from(queued), min_size=1, max_size=3, unique=True)):
            self._claim(name, owner)
        job = self.twin.jobs[name]
        if alone:
            assert self.ask(calls.isolate(name, job.fence, owner)) == self.twin.isolate(name, job.fence, owner)
        self._die(owner)

    @precondition(lambda self: any(job.state == "queued" for job in self.twin.jobs.values()))
    @rule(
        data=st.data(), owners=st.permutations(WORKERS), then=st.lists(st.sampled_from(["retry", "beat"]), max_size=2)
    )
    def job_ends_every_worker_that_takes_it(self, data: st.DataObject, owners: list[str], then: list[str]) -> None:
        # By chance alone hardly a job would be dead, and what comes after that would not be tried.
        queued = [name for name, job in self.twin.jobs.items() if job.state == "queued"]
        name = data.draw(st.sampled_from(queued))
        for owner in owners:
            self._claim(name, owner)
            job = self.twin.jobs[name]
            if job.state != "running":
                return
            assert self.ask(calls.isolate(name, job.fence, owner)) == self.twin.isolate(name, job.fence, owner)
            self.beat(owner, lives=data.draw(st.booleans()))
            self._die(owner)
            self.sweep(watched=True, held_by_broker={})
        for what in then:
            if what == "retry":
                self._retry_dead(name)
            else:
                self.beat(owner, lives=True)

    def _die(self, owner: str) -> None:
        for name, job in self.twin.jobs.items():
            if job.state == "running" and job.owner == owner:
                job.lease_over = True
                self.ledger.redis.zadd("rerankq:running", {name: 1.0})

    @precondition(lambda self: self.with_deadline())
    @rule(data=st.data())
    def deadline_passes(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.with_deadline()))
        self.twin.jobs[name].deadline = 0
        self.ledger.redis.hset(f"rerankq:job:{name}", "deadline", "1.0")
        self.ledger.redis.zadd("rerankq:deadlines", {name: 1.0})

    def with_deadline(self) -> list[str]:
        return [name for name, job in self.twin.jobs.items() if job.deadline is not None and job.state == "queued"]

    @precondition(lambda self: any(job.state in {"done", "failed"} for job in self.twin.jobs.values()))
    @rule(data=st.data())
    def time_to_live_ends(self, data: st.DataObject) -> None:
        ended = [name for name, job in self.twin.jobs.items() if job.state in {"done", "failed"}]
        name = data.draw(st.sampled_from(ended))
        self.ledger.redis.delete(f"rerankq:job:{name}")
        del self.twin.jobs[name]

    @invariant()
    def both_hold_the_same(self) -> None:
        held = Held.read(self.ledger, set(self.twin.jobs))
        self.jobs_are_equal(held)
        self.each_queued_job_stands_in_one_line(held)
        self.counters_are_sums(held)
        self.sets_hold_the_living_alone(held)
        self.every_line_with_a_backlog_is_known_to_the_ringer(held)

    def jobs_are_equal(self, held: Held) -> None:
        assert held.names == set(self.twin.jobs)
        for name, (real, ttl) in held.jobs.items():
            job = self.twin.jobs[name]
            assert real["state"] == job.state
            assert real["content"] == job.content
            assert (real["queue"], real["tenant"], real["priority"]) == (job.queue, job.tenant, job.priority)
            assert (real["fence"], real["claims"]) == (str(job.fence), str(job.claims))
            assert (real["deaths"], real["suspect"]) == (str(job.deaths), str(job.suspect))
            assert int(real.get("spared", 0)) == job.spared
            assert real.get("owner", "") == job.owner
            assert (real["deadline"] == "") == (job.deadline is None)
            if job.deadline:
                assert abs(float(real["deadline"]) - held.now - job.deadline) < FAR / 2
            kept = job.state in {"queued", "running", "dead"}
            assert ("payload" in real) == kept, "the payload is dropped when a job ends, and kept when it is dead"
            assert (ttl == -1) == kept
            assert "lease" not in real
            assert ("claim" in real) == (job.state == "running")

    def each_queued_job_stands_in_one_line(self, held: Held) -> None:
        for line in LINES:
            assert held.waiting[line] == self.twin.waiting(*line)
            assert set(held.sent[line]) == set(self.twin.sent(*line))
            in_line = [name for name in self.twin.sent(*line) if not self.twin.jobs[name].ahead]
            assert len(in_line) <= TERMS.doorbell_window

    def counters_are_sums(self, held: Held) -> None:
        assert {field: int(pairs) for field, pairs in held.backlog.items()} == dict(self.twin.backlog())

    def sets_hold_the_living_alone(self, held: Held) -> None:
        def those(*states: str) -> set[str]:
            return {name for name, job in self.twin.jobs.items() if job.state in states}

        assert held.running == those("running")
        assert held.dead == those("dead") == set(self.ask(calls.dead()))
        deadlines = {name for name, job in self.twin.jobs.items() if job.deadline is not None}
        assert held.deadlines == those("queued") & deadlines
        assert held.alone == self.twin.alone
        for worker in WORKERS:
            expected = {f"{'!' * death}{fence} {name}" for name, fence, death in self.twin.accused[worker]}
            assert held.accused[worker] == expected

    def every_line_with_a_backlog_is_known_to_the_ringer(self, held: Held) -> None:
        for job in self.twin.jobs.values():
            if job.state == "queued":
                assert job.tenant in held.tenants[job.queue]
                assert job.queue in held.queues


@pytest.mark.slow
@pytest.mark.timeout(max(900, 10 * EXAMPLES))  # 0.1 s of one core each, of which a busy machine gives little
def test_the_ledger_and_its_twin_stay_equal_whatever_is_asked_in_any_order(redis_url_each_version: str):
    with at(redis_url_each_version) as real:

        class Machine(BothLedgers):
            ledger = real

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=EXAMPLES, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
