"""Collect a snapshot of a live deployment: each Redis, the registry of workers, the ledger's counts."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from typing import Any

from .. import __version__, catalogue
from ..broker.celery_app import INTERACTIVE, queue_key
from ..errors import RerankqError, SettingsInvalid
from ..ledger import calls, connect
from ..ledger.keys import completion_channel
from ..ledger.lease_policy import LeasePolicy
from ..ledger.limits import LedgerLimits
from ..ledger.runner import Ledger, translated
from ..local.embedded import FOLDER, OLDEST
from ..settings import Settings
from ..urls import AMQP, masked, parts_of, with_database
from .checks import SILENT_S, LedgerCounts, RegisteredWorker, Server, Snapshot
from .round_trips import PROBE_ID, try_all, workers_that_answer

ROUND_TRIPS = 9


def collect(settings: Settings) -> Snapshot:
    """Collect everything; what cannot be reached is recorded as a fault. Changes nothing."""
    roles = {"broker": settings.broker, "ledger": settings.ledger, "cache": settings.cache}
    amqp = parts_of(settings.broker).scheme in AMQP
    if amqp:
        del roles["broker"]
    by_server = defaultdict(list)
    for role, url in roles.items():
        by_server[with_database(url, 0)].append(role)
    servers = [_server(settings, {role: roles[role] for role in served}) for served in by_server.values()]
    reached = {role for server in servers if not server.fault for role in server.roles}
    trips = try_all(settings, reached | {"broker"} if amqp else reached)
    usable = {"broker", "ledger", "cache"} - {trip.role for trip in trips if trip.fault and not trip.refused}
    answers = "ledger" in reached & usable
    workers = _workers(settings) if answers else ()
    living = [worker for worker in workers if worker.age_s <= SILENT_S]
    return Snapshot(
        version=__version__,
        servers=servers,
        round_trips=trips,
        workers=workers,
        answered=workers_that_answer(settings, len(living)) if living and "broker" in usable else None,
        counts=_counts(settings) if answers else None,
        promised_models=[catalogue.canonical(name, settings.conf_dir) for name in settings.models],
        channel=settings.channel,
        default_model=catalogue.canonical(settings.default_model or settings.model, settings.conf_dir),
        default_is_set=bool({"model", "default_model"} & settings.model_fields_set),
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
                    embedded=f"/{FOLDER}" in str(info.get("config_file", "")),
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
            # The server is reachable; the round trips show which role's database is not.
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
        return None  # our users need no permission for CONFIG


def _refused(role: str, url: str, settings: Settings) -> list[str]:
    """Try what the role needs, on keys that nothing else uses; return what this user may not do."""
    channel = completion_channel(settings.channel, PROBE_ID)
    with closing(connect(url)) as redis, closing(redis.pubsub()) as subscription:  # type: ignore[no-untyped-call]
        tries: dict[str, dict[str, Callable[[], object]]] = {
            "broker": {"read doorbells": lambda: redis.llen(queue_key(INTERACTIVE))},
            "ledger": {
                "run scripts": lambda: Ledger(redis).ask(calls.snapshot(PROBE_ID, LedgerLimits.of(settings))),
                "write": lambda: Ledger(redis).try_to_write(f"{PROBE_ID}-writes"),
                "subscribe": lambda: (subscription.subscribe(channel), subscription.get_message(timeout=1)),
                "publish": lambda: redis.publish(channel, ""),
            },
            # Only workers read scores: a producer without that permission is no fault.
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


def _workers(settings: Settings) -> list[RegisteredWorker]:
    with closing(connect(settings.ledger)) as redis:
        return [
            RegisteredWorker(
                seen.id,
                seen.model,
                seen.fingerprint,
                seen.queues,
                seen.version,
                seen.device,
                seen.age_s,
                seen.channel,
                seen.trouble,
            )
            for seen in Ledger(redis).workers()
            if seen.age_s <= LeasePolicy(settings.lease_s).alive_for_s
        ]


def _counts(settings: Settings) -> LedgerCounts:
    with closing(connect(settings.ledger)) as redis:
        found = Ledger(redis).overview(LeasePolicy(settings.lease_s))
    return LedgerCounts(
        pairs_waiting=found.pairs_waiting,
        max_pairs=settings.max_queued_pairs,
        by_queue=found.by_queue,
        running=found.running,
        expired=found.overdue,
        dead=found.dead,
        sweeper=found.somebody_sweeps,
    )
