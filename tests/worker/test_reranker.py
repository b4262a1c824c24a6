"""One job from its texts to its ranking, on the stub engine: cached or not, as plain scoring and fusion give it."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rerankq import Chunk, Fusion, JobCancelled, JobFailed, JobRejected, RankedChunk, Ranking, RerankJob
from rerankq.catalogue import profiles
from rerankq_worker.cache import ScoreCache, connect
from rerankq_worker.engine import Batcher, EngineClosed, PairFailed, StubEngine, text_hash
from rerankq_worker.fusion import Blend, blend, rank, rank_feature_scores, signals_needed, token_signal
from rerankq_worker.fusion.analyser import Analyser
from rerankq_worker.reranker import Reranker
from rerankq_worker.scoring import LocalScorer
from rerankq_worker.work import Work

WAIT_S = 20  # a test that hangs ends here; none that works waits so long
MODEL = Fusion(weights={"model": 1})
TEXTS = ["the moon pulls the sea", "bread rises", "", "tides of fashion", "the moon pulls the sea"]


class ScriptedEngine(StubEngine):
    """The stub, which waits for its gate, counts what it computes, and cannot score the word *broken*."""

    def __init__(self, *, held: bool = False, **options) -> None:
        super().__init__(seconds_per_token=0, **options)
        self.computed: Counter[bytes] = Counter()
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.broken = super().tokenise("x", ["broken"])[0].ids[-2]
        if not held:
            self.gate.set()

    def tokenise(self, query, chunks, *, hashes=None, **limits):
        # An engine remembers tokens by these: those of another text would give a chunk another's score.
        assert hashes is None or list(hashes) == [text_hash(chunk) for chunk in chunks]
        return super().tokenise(query, chunks, hashes=hashes, **limits)

    def forward(self, batch):
        self.entered.release()
        assert self.gate.wait(WAIT_S)
        if any(self.broken in pair.ids for pair in batch):
            raise ValueError("the word broken cannot be scored")
        self.computed.update(pair.ids.tobytes() for pair in batch)
        return super().forward(batch)


class World:
    """A reranker with what it stands on."""

    def __init__(self, url: str, **options) -> None:
        self.client = connect(url)
        self.engine = ScriptedEngine(**options)
        self.batcher = Batcher(self.engine, max_batch_tokens=32)
        scorer = LocalScorer(self.engine, self.batcher, ScoreCache(self.client, ttl_s=60))
        self.reranker = Reranker(scorer, Analyser(), name="stub model")

    def rank(self, job: RerankJob, work: Work | None = None) -> Ranking:
        return self.reranker.rank("id", job, work or Work(), priority=job.priority, waited_s=0.5)

    def close(self) -> None:
        self.engine.gate.set()
        self.batcher.close(drain=False, timeout=WAIT_S)
        self.client.close()


@pytest.fixture
def world(redis_url: str) -> Iterator[World]:
    world = World(redis_url)
    yield world
    world.close()


@pytest.fixture
def held(redis_url: str) -> Iterator[World]:
    """Its engine computes nothing until the gate is opened."""
    world = World(redis_url, held=True)
    yield world
    world.close()


def job(chunks=TEXTS, query="why do tides rise", fusion=MODEL, **fields) -> RerankJob:
    return RerankJob(query=query, chunks=chunks, fusion=fusion, **fields)


def plain(job: RerankJob) -> tuple[list[int], Blend, np.ndarray]:
    """The obvious twin: score every pair alone, fuse, order. Answers order, fusion and logits."""
    fusion, engine = job.fusion, StubEngine(seconds_per_token=0)
    if not any(job.query_tags.values()):
        fusion = fusion.model_copy(update={"weights": fusion.weights | {"tags": 0.0}})
    logits = np.array([float(engine.score([(job.query, chunk.model_text)])[0]) for chunk in job.chunks])
    signals = {
        "model": logits,
        "token": token_signal(job.query, job.query_tokens, job.chunks, fusion, Analyser()),
        "vector": np.array([chunk.vector_score for chunk in job.chunks], float),
        "keyword": np.array([chunk.keyword_score for chunk in job.chunks], float),
        "pagerank": np.array([chunk.pagerank for chunk in job.chunks], float),
        "tags": rank_feature_scores(job.query_tags, [chunk.tags for chunk in job.chunks]),
    }
    blended = blend({name: signals[name] for name in signals_needed(fusion)}, fusion)
    raw = logits if "model" in signals_needed(fusion) else np.full(len(job.chunks), np.nan)
    return rank(blended.scores, job.min_score, job.top_k, logits=raw).tolist(), blended, logits


def assert_plain(ranking: Ranking, job: RerankJob) -> None:
    order, blended, logits = plain(job)
    fused = blended.scores
    assert [chunk.index for chunk in ranking.chunks] == order
    assert [chunk.rank for chunk in ranking.chunks] == list(range(1, len(order) + 1))
    np.testing.assert_allclose([chunk.score for chunk in ranking.chunks], fused[order], atol=1e-12)
    if "model" in signals_needed(job.fusion):
        assert [chunk.model_logit for chunk in ranking.chunks] == logits[order].tolist()


def written_one_by_one(ranking: Ranking, job: RerankJob) -> str:
    """The ranking's JSON, if each chunk were validated by itself from the plain twin's numbers."""
    order, blended, logits = plain(job)
    scored = {chunk.index: chunk for chunk in ranking.chunks}
    chunks = []
    for place, at in enumerate(order, 1):
        present = {name: row[at] for name, row in blended.normalised.items() if not np.isnan(row[at])}
        chunks.append(
            RankedChunk(
                id=job.chunks[at].id or str(at),
                index=at,
                rank=place,
                score=float(blended.scores[at]),
                scores={name: float(value) for name, value in present.items()},
                model_logit=float(logits[at]) if "model" in signals_needed(job.fusion) else None,
                missing=blended.missing[at],
                truncated=scored[at].truncated,
                cached=scored[at].cached,
                text=job.chunks[at].text if job.return_text else None,
                metadata=job.chunks[at].metadata,
            )
        )
    return ranking.model_copy(update={"chunks": chunks}).model_dump_json()


TEXT = st.lists(st.sampled_from("moon sea tide bread rises 月亮 a".split()), max_size=12).map(" ".join)  # noqa: SIM905
CHUNKS = st.builds(
    Chunk,
    text=TEXT,
    title=TEXT,
    keywords=st.lists(TEXT, max_size=2),
    vector_score=st.none() | st.floats(-1, 1),
    keyword_score=st.none() | st.floats(0, 30) | st.just(float("nan")),
    pagerank=st.floats(0, 100),
    tags=st.dictionaries(st.sampled_from("ab"), st.floats(0, 1), max_size=2),
    id=st.sampled_from(["", "mine"]),
    metadata=st.dictionaries(st.sampled_from("ab"), st.none() | st.integers() | st.lists(st.booleans()), max_size=2),
)
JOBS = st.builds(
    RerankJob,
    query=TEXT.map(lambda text: f"{text}?"),
    chunks=st.lists(CHUNKS, min_size=1, max_size=8, unique_by=lambda chunk: chunk.id or id(chunk)),
    fusion=st.sampled_from(list(profiles().values())),
    query_tags=st.dictionaries(st.sampled_from("ab"), st.floats(0, 1), max_size=2),
    top_k=st.none() | st.integers(1, 5),
    min_score=st.none() | st.floats(0, 1),
    cache=st.sampled_from(["use", "refresh", "bypass"]),
    priority=st.sampled_from(["interactive", "bulk"]),
    return_text=st.booleans(),
)


def test_a_truncated_chunk_tells_how_far_it_was_read_cached_or_not_if_the_job_asks(world: World):
    long = "word " * 400
    job = RerankJob(query="a query", chunks=[{"title": "Title", "text": long}, "short"], fusion=MODEL, max_length=13)
    assert [chunk.span for chunk in world.rank(job).chunks] == [None, None]
    asked = job.model_copy(update={"explain": True})
    for _ in range(2):
        spans = {chunk.index: chunk.span for chunk in world.rank(asked).chunks}
        # 13 tokens: three marks, two words of the query, the title and seven words.
        assert spans == {0: (0, len("Title" + 7 * " word")), 1: None}


def test_parts_of_scores_are_told_to_a_job_that_asks_and_add_up(world: World):
    fusion = Fusion(weights={"model": 0.7, "token": 0.3, "vector": 0.5})
    chunks = [
        Chunk(text=text, vector_score=score) for text, score in zip(TEXTS, [0.1, None, 0.3, 0.4, 0.5], strict=True)
    ]
    job = RerankJob(query="what pulls the sea", chunks=chunks, fusion=fusion)
    told = world.rank(job.model_copy(update={"explain": True}))
    for chunk in told.chunks:
        assert chunk.parts.keys() == chunk.scores.keys()
        assert sum(chunk.parts.values()) == pytest.approx(chunk.score)
    silent = world.rank(job)
    assert [chunk.model_copy(update={"parts": {}, "cached": True}) for chunk in told.chunks] == silent.chunks
    assert not any("parts" in chunk.model_fields_set for chunk in silent.chunks)


@given(JOBS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_ranking_is_what_plain_scoring_and_plain_fusion_say(world: World, job: RerankJob):
    first = world.rank(job)
    assert_plain(first, job)
    again = world.rank(job)
    assert_plain(again, job)
    assert again.model_dump_json() == written_one_by_one(again, job)
    assert Ranking.model_validate_json(again.model_dump_json()) == again
    if job.cache == "use" and first.usage.pairs:
        assert again.usage.cached_pairs == len(job.chunks)
        assert again.usage.tokens == 0


def test_only_pairs_that_are_not_cached_are_computed(world: World):
    world.rank(job(TEXTS[:2]))
    before = sum(world.engine.computed.values())
    ranking = world.rank(job())
    assert sum(world.engine.computed.values()) - before == 2, "the empty one and the fourth; the fifth is the first"
    cached = {chunk.index: chunk.cached for chunk in ranking.chunks}
    assert cached == {0: True, 1: True, 2: False, 3: False, 4: True}
    assert ranking.usage.cached_pairs == 3
    assert_plain(ranking, job())


def test_equal_chunks_of_one_job_are_computed_once_and_ranked_each(world: World):
    twins = job(["same"] * 20)
    assert_plain(world.rank(twins), twins)
    assert sum(world.engine.computed.values()) == 1


class NoisyEngine(ScriptedEngine):
    """Its logits depend a little on the batch, as real ones do on the kernels that its shape chooses."""

    def forward(self, batch):
        return super().forward(batch) + np.float32(1e-4) * np.float32(len(batch) + random.random())


@pytest.mark.parametrize("way", ["use", "refresh", "bypass"])
def test_equal_pairs_of_a_job_are_computed_once_and_scored_equally_in_every_cache_mode(world: World, way: str):
    noisy = NoisyEngine()
    with Batcher(noisy, max_batch_tokens=24) as batcher:
        reranker = Reranker(LocalScorer(noisy, batcher, ScoreCache(world.client, ttl_s=60)), Analyser(), name="noisy")
        # The third reads as the first, and so does what is cut off the same text.
        texts = ["the same", "another one", "the  same ", "the same"] * 10 + ["w " * 600, "w " * 700]
        ranking = reranker.rank("id", job(texts, cache=way), Work(), priority="bulk", waited_s=0)
    by_index = {chunk.index: chunk for chunk in ranking.chunks}
    for alike in (range(0, 40, 4), range(2, 40, 4), range(3, 40, 4)):
        assert {by_index[at].model_logit for at in alike} == {by_index[0].model_logit}
        assert {by_index[at].score for at in alike} == {by_index[0].score}
    assert by_index[40].model_logit == by_index[41].model_logit
    assert set(noisy.computed.values()) == {1}
    assert len(noisy.computed) == 3
    pairs = noisy.tokenise("why do tides rise", ["the same", "another one", "w " * 600])
    assert ranking.usage.tokens == sum(pair.length for pair in pairs)
    assert ranking.usage.pairs == 42


def test_the_tokens_of_a_pair_that_two_jobs_wait_for_are_counted_once(held: World):
    wanted = [job(TEXTS), job(TEXTS)]
    with ThreadPoolExecutor(2) as threads:
        rankings = [threads.submit(held.rank, one) for one in wanted]
        while held.batcher.stats().tickets < 2:
            threading.Event().wait(0.001)
        held.engine.gate.set()
        tokens = [ranking.result(WAIT_S).usage.tokens for ranking in rankings]
    pairs = held.engine.tokenise("why do tides rise", list(dict.fromkeys(TEXTS)))
    assert sorted(tokens) == [0, sum(pair.length for pair in pairs)]


class GivenLogits(StubEngine):
    """Gives each chunk the logit that the test says."""

    def __init__(self, logits: dict[str, float]) -> None:
        super().__init__(seconds_per_token=0)
        self.logits = {self.tokenise("q", [text])[0].ids.tobytes(): logit for text, logit in logits.items()}

    def forward(self, batch):
        return np.array([self.logits[pair.ids.tobytes()] for pair in batch], dtype=np.float32)


@pytest.mark.parametrize("profile", ["model", "default", "ragflow", "elasticsearch", "rrf"])
@pytest.mark.parametrize(
    "logits", [(38.0, 45.0, 60.0, 37.0), (-40.0, -38.0, -36.0, -39.0), (-800.0, -760.0, -900.0, -750.0)]
)
def test_chunks_that_differ_in_their_logits_alone_are_ordered_by_them_however_saturated(
    world: World, profile: str, logits: tuple[float, ...]
):
    engine = GivenLogits({f"chunk{at}": logit for at, logit in enumerate(logits)})
    with Batcher(engine) as batcher:
        reranker = Reranker(LocalScorer(engine, batcher, ScoreCache(world.client, ttl_s=60)), Analyser(), name="given")
        wanted = RerankJob(
            query="q", chunks=[f"chunk{at}" for at in range(4)], fusion=profiles()[profile], cache="bypass"
        )
        ranking = reranker.rank("id", wanted, Work(), priority="bulk", waited_s=0)
    assert [chunk.model_logit for chunk in ranking.chunks] == sorted(logits, reverse=True)


def test_a_weighted_signal_that_no_chunk_has_is_listed_as_missing(world: World):
    ranking = world.rank(job(fusion=profiles()["elasticsearch"]))
    assert {tuple(chunk.missing) for chunk in ranking.chunks} == {("vector", "keyword")}
    assert_plain(ranking, job(fusion=profiles()["elasticsearch"]))


@pytest.mark.parametrize("profile", ["default", "rrf"])
def test_tags_are_missing_only_where_the_query_has_some(world: World, profile: str):
    chunks = [
        {"text": f"tide {at}", "vector_score": 0.5, "keyword_score": 1.0, "tags": {"sea": 1.0}} for at in range(3)
    ]
    wanted = job(chunks=chunks, fusion=profiles()[profile])
    assert [chunk.missing for chunk in world.rank(wanted).chunks] == [[], [], []]
    tagged = world.rank(wanted.model_copy(update={"query_tags": {"sea": 1.0}}))
    assert [(chunk.missing, chunk.scores["tags"]) for chunk in tagged.chunks] == [([], 1.0)] * 3


def test_a_nan_logit_fails_its_job(world: World):
    engine = GivenLogits({"fine": 1.0, "odd": float("nan")})
    with Batcher(engine) as batcher:
        reranker = Reranker(LocalScorer(engine, batcher, ScoreCache(world.client, ttl_s=60)), Analyser(), name="given")
        with pytest.raises(PairFailed, match="finite"):
            reranker.rank(
                "id", RerankJob(query="q", chunks=["fine", "odd"], fusion=MODEL), Work(), priority="bulk", waited_s=0
            )
        fine = RerankJob(query="q", chunks=["fine"], fusion=MODEL)
        assert reranker.rank("id", fine, Work(), priority="bulk", waited_s=0).chunks[0].model_logit == 1.0


def test_a_job_with_min_score_is_scored_however_few_chunks_it_has(world: World):
    few = job(skip_at_or_below=10, min_score=0.5)
    ranking = world.rank(few)
    assert not ranking.skipped
    assert_plain(ranking, few)
    assert all(chunk.score >= 0.5 for chunk in ranking.chunks)


def test_timings_separate_waiting_for_the_device_from_inference(world: World, monkeypatch: pytest.MonkeyPatch):
    submit = world.batcher.submit

    def busy(*args, **named):
        ticket = submit(*args, **named)
        ticket.result(WAIT_S)
        ticket.device_s, ticket._submitted = 0.25, ticket._ended - 1.0
        return ticket

    monkeypatch.setattr(world.batcher, "submit", busy)
    timings = world.rank(job(cache="bypass")).timings_ms
    assert (timings.inference, timings.waiting) == (250, 750)
    known = world.rank(job()) and world.rank(job())
    assert (known.timings_ms.inference, known.timings_ms.waiting) == (0, 0)


def test_jobs_that_differ_in_query_max_length_or_query_budget_share_no_score(world: World):
    world.rank(job())
    for other in (job(query="another"), job(max_length=16), job(query_max_tokens=2)):
        assert world.rank(other).usage.cached_pairs == 0


def test_a_max_length_beyond_the_models_own_is_the_models_own(world: World):
    world.rank(job())
    assert world.rank(job(max_length=100_000)).usage.cached_pairs == len(TEXTS)


def test_refresh_reads_nothing_and_writes_and_bypass_does_neither(world: World):
    world.rank(job(cache="bypass"))
    assert world.client.keys("*") == []
    world.rank(job())
    (key,) = world.client.keys("*")
    planted = np.float32(99).tobytes()
    world.client.hset(key, text_hash(TEXTS[0]), planted)
    assert world.rank(job()).chunks[0].model_logit == 99, "a planted score is used"
    for asked in (job(cache="bypass"), job(cache="refresh")):
        ranking = world.rank(asked)
        assert_plain(ranking, asked)
        assert ranking.usage.cached_pairs == 0
    assert_plain(world.rank(job()), job())
    assert world.client.hget(key, text_hash(TEXTS[0])) != planted, "refresh wrote the computed score"


@pytest.mark.parametrize(("way", "computed"), [("use", 1), ("refresh", 3), ("bypass", 3)])
def test_a_pair_in_flight_is_joined_unless_the_job_wants_its_own(held: World, way: str, computed: int):
    jobs = [job(["one pair"]), *[job(["one pair"], cache=way) for _ in range(2)]]
    with ThreadPoolExecutor(3) as threads:
        rankings = [threads.submit(held.rank, one) for one in jobs]
        while held.batcher.stats().tickets < 3:
            threading.Event().wait(0.001)
        held.engine.gate.set()
        for one, ranking in zip(jobs, rankings, strict=True):
            assert_plain(ranking.result(WAIT_S), one)
    assert sum(held.engine.computed.values()) == computed


def test_a_job_with_few_chunks_keeps_its_order_and_touches_neither_engine_nor_cache(world: World):
    ranking = world.rank(job(skip_at_or_below=5, top_k=3, return_text=True))
    assert ranking.skipped
    assert [chunk.index for chunk in ranking.chunks] == [0, 1, 2]
    assert [chunk.text for chunk in ranking.chunks] == TEXTS[:3]
    assert {(chunk.score, chunk.model_logit, tuple(chunk.missing)) for chunk in ranking.chunks} == {
        (0.0, None, ("model",))
    }
    assert ranking.usage.pairs == 0
    assert not world.engine.computed
    assert world.client.keys("*") == []
    assert not world.rank(job(skip_at_or_below=4)).skipped


def test_a_model_without_weight_is_not_run(world: World):
    chunks = [{"text": text, "vector_score": at / 10} for at, text in enumerate(TEXTS)]
    wanted = job(chunks, fusion=Fusion(weights={"model": 0, "vector": 1}))
    ranking = world.rank(wanted)
    assert [chunk.index for chunk in ranking.chunks] == [4, 3, 2, 1, 0]
    assert {chunk.model_logit for chunk in ranking.chunks} == {None}
    assert ranking.usage.pairs == ranking.usage.tokens == 0
    assert not world.engine.computed


def test_top_k_and_min_score_cut_after_all_were_scored(world: World):
    whole = world.rank(job())
    least = whole.chunks[2].score
    assert [chunk.index for chunk in world.rank(job(top_k=2)).chunks] == [chunk.index for chunk in whole.chunks[:2]]
    kept = world.rank(job(min_score=least)).chunks
    assert [chunk.index for chunk in kept] == [chunk.index for chunk in whole.chunks if chunk.score >= least]
    assert world.rank(job(min_score=1e9)).chunks == []
    assert world.rank(job(top_k=1)).usage.pairs == len(TEXTS)


def test_a_chunk_without_a_name_takes_that_of_no_other(world: World):
    chunks = [{"text": TEXTS[0]}, {"text": TEXTS[1]}, {"text": TEXTS[2], "id": "1"}, {"text": TEXTS[3], "id": "#1"}]
    for fields in ({}, {"skip_at_or_below": 4}):
        named = {chunk.index: chunk.id for chunk in world.rank(job(chunks, **fields)).chunks}
        assert named == {0: "0", 1: "##1", 2: "1", 3: "#1"}


def test_a_ranking_says_how_many_chunks_were_left_out(world: World):
    whole = world.rank(job())
    assert (len(whole.chunks), whole.dropped) == (len(TEXTS), 0)
    assert world.rank(job(top_k=2)).dropped == len(TEXTS) - 2
    assert world.rank(job(min_score=whole.chunks[2].score)).dropped == len(TEXTS) - 3
    assert world.rank(job(min_score=1e9)).dropped == len(TEXTS)
    assert world.rank(job(skip_at_or_below=5, top_k=3)).dropped == len(TEXTS) - 3


def test_a_truncated_pair_is_flagged_whether_computed_or_cached(world: World):
    long = job(["short", "word " * 5_000])
    for ranking in (world.rank(long), world.rank(long)):
        assert {chunk.index: chunk.truncated for chunk in ranking.chunks} == {0: False, 1: True}
        assert ranking.usage.truncated_pairs == 1


@pytest.mark.parametrize("known", [(0,), (1,), (0, 2), (1, 3)])
def test_a_truncated_pair_from_the_cache_is_flagged_whichever_of_its_neighbours_were_cached(
    world: World, known: tuple[int, ...]
):
    texts = ["short", "word " * 5_000, "also short", "others " * 5_000, "last"]
    world.rank(job([texts[at] for at in known]))
    for _ in range(2):
        ranking = world.rank(job(texts))
        assert {chunk.index: chunk.truncated for chunk in ranking.chunks} == dict(enumerate([0, 1, 0, 1, 0]))
        assert ranking.usage.truncated_pairs == 2
    assert ranking.usage.cached_pairs == len(texts)


def test_ids_texts_and_metadata_are_returned_unchanged(world: World):
    chunks = [{"text": "a", "id": "mine", "metadata": {"page": [1, None]}}, {"text": "b"}]
    by_index = {chunk.index: chunk for chunk in world.rank(job(chunks, return_text=True)).chunks}
    assert (by_index[0].id, by_index[0].text, by_index[0].metadata) == ("mine", "a", {"page": [1, None]})
    assert (by_index[1].id, by_index[1].text, by_index[1].metadata) == ("1", "b", {})
    assert world.rank(job(chunks)).chunks[0].text is None


def test_a_ranking_is_equal_after_serialisation(world: World):
    ranking = world.rank(job([{"text": text, "metadata": {"n": 1}} for text in TEXTS], fusion=profiles()["default"]))
    assert Ranking.model_validate_json(ranking.model_dump_json()) == ranking


def test_a_ranking_reports_usage_timings_and_model(world: World):
    ranking = world.rank(job(TEXTS[:2]))
    pairs = world.engine.tokenise("why do tides rise", TEXTS[:2])
    assert (ranking.usage.pairs, ranking.usage.tokens) == (2, sum(pair.length for pair in pairs))
    assert ranking.timings_ms.queued == 500
    assert 0 < ranking.timings_ms.inference <= ranking.timings_ms.total
    assert (ranking.model.name, ranking.model.fingerprint) == ("stub model", world.engine.fingerprint)


def test_jobs_that_ask_for_windows_or_name_a_profile_fail_with_a_message(world: World):
    with pytest.raises(JobFailed, match="window"):
        world.rank(job(long_chunks="window"))
    with pytest.raises(JobFailed, match="default"):
        world.rank(RerankJob(query="q", chunks=["x"], fusion="default"))


def test_an_instruction_changes_the_scores_and_has_scores_of_its_own_in_the_cache(world: World):
    plain, told, other = (world.rank(job(instruction=one)) for one in ("", "find causes", "find effects"))
    logits = [[chunk.model_logit for chunk in one.chunks] for one in (plain, told, other)]
    assert logits[0] != logits[1] != logits[2]
    assert [one.usage.cached_pairs for one in (plain, told, other)] == [0, 0, 0]
    again = world.rank(job(instruction=" find causes\n", explain=True))
    assert [chunk.model_logit for chunk in again.chunks] == logits[1]
    assert again.usage.cached_pairs == len(TEXTS)


def test_an_instruction_that_leaves_no_token_for_the_texts_is_refused_by_name(world: World):
    with pytest.raises(JobRejected, match="instruction: max_length 512 leaves no token for query and chunk") as refused:
        world.rank(job(instruction="word " * 600))
    assert refused.value.field == "instruction"


def test_an_instruction_is_refused_by_a_model_that_takes_none_where_its_scores_are_needed(world: World):
    world.engine.takes_instruction = False
    with pytest.raises(JobRejected, match="instruction: the model 'stub model' takes none"):
        world.rank(job(instruction="find causes"))
    assert world.rank(job(instruction="find causes", fusion=Fusion(weights={"token": 1}))).chunks


def test_a_pair_that_cannot_be_scored_fails_its_job_and_no_other(world: World):
    wanted = [job([f"chunk {number}", "fine"]) for number in range(6)]
    with ThreadPoolExecutor(7) as threads:
        fine = [threads.submit(world.rank, one) for one in wanted]
        with pytest.raises(PairFailed, match="broken cannot be scored"):
            threads.submit(world.rank, job(["fine too", "broken"])).result(WAIT_S)
        for one, ranking in zip(wanted, fine, strict=True):
            assert_plain(ranking.result(WAIT_S), one)


def test_a_job_on_a_closed_engine_raises_engine_closed(world: World):
    world.batcher.close()
    with pytest.raises(EngineClosed):
        world.rank(job())


# -- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", ["interactive", "bulk"])
def test_the_device_is_shared_by_priority_and_among_tenants(world: World, monkeypatch, priority: str):
    asked, submit = [], world.batcher.submit

    def submit_and_look(*args, **named):
        asked.append((named["priority"], named["tenant"]))
        return submit(*args, **named)

    monkeypatch.setattr(world.batcher, "submit", submit_and_look)
    world.rank(job(tenant="a-tenant", priority=priority))
    assert asked == [(priority, "a-tenant")]


def test_a_job_cancelled_before_it_began_computes_nothing(world: World):
    work = Work()
    work.cancel()
    with pytest.raises(JobCancelled):
        world.rank(job(), work)
    assert not world.engine.computed


def test_a_job_cancelled_while_it_runs_stops_before_its_next_micro_batch(held: World):
    work, wanted = Work(), job([f"chunk number {number} of many" for number in range(100)])
    with ThreadPoolExecutor(1) as threads:
        ranking = threads.submit(held.rank, wanted, work)
        assert held.engine.entered.acquire(timeout=WAIT_S)
        work.cancel()
        held.engine.gate.set()
        with pytest.raises(JobCancelled):
            ranking.result(WAIT_S)
    held.batcher.close(timeout=WAIT_S)
    assert sum(held.engine.computed.values()) < 10, "the micro-batch that ran, and no other"
    assert work.pairs_done < 10
    assert held.client.keys("*") == [], "half a job is not remembered"


def test_pairs_that_another_job_waits_for_are_computed_although_their_own_job_was_cancelled(held: World):
    work, wanted = Work(), job([f"chunk number {number} of many" for number in range(20)])
    with ThreadPoolExecutor(2) as threads:
        owner = threads.submit(held.rank, wanted, work)
        assert held.engine.entered.acquire(timeout=WAIT_S)
        joined = threads.submit(held.rank, wanted)
        while held.batcher.stats().tickets < 2:
            threading.Event().wait(0.001)
        work.cancel()
        with pytest.raises(JobCancelled):
            owner.result(WAIT_S)
        held.engine.gate.set()
        assert_plain(joined.result(WAIT_S), wanted)
    assert set(held.engine.computed.values()) == {1}


def test_a_cancellation_between_submitting_and_waiting_is_not_missed(world: World, monkeypatch: pytest.MonkeyPatch):
    work, submit = Work(), world.batcher.submit

    def submit_and_cancel(*args, **kwargs):
        ticket = submit(*args, **kwargs)
        work.cancel()
        return ticket

    monkeypatch.setattr(world.batcher, "submit", submit_and_cancel)
    with pytest.raises(JobCancelled):
        world.rank(job(), work)
    assert world.batcher.stats().tickets == 0


def test_progress_counts_known_pairs_and_computed_ones(world: World):
    world.rank(job(TEXTS[:2]))
    work = Work()
    world.rank(job(), work)
    assert work.pairs_done == len(TEXTS)


def test_cancelling_an_ended_job_has_no_effect(world: World):
    work = Work()
    world.rank(job(), work)
    work.cancel()
    assert_plain(world.rank(job()), job())


@pytest.mark.parametrize("texts", [[""], [" ", "\n"], ["\x00"], ["x" * 100_000], ["é", "e\u0301"], ["字" * 600]])
def test_odd_texts_are_ranked(world: World, texts: list[str]):
    assert_plain(world.rank(job(texts)), job(texts))


def test_ten_thousand_chunks_are_ranked_by_their_logits(world: World):
    many = job([f"chunk {number % 700} {'tide ' * (number % 5)}" for number in range(10_000)], top_k=2048)
    ranking = world.rank(many)
    assert len(ranking.chunks) == 2048
    logits = StubEngine(seconds_per_token=0).score([(many.query, chunk.model_text) for chunk in many.chunks])
    assert [chunk.model_logit for chunk in ranking.chunks] == np.sort(logits)[::-1][:2048].tolist()
    assert sum(world.engine.computed.values()) == len({chunk.model_text for chunk in many.chunks})


def test_many_jobs_at_once_are_each_ranked_as_if_alone(world: World):
    wanted = [
        job([f"text {(number * 7 + at) % 40}" for at in range(15)], query=f"query {number % 3}", fusion=profile)
        for number, profile in enumerate([*profiles().values()] * 3)
    ]
    with ThreadPoolExecutor(12) as threads:
        for one, ranking in zip(wanted, threads.map(world.rank, wanted), strict=True):
            assert_plain(ranking, one)
