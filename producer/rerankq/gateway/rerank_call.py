"""A rerank call of any dialect and its reply, in our words: to a job and back. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..contract import Chunk, Fusion, Priority, RankedChunk, Ranking, RerankJob, Timings, is_blank
from ..errors import JobTooLarge

# Scores of a document that is empty or blank: it ranks last. As a probability, and as a logit.
# The logit is near those of models: clients that stretch scores between the lowest and the highest divide by it.
BLANK_SCORE, BLANK_LOGIT = 0.0, -12.0
# Characters of a document that are sent to a worker: more than any model reads. One document that is larger than a job
# may be does not fail the others.
MOST_CHARACTERS = 1_000_000
# Queries of one call with pairs of its own: a job for each.
MAX_QUERIES = 1_000
# Jobs that a header names.
MAX_JOBS_NAMED = 50


@dataclass(frozen=True, slots=True)
class RerankCall:
    """What a caller asks, in any dialect.

    ``top_n`` None: all documents. ``max_length``: tokens of a pair. ``instruction``: what to judge by; empty: the
    model's own. ``warnings``: what of it cannot be done, for the caller to read.
    """

    query: str
    documents: tuple[Chunk, ...]
    model: str | None = None
    top_n: int | None = None
    raw_scores: bool = False
    priority: Priority | None = None
    max_length: int | None = None
    query_max_tokens: int | None = None
    instruction: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreCall:
    """Pairs with several queries: a call for each query, and the positions of its pairs."""

    calls: tuple[RerankCall, ...]
    positions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What a caller asks beside the dialect, by headers. ``fusion`` None: the model's probability is the score."""

    fusion: Fusion | str | None = None
    priority: Priority | None = None
    tenant: str = ""
    cache: Literal["use", "refresh", "bypass"] = "use"
    timeout_s: float | None = None
    on_timeout: Literal["error", "first-stage"] = "error"
    explain: bool = False


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document's place: its position in the call, its score, and what the ranking says of it (None: not ranked)."""

    index: int
    score: float
    ranked: RankedChunk | None = None


@dataclass(frozen=True, slots=True)
class RerankReply:
    """The documents best first, at most ``top_n``, and what they cost. ``tokens`` were computed for this call.

    ``job_id``: the call's job, or its jobs with commas between them; empty if nothing had to be ranked, then
    ``call_id`` names the call.
    """

    job_id: str
    model: str
    documents: tuple[RankedDocument, ...]
    tokens: int = 0
    pairs: int = 0
    cached_pairs: int = 0
    truncated_pairs: int = 0
    degraded: bool = False
    timings_ms: Timings = field(default_factory=Timings)
    warnings: tuple[str, ...] = ()
    call_id: str = "call"

    @property
    def id(self) -> str:
        """Names the reply: clients take a name that is empty for a fault."""
        return self.job_id.partition(",")[0] or self.call_id

    @property
    def billed_tokens(self) -> int:
        """Tokens as other servers tell them: clients take 0 for a fault."""
        return max(1, self.tokens)


def job_of_call(call: RerankCall, options: CallOptions, *, job_id: str, timeout_s: float) -> RerankJob | None:
    """Make the job of a call: its blank documents are left out; None if all are blank.

    Raises:
        JobRejected: naming the field, if no job can be made of it.
    """
    chunks = [_cut(chunk) for chunk in call.documents if not is_blank(chunk.model_text)]
    # Made even if nothing is to be ranked: a call that is wrong is wrong with blank documents, too.
    more: dict[str, object] = {}
    if call.max_length is not None:
        more["max_length"] = call.max_length
    if call.query_max_tokens is not None:
        more["query_max_tokens"] = call.query_max_tokens
    if call.instruction:
        more["instruction"] = call.instruction
    job = RerankJob(
        id=job_id,
        query=call.query,
        chunks=chunks or ["-"],
        model=call.model,
        fusion="model" if options.fusion is None else options.fusion,
        priority=options.priority or call.priority or "interactive",
        tenant=options.tenant,
        cache=options.cache,
        deadline_s=timeout_s,
        **more,
    )
    return job if chunks else None


def _cut(chunk: Chunk) -> Chunk:
    if len(chunk.text) <= MOST_CHARACTERS:
        return chunk
    return chunk.model_copy(update={"text": chunk.text[:MOST_CHARACTERS]})


def reply_of(call: RerankCall, options: CallOptions, ranking: Ranking) -> RerankReply:
    """Order a call's documents by a ranking of those that are not blank; these come last.

    The score is the model's probability; with ``raw_scores`` its logit; if a fusion was asked for, the fused score.
    """
    sent = [at for at, chunk in enumerate(call.documents) if not is_blank(chunk.model_text)]
    raw = call.raw_scores and options.fusion is None
    documents = [RankedDocument(sent[chunk.index], _score(chunk, raw=raw), chunk) for chunk in ranking.chunks]
    lowest = min((document.score for document in documents), default=0.0)
    documents += blank_documents(call, below=lowest, raw=raw)
    # What was cut here may have fitted there: a megabyte can be one word.
    cut = sum(
        len(call.documents[sent[one.index]].text) > MOST_CHARACTERS and not one.truncated for one in ranking.chunks
    )
    truncated = ranking.usage.truncated_pairs + cut
    return RerankReply(
        job_id=ranking.job_id,
        model=ranking.model.name,
        documents=tuple(documents[: call.top_n]),
        tokens=ranking.usage.tokens,
        pairs=ranking.usage.pairs,
        cached_pairs=ranking.usage.cached_pairs,
        truncated_pairs=truncated,
        timings_ms=ranking.timings_ms,
        warnings=(*call.warnings, *_truncation(truncated)),
    )


def _truncation(pairs: int) -> list[str]:
    return [f"{pairs} documents were longer than the model reads, and were truncated"] if pairs else []


def blank_documents(call: RerankCall, *, below: float, raw: bool) -> list[RankedDocument]:
    """Give the blank documents in their order, with a score that no other one is below."""
    score = min(BLANK_LOGIT if raw else BLANK_SCORE, below)
    return [RankedDocument(at, score) for at, chunk in enumerate(call.documents) if is_blank(chunk.model_text)]


def _score(chunk: RankedChunk, *, raw: bool) -> float:
    return chunk.model_logit if raw and chunk.model_logit is not None else chunk.score


def first_stage_reply(call: RerankCall, *, job_id: str, model: str, why: str = "no ranking in time") -> RerankReply:
    """Answer with the caller's own order: by the scores that it sent, else as it sent them, with falling scores.

    >>> call = RerankCall("q", (Chunk(text="a", vector_score=0.2), Chunk(text="b", vector_score=0.9)))
    >>> [(document.index, document.score) for document in first_stage_reply(call, job_id="", model="").documents]
    [(1, 0.9), (0, 0.2)]
    >>> call = RerankCall("q", (Chunk(text="a"), Chunk(text="b")))
    >>> [(document.index, document.score) for document in first_stage_reply(call, job_id="", model="").documents]
    [(0, 1.0), (1, 0.5)]
    """
    scores = first_stage_scores(call.documents)
    order = sorted(range(len(scores)), key=lambda at: (-scores[at], at))
    documents = tuple(RankedDocument(at, scores[at]) for at in order[: call.top_n])
    warnings = (*call.warnings, f"{why}: this is the order that was sent")
    return RerankReply(job_id=job_id, model=model, documents=documents, degraded=True, warnings=warnings)


def first_stage_scores(documents: Sequence[Chunk]) -> list[float]:
    """Read the scores that a caller sent, vector before keyword; if there is none, the order that it sent as scores."""
    for name in ("vector_score", "keyword_score"):
        found = [getattr(chunk, name) for chunk in documents]
        known = [score for score in found if score is not None and math.isfinite(score)]
        if known:
            lowest = min(known)
            return [score if score is not None and math.isfinite(score) else min(0.0, lowest) for score in found]
    return [(len(documents) - at) / len(documents) for at in range(len(documents))]


def by_query(call: RerankCall, queries: Sequence[str]) -> RerankCall | ScoreCall:
    """Make a call whose documents have a query each: the call itself if they have one, else one for each query.

    Raises:
        JobTooLarge: if there are more than ``MAX_QUERIES`` queries.

    >>> call = RerankCall("", (Chunk(text="a"), Chunk(text="b"), Chunk(text="c")))
    >>> made = by_query(call, ["p", "q", "p"])
    >>> [(one.query, positions) for one, positions in zip(made.calls, made.positions)]
    [('p', (0, 2)), ('q', (1,))]
    >>> by_query(call, ["p", "p", "p"]).query
    'p'
    """
    positions: dict[str, list[int]] = {}
    for at, query in enumerate(queries):
        positions.setdefault(query, []).append(at)
    if len(positions) > MAX_QUERIES:
        raise JobTooLarge(f"expected at most {MAX_QUERIES} different queries, not {len(positions)}", field="queries")
    calls = tuple(
        replace(call, query=query, documents=tuple(call.documents[at] for at in places))
        for query, places in positions.items()
    )
    return calls[0] if len(calls) == 1 else ScoreCall(calls, tuple(map(tuple, positions.values())))


def joined(call: ScoreCall, replies: Sequence[RerankReply]) -> RerankReply:
    """Join the replies to the calls of a call, its documents in the order of their scores."""
    documents = [
        replace(document, index=positions[document.index])
        for reply, positions in zip(replies, call.positions, strict=True)
        for document in reply.documents
    ]
    times = [reply.timings_ms for reply in replies]
    slowest = {name: max(getattr(one, name) for one in times) for name in Timings.model_fields}
    return RerankReply(
        job_id=",".join(reply.job_id for reply in replies[:MAX_JOBS_NAMED] if reply.job_id),
        model=replies[0].model,
        documents=tuple(sorted(documents, key=lambda document: (-document.score, document.index))),
        tokens=sum(reply.tokens for reply in replies),
        pairs=sum(reply.pairs for reply in replies),
        cached_pairs=sum(reply.cached_pairs for reply in replies),
        truncated_pairs=sum(reply.truncated_pairs for reply in replies),
        degraded=any(reply.degraded for reply in replies),
        timings_ms=Timings(**slowest),
        warnings=tuple(dict.fromkeys(warning for reply in replies for warning in reply.warnings)),
    )
