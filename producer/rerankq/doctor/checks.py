"""What a deployment's facts mean, held against the promise of ``docs/reliability.md``. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from ..broker.celery_app import INTERACTIVE
from ..local.embedded import OLDEST
from .round_trips import Trip

# Seconds without a sign of life, of which a worker gives one a second, that make a person look after it.
SILENT_S = 5.0

Level = Literal["ok", "note", "wrong"]

# Milliseconds of a round trip and seconds between clocks beyond which a person should know.
SLOW_MS, SKEW_S = 5.0, 2.0
# Shares of a limit: from the first on it is worth a note, from the second on it is as good as reached.
FILLING, FULL = 0.75, 0.9


class Finding(NamedTuple):
    """One line: ``note`` is worth knowing, ``wrong`` breaks a promise."""

    level: Level
    subject: str
    said: str


@dataclass(frozen=True)
class Server:
    """A Redis with the roles it serves; None stands for what it would not tell. Memory is in bytes."""

    roles: tuple[str, ...]
    url: str
    fault: str = ""
    run_id: str = ""
    version: str = ""
    replica: bool = False
    throwaway: bool = False
    appendonly: bool = False
    fsync: str | None = None
    # Behind Sentinel, but it writes with no replica at its side: then it may be one that was replaced already.
    accepts_alone: bool = False
    log_is_written: bool = True
    maxmemory: int = 0
    policy: str = "noeviction"
    memory: int = 0
    latency_ms: float = 0.0
    ahead_s: float = 0.0
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerSeen:
    """A worker that gives signs of life, as it shows itself in the registry."""

    id: str
    model: str
    fingerprint: str
    queues: tuple[str, ...]
    version: str = ""
    device: str = ""
    age_s: float = 0.0
    channel: str = ""


@dataclass(frozen=True)
class Work:
    """What the ledger holds: pairs waiting by queue and in all, jobs running, leases that are over, dead jobs."""

    pairs_waiting: int = 0
    max_pairs: int = 10_000_000
    by_queue: Mapping[str, int] = field(default_factory=dict)
    running: int = 0
    long_over: int = 0
    dead: int = 0
    sweeper: bool = True


@dataclass(frozen=True)
class Snapshot:
    """All that was found out, and how it should be by the settings here.

    *heard* are the ids of the workers that answered through the broker, None where nobody could be asked. *listed* are
    the models that the deployment promises, *default* is the one of jobs that name none, *chosen* if it was set.
    """

    version: str
    servers: Sequence[Server]
    workers: Sequence[WorkerSeen] = ()
    work: Work | None = None
    listed: Sequence[str] = ()
    trips: Sequence[Trip] = ()
    heard: Set[str] | None = None
    channel: str = ""
    default: str = ""
    chosen: bool = False


def checks(snapshot: Snapshot) -> list[Finding]:
    """Judge all facts, the servers first.

    >>> [str(one.level) for one in findings(Facts("0.1.0", [Server(("ledger",), "redis://h", fault="refused")]))]
    ['wrong']
    """
    found = [one for server in one_each(snapshot.servers) for one in _of_server(server)]
    found += _of_trips(snapshot.trips)
    if snapshot.work is not None:
        found += _of_workers(snapshot)
        found += _of_work(snapshot.work, workers=len(snapshot.workers))
    return found


def one_each(servers: Iterable[Server]) -> list[Server]:
    """Put together what is one server under several names or users.

    >>> [one.roles for one in one_each([Server(("ledger",), "a", run_id="1"), Server(("cache",), "b", run_id="1")])]
    [('ledger', 'cache')]
    """
    found: dict[str, Server] = {}
    for server in servers:
        key = server.run_id or server.url
        known = found.get(key)
        found[key] = (
            server
            if known is None
            else replace(known, roles=known.roles + server.roles, refused=known.refused + server.refused)
        )
    return list(found.values())


def _of_server(server: Server) -> Iterator[Finding]:
    subject = "+".join(server.roles)
    if server.fault:
        yield Finding("wrong", subject, f"{server.url} does not answer: {server.fault}")
        return
    yield Finding("ok", subject, f"redis {server.version} at {server.url}, {server.latency_ms:.1f} ms a round trip")
    if tuple(int(part) for part in server.version.split(".")[:2] if part.isdigit()) < OLDEST:
        yield Finding("wrong", subject, f"redis {server.version} is too old: {'.'.join(map(str, OLDEST))} or newer")
    if server.replica:
        yield Finding("wrong", subject, "is a replica: it takes no writes; name the master")
    if server.refused:
        yield Finding("wrong", subject, f"this user may not: {', '.join(server.refused)} (see conf/redis-acl.conf)")
    if server.latency_ms > SLOW_MS:
        yield Finding("note", subject, f"slow: {server.latency_ms:.1f} ms a round trip, and a job takes several")
    if abs(server.ahead_s) > SKEW_S:
        way = "ahead of" if server.ahead_s > 0 else "behind"
        said = f"its clock is {abs(server.ahead_s):.0f} s {way} ours; deadlines and times are told by its clock"
        yield Finding("note", subject, said)
    if {"ledger", "broker"} & set(server.roles):
        yield from _of_keeping(server, subject)
    yield from _of_memory(server, subject)


def _of_keeping(server: Server, subject: str) -> Iterator[Finding]:
    if "ledger" in server.roles and not server.appendonly and server.throwaway:
        yield Finding("note", subject, "was brought by `rerankq up` or the demo: its jobs are gone when that ends")
        return
    if "ledger" in server.roles and not server.appendonly:
        yield Finding("wrong", subject, "appendonly is off: a restart of Redis loses every job that was accepted")
        return
    if server.accepts_alone and "ledger" in server.roles:
        said = "a master that comes back after it was replaced forgets what it accepts until it is told"
        yield Finding("note", subject, f"min-replicas-to-write is 0: {said}; 1, with two replicas")
    if not server.log_is_written:
        yield Finding("wrong", subject, "the append-only file could not be written lately: see the server's log")
    match server.fsync if "ledger" in server.roles else "":
        case "always":
            yield Finding("ok", subject, "appendfsync always: what was accepted survives a crash of the machine")
        case "everysec":
            yield Finding("ok", subject, "appendfsync everysec: a crash may lose the last one to two seconds")
        case "no":
            yield Finding("wrong", subject, "appendfsync no: a crash of the machine may lose half a minute of jobs")
        case None:
            yield Finding("note", subject, "appendfsync is not told to this user; it should be everysec or always")


def _of_memory(server: Server, subject: str) -> Iterator[Finding]:
    keeps, evicts = {"ledger", "broker"} & set(server.roles), server.policy.startswith("allkeys-")
    share = server.memory / server.maxmemory if server.maxmemory else 0.0
    if not server.maxmemory:
        yield Finding("note", subject, "no maxmemory: set one before the machine's memory is the limit")
    elif keeps and server.policy != "noeviction":
        yield Finding(
            "wrong", subject, f"maxmemory-policy {server.policy}: a full server drops accepted jobs; noeviction"
        )
    elif keeps and "cache" in server.roles:
        said = "scores share a server that has a maxmemory and evicts nothing: they fill it until jobs are refused"
        yield Finding("wrong", subject, f"{said}; give RERANKQ_CACHE_URL a server of its own")
    elif not keeps and not evicts:
        yield Finding("wrong", subject, f"maxmemory-policy {server.policy}: a full cache takes no score; allkeys-lfu")
    elif keeps and share >= FULL:
        yield Finding("wrong", subject, f"its memory is {share:.0%} full: jobs are refused")
    elif keeps and share >= FILLING:
        yield Finding("note", subject, f"its memory is {share:.0%} full; from {FULL:.0%} on jobs are refused")
    else:
        yield Finding("ok", subject, f"maxmemory {server.maxmemory >> 20} MiB, {server.policy}, {share:.0%} in use")


def _of_trips(trips: Sequence[Trip]) -> Iterator[Finding]:
    for trip in trips:
        # What a user may not do stands with the server, where its role needs it.
        if trip.fault and not trip.refused:
            yield Finding("wrong", trip.role, f"{trip.way} does not come through: {trip.fault}")
    by_role: dict[str, list[Trip]] = defaultdict(list)
    for trip in trips:
        by_role[trip.role].append(trip)
    for role, gone in by_role.items():
        if not any(trip.fault for trip in gone):
            yield Finding("ok", role, f"there and back: {', '.join(trip.way for trip in gone)}")


def _of_workers(snapshot: Snapshot) -> Iterator[Finding]:
    living = [worker for worker in snapshot.workers if worker.age_s <= SILENT_S]
    if not living:
        yield Finding("wrong", "workers", "none gives signs of life: jobs wait")
    by_queue: dict[str, list[WorkerSeen]] = defaultdict(list)
    for worker in snapshot.workers:
        yield from _of_worker(worker, snapshot)
        if worker.queues and worker in living:
            by_queue[worker.queues[0]].append(worker)
    yield from _of_the_default(living, snapshot)
    for queue, serving in by_queue.items():
        if len({worker.fingerprint for worker in serving}) > 1:
            said = "its workers have different weights or precisions: the same job may be ranked differently"
            yield Finding("wrong", queue, said)
    versions = {worker.version for worker in living if worker.version} | {snapshot.version}
    if len(versions) > 1:
        yield Finding("note", "versions", f"{', '.join(sorted(versions))} side by side; here it is {snapshot.version}")
    served = {worker.model for worker in living}
    for model in snapshot.listed:
        if model not in served:
            yield Finding("wrong", "models", f"RERANKQ_MODELS lists {model}, and no worker serves it: its jobs wait")


def _of_worker(worker: WorkerSeen, snapshot: Snapshot) -> Iterator[Finding]:
    subject = f"worker {worker.id}"
    said = f"{worker.model} on {worker.device or 'a device it does not tell'}, {worker.age_s:.1f} s ago"
    if worker.age_s > SILENT_S:
        yield Finding("note", subject, f"{said}: killed, hung or cut off, if it does not come back")
        return
    yield Finding("ok", subject, said)
    if worker.channel and worker.channel != snapshot.channel:
        said = f"is of another deployment on the same ledger: its channels begin with {worker.channel}, ours with"
        advice = "give each a RERANKQ_LEDGER_URL of its own, or both one RERANKQ_DEPLOYMENT"
        yield Finding("wrong", subject, f"{said} {snapshot.channel}; {advice}")
    elif snapshot.heard is not None and worker.channel and worker.id not in snapshot.heard:
        said = (
            "does not answer through this broker: it listens to another one (two deployments on one ledger), or hangs"
        )
        yield Finding("wrong", subject, said)


def _of_the_default(living: Sequence[WorkerSeen], snapshot: Snapshot) -> Iterator[Finding]:
    serving = {worker.model for worker in living if worker.queues and worker.queues[0] == INTERACTIVE}
    if snapshot.chosen and serving and snapshot.default not in serving:
        said = f"{snapshot.default} here, and not heeded: jobs that name no model go to {', '.join(sorted(serving))}"
        yield Finding("note", "RERANKQ_MODEL", said)


def _of_work(work: Work, *, workers: int) -> Iterator[Finding]:
    share = work.pairs_waiting / work.max_pairs
    level: Level = "wrong" if share >= 1 else "note" if share >= FILLING else "ok"
    queues = ", ".join(f"{queue} {pairs}" for queue, pairs in sorted(work.by_queue.items()))
    said = f"{work.pairs_waiting} pairs waiting of {work.max_pairs} allowed, {work.running} jobs running"
    yield Finding(level, "backlog", said + (f" ({queues})" if queues else ""))
    if work.long_over:
        yield Finding("wrong", "leases", f"{work.long_over} jobs lost their worker and nobody has queued them again")
    if workers and not work.sweeper:
        yield Finding("wrong", "sweeper", "workers live, and none sweeps: lost jobs and doorbells stay lost")
    if work.dead:
        yield Finding("note", "dead jobs", f"{work.dead}: see `rerankq dead list`")
