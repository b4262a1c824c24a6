"""The backend of a worker without a device: how it is chosen, what it shows, and what it does not need."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from rerank_server import WAIT_S, Answer, Held, RerankServer, score_of

from rerankq.errors import SettingsInvalid
from rerankq.ledger.lease_policy import PATIENCE_S, LeasePolicy
from rerankq.settings import Settings
from rerankq_worker import backend
from rerankq_worker.cache import ScoreCache
from rerankq_worker.fusion.normalise import normalise_sigmoid
from rerankq_worker.remote import RemoteBackend
from rerankq_worker.scoring import ScoreOptions
from rerankq_worker.work import Work

POLICY = LeasePolicy(8)
BYPASS = ScoreOptions(cache="bypass")
TABLE = """
[models]
[remote.test]
dialect = "jina"
url = "{url}"
model = "m"
score = "probability"
max_length = 512
max_documents = 2
{more}
"""


def conf(folder: Path, url: str, more: str = "") -> Path:
    (folder / "models.toml").write_text(TABLE.format(url=url, more=more))
    return folder


@pytest.fixture
def server() -> Iterator[RerankServer]:
    with RerankServer() as running:
        yield running


@pytest.fixture
def load(redis_url: str, tmp_path: Path, server: RerankServer) -> Iterator[Callable[..., Any]]:
    """Load the backend of a model by its name, over a catalogue that leads to the server."""
    loaded = []

    def load_named(model: str = "remote:test", more: str = "") -> Any:
        settings = Settings(broker_url=redis_url, conf_dir=conf(tmp_path, server.url, more), _env_file=None)
        loaded.append(backend.load_backend(model, settings, ScoreCache(redis.Redis(), ttl_s=1)))
        return loaded[-1]

    yield load_named
    for one in loaded:
        one.close(WAIT_S)


def test_a_model_of_the_catalogue_is_asked_for_scores_with_the_key_from_the_environment(
    load: Callable[..., Any], server: RerankServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TEST_RERANK_KEY", " k-1\n")
    made = load(more='api_key_env = "TEST_RERANK_KEY"')
    assert isinstance(made, RemoteBackend)
    found = made.scorer.score("q", ["a", "b", "c"], BYPASS, Work())
    np.testing.assert_allclose(normalise_sigmoid(found.logits), [score_of(text) for text in "abc"], rtol=1e-5)
    assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer k-1"}


def test_the_key_may_stand_in_the_file_of_settings(
    load: Callable[..., Any], server: RerankServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("TEST_RERANK_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text('RERANKQ_CONCURRENCY=3\nTEST_RERANK_KEY="k-2"\n')
    load(more='api_key_env = "TEST_RERANK_KEY"').scorer.score("q", ["a"], BYPASS, Work())
    assert server.asked[0].headers["authorization"] == "Bearer k-2"


@pytest.mark.parametrize(
    ("key", "said"),
    [("", "TEST_RERANK_KEY: is not set"), ("a\nb", "TEST_RERANK_KEY: expected printable ASCII"), ("ключ", "ASCII")],
)
def test_a_key_that_is_missing_or_cannot_be_sent_is_named_when_the_worker_starts(
    load: Callable[..., Any], key: str, said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TEST_RERANK_KEY", key)
    with pytest.raises(SettingsInvalid, match=said) as raised:
        load(more='api_key_env = "TEST_RERANK_KEY"')
    assert not key or key not in str(raised.value)


def test_no_key_is_sent_where_the_catalogue_names_none(load: Callable[..., Any], server: RerankServer):
    load().scorer.score("q", ["a"], BYPASS, Work())
    assert "authorization" not in server.asked[0].headers


def test_a_name_that_the_catalogue_does_not_have_is_refused_with_those_that_it_has(load: Callable[..., Any]):
    with pytest.raises(SettingsInvalid, match=r"has no table \[remote\.other\]; there are: remote:test"):
        load("remote:other")


def test_a_missing_http_client_is_named_with_what_to_install(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("rerankq_worker.remote")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(SettingsInvalid, match=r"needs httpx: pip install 'rerankq\[remote\]'"):
        load()


def test_other_models_are_loaded_on_this_machine(load: Callable[..., Any]):
    assert isinstance(load("stub:0"), backend.LocalBackend)


def test_what_is_shown_names_the_server_and_its_trouble_and_no_key(
    load: Callable[..., Any], server: RerankServer, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
):
    monkeypatch.setenv("TEST_RERANK_KEY", "k-secret")
    made = load(more='api_key_env = "TEST_RERANK_KEY"\nconcurrency = 1')
    host = server.url.split("/")[2]
    assert made.can_work
    shown = made.description()
    assert (shown["device"], shown["trouble"], shown["max_length"]) == (f"{host} (jina: m)", "", 512)
    assert shown["fingerprint"] == made.scorer.fingerprint
    held = Held()
    server.next += [Answer(503, b"words of the server"), held]
    thread = threading.Thread(target=made.scorer.score, args=("q", ["a", "b"], BYPASS, Work()))
    thread.start()
    assert held.arrived.wait(WAIT_S)
    assert made.description()["trouble"] == "HTTP 503"
    assert (made.figures()["running_calls"], made.figures()["failures"]) == (1, 1)
    held.let_go.set()
    thread.join(WAIT_S)
    wait_until(lambda: made.figures()["running_calls"] == 0)
    figures = made.figures()
    assert (figures["trouble"], figures["calls"], figures["pairs"], figures["tokens"]) == ("", 1, 2, 79)
    assert made.description()["pairs_per_s"] > 0
    assert "k-secret" not in f"{made.description()} {figures}"


def test_a_request_within_its_limit_is_no_hang_and_one_long_after_it_is(
    load: Callable[..., Any], server: RerankServer, monkeypatch: pytest.MonkeyPatch
):
    made, held = load(more="timeout_s = 300"), Held()
    server.next.append(held)
    assert not made.hangs(POLICY)
    thread = threading.Thread(target=made.scorer.score, args=("q", ["a"], BYPASS, Work()))
    thread.start()
    assert held.arrived.wait(WAIT_S)
    clock = made._sender._clock
    for age, hangs in ((290, False), (300 + PATIENCE_S + 1, True)):
        monkeypatch.setattr(made._sender, "_clock", lambda age=age: clock() + age)
        assert made.hangs(POLICY) == hangs
    monkeypatch.setattr(made._sender, "_clock", clock)
    held.let_go.set()
    thread.join(WAIT_S)


def test_a_backend_whose_thread_has_ended_cannot_work(load: Callable[..., Any]):
    made = load()
    made.close(WAIT_S)
    assert not made.can_work


BLOCKED = (
    "torch", "transformers", "sentence_transformers", "tokenizers", "safetensors", "huggingface_hub", "openvino",
    "httpx2",
)  # fmt: skip
WITHOUT_TORCH = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None
from rerankq_worker.tasks import Worker, settings
from rerankq import RerankJob
from rerankq_worker.work import Work
worker = Worker(settings)
job = RerankJob(query="q", chunks=["a", "b", "c"], fusion="default")
from rerankq.catalogue import resolve
ranking = worker.reranker.rank("id", job.model_copy(update={"fusion": resolve("default")}), Work(),
                               priority="bulk", waited_s=0)
print(*(chunk.model_logit for chunk in sorted(ranking.chunks, key=lambda one: one.index)))
worker.stop()
"""


def test_a_worker_of_this_kind_starts_and_ranks_without_torch(redis_url: str, tmp_path: Path, server: RerankServer):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RERANKQ_")}
    environment |= {
        "RERANKQ_BROKER_URL": redis_url,
        "RERANKQ_MODEL": "remote:test",
        "RERANKQ_CONF_DIR": str(conf(tmp_path, server.url)),
    }
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, " ".join(BLOCKED)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    logits = [float(one) for one in run.stdout.split()]
    np.testing.assert_allclose(normalise_sigmoid(logits), [score_of(text) for text in "abc"], rtol=1e-5)
