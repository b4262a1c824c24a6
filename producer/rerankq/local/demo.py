"""The demo: a few questions over the shipped sample, keyword order beside reranked order."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from math import log
from typing import Any, NamedTuple

from ..client.blocking import Client
from ..contract import Chunk, RankedChunk, Ranking, RerankJob
from ..errors import RerankqError
from ..settings import Settings
from ..stream import JobStream
from .stack import Stack


class Question(NamedTuple):
    """A question of the sample, and the id of the chunk that answers it."""

    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """The shipped questions and chunks."""

    questions: list[Question]
    chunks: list[Chunk]


@dataclass(frozen=True)
class Comparison:
    """A question's chunks before and after; ``before`` holds ids, ``texts`` is by id."""

    query: str
    answer: str
    before: list[str]
    after: list[RankedChunk]
    texts: dict[str, str]


@dataclass(frozen=True)
class Demo:
    """What the demo did. Seconds are from submitting to the last ranking."""

    comparisons: list[Comparison]
    chunks: int
    jobs: int
    pairs: int
    cached_pairs: int
    seconds: float
    again_pairs: int
    again_cached_pairs: int
    again_seconds: float
    ready_s: float

    @property
    def first_before(self) -> int:
        """Questions whose answer is first in keyword order."""
        return sum(rank_of_answer(one)[0] == 1 for one in self.comparisons)

    @property
    def first_after(self) -> int:
        """Questions whose answer is first after reranking."""
        return sum(rank_of_answer(one)[1] == 1 for one in self.comparisons)


def read_sample() -> Sample:
    """Read the sample that ships with the package."""
    raw = json.loads((resources.files(__package__) / "sample.json").read_text(encoding="utf-8"))
    return Sample(
        [Question(**question) for question in raw["queries"]],
        [Chunk.model_validate(chunk) for chunk in raw["chunks"]],
    )


def words(text: str) -> list[str]:
    """Split a text into lower-case words.

    >>> words("It's the Sun.")
    ['it', 's', 'the', 'sun']
    """
    return re.findall(r"\w+", text.lower())


def bm25(query: str, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> list[float]:
    """Score texts by BM25 (Robertson & Zaragoza 2009), with Lucene's idf, which is never negative.

    >>> [round(score, 3) for score in bm25("blue sky", ["sky", "a blue sky", "sea"])]
    [0.562, 1.093, 0.0]
    """
    bags = [Counter(words(text)) for text in texts]
    average = sum(bag.total() for bag in bags) / max(len(bags), 1)
    scores = [0.0] * len(bags)
    for word in words(query):
        holding = sum(word in bag for bag in bags)
        idf = log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
        for at, bag in enumerate(bags):
            if bag[word]:
                scores[at] += idf * bag[word] * (k1 + 1) / (bag[word] + k1 * (1 - b + b * bag.total() / average))
    return scores


def jobs_of(sample: Sample, *, fusion: str = "default") -> list[RerankJob]:
    """Make a job per question over all chunks, in keyword order, as a first stage would return them."""
    return [
        RerankJob(query=question.text, chunks=keyword_order(question.text, sample.chunks), fusion=fusion)
        for question in sample.questions
    ]


def keyword_order(query: str, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Order chunks by BM25, each with its score; equal scores keep their order."""
    scores = bm25(query, [chunk.model_text for chunk in chunks])
    scored = [chunk.model_copy(update={"keyword_score": score}) for chunk, score in zip(chunks, scores, strict=True)]
    return sorted(scored, key=lambda chunk: -(chunk.keyword_score or 0))


def compare(question: Question, job: RerankJob, ranking: Ranking) -> Comparison:
    """Pair a job's order with its ranking."""
    return Comparison(
        query=question.text,
        answer=question.answer,
        before=[chunk.id for chunk in job.chunks],
        after=ranking.chunks,
        texts={chunk.id: chunk.text for chunk in job.chunks},
    )


def move_of(comparison: Comparison, chunk: RankedChunk) -> int:
    """Count the ranks that a chunk moved up; negative: down."""
    return comparison.before.index(chunk.id) + 1 - chunk.rank


def rank_of_answer(comparison: Comparison) -> tuple[int, int]:
    """Return the rank of the answer before and after."""
    after = next(chunk.rank for chunk in comparison.after if chunk.id == comparison.answer)
    return comparison.before.index(comparison.answer) + 1, after


def run(settings: Settings) -> Demo:
    """Start a Redis and a worker, ask the sample's questions twice, stop everything.

    Raises:
        RerankqError: if the stack cannot be started, or a job fails.
    """
    sample = read_sample()
    started = time.monotonic()
    with Stack(settings, embedded=True) as stack, Client(stack.settings) as client:
        stack.wait_until_ready(client)
        ready_s = time.monotonic() - started
        jobs = jobs_of(sample)
        rankings, seconds = ask(client, stack, jobs)
        again, again_seconds = ask(client, stack, jobs_of(sample, fusion="model"))
    return Demo(
        comparisons=[compare(*one) for one in zip(sample.questions, jobs, rankings, strict=True)],
        chunks=len(sample.chunks),
        jobs=len(jobs),
        pairs=sum(ranking.usage.pairs for ranking in rankings),
        cached_pairs=sum(ranking.usage.cached_pairs for ranking in rankings),
        seconds=seconds,
        again_pairs=sum(ranking.usage.pairs for ranking in again),
        again_cached_pairs=sum(ranking.usage.cached_pairs for ranking in again),
        again_seconds=again_seconds,
        ready_s=ready_s,
    )


def ask(client: Client, stack: Stack, jobs: Sequence[RerankJob]) -> tuple[list[Ranking], float]:
    """Submit jobs and wait for all; return their rankings in order, and the seconds it took."""
    started = time.monotonic()
    found: dict[int, Ranking] = {}
    for index, outcome in JobStream[int](client, supervise=stack.supervise).outcomes(enumerate(jobs)):
        if isinstance(outcome, RerankqError):
            raise outcome
        found[index] = outcome
    return [found[index] for index in range(len(jobs))], time.monotonic() - started


def as_record(demo: Demo) -> dict[str, Any]:
    """Make a record of the demo, as JSON takes it."""
    return {
        "comparisons": [
            {
                "query": one.query,
                "answer": one.answer,
                "before": one.before,
                "after": [
                    {
                        "id": chunk.id,
                        "rank": chunk.rank,
                        "moved": move_of(one, chunk),
                        "score": chunk.score,
                        "scores": chunk.scores,
                    }
                    for chunk in one.after
                ],
            }
            for one in demo.comparisons
        ],
        "chunks": demo.chunks,
        "jobs": demo.jobs,
        "pairs": demo.pairs,
        "cached_pairs": demo.cached_pairs,
        "seconds": demo.seconds,
        "again": {
            "pairs": demo.again_pairs,
            "cached_pairs": demo.again_cached_pairs,
            "seconds": demo.again_seconds,
        },
        "ready_s": demo.ready_s,
        "answers_first": {"before": demo.first_before, "after": demo.first_after},
    }
