"""What the ledger says from outside: who holds which jobs, and when the jobs of a lost worker run again."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import redis
from redis.exceptions import RedisError

from rerankq.connections import opening as connections
from rerankq.urls import with_database

ANSWER_S = 2.0


@dataclass
class Orphans:
    """The jobs that a worker held when it was lost, and for each when it was queued and ran again (seconds after)."""

    kind: str
    at_s: float
    lost_at: float
    claims: dict[str, int]
    again_s: dict[str, float] = field(default_factory=dict)
    queued_s: dict[str, float] = field(default_factory=dict)
    priorities: dict[str, str] = field(default_factory=dict)
    # Those that ended without running again: cancelled, or their worker completed them after all.
    ended: set[str] = field(default_factory=set)

    @property
    def waiting(self) -> list[str]:
        return [one for one in self.claims if one not in self.again_s and one not in self.ended]


class Watch:
    """Read the ledger directly, never through a proxy; answers nothing while Redis is away."""

    def __init__(self, url: str) -> None:
        kind, options = connections.broker(with_database(url, 1))
        options |= {"decode_responses": True, "socket_timeout": ANSWER_S, "socket_connect_timeout": ANSWER_S}
        self._redis = redis.Redis.from_pool(redis.ConnectionPool(connection_class=kind, **options))

    def is_registered(self, token: str) -> bool:
        try:
            return bool(token) and any(token in name for name in self._redis.hkeys("rerankq:workers"))
        except RedisError:
            return False

    def held_by(self, token: str) -> dict[str, int]:
        """The jobs that a worker holds, with how often each was claimed."""
        try:
            running = self._redis.zrange("rerankq:running", 0, -1)
            found = self._read(running, "owner", "claims")
        except RedisError:
            return {}
        return {one: int(claims) for one, (owner, claims) in found.items() if token in (owner or "")}

    def look_after(self, lost: Iterable[Orphans]) -> None:
        """Note which orphans have been claimed again since, by our own clock: that of Redis may have been set."""
        for orphans in lost:
            try:
                found = self._read(orphans.waiting, "claims", "state", "priority")
            except RedisError:
                return
            for one, (claims, state, priority) in found.items():
                after_s = time.time() - orphans.lost_at
                orphans.priorities[one] = priority or ""
                if state == "queued" or (claims is not None and int(claims) > orphans.claims[one]):
                    orphans.queued_s.setdefault(one, after_s)
                if claims is not None and int(claims) > orphans.claims[one]:
                    orphans.again_s[one] = after_s
                elif state not in {"queued", "running"}:
                    orphans.ended.add(one)

    def claims(self, ids: Iterable[str]) -> dict[str, int]:
        return {one: int(claims or 0) for one, (claims,) in self._read(ids, "claims").items()}

    def history(self, job_id: str) -> str:
        return self._redis.hget(f"rerankq:job:{job_id}", "history") or ""

    def close(self) -> None:
        self._redis.close()

    def _read(self, ids: Iterable[str], *fields: str) -> dict[str, list[str | None]]:
        ids = list(ids)
        if not ids:
            return {}
        pipe = self._redis.pipeline(transaction=False)
        for one in ids:
            pipe.hmget(f"rerankq:job:{one}", *fields)
        return dict(zip(ids, pipe.execute(), strict=True))
