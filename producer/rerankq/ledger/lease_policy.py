"""When a worker counts as gone, and its jobs go to others: every figure of that rule is here.

The scripts see the figures as the table ``POLICY``; ``prelude.lua`` applies them to jobs, under *Life*.

- A lease that lapsed is one sign that its worker is gone; silence is the other. On the first the job is queued again at
  once, as a suspect, and counts a death if it was alone on the device: nobody waits longer than a lease and a sweep.
- A later sign of life of that worker (a heartbeat, a claim) takes suspicion and death back, for a day; even a job that
  was set aside as dead is queued again.
- The death that would set a job aside waits for the second sign: the worker signed off, another worker on its machine
  finds its process ended, or it was silent for three leases, 10 s at least. Until then the claim stands, and a
  worker that was only paused completes the job.
- The lease of a worker whose process has certainly ended is not waited for: who finds that, on its machine, says so and
  says which of its jobs only waited. Those are queued again without suspicion, each two times at most.
- A worker whose device hangs or died gives no signs of life, and claims nothing.
- Every lease has the length that its own worker set. The sweeper judges no lapsed lease until it has watched the
  ledger for that long without a break (outage, restarted or replaced server, clock set forward, pause).
- If the clock was set back, no lease ends later than its own length from the next sweep, and no sign of life is younger
  than now.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

#: Seconds between signs of life, and between sweeps.
BEAT_S = 1.0
#: Seconds by which the ledger's clock is ahead of ours that are a break, and the least without a sweep that are one.
BREAK_S = 3.0
#: A batch may take this many times what its tokens predict, and never less than this many seconds,
#: before the device counts as hung.
BATCH_TIME_FACTOR = 10.0
PATIENCE_S = 60.0
#: A worker counts as alive for so many leases after its last sign of life, and for so many seconds at least: signs come
#: every second whatever the lease, and a short silence is no more than a hiccup of the server.
ALIVE_LEASES = 3.0
ALIVE_LEAST_S = 10.0
#: Seconds for which a sweeper's lock holds.
SWEEPER_LOCK_S = 3
#: Seconds for which a worker may be paused and still clear the jobs that became suspects because of its silence.
ACCUSED_KEPT_S = 86_400
#: Deaths that a job may live through unsuspected because it only waited. A job that ends its worker some time after its
#: batch seems to have waited, so it must become a suspect in the end.
SPARED_AT_MOST = 2


class Server(NamedTuple):
    """Which run of which server answers, and for how long, by its own clock, it has been up."""

    run_id: str
    uptime_s: float


@dataclass(frozen=True, slots=True)
class LeasePolicy:
    """The rule for leases of *lease_s* seconds. All times are in seconds.

    >>> policy = LeasePolicy(lease_s=8.0)
    >>> policy.alive_for_s, policy.forget_after_s
    (24.0, 80.0)
    >>> policy.hangs(61, predicted_s=1), policy.hangs(61, predicted_s=10), policy.hangs(None, predicted_s=0)
    (True, False, False)
    """

    lease_s: float

    @property
    def renew_every_s(self) -> float:
        """Time between renewals of a lease; they tell how far a job is, too, to whoever follows it."""
        return min(self.lease_s / 3, BEAT_S)

    @property
    def alive_for_s(self) -> float:
        """Silence for which a worker still counts as alive."""
        return max(ALIVE_LEAST_S, ALIVE_LEASES * self.lease_s)

    @property
    def forget_after_s(self) -> float:
        """Silence after which the registry forgets a worker."""
        return max(60.0, 10 * self.lease_s)

    @property
    def longest_gap_s(self) -> float:
        """Longest time between two sweeps in which every worker could still renew its leases, each third of one."""
        return max(BREAK_S, self.lease_s * 2 / 3)

    @property
    def judged_within_s(self) -> float:
        """Time from a lease's end within which some sweep has judged it: after an outage sweepers wait a lease."""
        return 2 * self.lease_s + SWEEPER_LOCK_S

    def was_paused(self, slept_s: float) -> bool:
        """Whether a worker that slept for so long between renewals has lost its leases."""
        return slept_s > self.lease_s + BREAK_S

    @staticmethod
    def hangs(running_s: float | None, predicted_s: float) -> bool:
        """Whether a batch that has been on the device for *running_s* (None = no batch) is never coming back."""
        return running_s is not None and running_s > max(PATIENCE_S, BATCH_TIME_FACTOR * predicted_s)


@dataclass(frozen=True, slots=True)
class Watch:
    """For how long a sweeper has seen the ledger without a break, by its own monotonic clock, in seconds.

    >>> first = Watch(LeasePolicy(8)).saw(9.9, 10.0, ledger_now=5000.0, server=Server("a", uptime_s=7.0))
    >>> first.watched_s(10.0), first.saw(10.9, 11.0, ledger_now=5001.0, server=Server("a", 8.0)).watched_s(11.0)
    (7.0, 8.0)
    >>> first.saw(10.9, 11.0, ledger_now=8601.0, server=Server("a", 3608.0)).watched_s(11.0)
    0.0
    """

    policy: LeasePolicy
    since: float = -math.inf
    at: float = math.nan
    ledger_at: float = math.nan
    server: str | None = None

    def saw(self, asked: float, now: float, *, ledger_now: float, server: Server) -> Watch:
        """Note what the ledger answered between *asked* and *now*: its time, and which server it is and since when.

        A server that is seen for the first time has been watched for as long as it is up: before, nobody could renew.
        """
        seen = replace(self, at=asked, ledger_at=ledger_now, server=server.run_id)
        if self.server is None:
            # A negative uptime: its clock was set back, so its uptime says nothing.
            return replace(seen, since=max(self.since, now - server.uptime_s)) if server.uptime_s >= 0 else seen
        # At most so much time has passed between its two answers: slow ones are no step of its clock.
        passed = now - self.at
        broke = (
            server.run_id != self.server
            or passed > self.policy.longest_gap_s
            or ledger_now - self.ledger_at > passed + BREAK_S
        )
        return seen.lost(now) if broke else seen

    def lost(self, now: float) -> Watch:
        """Begin anew: the ledger was away."""
        return replace(self, since=now)

    def watched_s(self, now: float) -> float:
        """Seconds without a break."""
        return now - self.since


def as_lua() -> str:
    """Write the figures for the scripts."""
    figures = {
        "alive_leases": ALIVE_LEASES,
        "alive_least_s": ALIVE_LEAST_S,
        "sweeper_lock_ms": 1_000 * SWEEPER_LOCK_S,
        "accused_kept_s": ACCUSED_KEPT_S,
        "spared_at_most": SPARED_AT_MOST,
    }
    return f"local POLICY = {{{', '.join(f'{name} = {figure:g}' for name, figure in figures.items())}}}\n"
