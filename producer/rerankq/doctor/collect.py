"""Ask a live deployment what it is: Redis by Redis, the registry of workers, the ledger's counts."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from typing import Any

from .. import RerankqError, __version__, catalogue
from ..broker.celery_app import INTERACTIVE, queue_key
from ..errors import SettingsInvalid
from ..ledger import calls, connect
from ..ledger.keys import completion_channel
from ..ledger.lease_policy import LeasePolicy
from ..ledger.limits import LedgerLimits
from ..ledger.runner import Ledger, translated
from ..local.embedded import FOLDER, OLDEST
from ..settings import Settings
from ..urls import AMQP, masked, parts_of, with_database
from .checks import SILENT_S, Server, Snapshot, Work, WorkerSeen
from .round_trips import NOBODY, go, heard_through_the_broker

ROUND_TRIPS = 9


def collect(settings: Settings) -> Snapshot:
    """Find out everything; what cannot be reached stands as a fault, and nothing is changed."""
    roles = {"broker": settings.broker, "ledger": settings.ledger, "cache": settings.cache}
    amqp = parts_of(settings.broker).scheme in AMQP
    if amqp:
        del roles["broker"]
    by_server = defaultdict(list)
    for role, url in roles.items():
        by_server[with_database(url, 0)].append(role)
    servers = [_server(settings, {role: roles[role] for role in served}) for served in by_server.values()]
    reached = {role for server in servers if not server.fault for role in server.roles}
    trips = go(settings, reached | {"broker"} if amqp else reached)
    well = {"broker", "ledger", "cache"} - {trip.role for trip in trips if trip.fault and not trip.refused}
    answers = "ledger" in reached & well
    workers = _workers(settings) if answers else ()
    living = [worker for worker in workers if worker.age_s <= SILENT_S]
    return Snapshot(
        version=__version__,
        servers=servers,
        trips=trips,
        workers=workers,
        heard=heard_through_the_broker(settings, len(living)) if living and "broker" in well else None,
        work=_work(settings) if answers else None,
        listed=[catalogue.canonical(name, settings.conf_dir) for name in settings.models],
        channel=settings.channel,
        default=catalogue.canonical(settings.default_model or settings.model, settings.conf_dir),
        chosen=bool({"model", "default_model"} & settings.model_fields_set),
    )


def _server(settings: Settings, urls: dict[str, str]) -> Server:
    roles, url = tuple(urls), next(iter(urls.values()))
    with closing(connect(url)) as redis:
        try:
            with translated():
                info: dict[str, Any] = redis.info()
                latency_ms, ahead_s = _clock(redis)
                return Server(
                    roles=roles,
                    url=masked(with_database(url, 0)),
                    run_id=str(info.get("run_id", "")),
                    version=str(info["redis_version"]),
                    replica=info.get("role") in {"slave", "replica"},
                    throwaway=f"/{FOLDER}" in str(info.get("config_file", "")),
                    appendonly=bool(info.get("aof_enabled")),
                    fsync=_setting(redis, "appendfsync"),
                    accepts_alone=url.startswith("sentinel") and _setting(redis, "min-replicas-to-write") == "0",
                    log_is_written=info.get("aof_last_write_status", "ok") == "ok",
                    maxmemory=int(info.get("maxmemory", 0)),
                    policy=str(info.get("maxmemory_policy", "noeviction")),
                    memory=int(info.get("used_memory", 0)),
                    latency_ms=latency_ms,
                    ahead_s=ahead_s,
                    refused=tuple(f"{role}: {what}" for role in roles for what in _refused(role, urls[role], settings)),
                )
        except SettingsInvalid:
            # It is there; the round trips tell which role's database is not.
            return Server(roles=roles, url=masked(with_database(url, 0)), version=".".join(map(str, OLDEST)))
        except RerankqError as error:
            return Server(roles=roles, url=masked(with_database(url, 0)), fault=str(error.__cause__ or error))


def _clock(redis: Any) -> tuple[float, float]:
    """Measure the median round trip in milliseconds, and how far the server's clock is ahead in seconds."""
    trips, ahead = [], []
    for _ in range(ROUND_TRIPS):
        before = time.time()
        seconds, micros = redis.time()
        after = time.time()
        trips.append(1_000 * (after - before))
        ahead.append(seconds + micros / 1e6 - (before + after) / 2)
    return statistics.median(trips), statistics.median(ahead)


def _setting(redis: Any, name: str) -> str | None:
    try:
        with translated():
            return str(redis.config_get(name)[name])
    except (RerankqError, KeyError):
        return None  # CONFIG is no right that a user of ours needs


def _refused(role: str, url: str, settings: Settings) -> list[str]:
    """Try what the role needs, on names that nobody has; answer what this user may not do."""
    channel = completion_channel(settings.channel, NOBODY)
    with closing(connect(url)) as redis, closing(redis.pubsub()) as heard:  # type: ignore[no-untyped-call]
        tries: dict[str, dict[str, Callable[[], object]]] = {
            "broker": {"read doorbells": lambda: redis.llen(queue_key(INTERACTIVE))},
            "ledger": {
                "run scripts": lambda: Ledger(redis).ask(calls.snapshot(NOBODY, LedgerLimits.of(settings))),
                "write": lambda: Ledger(redis).try_to_write(f"{NOBODY}-writes"),
                "subscribe": lambda: (heard.subscribe(channel), heard.get_message(timeout=1)),
                "publish": lambda: redis.publish(channel, ""),
            },
            # Producers need no scores, so that reading none is no fault: only workers do.
            "cache": {},
        }
        return [what for what, attempt in tries[role].items() if _may_not(attempt)]


def _may_not(attempt: Callable[[], object]) -> bool:
    try:
        with translated():
            attempt()
    except RerankqError as error:
        return "permission" in str(error).lower()
    return False


def _workers(settings: Settings) -> list[WorkerSeen]:
    with closing(connect(settings.ledger)) as redis:
        return [
            WorkerSeen(
                seen.id, seen.model, seen.fingerprint, seen.queues, seen.version, seen.device, seen.age_s, seen.channel
            )
            for seen in Ledger(redis).workers()
            if seen.age_s <= LeasePolicy(settings.lease_s).alive_for_s
        ]


def _work(settings: Settings) -> Work:
    with closing(connect(settings.ledger)) as redis:
        found = Ledger(redis).overview(LeasePolicy(settings.lease_s))
    return Work(
        pairs_waiting=found.pairs_waiting,
        max_pairs=settings.max_queued_pairs,
        by_queue=found.by_queue,
        running=found.running,
        long_over=found.overdue,
        dead=found.dead,
        sweeper=found.somebody_sweeps,
    )
