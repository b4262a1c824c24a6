"""Jobs with some chunks cached: a real tokeniser reads the others as in a cold run."""

from collections.abc import Iterator

import pytest
import redis
from tiny_checkpoints import QUERY, TEXTS, reading

from rerankq import Fusion, RerankJob
from rerankq_worker.cache import ScoreCache, connect
from rerankq_worker.engine import Batcher, StubEngine
from rerankq_worker.engine.tokenising.pair_tokeniser import PairTokeniser
from rerankq_worker.fusion.analyser import Analyser
from rerankq_worker.reranker import Reranker
from rerankq_worker.scoring import LocalScorer
from rerankq_worker.work import Work

CHUNKS = [*TEXTS[:5], "short"]


class ReadingEngine(StubEngine):
    """The stub's scores, of the token ids that a real tokeniser gives, which it remembers by the hashes of texts."""

    def __init__(self) -> None:
        super().__init__(seconds_per_token=0, max_length=64)
        self._tokeniser = PairTokeniser(reading("word pieces").tokenizer, max_length=64)

    def tokenise(self, query, chunks, *, instruction="", **options):
        return self._tokeniser.pairs(query, chunks, **options)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connect(redis_url) as client:
        yield client


def job(chunks: list[str], cache: str = "use") -> RerankJob:
    return RerankJob(query=QUERY, chunks=chunks, fusion=Fusion(weights={"model": 1}), cache=cache)


def logits_of_the_last(client: redis.Redis, *jobs: RerankJob) -> list[float | None]:
    """Rank jobs one after the other on an engine that has seen no text before."""
    engine = ReadingEngine()
    with Batcher(engine) as batcher:
        reranker = Reranker(LocalScorer(engine, batcher, ScoreCache(client, ttl_s=60)), Analyser(), name="tiny")
        for one in jobs:
            ranking = reranker.rank("id", one, Work(), priority="bulk", waited_s=0)
    return [chunk.model_logit for chunk in sorted(ranking.chunks, key=lambda chunk: chunk.index)]


@pytest.mark.parametrize("known", [(0,), (3,), (0, 2), (1, 3, 4)])
def test_scores_after_a_partial_cache_hit_equal_a_cold_run(client: redis.Redis, known: tuple[int, ...]):
    cold = logits_of_the_last(client, job(CHUNKS, "bypass"))
    some, whole = job([CHUNKS[at] for at in known]), job(CHUNKS)
    assert logits_of_the_last(client, some, whole) == cold
    client.flushdb()
    refreshed = logits_of_the_last(client, some, whole, job(CHUNKS, "refresh"))
    assert refreshed == cold, "token ids remembered for one chunk are never another's"
