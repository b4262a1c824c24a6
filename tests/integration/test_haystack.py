"""The adapter for Haystack, inside its pipelines."""

import asyncio
import copy
import inspect

import pytest

pytest.importorskip("haystack", reason="haystack-ai is not installed")

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret

from rerankq import Client, Fusion
from rerankq.errors import JobRejected
from rerankq.integrations.haystack import RerankqRanker

QUERY = "why do tides rise?"


def documents():
    return [
        Document(id="bread", content="Bread rises in the oven.", meta={"page": 1}, score=0.9),
        Document(
            id="tides", content="The moon pulls at the sea and makes the tides rise.", meta={"page": 2}, score=0.5
        ),
        Document(id="sun", content="The sun rises in the east.", meta={"page": 3, "topic": "tides"}, score=0.1),
    ]


@pytest.fixture
def ranker(bundled_url):
    one = RerankqRanker(url=bundled_url, timeout=60)
    yield one
    one.close()


def ids(found):
    return [document.id for document in found["documents"]]


def test_the_best_documents_come_first_as_copies_with_their_scores(ranker):
    given = documents()
    found = ranker.run(query=QUERY, documents=given)["documents"]
    assert found[0].id == "tides"
    assert [document.score for document in found] == sorted((document.score for document in found), reverse=True)
    assert {document.id: document.meta for document in found} == {document.id: document.meta for document in given}
    assert given == documents()


def test_a_url_in_a_secret_is_written_out_as_the_name_of_its_variable(monkeypatch):
    monkeypatch.setenv("MY_REDIS", "redis://:secret@127.0.0.1:1/0")
    one = RerankqRanker(url=Secret.from_env_var("MY_REDIS"))
    written = one.to_dict()
    assert written["init_parameters"]["url"] == {"type": "env_var", "env_vars": ["MY_REDIS"], "strict": True}
    monkeypatch.setenv("MY_REDIS", "redis://127.0.0.1:2/0")
    again = RerankqRanker.from_dict(written)
    assert again.to_dict() == written
    assert again._reranker.url == "redis://127.0.0.1:2/0"
    with pytest.raises(ValueError, match="token"):
        RerankqRanker(url=Secret.from_token("redis://127.0.0.1:1/0")).to_dict()
    again.warm_up()


def test_ranking_with_asyncio_gives_the_same(ranker):
    async def main():
        found = await ranker.run_async(query=QUERY, documents=documents())
        await ranker.close_async()
        return found

    assert asyncio.run(main()) == ranker.run(query=QUERY, documents=documents())


def test_top_k_is_the_rankers_or_that_of_a_run(bundled_url, ranker):
    many = [Document(content=f"tide {number}") for number in range(12)]
    assert len(ids(ranker.run(query=QUERY, documents=many))) == 10
    assert len(ids(ranker.run(query=QUERY, documents=many, top_k=2))) == 2
    all_of_them = RerankqRanker(url=bundled_url, timeout=60, top_k=None)
    assert len(ids(all_of_them.run(query=QUERY, documents=many))) == 12
    all_of_them.close()
    with pytest.raises(ValueError, match="top_k"):
        RerankqRanker(top_k=0)
    with pytest.raises(ValueError, match="top_k"):
        ranker.run(query=QUERY, documents=many, top_k=-1)


def test_no_documents_are_answered_without_a_deployment():
    ranker = RerankqRanker(url="redis://127.0.0.1:1/0")
    assert ranker.run(query=QUERY, documents=[]) == {"documents": []}
    assert asyncio.run(ranker.run_async(query=QUERY, documents=[])) == {"documents": []}


def test_of_documents_with_one_id_the_best_is_ranked(ranker):
    twice = [Document(id="same", content="Bread.", score=0.1), Document(id="same", content="Tides.", score=0.9)]
    found = ranker.run(query=QUERY, documents=[*twice, Document(id="other", content="Sun.")])["documents"]
    assert sorted((document.id, document.content) for document in found) == [("other", "Sun."), ("same", "Tides.")]


def test_documents_without_a_text_rank_last(ranker):
    given = [Document(id="none"), Document(id="blank", content=" "), *documents()]
    assert ids(ranker.run(query=QUERY, documents=given))[3:] == ["none", "blank"]


def test_meta_fields_title_and_first_stage_scores_are_used_where_that_is_asked_for(bundled_url):
    def scores(query, **options):
        ranker = RerankqRanker(url=bundled_url, timeout=60, **options)
        found = ranker.run(query=query, documents=documents())["documents"]
        ranker.close()
        return {document.id: document.score for document in found}

    token = Fusion(weights={"token": 1})
    assert scores("tides", fusion=token)["sun"] == 0
    assert scores("tides", fusion=token, title_key="topic")["sun"] == 1
    assert scores("tides", fusion=token, meta_fields_to_embed=["page", "topic"])["sun"] == 1
    vector = scores(QUERY, fusion=Fusion(weights={"vector": 1}), first_stage="vector")
    assert list(vector) == ["bread", "tides", "sun"]
    with pytest.raises(ValueError, match="first_stage"):
        RerankqRanker(first_stage="tea leaves")


def test_documents_that_were_not_scored_keep_their_scores():
    ranker = RerankqRanker(url="redis://127.0.0.1:1/0", skip_at_or_below=3)
    assert ranker.run(query=QUERY, documents=documents())["documents"] == documents()


def test_errors_of_the_client_pass_through(ranker):
    with pytest.raises(JobRejected, match="query"):
        ranker.run(query=" ", documents=documents())
    with pytest.raises(ValueError, match="priority"):
        RerankqRanker(priority="urgent")


def pipeline_of(ranker):
    store = InMemoryDocumentStore()
    store.write_documents(documents())
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=20))
    pipeline.add_component("ranker", ranker)
    pipeline.connect("retriever.documents", "ranker.documents")
    return pipeline


def test_a_pipeline_ranks_what_it_retrieves_blocking_and_with_asyncio(ranker):
    given = {"retriever": {"query": "rise rises tides"}, "ranker": {"query": QUERY, "top_k": 2}}
    pipeline = pipeline_of(ranker)

    async def main():
        found = await pipeline.run_async(given)
        await pipeline.close_async()
        return found

    found = pipeline.run(given)
    assert ids(found["ranker"])[0] == "tides"
    assert asyncio.run(main()) == found


def test_a_pipeline_is_written_and_read_with_its_ranker(bundled_url, monkeypatch):
    monkeypatch.setenv("RERANKQ_BROKER_URL", bundled_url)
    options = {
        "top_k": 2,
        "fusion": Fusion(weights={"model": 1}),
        "tenant": "acme",
        "title_key": "topic",
        "meta_fields_to_embed": ["page"],
        "job_fields": {"deadline_s": 30},
    }
    ranker = RerankqRanker(timeout=60, **options)
    pipeline = Pipeline()
    pipeline.add_component("ranker", ranker)
    # Version 3 imports nothing that it was not told of.
    allowed = (
        {"allowed_modules": ["rerankq.*"]} if "allowed_modules" in inspect.signature(Pipeline.loads).parameters else {}
    )
    read = Pipeline.loads(pipeline.dumps(), **allowed)
    assert read.to_dict() == pipeline.to_dict()
    assert ids(read.run({"ranker": {"query": QUERY, "documents": documents()}})["ranker"])[0] == "tides"
    read.close()


def test_every_option_is_serialised_and_no_password_is():
    written = RerankqRanker(url="redis://:secret@127.0.0.1:1/0").to_dict()
    assert "secret" not in str(written)
    options = set(inspect.signature(RerankqRanker.__init__).parameters) - {"self", "client", "async_client"}
    assert set(written["init_parameters"]) == options
    assert RerankqRanker.from_dict(written).to_dict() == written


def test_copies_share_a_client_that_was_given(bundled_url):
    with Client(bundled_url) as client:
        copied = copy.deepcopy(RerankqRanker(client=client, timeout=60))
        assert ids(copied.run(query=QUERY, documents=documents()))[0] == "tides"
        copied.close()
        client.status("x")
