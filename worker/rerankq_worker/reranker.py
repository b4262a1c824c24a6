"""The story of one job: hash, read known scores, tokenise the rest, score, remember, fuse, order, cut."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rerankq.contract import Fusion, ModelName, Priority, Ranking, RerankJob, Timings, Usage
from rerankq.errors import JobCancelled, JobFailed

from .cache import CachedScores, ScoreCache, score_fingerprint
from .engine import Batcher, Engine, PairLimits, Ticket, TicketCancelled, TokenisedPair, text_hash
from .fusion import Blend, FusionSpec, blend, rank, rank_feature_scores, signals_needed, token_signal
from .fusion.analyser import Analyser


class Work:
    """A job being scored, as seen from outside: how far it is, and a way to stop it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ticket: Ticket | None = None
        self._cancelled = False
        self._known = 0

    @property
    def pairs_done(self) -> int:
        """Pairs scored so far, those from the cache included."""
        ticket = self._ticket
        return self._known + (ticket.done_pairs if ticket is not None else 0)

    def cancel(self) -> None:
        """Stop before the next micro-batch."""
        with self._lock:
            self._cancelled = True
            if self._ticket is not None:
                self._ticket.cancel()

    def go_on(self, known: int = 0, ticket: Ticket | None = None) -> None:
        """Note progress.

        Raises:
            JobCancelled: if the work was cancelled meanwhile.
        """
        with self._lock:
            self._known = known or self._known
            self._ticket = ticket
            if self._cancelled:
                if ticket is not None:
                    ticket.cancel()
                raise JobCancelled("cancelled while running")


@dataclass
class Scored:
    """The model's side of a job: arrays of shape (chunks,), and what they cost."""

    logits: NDArray[np.float64]
    cached: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    tokens: int = 0
    tokenise_s: float = 0
    waiting_s: float = 0
    inference_s: float = 0


class Reranker:
    """Ranks jobs with one engine. Safe to share between threads: each job is one call."""

    def __init__(self, engine: Engine, batcher: Batcher, cache: ScoreCache, analyser: Analyser, *, name: str) -> None:
        self._engine = engine
        self._batcher = batcher
        self._cache = cache
        self._analyser = analyser
        self._name = name

    def rank(self, job_id: str, job: RerankJob, work: Work, *, priority: Priority, waited_s: float) -> Ranking:
        """Rank a job's chunks.

        Raises:
            JobCancelled: if *work* was cancelled.
            JobFailed: if the job asks for what this worker cannot do.
            EngineError: if the device could not score its pairs.
        """
        began = time.perf_counter()
        if job.long_chunks == "window":
            raise JobFailed("long_chunks: 'window' is not available yet; use 'truncate'")
        if not isinstance(job.fusion, Fusion):
            raise JobFailed(f"fusion: expected numbers, got the name {job.fusion!r}; submit through the client")
        # A least score can be judged by scores alone.
        if len(job.chunks) <= job.skip_at_or_below and job.min_score is None:
            return self._unscored(job_id, job, began, waited_s)
        # Its keys are literals, and Mapping's keys are invariant.
        fusion = cast("FusionSpec", _asked_for(job.fusion, job))
        needed = signals_needed(fusion)
        scored = self._score(job, work, priority) if "model" in needed else _nothing(len(job.chunks))
        blended = blend(self._signals(job, fusion, scored, needed), fusion)
        chunks = _ranked(job, scored, blended)
        return _ranking(
            job_id=job_id,
            model=self._model,
            chunks=chunks,
            dropped=len(job.chunks) - len(chunks),
            usage=Usage(
                pairs=len(job.chunks) if "model" in needed else 0,
                cached_pairs=int(scored.cached.sum()),
                tokens=scored.tokens,
                truncated_pairs=int(scored.truncated.sum()),
            ),
            timings_ms=Timings(
                queued=_ms(waited_s),
                tokenise=_ms(scored.tokenise_s),
                waiting=_ms(scored.waiting_s),
                inference=_ms(scored.inference_s),
                total=_ms(time.perf_counter() - began),
            ),
        )

    @property
    def _model(self) -> ModelName:
        return ModelName(name=self._name, fingerprint=self._engine.fingerprint)

    def _score(self, job: RerankJob, work: Work, priority: Priority) -> Scored:
        texts = [chunk.model_text for chunk in job.chunks]
        query, hashes = text_hash(job.query), [text_hash(text) for text in texts]
        max_length = min(job.max_length or self._engine.max_length, self._engine.max_length)
        fingerprint = score_fingerprint(
            self._engine.fingerprint,
            max_length=max_length,
            query_max_tokens=job.query_max_tokens,
            long_chunks=job.long_chunks,
            rule=PairLimits.RULE,
        )
        known = self._cache.read(fingerprint, query, hashes) if job.cache == "use" else CachedScores.nothing(len(texts))
        work.go_on(known=int(known.mask.sum()))
        scored = Scored(known.logits.astype(np.float64), known.mask, known.truncated)
        unknown = np.flatnonzero(~known.mask)
        if not unknown.size:
            return scored

        began = time.perf_counter()
        pairs = self._engine.tokenise(
            job.query,
            [texts[at] for at in unknown],
            max_length=max_length,
            query_max_tokens=job.query_max_tokens,
            hashes=[hashes[at] for at in unknown],
        )
        scored.truncated[unknown] = [pair.truncated for pair in pairs]
        scored.tokenise_s = time.perf_counter() - began

        # Equal pairs of a job are computed once and get one logit, in two batches they might get two; with those of
        # other jobs it shares them only where it takes what is known.
        join = bytes.fromhex(fingerprint) + query if job.cache == "use" else secrets.token_bytes(16)
        first: dict[bytes, bytes] = {}
        keys = [first.setdefault(_content(pair), join + hashes[at]) for pair, at in zip(pairs, unknown, strict=True)]
        ticket = self._batcher.submit(pairs, priority=priority, keys=keys, tenant=job.tenant)
        work.go_on(ticket=ticket)
        try:
            logits = ticket.result()
        except TicketCancelled:
            raise JobCancelled("cancelled while running") from None
        # Scores go to the cache before the job is completed: if we die in between, the next attempt finds them and
        # costs nothing; the other way round they are lost.
        if job.cache != "bypass":
            self._cache.write(fingerprint, query, [hashes[at] for at in unknown], logits, scored.truncated[unknown])
        scored.logits[unknown] = logits
        scored.tokens, scored.waiting_s, scored.inference_s = ticket.tokens, ticket.waited_s, ticket.device_s
        return scored

    def _signals(
        self, job: RerankJob, fusion: FusionSpec, scored: Scored, needed: frozenset[str]
    ) -> dict[str, NDArray[np.float64]]:
        # Signals of no weight are not computed.
        compute: dict[str, Callable[[], NDArray[np.float64]]] = {
            "model": lambda: scored.logits,
            "token": lambda: token_signal(job.query, job.query_tokens, job.chunks, fusion, self._analyser),
            "vector": lambda: _floats([chunk.vector_score for chunk in job.chunks]),
            "keyword": lambda: _floats([chunk.keyword_score for chunk in job.chunks]),
            "pagerank": lambda: _floats([chunk.pagerank for chunk in job.chunks]),
            "tags": lambda: rank_feature_scores(job.query_tags, [chunk.tags for chunk in job.chunks]),
        }
        return {name: compute[name]() for name in compute if name in needed}

    def _unscored(self, job_id: str, job: RerankJob, began: float, waited_s: float) -> Ranking:
        names = job.chunk_names()
        chunks = [
            _chunk(job, at, place, id=names[at], score=0.0, missing=["model"])
            for place, at in enumerate(range(len(job.chunks))[: job.top_k], 1)
        ]
        return _ranking(
            job_id=job_id,
            model=self._model,
            chunks=chunks,
            dropped=len(job.chunks) - len(chunks),
            timings_ms=Timings(queued=_ms(waited_s), total=_ms(time.perf_counter() - began)),
            skipped=True,
        )


def _asked_for(fusion: Fusion, job: RerankJob) -> Fusion:
    """Leave tags out where the query has none: it asks for none, so no chunk lacks them."""
    weights = {name: weight for name, weight in fusion.weights.items() if name != "tags"}
    return (
        fusion
        if any(job.query_tags.values()) or not any(weights.values())
        else fusion.model_copy(update={"weights": weights})
    )


def _ranking(**fields: Any) -> Ranking:
    return Ranking.model_validate(fields)


def _ranked(job: RerankJob, scored: Scored, blended: Blend) -> list[dict[str, Any]]:
    names = job.chunk_names()
    # Lists of Python's own numbers: to pick single ones out of arrays costs more than the fusion.
    fused, truncated, cached = blended.scores.tolist(), scored.truncated.tolist(), scored.cached.tolist()
    logits = _or_none(scored.logits)
    signals = {name: _or_none(row) for name, row in blended.normalised.items()}
    return [
        _chunk(
            job,
            at,
            place,
            id=names[at],
            score=fused[at],
            scores={name: value for name, row in signals.items() if (value := row[at]) is not None},
            missing=blended.missing[at],
            model_logit=logits[at],
            truncated=truncated[at],
            cached=cached[at],
        )
        for place, at in enumerate(rank(blended.scores, job.min_score, job.top_k, logits=scored.logits).tolist(), 1)
    ]


def _chunk(job: RerankJob, at: int, place: int, **fields: Any) -> dict[str, Any]:
    """Write a chunk's place as a ranking takes it: one validation of them all costs half of making each by itself."""
    chunk = job.chunks[at]
    fields |= {"index": at, "rank": place}
    if job.return_text:
        fields["text"] = chunk.text
    if chunk.metadata:
        fields["metadata"] = chunk.metadata
    return fields


def _or_none(row: NDArray[np.float64]) -> list[float | None]:
    values = row.tolist()
    return values if np.isfinite(row).all() else [value if math.isfinite(value) else None for value in values]


def _nothing(chunks: int) -> Scored:
    return Scored(np.full(chunks, np.nan), np.zeros(chunks, np.bool_), np.zeros(chunks, np.bool_))


def _floats(values: list[float | None]) -> NDArray[np.float64]:
    # None becomes NaN: a signal that this chunk lacks.
    return np.array(values, dtype=np.float64)


def _content(pair: TokenisedPair) -> bytes:
    return pair.second_from.to_bytes(4, "little") + pair.ids.tobytes()


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
