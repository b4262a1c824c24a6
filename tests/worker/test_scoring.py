"""The seam above tokens: whatever gives logits for a query and texts can stand under a reranker."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import redis

from rerankq import Fusion, JobCancelled, Ranking, RerankJob
from rerankq_worker.cache import ScoreCache
from rerankq_worker.engine import Batcher, StubEngine
from rerankq_worker.fusion.analyser import Analyser
from rerankq_worker.reranker import Reranker
from rerankq_worker.scoring import LocalScorer, Scored, ScoreOptions, Scorer
from rerankq_worker.work import Work

MODEL = Fusion(weights={"model": 1})
UNCACHED = ScoreOptions(cache="bypass")


class LengthScorer:
    """Its logit is the length of the text: no engine, no tokens, no cache. It keeps what it was asked."""

    fingerprint = "lengths"
    max_length = 512

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], ScoreOptions]] = []

    def score(self, query: str, texts: Sequence[str], options: ScoreOptions, work: Work) -> Scored:
        self.asked.append((list(texts), options))
        work.add_known(len(texts))
        return replace(Scored.nothing(len(texts)), logits=np.array([len(text) for text in texts], np.float64))


class BestWindowScorer:
    """Scores every text by the best of its lines, over another scorer."""

    max_length = 512

    def __init__(self, inner: Scorer) -> None:
        self.inner = inner
        self.fingerprint = f"best line by {inner.fingerprint}"

    def score(self, query: str, texts: Sequence[str], options: ScoreOptions, work: Work) -> Scored:
        lines = [text.split("\n") for text in texts]
        scored = self.inner.score(query, [line for one in lines for line in one], options, work)
        starts = np.cumsum([0, *map(len, lines[:-1])])
        return Scored(
            np.maximum.reduceat(scored.logits, starts),
            np.logical_and.reduceat(scored.cached, starts),
            np.logical_or.reduceat(scored.truncated, starts),
            tokens=scored.tokens,
        )


class Call:
    """A call to another server, under way."""

    def __init__(self) -> None:
        self.done_pairs = 0
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class RemoteScorer(LengthScorer):
    """Asks a server, which *meanwhile* runs."""

    def __init__(self, meanwhile=lambda: None) -> None:
        super().__init__()
        self.call = Call()
        self.meanwhile = meanwhile

    def score(self, query: str, texts: Sequence[str], options: ScoreOptions, work: Work) -> Scored:
        work.follow(self.call)
        self.meanwhile()
        self.call.done_pairs = len(texts)
        work.raise_if_cancelled()
        return Scored.nothing(len(texts))


def rank(scorer: Scorer, texts: list[str], work: Work | None = None, **fields) -> Ranking:
    job = RerankJob(query="q", chunks=texts, fusion=MODEL, **fields)
    return Reranker(scorer, Analyser(), name="toy").rank("id", job, work or Work(), priority="bulk", waited_s=0)


@pytest.fixture
def local():
    engine = StubEngine(seconds_per_token=0)
    with Batcher(engine) as batcher:
        # Jobs here bypass the cache, so no server is asked.
        yield LocalScorer(engine, batcher, ScoreCache(redis.Redis(), ttl_s=1))


def test_a_reranker_takes_any_scorer():
    ranking = rank(LengthScorer(), ["aa", "aaaa", "a"])
    assert [(chunk.index, chunk.model_logit) for chunk in ranking.chunks] == [(1, 4.0), (0, 2.0), (2, 1.0)]
    assert (ranking.model.name, ranking.model.fingerprint) == ("toy", "lengths")
    assert ranking.usage.pairs == 3


def test_a_scorer_is_told_what_the_job_asks_of_its_scores():
    scorer = LengthScorer()
    rank(scorer, ["a"], max_length=64, query_max_tokens=7, cache="refresh", tenant="t", priority="interactive")
    # The priority under which the ledger knows the job, not the one that it was written with.
    asked = ScoreOptions(max_length=64, query_max_tokens=7, cache="refresh", priority="bulk", tenant="t")
    assert scorer.asked == [(["a"], asked)]


def test_a_fusion_without_the_model_asks_no_scorer():
    scorer = LengthScorer()
    job = RerankJob(query="q", chunks=[{"text": "a", "vector_score": 1}], fusion=Fusion(weights={"vector": 1}))
    Reranker(scorer, Analyser(), name="toy").rank("id", job, Work(), priority="bulk", waited_s=0)
    assert scorer.asked == []


def test_windows_of_a_text_are_pairs_of_the_scorer_below(local: LocalScorer):
    texts = ["one line", "two\nlines of one text", "a third\nof\nthree"]
    by_line = {line: local.score("q", [line], UNCACHED, Work()).logits[0] for line in "\n".join(texts).split("\n")}
    ranking = rank(BestWindowScorer(local), texts, cache="bypass")
    for chunk in ranking.chunks:
        assert chunk.model_logit == max(by_line[line] for line in texts[chunk.index].split("\n"))


def test_two_scorers_make_a_cascade_that_counts_in_one_work(local: LocalScorer):
    texts, work, large = ["aaa", "a", "aaaa", "aa"], Work(), LengthScorer()
    first = local.score("q", texts, UNCACHED, work)
    kept = np.argsort(-first.logits)[:2]
    second = large.score("q", [texts[at] for at in kept], UNCACHED, work)
    assert second.logits.tolist() == [len(texts[at]) for at in kept]
    assert work.pairs_done == 6


def test_a_scorer_that_calls_a_server_is_stopped_with_its_job():
    work = Work()
    scorer = RemoteScorer(meanwhile=work.cancel)
    with pytest.raises(JobCancelled):
        rank(scorer, ["a"], work)
    assert scorer.call.cancelled


def test_the_progress_of_a_call_is_that_of_its_job():
    work = Work()
    rank(RemoteScorer(), ["a", "b"], work)
    assert work.pairs_done == 2


def test_a_job_that_was_cancelled_before_it_was_scored_stops_what_it_begins():
    work, scorer = Work(), RemoteScorer()
    work.cancel()
    with pytest.raises(JobCancelled):
        rank(scorer, ["a"], work)
    assert scorer.call.cancelled


def test_a_local_scorer_has_the_fingerprint_and_the_length_of_its_engine(local: LocalScorer):
    engine = StubEngine()
    assert (local.fingerprint, local.max_length) == (engine.fingerprint, engine.max_length)


def test_a_text_that_no_scorer_saw_has_no_logit():
    nothing = Scored.nothing(2)
    assert np.isnan(nothing.logits).all()
    assert [nothing.cached.tolist(), nothing.truncated.tolist()] == [[False, False]] * 2
