"""The backend of a worker that has no device: a scorer over another server."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

from rerankq.catalogue import RemoteCard
from rerankq.errors import SettingsInvalid
from rerankq.ledger.lease_policy import PATIENCE_S, LeasePolicy

from ..cache import ScoreCache
from .remote_scorer import RemoteScorer
from .sending import RequestSender, SenderStats


class RemoteBackend:
    """One model on another server, by its entry in the catalogue.

    Raises SettingsInvalid if the key cannot be sent. The server itself need not answer yet.
    """

    def __init__(self, name: str, card: RemoteCard, scores: ScoreCache, *, api_key: str = "") -> None:
        self._card = card
        self._sender = RequestSender(card, name=name, api_key=checked_key(card, api_key))
        self.scorer = RemoteScorer(card, self._sender, scores, name=name)

    @property
    def can_work(self) -> bool:
        """Whether the thread that sends requests lives. An outage of the server is not the worker's."""
        return self._sender.alive

    def hangs(self, policy: LeasePolicy) -> bool:  # noqa: ARG002 - a request has a limit of its own
        """Tell whether a request is under way long after its limit: the thread that should end it hangs."""
        oldest_s = self._sender.stats().oldest_s
        return oldest_s is not None and oldest_s > self._card.timeout_s + PATIENCE_S

    def description(self) -> dict[str, Any]:
        """Say what the registry shows: where requests go, and why none succeeds, if so."""
        stats = self._sender.stats()
        return {
            "fingerprint": self.scorer.fingerprint,
            "device": f"{urlsplit(self._card.url).netloc} ({self._card.dialect}: {self._card.model or 'its model'})",
            "pairs_per_s": round(stats.pairs / max(1.0, stats.busy_s), 1) if stats.busy_s else 0,
            "last_progress_s": _since_progress(stats),
            "max_length": self._card.max_length,
            "takes_instruction": self.scorer.takes_instruction,
            "trouble": stats.trouble,
        }

    def figures(self) -> dict[str, Any]:
        """Say what was asked of the server, and how it answered."""
        stats = self._sender.stats()
        return {
            "url": self._card.url,
            "dialect": self._card.dialect,
            "calls": stats.calls,
            "failures": stats.failures,
            "throttled": stats.throttled,
            "pairs": stats.pairs,
            "tokens": stats.tokens,
            "busy_s": round(stats.busy_s, 1),
            "running_calls": stats.running,
            "waiting_calls": stats.waiting,
            "last_progress_s": _since_progress(stats),
            "trouble": stats.trouble,
        }

    def close(self, timeout_s: float) -> None:
        """Break off every request."""
        self._sender.close(timeout_s)


def checked_key(card: RemoteCard, api_key: str) -> str:
    """Return a key without the white space round it.

    Raises:
        SettingsInvalid: if there is none although the entry names its variable, or if no header can carry it.
    """
    key = api_key.strip()
    if card.api_key_env and not key:
        raise SettingsInvalid(f"{card.api_key_env}: is not set; expected the API key for {urlsplit(card.url).netloc}")
    if not (key.isascii() and key.isprintable()):
        raise SettingsInvalid(f"{card.api_key_env}: expected printable ASCII characters in one line")
    return key


def _since_progress(stats: SenderStats) -> float:
    return round(time.monotonic() - stats.last_progress, 1)
