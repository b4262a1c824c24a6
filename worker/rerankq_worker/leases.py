"""The jobs that this worker holds, and the timer that renews their leases while the device makes progress."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable

from rerankq.errors import RerankqError
from rerankq.ledger import LedgerLimits, calls
from rerankq.ledger.lease_policy import PATIENCE_S
from rerankq.ledger.runner import Ledger
from rerankq.outage import Outage

from .work import Work

logger = logging.getLogger("rerankq")

# Seconds that stopping waits for a renewal under way: the ledger may hang.
JOIN_S = 1.0


class Leases:
    """Holds claimed jobs; every second, or third of a lease, one script renews them all.

    *device_hangs* is asked first. Of a hung device's jobs those that only wait are handed back; the leases of the
    others lapse, so that other workers take them as suspects, and *give_up* is called once they have.
    """

    def __init__(
        self, ledger: Ledger, limits: LedgerLimits, *, device_hangs: Callable[[], bool], give_up: Callable[[], None]
    ) -> None:
        self._ledger = ledger
        self._limits = limits
        self._device_hangs = device_hangs
        self._give_up = give_up
        self._lock = threading.Lock()
        self._held: dict[str, tuple[int, Work]] = {}
        self._stopped = threading.Event()
        self._outage = Outage()
        self._hung_since: float | None = None
        self._trusted_until = -math.inf
        self._thread = threading.Thread(target=self._run, name="rerankq-leases", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> list[tuple[str, int]]:
        """Stop renewing; answers ``(id, fence)`` of what is still held, to be handed back."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)
        with self._lock:
            return [(job_id, fence) for job_id, (fence, _) in self._held.items()]

    @property
    def hung(self) -> bool:
        """Whether the device hangs, so that leases are left to lapse: no work may be taken."""
        return self._hung_since is not None

    def hold(self, job_id: str, fence: int, work: Work) -> None:
        """Renew this job's lease from now on; work on an earlier claim of it stops, which the ledger ended."""
        with self._lock:
            earlier = self._held.get(job_id)
            self._held[job_id] = (fence, work)
        if earlier is not None:
            earlier[1].cancel()

    def release(self, job_id: str, fence: int) -> None:
        """Renew this claim no more; a later claim of the same job (another fence) stays."""
        with self._lock:
            if self._held.get(job_id, (None,))[0] == fence:
                del self._held[job_id]

    def cancel(self, held: Iterable[tuple[str, int]]) -> None:
        """Stop work on these claims, each ``(id, fence)``, before their next micro-batch; a later claim goes on."""
        with self._lock:
            found = [(self._held.get(job_id), fence) for job_id, fence in held]
        for claim, fence in found:
            if claim is not None and claim[0] == fence:
                claim[1].cancel()

    def renew(self) -> None:
        """Renew once; work on jobs whose lease was lost stops."""
        with self._lock:
            held = [(job_id, fence, work.pairs_done) for job_id, (fence, work) in self._held.items()]
        if held:
            fences = {job_id: fence for job_id, fence, _ in held}
            lost = self._ledger.ask(calls.renew(held, self._limits))
            self.cancel((job_id, fences[job_id]) for job_id in lost)

    def hand_back_waiting(self) -> None:
        """Hand back the jobs that only wait: the device hangs, and it was none of them."""
        with self._lock:
            waiting = [(job_id, fence) for job_id, (fence, work) in self._held.items() if not work.activity.at_work]
        self.cancel(waiting)
        if waiting:
            self._ledger.ask(calls.hand_back(waiting))

    def _run(self) -> None:
        while not self._stopped.is_set():
            slept_at = time.monotonic()
            if self._stopped.wait(self._limits.lease_policy.renew_every_s):
                return
            self._note_pause(slept_for=time.monotonic() - slept_at)
            try:
                if self._hangs():
                    self.hand_back_waiting()
                    continue
                self.renew()
                if (lasted_s := self._outage.works(time.monotonic())) is not None:
                    logger.warning("leases are renewed again, after %.0f s", lasted_s)
            except RerankqError as error:
                if self._outage.fails(time.monotonic()):
                    logger.warning("cannot renew leases: %s", error)
            except Exception:
                # This thread must outlive any bug in it: without it every lease lapses.
                logger.exception("cannot renew leases")

    def _note_pause(self, *, slept_for: float) -> None:
        if self._limits.lease_policy.was_paused(slept_for):
            # This process was paused, and its device with it: only the clock of its batch ran on.
            self._trusted_until = time.monotonic() + PATIENCE_S

    def _hangs(self) -> bool:
        if not self._device_hangs() or time.monotonic() < self._trusted_until:
            self._hung_since = None
            return False
        if self._hung_since is None:
            logger.error("the device hangs: leases are left to lapse")
            self._hung_since = time.monotonic()
        if time.monotonic() - self._hung_since > self._limits.lease_s:
            self._give_up()
        return True
