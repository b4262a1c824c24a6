"""The settings that the ledger's scripts need."""

from __future__ import annotations

from typing import NamedTuple

from ..settings import Settings
from .keys import cancel_channel, completion_channel
from .lease_policy import LeasePolicy


class LedgerLimits(NamedTuple):
    """The settings that the ledger's scripts need; equal in a whole deployment."""

    channel: str
    result_ttl_s: int = 3_600
    doorbell_window: int = 256
    max_queued_pairs: int = 10_000_000
    max_attempts: int = 3
    lease_s: float = 8
    max_memory_percent: int = 90

    @property
    def lease_policy(self) -> LeasePolicy:
        """The rule for this deployment's leases."""
        return LeasePolicy(self.lease_s)

    def completion_channel(self, job_id: str) -> str:
        """Name the channel on which the end of a job is published."""
        return completion_channel(self.channel, job_id)

    @property
    def cancel_channel(self) -> str:
        """The channel on which workers are told of cancelled jobs."""
        return cancel_channel(self.channel)

    @classmethod
    def of(cls, settings: Settings) -> LedgerLimits:
        """Pick what the ledger's scripts need of the settings."""
        return cls(
            channel=settings.channel,
            result_ttl_s=settings.result_ttl_s,
            doorbell_window=settings.doorbell_window,
            max_queued_pairs=settings.max_queued_pairs,
            max_attempts=settings.max_attempts,
            lease_s=settings.lease_s,
        )
