"""The adapter for LlamaIndex, inside its query engine."""

import asyncio
import copy
import pickle

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")

from llama_index.core import VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, QueryBundle, TextNode

from rerankq import Fusion
from rerankq.errors import JobRejected
from rerankq.integrations.llama_index import RerankqRerank

QUERY = "why do tides rise?"


def nodes():
    texts = {
        "bread": ("Bread rises in the oven.", 0.9),
        "tides": ("The moon pulls at the sea and makes the tides rise.", 0.5),
        "sun": ("The sun rises in the east.", 0.1),
    }
    return [
        NodeWithScore(node=TextNode(text=text, id_=name, metadata={"name": name}), score=score)
        for name, (text, score) in texts.items()
    ]


@pytest.fixture
def rerank(bundled_url):
    with RerankqRerank(url=bundled_url, timeout=60, top_n=3) as one:
        yield one


def ids(found):
    return [each.node.node_id for each in found]


def test_the_best_nodes_come_first_with_their_scores(rerank):
    given = nodes()
    found = rerank.postprocess_nodes(given, query_str=QUERY)
    assert ids(found)[0] == "tides"
    assert found[0].node is given[1].node
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert given == nodes()


def test_postprocessing_with_asyncio_gives_the_same(rerank):
    async def main():
        found = await rerank.apostprocess_nodes(nodes(), QueryBundle(QUERY))
        await rerank.aclose()
        return found

    assert asyncio.run(main()) == rerank.postprocess_nodes(nodes(), QueryBundle(QUERY))


def test_top_n_is_two_unless_it_is_given(bundled_url):
    for options, count in (({}, 2), ({"top_n": 1}, 1), ({"top_n": 100}, 3), ({"top_n": None}, 3)):
        with RerankqRerank(url=bundled_url, timeout=60, **options) as rerank:
            assert len(rerank.postprocess_nodes(nodes(), query_str=QUERY)) == count
    with pytest.raises(ValueError, match="top_n"):
        RerankqRerank(top_n=0)


def test_no_nodes_need_neither_query_nor_deployment():
    rerank = RerankqRerank(url="redis://127.0.0.1:1/0")
    assert rerank.postprocess_nodes([], query_str=QUERY) == []
    assert rerank.postprocess_nodes([]) == []
    assert asyncio.run(rerank.apostprocess_nodes([])) == []


def test_a_query_that_is_missing_is_named():
    with pytest.raises(ValueError, match="query_bundle"):
        RerankqRerank().postprocess_nodes(nodes())


def test_the_metadata_mode_says_what_the_model_reads(bundled_url):
    hidden = TextNode(text="See above.", id_="hidden", metadata={"topic": "tides"})
    excluded = TextNode(
        text="See above.", id_="excluded", metadata={"topic": "tides"}, excluded_embed_metadata_keys=["topic"]
    )
    given = [NodeWithScore(node=node) for node in (hidden, excluded)]

    def scores(**options):
        token = Fusion(weights={"token": 1})
        with RerankqRerank(url=bundled_url, timeout=60, fusion=token, **options) as rerank:
            return {each.node.node_id: each.score for each in rerank.postprocess_nodes(given, query_str="tides")}

    assert scores() == {"hidden": 1, "excluded": 0}
    assert scores(metadata_mode="all") == {"hidden": 1, "excluded": 1}
    assert scores(metadata_mode=MetadataMode.NONE) == {"hidden": 0, "excluded": 0}
    assert scores(metadata_mode="none", title_key="topic") == {"hidden": 1, "excluded": 1}


def test_the_retrievers_scores_are_a_signal_where_that_is_asked_for(bundled_url):
    for signal in ("vector", "keyword"):
        options = {"fusion": Fusion(weights={signal: 1}), "first_stage": signal, "top_n": 3}
        with RerankqRerank(url=bundled_url, timeout=60, **options) as rerank:
            assert ids(rerank.postprocess_nodes(nodes(), query_str=QUERY)) == ["bread", "tides", "sun"]
    with pytest.raises(ValueError, match="first_stage"):
        RerankqRerank(first_stage="tea leaves")


def test_nodes_that_were_not_scored_keep_the_retrievers_scores():
    rerank = RerankqRerank(url="redis://127.0.0.1:1/0", skip_at_or_below=3, top_n=2)
    assert rerank.postprocess_nodes(nodes(), query_str=QUERY) == nodes()[:2]


def test_nodes_without_a_text_rank_last(rerank):
    picture = NodeWithScore(node=ImageNode(id_="picture", image_url="https://example.org/a.png"), score=1.0)
    assert ids(rerank.postprocess_nodes([picture, *nodes()[:2]], query_str=QUERY)) == ["tides", "bread", "picture"]


class Events(BaseEventHandler):
    """Keeps the events that instrumentation gives it."""

    seen: list = []  # noqa: RUF012  # a field

    def handle(self, event, **_):
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.seen.append(event)


def test_callbacks_and_instrumentation_hear_of_the_nodes(bundled_url):
    debug, events = LlamaDebugHandler(print_trace_on_end=False), Events()
    root = get_dispatcher()
    root.add_event_handler(events)
    try:
        manager = CallbackManager([debug])
        with RerankqRerank(url=bundled_url, timeout=60, top_n=1, callback_manager=manager) as rerank:
            found = rerank.postprocess_nodes(nodes(), query_str=QUERY)
            with pytest.raises(JobRejected):
                rerank.postprocess_nodes(nodes(), query_str=" ")
    finally:
        root.event_handlers.remove(events)
    start, end, unanswered = events.seen
    assert (start.top_n, start.query.query_str, len(start.nodes)) == (1, QUERY, 3)
    assert (end.nodes, type(unanswered)) == (found, ReRankStartEvent)
    began, ended = debug.get_event_pairs(CBEventType.RERANKING)[0]
    assert began.payload[EventPayload.QUERY_STR] == QUERY
    assert ended.payload[EventPayload.NODES] == found


def test_a_query_engine_answers_from_the_reranked_nodes(rerank):
    index = VectorStoreIndex([each.node for each in nodes()], embed_model=MockEmbedding(embed_dim=8))
    engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=20, node_postprocessors=[rerank])

    async def main():
        found = await engine.aquery(QUERY)
        await rerank.aclose()
        return found

    assert ids(engine.query(QUERY).source_nodes)[0] == "tides"
    assert ids(asyncio.run(main()).source_nodes)[0] == "tides"


def test_a_postprocessor_is_serialised_copied_and_pickled_with_its_options(bundled_url, monkeypatch):
    monkeypatch.setenv("RERANKQ_BROKER_URL", bundled_url)
    options = {
        "top_n": 1,
        "metadata_mode": "none",
        "fusion": Fusion(weights={"model": 1}),
        "job_fields": {"cache": "use"},
    }
    with RerankqRerank(timeout=60, **options) as rerank:
        copies = [
            RerankqRerank.from_json(rerank.to_json()),
            RerankqRerank.from_dict(rerank.to_dict()),
            copy.deepcopy(rerank),
            pickle.loads(pickle.dumps(rerank)),
        ]
        assert rerank.to_dict()["class_name"] == "RerankqRerank"
        for copied in copies:
            assert copied.to_dict() == rerank.to_dict()
            with copied:
                assert ids(copied.postprocess_nodes(nodes(), query_str=QUERY)) == ["tides"]
