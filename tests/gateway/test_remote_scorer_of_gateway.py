"""Our own gateway as the server that a remote scorer asks: the same logits as from the worker behind it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import redis
from tides import DOCUMENTS, QUERY

from rerankq import Client
from rerankq.catalogue import RemoteCard
from rerankq_worker.cache import ScoreCache
from rerankq_worker.remote import RemoteBackend
from rerankq_worker.scoring import Scored, ScoreOptions
from rerankq_worker.work import Work

LIMITS = {"model": "bundled", "max_length": 512, "max_documents": 2}


@pytest.fixture
def score(url: str) -> Iterator[Callable[..., Scored]]:
    """Score the documents through the gateway, by a card of the catalogue."""
    opened = []

    def score_by(path: str, **fields: Any) -> Scored:
        card = RemoteCard(url=url + path, **LIMITS, **fields)
        backend = RemoteBackend("remote:gateway", card, ScoreCache(redis.Redis(), ttl_s=1))
        opened.append(backend)
        return backend.scorer.score(QUERY, DOCUMENTS, ScoreOptions(cache="bypass"), Work())

    yield score_by
    for backend in opened:
        backend.close(10)


@pytest.mark.parametrize(
    ("path", "dialect", "kind"),
    [("/rerank", "tei", "logit"), ("/rerank", "tei", "probability"), ("/v2/rerank", "cohere", "probability"),
     ("/v1/rerank", "jina", "probability"), ("/v1/rerank", "vllm", "logit"), ("/infinity/rerank", "infinity", "logit"),
     ("/voyage/rerank", "voyage", "probability"),
     ("/api/v1/services/rerank/text-rerank/text-rerank", "dashscope", "probability")],
)  # fmt: skip
def test_a_gateway_gives_a_remote_scorer_the_logits_of_its_worker(deployment, score, path, dialect, kind):
    with Client(deployment) as client:
        ranking = client.rerank(QUERY, DOCUMENTS, fusion="model", timeout=60)
    expected = {chunk.index: chunk.model_logit for chunk in ranking.chunks}
    found = score(path, dialect=dialect, score=kind)
    np.testing.assert_allclose(found.logits, [expected[at] for at in range(len(DOCUMENTS))], rtol=1e-4, atol=1e-4)
