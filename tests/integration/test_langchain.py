"""The adapters for LangChain, inside LangChain's own retrievers and compressors."""

import asyncio
import copy
import pickle

import pytest

pytest.importorskip("langchain_core", reason="langchain-core is not installed")
pytest.importorskip("langchain_classic", reason="langchain-classic is not installed")

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker, DocumentCompressorPipeline
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore

from rerankq import Fusion
from rerankq.errors import JobRejected, JobTimedOut
from rerankq.integrations.langchain import RerankqCompressor, RerankqCrossEncoder

QUERY = "why do tides rise?"
BREAD, TIDES, SUN = (
    Document("Bread rises in the oven.", id="bread", metadata={"page": 1, "vector": 0.9, "nested": {"a": [1]}}),
    Document("The moon pulls at the sea and makes the tides rise.", id="tides", metadata={"page": 2, "vector": 0.5}),
    Document("The sun rises in the east.", id="sun", metadata={"page": 3, "heading": "Tides", "vector": 0.1}),
)
DOCUMENTS = [BREAD, TIDES, SUN]


@pytest.fixture
def compressor(bundled_url):
    with RerankqCompressor(url=bundled_url, timeout=60) as one:
        yield one


class Told(BaseCallbackHandler):
    """Keeps the names of the runs that it hears of, and how they end."""

    def __init__(self):
        self.runs = []

    def on_chain_start(self, serialized, inputs, *, name=None, **_):
        self.runs.append((name, inputs["query"], len(inputs["documents"])))

    def on_chain_end(self, outputs, **_):
        self.runs.append([document.id for document in outputs])

    def on_chain_error(self, error, **_):
        self.runs.append(type(error))


def test_the_best_documents_come_back_as_copies_with_their_scores(compressor):
    before = copy.deepcopy(DOCUMENTS)
    found = compressor.compress_documents(DOCUMENTS, QUERY)
    assert found[0].id == "tides"
    assert {document.id for document in found} == {"bread", "tides", "sun"}
    scores = [document.metadata.pop("relevance_score") for document in found]
    assert scores == sorted(scores, reverse=True)
    assert all(type(score) is float for score in scores)
    assert {document.id: document for document in found} == {document.id: document for document in DOCUMENTS}
    next(document for document in found if document.id == "bread").metadata["nested"]["a"].append(2)
    assert before == DOCUMENTS


def test_compressing_with_asyncio_gives_the_same(compressor):
    async def main():
        found = await compressor.acompress_documents(DOCUMENTS, QUERY)
        await compressor.aclose()
        return found

    assert asyncio.run(main()) == compressor.compress_documents(DOCUMENTS, QUERY)


def test_top_n_is_three_unless_it_is_given(compressor, bundled_url):
    many = [*DOCUMENTS, *DOCUMENTS]
    assert len(compressor.compress_documents(many, QUERY)) == 3
    for top_n, count in ((1, 1), (5, 5), (100, 6), (None, 6)):
        with RerankqCompressor(url=bundled_url, timeout=60, top_n=top_n) as other:
            assert len(other.compress_documents(many, QUERY)) == count
    with pytest.raises(ValueError, match="top_n"):
        RerankqCompressor(top_n=0)


def test_no_documents_are_answered_without_a_deployment():
    compressor = RerankqCompressor(url="redis://127.0.0.1:1/0")
    told = Told()
    assert compressor.compress_documents([], QUERY, callbacks=[told]) == []
    assert asyncio.run(compressor.acompress_documents((), QUERY)) == []
    assert told.runs == []


def test_a_title_and_first_stage_scores_are_taken_from_the_metadata(bundled_url):
    vector = Fusion(weights={"vector": 1})
    with RerankqCompressor(url=bundled_url, timeout=60, fusion=vector, vector_score_key="vector") as compressor:
        assert [one.id for one in compressor.compress_documents(DOCUMENTS, QUERY)] == ["bread", "tides", "sun"]
    keyword = Fusion(weights={"keyword": 1})
    with RerankqCompressor(url=bundled_url, timeout=60, fusion=keyword, keyword_score_key="page") as compressor:
        assert [one.id for one in compressor.compress_documents(DOCUMENTS, QUERY)] == ["sun", "tides", "bread"]
    token = Fusion(weights={"token": 1})
    with RerankqCompressor(url=bundled_url, timeout=60, fusion=token, title_key="heading") as compressor:
        found = {one.id: one.metadata["relevance_score"] for one in compressor.compress_documents(DOCUMENTS, "tides")}
        assert found["sun"] == found["tides"] > found["bread"]


def test_documents_that_were_not_scored_have_no_score():
    compressor = RerankqCompressor(url="redis://127.0.0.1:1/0", skip_at_or_below=3)
    assert compressor.compress_documents(DOCUMENTS, QUERY) == DOCUMENTS


def test_callbacks_hear_of_a_run_and_of_its_error(compressor):
    told = Told()
    found = compressor.compress_documents(DOCUMENTS, QUERY, callbacks=[told])
    assert told.runs == [("RerankqCompressor", QUERY, 3), [document.id for document in found]]
    told = Told()
    with pytest.raises(JobRejected, match="query"):
        compressor.compress_documents(DOCUMENTS, " ", callbacks=[told])
    assert told.runs == [("RerankqCompressor", " ", 3), JobRejected]


def retriever_of(compressor):
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store.add_documents(DOCUMENTS)
    return ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=store.as_retriever(search_kwargs={"k": 20})
    )


def test_a_retriever_compresses_what_it_finds(compressor):
    async def main():
        found = await retriever_of(compressor).ainvoke(QUERY)
        await compressor.aclose()
        return found

    found = retriever_of(compressor).invoke(QUERY)
    assert found[0].id == "tides"
    assert asyncio.run(main()) == found
    pipeline = DocumentCompressorPipeline(transformers=[compressor])
    assert pipeline.compress_documents(DOCUMENTS, QUERY)[0].id == "tides"


def test_many_retrievals_at_once_share_one_client(compressor):
    async def main():
        found = await asyncio.gather(*(compressor.acompress_documents(DOCUMENTS, f"tides {n}") for n in range(30)))
        await compressor.aclose()
        return found

    assert [documents[0].id for documents in asyncio.run(main())] == ["tides"] * 30
    assert len(retriever_of(compressor).batch([QUERY] * 5)) == 5


def test_a_compressor_is_copied_and_pickled_with_its_options(compressor):
    for copied in (copy.deepcopy(compressor), pickle.loads(pickle.dumps(compressor))):
        assert copied == compressor
        with copied:
            assert copied.compress_documents(DOCUMENTS, QUERY)[0].id == "tides"


def test_a_cross_encoder_scores_pairs_in_order(bundled_url):
    pairs = [(QUERY, TIDES.page_content), ("how is bread baked?", BREAD.page_content), (QUERY, BREAD.page_content)]
    pairs += [("how is bread baked?", SUN.page_content), (QUERY, TIDES.page_content)]
    with RerankqCrossEncoder(url=bundled_url, timeout=60) as encoder:
        scores = encoder.score(pairs)
        assert encoder.score([]) == []
        assert encoder.score([(QUERY, " "), ("", "")]) == [0.0, 0.0]
        assert [encoder.score([pair])[0] for pair in pairs] == pytest.approx(scores, abs=1e-4)
    assert scores[0] == scores[4] > scores[2]
    assert scores[1] > scores[3]
    assert all(0 <= score <= 1 for score in scores)
    with RerankqCrossEncoder(url=bundled_url, timeout=60, raw_scores=True) as encoder:
        logits = encoder.score(pairs)
        assert encoder.score([(QUERY, BREAD.page_content), (QUERY, ""), pairs[0]])[1] == min(0.0, logits[2])
    assert sorted(range(5), key=logits.__getitem__) == sorted(range(5), key=scores.__getitem__)
    assert min(logits) < 0


def test_pairs_beyond_the_limit_of_a_job_are_several_jobs(bundled_url, monkeypatch):
    monkeypatch.setenv("RERANKQ_MAX_CHUNKS", "2")
    with RerankqCrossEncoder(url=bundled_url, timeout=60) as encoder:
        scores = encoder.score([(QUERY, document.page_content) for document in [*DOCUMENTS, *DOCUMENTS[:2]]])
    assert scores[:2] == pytest.approx(scores[3:], abs=1e-4)
    assert max(scores) == scores[1] == pytest.approx(scores[4], abs=1e-4)


def test_a_cross_encoder_raises_the_errors_of_the_client(redis_url, bundled_url):
    with RerankqCrossEncoder(url=redis_url, timeout=0.1) as encoder, pytest.raises(JobTimedOut):
        encoder.score([(QUERY, "a")])
    with RerankqCrossEncoder(url=bundled_url) as encoder, pytest.raises(JobRejected, match="query"):
        encoder.score([("", "a")])
    with RerankqCrossEncoder(url=bundled_url, timeout=60, job_fields={"deadline_s": 60}) as encoder:
        assert len(encoder.score([(QUERY, "a")])) == 1


def test_langchains_reranker_takes_the_cross_encoder(bundled_url):
    with RerankqCrossEncoder(url=bundled_url, timeout=60) as encoder:
        reranker = CrossEncoderReranker(model=encoder, top_n=1)
        assert [document.id for document in reranker.compress_documents(DOCUMENTS, QUERY)] == ["tides"]
