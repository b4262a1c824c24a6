"""Who is alive: the workers that registered themselves in the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple


class WorkerInfo(NamedTuple):
    """A worker's entry in the registry; ``age_s`` is the time since its last sign of life.

    ``trouble`` says why it gets no scores at present, although it lives: another server does not give them.
    """

    id: str
    model: str
    aliases: tuple[str, ...]
    fingerprint: str
    queues: tuple[str, ...]
    age_s: float
    pairs_per_s: float
    version: str = ""
    device: str = ""
    process: str = ""
    channel: str = ""
    max_length: int = 0  # tokens of a pair that its model reads; 0 = an older version, which does not say
    trouble: str = ""
    # Since it started; 0 also where an older version does not say.
    jobs: int = 0
    pairs: int = 0
    cached_pairs: int = 0
    takes_instruction: bool = False  # whether its model has a place for one
    last_progress_s: float | None = None  # since its last batch ended, or it started; None = it does not say

    @property
    def suffix(self) -> str:
        """The suffix of its queues: empty for the deployment's default model."""
        return self.queues[0].removeprefix("rerankq.interactive") if self.queues else ""


def workers_of(now: float, found: Mapping[bytes, bytes]) -> list[WorkerInfo]:
    """Read the entries of the registry; *now* is the ledger's time."""
    workers = []
    for name, entry in found.items():
        # Skip entries that no worker wrote.
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            workers.append(_worker(name.decode(), entry.decode(), now))
    return workers


def _worker(name: str, entry: str, now: float) -> WorkerInfo:
    beaten, _, text = entry.partition(" ")
    info = json.loads(text)
    return WorkerInfo(
        id=name,
        model=info["model"],
        aliases=tuple(info.get("aliases", ())),
        fingerprint=info["fingerprint"],
        queues=tuple(info.get("queues", ())),
        age_s=max(0.0, now - float(beaten)),
        pairs_per_s=float(info.get("pairs_per_s", 0)),
        version=str(info.get("version", "")),
        device=str(info.get("device", "")),
        process=str(info.get("process", "")),
        channel=str(info.get("channel", "")),
        max_length=int(info.get("max_length", 0)),
        trouble=str(info.get("trouble", "")),
        jobs=int(info.get("jobs", 0)),
        pairs=int(info.get("pairs", 0)),
        cached_pairs=int(info.get("cached_pairs", 0)),
        takes_instruction=bool(info.get("takes_instruction", False)),
        last_progress_s=float(info["last_progress_s"]) if "last_progress_s" in info else None,
    )
