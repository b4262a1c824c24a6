"""A query and texts become raw logits: the seam above tokens, and the scorer that stands on a worker's own engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rerankq.contract import Priority, RerankJob
from rerankq.errors import JobCancelled, JobRejected

from .cache import CachedScores, ScoreCache, score_fingerprint
from .engine import (
    QUERY_MAX_TOKENS,
    Batcher,
    Engine,
    LimitTooSmall,
    PairLimits,
    TicketCancelled,
    TokenisedPair,
    text_hash,
)
from .work import Work

# Truncated pairs of which it is remembered how far they were read, at 200 bytes each.
REMEMBERED_CUTS = 50_000


@dataclass(frozen=True)
class ScoreOptions:
    """What a job asks of its scores beside its texts; the fields are those of ``RerankJob``."""

    max_length: int | None = None
    query_max_tokens: int = QUERY_MAX_TOKENS
    long_chunks: Literal["truncate", "window"] = "truncate"
    cache: Literal["use", "refresh", "bypass"] = "use"
    priority: Priority = "interactive"
    tenant: str = ""
    explain: bool = False
    instruction: str = ""

    @classmethod
    def of(cls, job: RerankJob, priority: Priority) -> ScoreOptions:
        """Take a job's options; *priority* is the one that the ledger knows it under."""
        return cls(
            max_length=job.max_length,
            query_max_tokens=job.query_max_tokens,
            long_chunks=job.long_chunks,
            cache=job.cache,
            priority=priority,
            tenant=job.tenant,
            explain=job.explain,
            instruction=job.instruction,
        )


@dataclass(frozen=True)
class Scored:
    """The model's side of a job: one entry for each text, and what they cost.

    ``logits`` are float64, NaN where a text was not scored. ``cached`` says which came from the score cache,
    ``truncated`` of which pairs the model read a part only. ``characters_read`` says for truncated texts, by position,
    how far they were read, if the options asked and it is known. ``tokens`` are those computed; times are in seconds.
    """

    logits: NDArray[np.float64]
    cached: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    tokens: int = 0
    tokenise_s: float = 0
    waiting_s: float = 0
    inference_s: float = 0
    characters_read: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def nothing(cls, texts: int) -> Scored:
        """Score none of so many texts."""
        return cls(np.full(texts, np.nan), np.zeros(texts, np.bool_), np.zeros(texts, np.bool_))


class Scorer(Protocol):
    """Scores texts for a query with one model. Safe to share between threads: each job is one call.

    How it comes by a logit is its own affair: an engine, somebody else's server, the best of several windows.
    ``fingerprint`` names what changes a logit beside texts and options; ``max_length`` is in tokens, the most that the
    model reads of a pair; ``takes_instruction`` says whether it takes a job's instruction.
    """

    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def max_length(self) -> int: ...  # noqa: D102
    @property
    def takes_instruction(self) -> bool: ...  # noqa: D102

    def score(self, query: str, texts: Sequence[str], options: ScoreOptions, work: Work) -> Scored:
        """Score each text, in order; tells *work* how far it is, and stops with it.

        Raises:
            JobCancelled: if *work* was cancelled.
            JobRejected: if what the options ask to be read leaves no token for query and text.
            EngineError: if the device could not score a pair.
        """


class LocalScorer:
    """Scores on this worker's engine: hash, read known scores, tokenise the others, batch, store."""

    def __init__(self, engine: Engine, batcher: Batcher, cache: ScoreCache) -> None:
        self._engine = engine
        self._batcher = batcher
        self._cache = cache
        self._characters_read: dict[tuple[str, bytes, bytes], int | None] = {}

    @property
    def fingerprint(self) -> str:
        """Name the engine's weights, precision, tokeniser and template."""
        return self._engine.fingerprint

    @property
    def max_length(self) -> int:
        """Tokens that the engine reads of a pair."""
        return self._engine.max_length

    @property
    def takes_instruction(self) -> bool:
        """Tell whether the engine's pairs have a place for an instruction."""
        return self._engine.takes_instruction

    def score(self, query: str, texts: Sequence[str], options: ScoreOptions, work: Work) -> Scored:
        """Score each text; see :class:`Scorer`."""
        names = self._named(query, texts, options)
        scored = self._score(query, texts, options, work, names)
        # Formats that take an instruction do not know how far they read.
        if not options.explain or options.instruction or not scored.truncated.any():
            return scored
        read = {
            at: self._read(query, texts[at], options, names, at) for at in np.flatnonzero(scored.truncated).tolist()
        }
        return replace(scored, characters_read={at: end for at, end in read.items() if end is not None})

    def _read(self, query: str, text: str, options: ScoreOptions, names: _Named, at: int) -> int | None:
        """Tell how far a truncated text is read; remembered, because who asks once asks again with other weights."""
        key = (names.fingerprint, names.query, names.texts[at])
        if key not in self._characters_read:
            if len(self._characters_read) >= REMEMBERED_CUTS:
                self._characters_read.clear()
            self._characters_read[key] = self._engine.characters_read(
                query, text, max_length=names.max_length, query_max_tokens=options.query_max_tokens
            )
        return self._characters_read.get(key)

    def _score(self, query: str, texts: Sequence[str], options: ScoreOptions, work: Work, names: _Named) -> Scored:
        known = CachedScores.nothing(len(texts))
        if options.cache == "use":
            known = self._cache.read(names.fingerprint, names.query, names.texts)
        work.add_known(int(known.mask.sum()))
        logits = known.logits.astype(np.float64)
        unknown = np.flatnonzero(~known.mask).tolist()
        if not unknown:
            return Scored(logits, known.mask, known.truncated)

        began = time.perf_counter()
        rest = names.only(unknown)
        try:
            pairs = self._engine.tokenise(
                query,
                [texts[at] for at in unknown],
                max_length=names.max_length,
                query_max_tokens=options.query_max_tokens,
                hashes=rest.texts,
                instruction=options.instruction,
            )
        except LimitTooSmall as error:
            raise JobRejected(str(error), field="instruction" if options.instruction else "max_length") from None
        tokenise_s = time.perf_counter() - began
        truncated = known.truncated.copy()
        truncated[unknown] = [pair.truncated for pair in pairs]

        keys = _sharing_keys(pairs, rest, shared=options.cache == "use")
        ticket = self._batcher.submit(
            pairs,
            priority=options.priority,
            keys=keys,
            tenant=options.tenant,
            note_on_device=work.activity.set_on_device,
        )
        work.follow(ticket)
        try:
            with work.waiting():
                logits[unknown] = computed = ticket.result()
        except TicketCancelled:
            raise JobCancelled("cancelled while running") from None
        # Scores go to the cache before the job is completed: if we die in between, the next attempt finds them and
        # costs nothing; the other way round they are lost.
        if options.cache != "bypass":
            self._cache.write(rest.fingerprint, rest.query, rest.texts, computed, truncated[unknown])
        return Scored(
            logits,
            known.mask,
            truncated,
            tokens=ticket.tokens,
            tokenise_s=tokenise_s,
            waiting_s=ticket.waited_s,
            inference_s=ticket.device_s,
        )

    def _named(self, query: str, texts: Sequence[str], options: ScoreOptions) -> _Named:
        max_length = min(options.max_length or self.max_length, self.max_length)
        fingerprint = score_fingerprint(
            self.fingerprint,
            max_length=max_length,
            query_max_tokens=options.query_max_tokens,
            long_chunks=options.long_chunks,
            rule=PairLimits.RULE,
            instruction=options.instruction,
        )
        return _Named(fingerprint, text_hash(query), [text_hash(text) for text in texts], max_length)


class _Named(NamedTuple):
    """By which names scores are known: a fingerprint, and the hashes of query and texts."""

    fingerprint: str
    query: bytes
    texts: list[bytes]
    max_length: int

    def only(self, positions: Sequence[int]) -> _Named:
        return self._replace(texts=[self.texts[at] for at in positions])


def _sharing_keys(pairs: Sequence[TokenisedPair], names: _Named, *, shared: bool) -> list[bytes]:
    """Name each pair for the batcher, which computes those of one name once while they are in flight.

    Equal pairs of a job are computed once and get one logit, in two batches they might get two; with those of other
    jobs it shares them only where it takes what is known.
    """
    owner = bytes.fromhex(names.fingerprint) + names.query if shared else secrets.token_bytes(16)
    first: dict[bytes, bytes] = {}
    return [first.setdefault(_content(pair), owner + name) for pair, name in zip(pairs, names.texts, strict=True)]


def _content(pair: TokenisedPair) -> bytes:
    return pair.second_from.to_bytes(4, "little") + pair.ids.tobytes()
