"""What each job's ranking is when nothing else runs: the worker's own reranker, called directly, one job at a time."""

from __future__ import annotations

from collections.abc import Iterable

import redis

from rerankq import catalogue
from rerankq_worker import engine
from rerankq_worker.cache import ScoreCache
from rerankq_worker.fusion.analyser import Analyser
from rerankq_worker.reranker import Reranker
from rerankq_worker.scoring import LocalScorer
from rerankq_worker.work import Work

from .schedule import Order
from .verdict import Undisturbed


def rank_alone(orders: Iterable[Order], model: str) -> dict[int, Undisturbed]:
    """Rank every job but the poison, by order number; nothing comes from a cache."""
    # The stub's scores do not depend on what a token costs.
    loaded = engine.load("stub:0" if model.startswith("stub") else model, "cpu", "float32")
    nowhere = ScoreCache(redis.Redis(port=1), ttl_s=1)
    batcher = engine.Batcher(loaded)
    reranker = Reranker(LocalScorer(loaded, batcher, nowhere), Analyser(), name=model)
    try:
        return {order.number: _alone(reranker, order) for order in orders if order.fate != "poison"}
    finally:
        batcher.close(drain=False, timeout=5)


def _alone(reranker: Reranker, order: Order) -> Undisturbed:
    resolved = catalogue.resolve(order.job.fusion, None)
    job = order.job.model_copy(update={"fusion": resolved, "cache": "bypass"})
    chunks = reranker.rank(str(order.number), job, Work(), priority="bulk", waited_s=0).chunks
    by_place = {chunk.index: chunk for chunk in chunks}
    places = range(len(chunks))
    return Undisturbed(
        logits=[by_place[at].model_logit for at in places],
        scores=[by_place[at].score for at in places],
        best_first=[chunk.index for chunk in chunks],
    )
