"""One job, from its texts to its ranking: score, compute the other signals, fuse, order and cut."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray

from rerankq.contract import Fusion, ModelName, Priority, Ranking, RerankJob, Timings, Usage
from rerankq.errors import JobFailed, JobRejected

from .fusion import Analyser, FusionSpec, blend, contributions, rank_feature_scores, signals_needed, token_signal
from .ranking import ranked_chunks, ranking_of, unscored_chunks
from .scoring import Scored, ScoreOptions, Scorer
from .work import Work


class Reranker:
    """Ranks jobs with one scorer. Safe to share between threads: each job is one call."""

    def __init__(self, scorer: Scorer, analyser: Analyser, *, name: str) -> None:
        self._scorer = scorer
        self._analyser = analyser
        self._name = name

    def rank(self, job_id: str, job: RerankJob, work: Work, *, priority: Priority, waited_s: float) -> Ranking:
        """Rank a job's chunks.

        Raises:
            JobCancelled: if *work* was cancelled.
            JobFailed, JobRejected: if the job asks for what this worker cannot do.
            EngineError: if the device could not score its pairs.
        """
        began = time.perf_counter()
        if job.long_chunks == "window":
            raise JobFailed("long_chunks: 'window' is not available yet; use 'truncate'")
        if not isinstance(job.fusion, Fusion):
            raise JobFailed(f"fusion: expected numbers, got the name {job.fusion!r}; submit through the client")
        model = ModelName(name=self._name, fingerprint=self._scorer.fingerprint)
        # A least score can be judged by scores alone.
        if len(job.chunks) <= job.skip_at_or_below and job.min_score is None:
            return ranking_of(
                job,
                unscored_chunks(job),
                job_id=job_id,
                model=model,
                timings_ms=Timings(queued=_ms(waited_s), total=_ms(time.perf_counter() - began)),
                skipped=True,
            )
        # Its keys are literals, and Mapping's keys are invariant.
        fusion = cast("FusionSpec", _without_idle_tags(job.fusion, job))
        needed = signals_needed(fusion)
        scored = Scored.nothing(len(job.chunks))
        if "model" in needed:
            if job.instruction and not self._scorer.takes_instruction:
                raise JobRejected(f"the model {self._name!r} takes none", field="instruction")
            texts = [chunk.model_text for chunk in job.chunks]
            scored = self._scorer.score(job.query, texts, ScoreOptions.of(job, priority), work)
        signals = self._signals(job, fusion, scored, needed)
        blended = blend(signals, fusion)
        return ranking_of(
            job,
            ranked_chunks(
                job,
                blended,
                logits=scored.logits,
                truncated=scored.truncated,
                cached=scored.cached,
                parts=contributions(signals, fusion) if job.explain else {},
                characters_read=scored.characters_read,
            ),
            job_id=job_id,
            model=model,
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


def _without_idle_tags(fusion: Fusion, job: RerankJob) -> Fusion:
    """Leave tags out where the query has none: it asks for none, so no chunk lacks them."""
    weights = {name: weight for name, weight in fusion.weights.items() if name != "tags"}
    if any(job.query_tags.values()) or not any(weights.values()):
        return fusion
    return fusion.model_copy(update={"weights": weights})


def _floats(values: list[float | None]) -> NDArray[np.float64]:
    # None becomes NaN: a signal that this chunk lacks.
    return np.array(values, dtype=np.float64)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
