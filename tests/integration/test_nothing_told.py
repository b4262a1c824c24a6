"""Texts and passwords stay where they belong: not in talkative logs, not in events, not in what Flower asks."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from rerankq import BrokerUnavailable, Chunk, Client, JobFailed, Ranking, RerankJob
from rerankq.broker.celery_app import make_app
from rerankq.settings import Settings
from rerankq.urls import masked

MARK = "Sphinx-of-black-quartz"


@contextmanager
def events_of(settings: Settings) -> Iterator[list[dict]]:
    """Receive every event while the block lasts, as Flower does."""
    events: list[dict] = []
    app = make_app(settings)
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": events.append})
        listener = threading.Thread(target=receiver.capture, kwargs={"limit": None, "timeout": None, "wakeup": True})
        listener.start()
        try:
            yield events
        finally:
            receiver.should_stop = True
            listener.join()
            app.close()


def test_a_worker_that_logs_everything_logs_no_text_of_a_chunk_and_no_password(
    settings: Settings, start_worker: Callable, wait_until: Callable, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("DEBUG")
    password = urlsplit(settings.broker).password
    assert password
    worker = start_worker("poisonable", debug=True)
    marked = Chunk(text=f"{MARK} text", title=f"{MARK} title", keywords=[f"{MARK}-k"], metadata={"m": MARK})
    with events_of(settings) as events, Client(settings) as client:
        good = RerankJob(query="what is shown?", chunks=[marked, "another"], return_text=True)
        ranking = client.rerank(good.query, good.chunks, timeout=60)
        assert isinstance(ranking, Ranking)
        # One that fails in the engine: errors like to quote what they stumbled over.
        broken = client.submit(RerankJob(query="what breaks?", chunks=[marked, "broken"]))
        with pytest.raises(JobFailed) as failed:
            client.result(broken, timeout=60)
        kinds = {"task-received", "task-started", "task-succeeded", "task-failed"}
        wait_until(lambda: kinds <= {event["type"] for event in events})
        app = make_app(settings)
        asked = app.control.inspect(timeout=10, limit=1)
        answers = {name: getattr(asked, name)() for name in ("conf", "stats", "reserved")}
        app.close()
    assert all(answers.values()), "each was answered"
    log = worker.log.read_text()
    assert "DEBUG" in log
    assert "what is shown?" in json.dumps(events), "the query's first words are shown"
    for where, text in {
        "log of the worker": log,
        "log of the producer": caplog.text,
        "events": json.dumps(events, default=str),
        "remote control": json.dumps(answers, default=str),
        "error": str(failed.value),
        "settings": repr(settings),
    }.items():
        assert MARK not in text, where
        assert password not in text, where


def test_a_broker_that_is_not_there_is_named_without_its_password(start_worker: Callable, wait_until: Callable):
    url = "redis://me:s3cr3t-w0rd@127.0.0.1:1/0"
    worker = start_worker(url=url, ready=False, debug=True)
    wait_until(lambda: worker.process.poll() is not None)
    log = worker.log.read_text()
    assert "127.0.0.1:1" in log
    assert "s3cr3t" not in log
    with Client(Settings(_env_file=None, broker_url=url)) as client, pytest.raises(BrokerUnavailable) as refused:
        client.status("x")
    assert "s3cr3t" not in str(refused.value)
    assert masked(url) == "redis://me:***@127.0.0.1:1/0"
