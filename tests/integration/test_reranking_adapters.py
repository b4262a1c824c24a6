"""What all adapters have in common: clients, options, the order of texts; with the bundled model behind them."""

import asyncio
import copy
import gc
import pickle

import numpy as np
import pytest

from rerankq import AsyncClient, Client, ClientClosed, Fusion, SettingsInvalid
from rerankq.contract import ModelName, RankedChunk, Ranking
from rerankq.errors import BrokerUnavailable, JobRejected, JobTimedOut
from rerankq.integrations.clients import Clients
from rerankq.integrations.reranking import Reranker, chunk_fields

QUERY = "why do tides rise?"
TEXTS = [
    "Bread rises in the oven.",
    "The moon pulls at the sea and makes the tides rise.",
    "The sun rises in the east.",
]
NOWHERE = "redis://127.0.0.1:1/0"


def chunks(*texts):
    return [chunk_fields(text) for text in texts or TEXTS]


@pytest.fixture
def reranker(bundled_url):
    with Reranker(url=bundled_url, timeout=60) as one:
        yield one


def ranked(reranker, given, limit=None):
    """Rank blocking and with asyncio; both must answer the same."""

    async def asynchronous():
        found = await reranker.arank(QUERY, given, limit)
        await reranker.aclose()
        return found

    blocking = reranker.rank(QUERY, given, limit)
    assert asyncio.run(asynchronous()) == blocking
    return blocking


def test_the_best_text_comes_first_and_scores_fall(reranker):
    found = ranked(reranker, chunks())
    assert found[0].at == 1
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert ranked(reranker, chunks(), 2) == found[:2]


def test_blank_texts_rank_last_and_fail_nothing(reranker):
    found = ranked(reranker, chunks("", *TEXTS, " \n"))
    assert [one.at for one in found[:1]] == [2]
    assert found[3:] == [(0, 0.0), (4, 0.0)]
    assert ranked(reranker, chunks("", " ")) == [(0, 0.0), (1, 0.0)]
    assert ranked(reranker, chunks("", *TEXTS), 1) == [(2, found[0].score)]


def test_blank_texts_stand_below_raw_logits_and_below_a_minimum_score(bundled_url):
    logits = Fusion(weights={"model": 1}, normalise={"model": "raw"})
    with Reranker(url=bundled_url, timeout=60, fusion=logits) as below_zero:
        found = ranked(below_zero, chunks("", *TEXTS))
    assert found[-1].at == 0
    assert found[-1].score == found[-2].score < 0
    with Reranker(url=bundled_url, timeout=60, fusion="model", min_score=0.5) as strict:
        assert [one.at for one in ranked(strict, chunks("", *TEXTS))] == [2]


def test_a_title_is_read_and_is_enough(reranker):
    given = [chunk_fields("", title=TEXTS[1]), chunk_fields("See above.", title=None), chunk_fields(TEXTS[0])]
    assert ranked(reranker, given)[0].at == 0


def test_half_a_surrogate_pair_fails_nothing(reranker):
    found = ranked(reranker, chunks("\ud800 Bread rises.", TEXTS[1]))
    assert [one.at for one in found] == [1, 0]


def test_first_stage_scores_reach_the_fusion(bundled_url):
    given = [
        chunk_fields(text, vector_score=score)
        for text, score in zip(TEXTS, (np.float32(0.9), float("nan"), 0.1), strict=True)
    ]
    with Reranker(url=bundled_url, timeout=60, fusion=Fusion(weights={"vector": 1})) as reranker:
        assert ranked(reranker, given)[0].at == 0
    with (
        Reranker(url=bundled_url) as reranker,
        pytest.raises(JobRejected, match=r"chunks\.0\.vector_score"),
    ):
        reranker.rank(QUERY, [chunk_fields("a", vector_score="high")])


def test_few_texts_keep_their_order_without_a_job():
    reranker = Reranker(url=NOWHERE, skip_at_or_below=3)
    assert ranked(reranker, chunks()) == [(0, None), (1, None), (2, None)]
    assert ranked(reranker, chunks(), 2) == [(0, None), (1, None)]
    assert ranked(Reranker(url=NOWHERE), []) == []
    with pytest.raises(BrokerUnavailable):
        reranker.rank(QUERY, chunks(*TEXTS, "one more"))
    with pytest.raises(BrokerUnavailable):
        Reranker(url=NOWHERE, skip_at_or_below=3, min_score=0.5).rank(QUERY, chunks())


class RecordingClient(Client):
    """Tells what it was asked for, and answers at once."""

    def rerank(self, query, chunks, timeout=None, **job_fields):
        self.asked = {"query": query, "timeout": timeout, **job_fields}
        return Ranking(
            job_id="x",
            model=ModelName(name="m", fingerprint="f"),
            chunks=[RankedChunk(id=str(at), index=at, rank=at + 1, score=1 / (at + 1)) for at in range(len(chunks))],
        )


def test_every_option_reaches_the_job():
    with RecordingClient(NOWHERE) as client:
        reranker = Reranker(
            client=client,
            model="m",
            fusion="rrf",
            priority="bulk",
            tenant="acme",
            timeout=7,
            min_score=0.1,
            skip_at_or_below=2,
            job_fields={"deadline_s": 5, "cache": "refresh", "query_tags": {"sea": 1.0}},
        )
        reranker.rank(QUERY, chunks(), 2)
        assert client.asked == {
            "query": QUERY,
            "timeout": 7,
            "top_k": 2,
            "model": "m",
            "fusion": "rrf",
            "priority": "bulk",
            "tenant": "acme",
            "min_score": 0.1,
            "skip_at_or_below": 0,
            "deadline_s": 5,
            "cache": "refresh",
            "query_tags": {"sea": 1.0},
        }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"priority": "urgent"}, "priority"),
        ({"tenant": "a b"}, "tenant"),
        ({"timeout": -1}, "timeout"),
        ({"skip_at_or_below": -1}, "skip_at_or_below"),
        ({"min_score": float("nan")}, "min_score"),
        ({"fusion": {"weights": {"luck": 1}}}, "luck"),
        ({"no_such": 1}, "no_such"),
        ({"job_fields": {"no_such": 1}}, "no_such"),
        ({"job_fields": {"id": "one", "chunks": []}}, "chunks, id"),
        ({"job_fields": {"fusion": "rrf"}}, "fusion"),
        ({"client": "redis://"}, "client"),
    ],
)
def test_a_wrong_option_is_named_and_no_password_is_shown(options, named):
    with pytest.raises(ValueError, match=named) as refused:
        Reranker(url="redis://:secret@127.0.0.1:1/0", **options)
    assert "secret" not in str(refused.value)


def test_errors_of_the_client_pass_through(redis_url, bundled_url):
    with Reranker(url=redis_url, timeout=0.1) as nobody_works, pytest.raises(JobTimedOut):
        nobody_works.rank(QUERY, chunks())
    with Reranker(url=bundled_url) as reranker, pytest.raises(JobRejected, match="query"):
        reranker.rank(" ", chunks())
    with Reranker(url=bundled_url, fusion="no-such-profile") as reranker, pytest.raises(JobRejected, match="no-such"):
        reranker.rank(QUERY, chunks())


def test_a_client_that_was_given_stays_open_and_serves_asyncio_too(bundled_url):
    async def main(client):
        async with Reranker(client=client, timeout=60) as reranker:
            return reranker.rank(QUERY, chunks()), await reranker.arank(QUERY, chunks())

    async def main_async():
        async with AsyncClient(bundled_url) as client, Reranker(async_client=client, timeout=60) as reranker:
            found = await reranker.arank(QUERY, chunks())
            await reranker.aclose()
            await client.status("x")
            return await asyncio.to_thread(reranker.rank, QUERY, chunks()), found

    with Client(bundled_url) as client:
        blocking, asynchronous = asyncio.run(main(client))
        assert blocking == asynchronous
        client.status("x")  # still open
    blocking, asynchronous = asyncio.run(main_async())
    assert blocking == asynchronous
    gc.collect()  # the blocking client of the last adapter


def test_clients_are_made_once_and_again_after_they_were_closed():
    clients = Clients(NOWHERE)
    first = clients.blocking
    assert clients.blocking is first
    clients.close()
    with pytest.raises(ClientClosed):
        first.status("x")
    assert clients.blocking is not first
    assert clients.asynchronous is clients.asynchronous
    asyncio.run(clients.aclose())


def test_a_url_and_a_client_at_once_are_refused():
    with Client(NOWHERE) as client, pytest.raises(SettingsInvalid, match="not both"):
        Reranker(url=NOWHERE, client=client)


def test_without_a_url_the_environment_says_which_deployment(bundled_url, monkeypatch):
    monkeypatch.setenv("RERANKQ_BROKER_URL", bundled_url)
    with Reranker(timeout=60) as reranker:
        assert reranker.rank(QUERY, chunks())[0].at == 1


def test_copies_share_a_client_that_was_given_and_close_only_their_own(bundled_url):
    with Client(bundled_url) as client:
        copied = copy.deepcopy(Reranker(client=client, timeout=60))
        assert copied.client is client
        copied.close()
        client.status("x")
    with Reranker(url=bundled_url, timeout=60) as reranker:
        made = reranker._clients.blocking
        copied = copy.deepcopy(reranker)
        assert copied.rank(QUERY, chunks())[0].at == 1
        copied.close()
        assert reranker._clients.blocking is made
        made.status("x")


def test_a_pickled_adapter_has_clients_of_its_own_with_the_same_settings(bundled_url):
    with Client(bundled_url) as client:
        carried = pickle.dumps(Reranker(client=client, timeout=60, fusion=Fusion(weights={"model": 1})))
    copied = pickle.loads(carried)
    with copied.client:
        assert copied.rank(QUERY, chunks())[0].at == 1
        assert copied.fusion == Fusion(weights={"model": 1})


def test_a_password_is_neither_shown_nor_written_out():
    secret = Reranker(url="redis://:secret@127.0.0.1:1/0")
    assert "secret" not in repr(secret) + str(secret.model_dump()) + secret.model_dump_json()
    assert secret.url == "redis://:secret@127.0.0.1:1/0"
    plain = Reranker(url=NOWHERE, fusion=Fusion(weights={"model": 1}))
    assert Reranker.model_validate_json(plain.model_dump_json()) == plain


def test_an_adapter_serves_one_event_loop_after_another(bundled_url):
    reranker = Reranker(url=bundled_url, timeout=60)
    first, second = (asyncio.run(reranker.arank(QUERY, chunks())) for _ in range(2))
    assert first == second
    asyncio.run(reranker.aclose())


def test_options_have_a_json_schema_without_the_clients():
    properties = Reranker.model_json_schema()["properties"]
    assert not {"client", "async_client"} & properties.keys()
    assert properties["skip_at_or_below"]["minimum"] == 0
