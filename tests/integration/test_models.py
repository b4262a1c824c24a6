"""Several models beside each other on real workers: each job is ranked by its own, whatever they are called."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rerankq import Client
from rerankq.settings import Settings


def test_models_with_almost_equal_names_rank_their_own_jobs_alone(redis_url: str, start_worker: Callable):
    names = ["stub:1e-6", "stub: 1e-6", "stub:1E-6"]
    for name in names:
        start_worker(RERANKQ_MODEL=name, RERANKQ_DEFAULT_MODEL="stub")
    with Client(Settings(broker_url=redis_url, default_model="stub")) as client:
        ids = {
            client.submit({"query": f"q {at}", "chunks": ["x"], "model": name}): name
            for name in names
            for at in range(8)
        }
        ranked = {one: ranking.model.name for one, ranking in client.as_completed(ids, timeout=60)}
    assert ranked == ids


def test_a_job_that_names_the_default_is_ranked_by_its_model_when_that_is_the_default_no_more(
    redis_url: str, start_worker: Callable
):
    listed = {"broker_url": redis_url, "models": ["stub", "stub:0"]}
    with Client(Settings(**listed, model="stub")) as client:
        named = client.submit({"query": "q", "chunks": ["x"], "model": "stub"})
        unnamed = client.submit({"query": "q", "chunks": ["x"]})
    start_worker(RERANKQ_MODEL="stub:0", RERANKQ_DEFAULT_MODEL="stub:0")
    start_worker(RERANKQ_MODEL="stub", RERANKQ_DEFAULT_MODEL="stub:0")
    with Client(Settings(**listed, default_model="stub:0")) as client:
        assert client.result(named, timeout=30).model.name == "stub"
        assert client.result(unnamed, timeout=30).model.name == "stub:0", "the default of when it ran"


def test_a_job_that_waits_for_a_model_is_ranked_when_that_has_become_the_default(
    redis_url: str, start_worker: Callable
):
    with Client(Settings(broker_url=redis_url, default_model="stub:0", models=["stub"])) as client:
        waits = client.submit({"query": "q", "chunks": ["x"], "model": "stub"})
        start_worker(RERANKQ_MODEL="stub")
        assert client.result(waits, timeout=30).model.name == "stub"


@pytest.mark.parametrize("producers", ["stub", ""])
def test_a_job_has_the_same_id_before_and_after_the_first_worker_comes(
    redis_url: str, start_worker: Callable, producers: str
):
    fields = {"model": producers} if producers else {}
    with Client(Settings(broker_url=redis_url, **fields)) as client:
        job = {"query": "the same", "chunks": ["x"]}
        before = client.submit(job)
        start_worker()
        client.result(before, timeout=30)
        assert client.submit(job) == before
        assert client.status(before).state == "done"


def test_a_job_is_ranked_again_when_it_is_submitted_after_the_weights_were_renewed(
    redis_url: str, start_worker: Callable, tmp_path: Path, wait_until: Callable
):
    old = start_worker(RERANKQ_MODEL="stub")
    with Client(Settings(broker_url=redis_url)) as client:
        job = {"query": "q", "chunks": ["x"]}
        one = client.submit(job)
        assert client.result(one, timeout=30).model.name == "stub"
        old.stop()
        assert client.submit(job) == one
        assert client.status(one).state == "done", "no living worker would rank it again"
        start_worker("renewed")
        wait_until(lambda: len(client.workers()) == 1)

        def ranked_anew() -> bool:
            assert client.submit(job) == one
            return client.result(one, timeout=30).model.fingerprint == "renewed"

        wait_until(ranked_anew)
        status = client.status(one)
        assert client.submit(job) == one
        assert client.status(one) == status, "once"
