"""The ledger: what a job is and what may happen to it. Redis holds it, short Lua scripts change it.

The first lines of each script say what it does; :mod:`.calls` builds a call of each, :mod:`.runner` runs it.
:mod:`.keys` lists the keys, :mod:`.lease_policy` says when a worker counts as gone, :mod:`.registry` who is alive.
"""

from ..connections import ledger as connect
from ..connections import ledger_async as connect_async
from ..connections import listening as subscription
from . import calls, keys, webhooks
from .calls import Acceptance, Call, Claim, Counted, Deferred, Doorbell, JobSnapshot, NewJob, Recovered, Retrial, Swept
from .lease_policy import LeasePolicy, Server, Watch
from .limits import LedgerLimits
from .registry import WorkerInfo
from .runner import AsyncLedger, Ledger, Overview, reraise_cancelled, source, translated, yield_to_loop

__all__ = [
    "Acceptance",
    "AsyncLedger",
    "Call",
    "Claim",
    "Counted",
    "Deferred",
    "Doorbell",
    "JobSnapshot",
    "LeasePolicy",
    "Ledger",
    "LedgerLimits",
    "NewJob",
    "Overview",
    "Recovered",
    "Retrial",
    "Server",
    "Swept",
    "Watch",
    "WorkerInfo",
    "calls",
    "connect",
    "connect_async",
    "keys",
    "reraise_cancelled",
    "source",
    "subscription",
    "translated",
    "webhooks",
    "yield_to_loop",
]
