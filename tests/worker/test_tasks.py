"""The worker's program: what Celery's task, signals and control commands do with the worker."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import signals
from celery.exceptions import Ignore
from one_worker import WAIT_S, request, state, submit

from rerankq import JobCancelled
from rerankq.errors import SettingsInvalid
from rerankq.ledger import calls
from rerankq.settings import Settings
from rerankq_worker.worker import Phase


@pytest.fixture
def running(program: Any, worker: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The worker, where the program finds it."""
    monkeypatch.setattr(program.app.process, "worker", worker)
    return worker


class Sender:
    """Who sends a signal: the consumer, or the worker's controller."""

    exitcode = 0

    def __init__(self, update_bulk: Callable[[], None] = lambda: None) -> None:
        self.update_bulk = update_bulk


def received(*requests: SimpleNamespace) -> None:
    for one in requests:
        signals.task_received.send(sender=Sender(), request=one)


def test_a_task_says_how_its_job_ended_and_that_of_a_running_job_is_ignored(program: Any, running: Any):
    assert program.rerank(submit(running)).startswith("ranked 2 pairs")
    running.ledger.ask(calls.cancel(submit(running, "b"), running.limits))
    with pytest.raises(JobCancelled):
        program.rerank("b")
    running.ledger.ask(calls.claim(submit(running, "c"), "another", running.limits))
    with pytest.raises(Ignore, match="running"):
        program.rerank("c")


def test_a_received_message_takes_a_slot_and_updates_the_bulk_consumer(program: Any, running: Any):
    updated: list[int] = []
    consumer = Sender(update_bulk=lambda: updated.append(running.slots.taken))
    signals.task_received.send(sender=consumer, request=request("a"))
    assert updated == [1]


def test_a_job_revoked_before_it_was_received_gives_no_slot_back(program: Any, running: Any):
    submit(running)
    received(request("b"))
    signals.task_revoked.send(sender=None, request=request("a"), terminated=False, signum=None, expired=False)
    assert running.slots.taken == 1
    assert state(running) == "cancelled"
    signals.task_revoked.send(sender=None, request=request("b"), terminated=False, signum=None, expired=False)
    assert running.slots.taken == 0
    running.give_slot_back("b")
    assert running.slots.taken == 0


def test_revoking_cancels_in_the_ledger_and_the_same_content_can_be_submitted_again(program: Any, running: Any):
    sent: list[tuple[str, str]] = []
    dispatcher = SimpleNamespace(send=lambda kind, **fields: sent.append((kind, fields["uuid"])))
    panel = SimpleNamespace(consumer=SimpleNamespace(event_dispatcher=dispatcher))
    for name in ("a", "b"):
        submit(running, name)
    for names in (["a", "never submitted"], "b"):
        program.revoke(panel, task_id=names, terminate=True, signal="SIGTERM")
    for thread in [one for one in threading.enumerate() if one.name == "rerankq-revoked"]:
        thread.join(WAIT_S)
    assert [state(running, name) for name in ("a", "b")] == ["cancelled", "cancelled"]
    assert sent == [("task-revoked", "a"), ("task-revoked", "never submitted"), ("task-revoked", "b")]
    running.rerank(submit(running, "a"))
    assert state(running) == "done"


def test_a_shutdown_begins_with_the_drain_and_ends_with_the_workers_exit_status(program: Any, running: Any):
    signals.worker_shutting_down.send(sender="test", sig="TERM", how="Warm", exitcode=0)
    assert running.life.reached(Phase.DRAINING)
    assert not running.life.reached(Phase.HANDING_BACK)
    running.life._exit_status = 70
    controller = Sender()
    signals.worker_shutdown.send(sender=controller)
    assert running.life.reached(Phase.HANDING_BACK)
    assert controller.exitcode == 70


def test_concurrency_of_celerys_command_line_counts_and_another_pool_is_refused(program: Any):
    settings = Settings(broker_url="redis://nowhere", concurrency=32)
    asked = SimpleNamespace(pool_cls="threads", concurrency=3)
    assert program.chosen(settings, asked).concurrency == 3
    asked.concurrency = "auto"  # Celery counts processors later
    assert program.chosen(settings, asked).concurrency == 32
    for pool in ("solo", "prefork"):
        asked.pool_cls = pool
        with pytest.raises(SettingsInvalid, match=f"expected threads, and not {pool}"):
            program.chosen(settings, asked)


def test_a_task_before_the_worker_started_is_an_error(program: Any):
    assert program.app.process.worker is None
    with pytest.raises(RuntimeError):
        program.rerank("a")
    received(request("a"))
    signals.task_revoked.send(sender=None, request=request("a"))
    signals.worker_shutting_down.send(sender="test", sig="TERM", how="Warm", exitcode=0)
    signals.worker_shutdown.send(sender=None)
