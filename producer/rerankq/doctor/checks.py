"""Checks of a snapshot against what ``docs/reliability.md`` promises. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from ..broker.celery_app import INTERACTIVE
from ..local.embedded import OLDEST
from .round_trips import RoundTrip

# A worker reports once a second; one that has been silent for so many seconds may be dead.
SILENT_S = 5.0

Level = Literal["ok", "note", "wrong"]

# Milliseconds of a round trip, and seconds between clocks, above which there is a note.
SLOW_MS, SKEW_S = 5.0, 2.0
# Shares of a limit: a note from the first on, wrong from the second on.
FILLING, FULL = 0.75, 0.9


class Finding(NamedTuple):
    """One result of a check: ``note`` is worth knowing, ``wrong`` breaks a promise."""

    level: Level
    subject: str
    said: str


@dataclass(frozen=True)
class Server:
    """A Redis with the roles it serves; None = this user may not ask. Memory is in bytes."""

    roles: tuple[str, ...]
    url: str
    fault: str = ""
    run_id: str = ""
    version: str = ""
    replica: bool = False
    embedded: bool = False
    appendonly: bool = False
    fsync: str | None = None
    # Behind Sentinel, it accepts writes without a replica: it may be a master that was replaced already.
    accepts_alone: bool = False
    log_is_written: bool = True
    maxmemory: int = 0
    policy: str = "noeviction"
    memory: int = 0
    latency_ms: float = 0.0
    ahead_s: float = 0.0
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class RegisteredWorker:
    """A worker in the registry; ``age_s`` is the time since its last report, in seconds.

    ``trouble`` says why the server that it asks for scores gives none.
    """

    id: str
    model: str
    fingerprint: str
    queues: tuple[str, ...]
    version: str = ""
    device: str = ""
    age_s: float = 0.0
    channel: str = ""
    trouble: str = ""


@dataclass(frozen=True)
class LedgerCounts:
    """Counts of the ledger: pairs waiting by queue and in all, jobs running, expired leases, dead jobs."""

    pairs_waiting: int = 0
    max_pairs: int = 10_000_000
    by_queue: Mapping[str, int] = field(default_factory=dict)
    running: int = 0
    expired: int = 0
    dead: int = 0
    sweeper: bool = True


@dataclass(frozen=True)
class Snapshot:
    """The state of a deployment, and what our settings expect of it.

    ``answered`` are the ids of the workers that answered through the broker, None if they could not be asked.
    ``promised_models`` are the models of ``RERANKQ_MODELS``; ``default_model`` is, by our settings, the model of jobs
    that name none; ``default_is_set`` if they set one.
    """

    version: str
    servers: Sequence[Server]
    workers: Sequence[RegisteredWorker] = ()
    counts: LedgerCounts | None = None
    promised_models: Sequence[str] = ()
    round_trips: Sequence[RoundTrip] = ()
    answered: Set[str] | None = None
    channel: str = ""
    default_model: str = ""
    default_is_set: bool = False


def checks(snapshot: Snapshot) -> list[Finding]:
    """Run every check, those of the servers first.

    >>> [one.level for one in checks(Snapshot("0.1.0", [Server(("ledger",), "redis://h", fault="refused")]))]
    ['wrong']
    """
    found = [one for server in merged(snapshot.servers) for one in _of_server(server)]
    found += _of_trips(snapshot.round_trips)
    if snapshot.counts is not None:
        found += _of_workers(snapshot)
        found += _of_counts(snapshot.counts, workers=len(snapshot.workers))
    return found


def merged(servers: Iterable[Server]) -> list[Server]:
    """Merge entries that are one server under several names or users.

    >>> [one.roles for one in merged([Server(("ledger",), "a", run_id="1"), Server(("cache",), "b", run_id="1")])]
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
        yield Finding("wrong", subject, "is a replica, which accepts no writes; use the master's URL")
    if server.refused:
        yield Finding(
            "wrong", subject, f"this user lacks permissions: {', '.join(server.refused)} (see conf/redis-acl.conf)"
        )
    if server.latency_ms > SLOW_MS:
        yield Finding("note", subject, f"slow: {server.latency_ms:.1f} ms a round trip, and a job takes several")
    if abs(server.ahead_s) > SKEW_S:
        way = "ahead of" if server.ahead_s > 0 else "behind"
        said = f"its clock is {abs(server.ahead_s):.0f} s {way} ours; deadlines and times are by its clock"
        yield Finding("note", subject, said)
    if {"ledger", "broker"} & set(server.roles):
        yield from _of_keeping(server, subject)
    yield from _of_memory(server, subject)


def _of_keeping(server: Server, subject: str) -> Iterator[Finding]:
    if "ledger" in server.roles and not server.appendonly and server.embedded:
        yield Finding("note", subject, "was started by `rerankq up` or the demo: its jobs are lost when that ends")
        return
    if "ledger" in server.roles and not server.appendonly:
        yield Finding("wrong", subject, "appendonly is off: a restart of Redis loses every accepted job")
        return
    if server.accepts_alone and "ledger" in server.roles:
        said = "a replaced master that returns may accept jobs and lose them; set it to 1, with two replicas"
        yield Finding("note", subject, f"min-replicas-to-write is 0: {said}")
    if not server.log_is_written:
        yield Finding("wrong", subject, "the last write of the append-only file failed; see the server's log")
    match server.fsync if "ledger" in server.roles else "":
        case "always":
            yield Finding("ok", subject, "appendfsync always: accepted jobs survive a crash of the machine")
        case "everysec":
            yield Finding("ok", subject, "appendfsync everysec: a crash may lose the last one or two seconds")
        case "no":
            yield Finding("wrong", subject, "appendfsync no: a crash of the machine may lose jobs of half a minute")
        case None:
            yield Finding("note", subject, "this user may not read appendfsync; it should be everysec or always")


def _of_memory(server: Server, subject: str) -> Iterator[Finding]:
    keeps, evicts = {"ledger", "broker"} & set(server.roles), server.policy.startswith("allkeys-")
    share = server.memory / server.maxmemory if server.maxmemory else 0.0
    if not server.maxmemory:
        yield Finding("note", subject, "maxmemory is not set: Redis may use all of the machine's memory")
    elif keeps and server.policy != "noeviction":
        yield Finding(
            "wrong", subject, f"maxmemory-policy {server.policy}: a full server drops accepted jobs; use noeviction"
        )
    elif keeps and "cache" in server.roles:
        said = "the cache shares a server that evicts nothing: scores fill it until jobs are refused"
        yield Finding("wrong", subject, f"{said}; give RERANKQ_CACHE_URL a server of its own")
    elif not keeps and not evicts:
        yield Finding(
            "wrong", subject, f"maxmemory-policy {server.policy}: a full cache accepts no scores; use allkeys-lfu"
        )
    elif keeps and share >= FULL:
        yield Finding("wrong", subject, f"memory is {share:.0%} full: jobs are refused")
    elif keeps and share >= FILLING:
        yield Finding("note", subject, f"memory is {share:.0%} full; from {FULL:.0%} on jobs are refused")
    else:
        yield Finding("ok", subject, f"maxmemory {server.maxmemory >> 20} MiB, {server.policy}, {share:.0%} in use")


def _of_trips(trips: Sequence[RoundTrip]) -> Iterator[Finding]:
    for trip in trips:
        # Missing permissions are reported with the server, if its role needs them.
        if trip.fault and not trip.refused:
            yield Finding("wrong", trip.role, f"{trip.path} failed: {trip.fault}")
    by_role: dict[str, list[RoundTrip]] = defaultdict(list)
    for trip in trips:
        by_role[trip.role].append(trip)
    for role, of_role in by_role.items():
        if not any(trip.fault for trip in of_role):
            yield Finding("ok", role, f"round trips: {', '.join(trip.path for trip in of_role)}")


def _of_workers(snapshot: Snapshot) -> Iterator[Finding]:
    living = [worker for worker in snapshot.workers if worker.age_s <= SILENT_S]
    if not living:
        yield Finding("wrong", "workers", "no worker is running; jobs are waiting")
    by_queue: dict[str, list[RegisteredWorker]] = defaultdict(list)
    for worker in snapshot.workers:
        yield from _of_worker(worker, snapshot)
        if worker.queues and worker in living:
            by_queue[worker.queues[0]].append(worker)
    yield from _of_the_default(living, snapshot)
    for queue, serving in by_queue.items():
        if len({worker.fingerprint for worker in serving}) > 1:
            said = "its workers differ in weights or precision: the same job may be ranked differently"
            yield Finding("wrong", queue, said)
    versions = {worker.version for worker in living if worker.version} | {snapshot.version}
    if len(versions) > 1:
        yield Finding("note", "versions", f"{', '.join(sorted(versions))} run side by side; this is {snapshot.version}")
    served = {worker.model for worker in living}
    for model in snapshot.promised_models:
        if model not in served:
            yield Finding(
                "wrong", "models", f"RERANKQ_MODELS lists {model}, but no worker serves it; its jobs are waiting"
            )


def _of_worker(worker: RegisteredWorker, snapshot: Snapshot) -> Iterator[Finding]:
    subject = f"worker {worker.id}"
    said = f"{worker.model} on {worker.device or 'an unknown device'}, {worker.age_s:.1f} s ago"
    if worker.age_s > SILENT_S:
        yield Finding("note", subject, f"{said}: if it does not return, it was killed, hangs or is cut off")
        return
    yield Finding("ok", subject, said)
    if worker.trouble:
        yield Finding("wrong", subject, f"gets no scores from {worker.device}: {worker.trouble}; its jobs wait or fail")
    if worker.channel and worker.channel != snapshot.channel:
        said = f"belongs to another deployment on the same ledger: its channels begin with {worker.channel}, ours with"
        advice = "give each its own RERANKQ_LEDGER_URL, or both the same RERANKQ_DEPLOYMENT"
        yield Finding("wrong", subject, f"{said} {snapshot.channel}; {advice}")
    elif snapshot.answered is not None and worker.channel and worker.id not in snapshot.answered:
        said = "does not answer through this broker: it uses another one (two deployments on one ledger), or hangs"
        yield Finding("wrong", subject, said)


def _of_the_default(living: Sequence[RegisteredWorker], snapshot: Snapshot) -> Iterator[Finding]:
    serving = {worker.model for worker in living if worker.queues and worker.queues[0] == INTERACTIVE}
    if snapshot.default_is_set and serving and snapshot.default_model not in serving:
        said = f"{snapshot.default_model} is set here but has no effect: jobs that name no model go to"
        yield Finding("note", "RERANKQ_MODEL", f"{said} {', '.join(sorted(serving))}")


def _of_counts(counts: LedgerCounts, *, workers: int) -> Iterator[Finding]:
    share = counts.pairs_waiting / counts.max_pairs
    level: Level = "wrong" if share >= 1 else "note" if share >= FILLING else "ok"
    queues = ", ".join(f"{queue} {pairs}" for queue, pairs in sorted(counts.by_queue.items()))
    said = f"{counts.pairs_waiting} pairs waiting of {counts.max_pairs} allowed, {counts.running} jobs running"
    yield Finding(level, "backlog", said + (f" ({queues})" if queues else ""))
    if counts.expired:
        yield Finding("wrong", "leases", f"{counts.expired} jobs lost their worker and were not queued again")
    if workers and not counts.sweeper:
        yield Finding(
            "wrong", "sweeper", "workers are running but none sweeps: lost jobs and doorbells are not recovered"
        )
    if counts.dead:
        yield Finding("note", "dead jobs", f"{counts.dead}: see `rerankq dead list`")
