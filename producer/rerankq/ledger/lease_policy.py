"""Who lives: one policy, in figures. ``ledger/scripts/prelude.lua`` applies it to jobs, under *Life*.

- A lease that lapsed is one sign that its worker is gone; silence is the other. On the first the job is queued again at
  once, as a suspect, and counts a death if it was alone on the device: nobody waits longer than a lease and a sweep.
- A later sign of life of that worker (a heartbeat, a claim) takes suspicion and death back, for a day; even a job that
  was set aside as dead is queued again.
- The death that would set a job aside waits for the second sign: the worker signed off, a neighbour on its machine
  finds its process ended, or it gave no sign for three leases, 10 s at least. Until then the claim stands, and a
  worker that was only paused completes the job.
- A worker whose device hangs or died gives no signs of life, and claims nothing.
- Every lease has the length that its own worker set. Whoever sweeps gives each lapsed lease until it has watched the
  ledger for so long without a break: an outage, a restarted or replaced server, a clock that was set forward, a pause.
- A clock that was set back: no lease ends later than its own length from the next sweep, and no sign of life is younger
  than now.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .runner import Server

#: Seconds between signs of life, and between sweeps.
BEAT_S = 1.0
#: Seconds by which the ledger's clock is ahead of ours that are a break, and the least without a sweep that are one.
BREAK_S = 3.0
#: A batch may take this many times what its tokens predict, and never less than this many seconds,
#: before the device counts as hung.
BATCH_TIME_FACTOR = 10.0
PATIENCE_S = 60.0


def renew_every_s(lease_s: float) -> float:
    """Seconds between renewals of a lease."""
    return lease_s / 3


def forget_after_s(lease_s: float) -> float:
    """Seconds of silence after which the registry forgets a worker of such leases."""
    return max(60.0, 10 * lease_s)


def hangs(running_s: float | None, predicted_s: float) -> bool:
    """Whether a batch that has been on the device for *running_s* (None = no batch) is never coming back.

    >>> hangs(61, predicted_s=1), hangs(61, predicted_s=10), hangs(None, predicted_s=0)
    (True, False, False)
    """
    return running_s is not None and running_s > max(PATIENCE_S, BATCH_TIME_FACTOR * predicted_s)


@dataclass(frozen=True, slots=True)
class Watch:
    """For how long a sweeper has seen the ledger without a break, by its own monotonic clock, in seconds.

    >>> first = Watch(lease_s=8).saw(9.9, 10.0, ledger_now=5000.0, server=Server("a", uptime_s=7.0))
    >>> first.watched_s(10.0), first.saw(10.9, 11.0, ledger_now=5001.0, server=Server("a", 8.0)).watched_s(11.0)
    (7.0, 8.0)
    >>> first.saw(10.9, 11.0, ledger_now=8601.0, server=Server("a", 3608.0)).watched_s(11.0)
    0.0
    """

    lease_s: float
    since: float = -math.inf
    at: float = math.nan
    ledger_at: float = math.nan
    server: str | None = None

    def saw(self, asked: float, now: float, *, ledger_now: float, server: Server) -> Watch:
        """Note what the ledger told between *asked* and *now*: its time, and which server it is and since when.

        A server that is seen for the first time has been watched for as long as it is up: before, nobody could renew.
        """
        seen = replace(self, at=asked, ledger_at=ledger_now, server=server.run_id)
        if self.server is None:
            # Less than nothing: its clock was set back. What it says of its age then says nothing.
            return replace(seen, since=max(self.since, now - server.uptime_s)) if server.uptime_s >= 0 else seen
        # At most so much time has passed between its two answers: slow ones are no step of its clock.
        passed = now - self.at
        broke = (
            server.run_id != self.server
            or passed > max(BREAK_S, self.lease_s - renew_every_s(self.lease_s))
            or ledger_now - self.ledger_at > passed + BREAK_S
        )
        return seen.lost(now) if broke else seen

    def lost(self, now: float) -> Watch:
        """Begin anew: the ledger was away."""
        return replace(self, since=now)

    def watched_s(self, now: float) -> float:
        """Seconds without a break."""
        return now - self.since
