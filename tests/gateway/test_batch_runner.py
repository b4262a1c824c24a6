"""Which batches a gateway runs at once, and that nothing ends its looking for them."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rerankq.batches.journal import Journal
from rerankq.batches.running import Survey
from rerankq.errors import NoWorker
from rerankq.gateway import batch_runner
from rerankq.gateway.batch_runner import AT_ONCE_EACH, BatchRunner, BatchWork
from rerankq.gateway.batch_store import BatchObject, BatchStore, StoredBatch
from rerankq.gateway.file_store import FileStore, new_id
from rerankq.settings import Settings


class Recording(BatchRunner):
    """Begins batches and ends them when it is released."""

    def __init__(self, folder: Path) -> None:
        self.store = BatchStore(folder)
        settings = Settings(model="stub", _env_file=None)
        super().__init__(settings, self.store, FileStore(folder), rates=None, keys=None)
        self.begun: list[str] = []
        self.release = threading.Event()

    def _run(self, name: str) -> None:
        self.begun.append(name)
        self.release.wait(30)
        self.store.end(self.store.stored(name))

    def add(self, tenant: str, *, expires_in_s: int = 3600) -> str:
        """Store a batch, as a gateway does that accepts it."""
        now = int(time.time())
        batch = BatchObject(
            id=new_id("batch_"),
            endpoint="/v1/rerank",
            input_file_id="file-1",
            completion_window="1h",
            created_at=now,
            expires_at=now + expires_in_s,
        )
        content = self.store.folder("input")
        content.parent.mkdir(parents=True, exist_ok=True)
        content.write_bytes(b"{}\n")
        return self.store.add(StoredBatch(batch=batch, owner=tenant, tenant=tenant), content).id


@pytest.fixture
def runner(tmp_path) -> Iterator[Recording]:
    found = Recording(tmp_path)
    yield found
    found.release.set()


def test_the_batches_of_one_tenant_leave_room_for_those_of_another(runner, wait_until):
    many = [runner.add("one") for _ in range(AT_ONCE_EACH + 2)]
    other = runner.add("two")
    runner._look()
    runner._look()
    wait_until(lambda: len(runner.begun) == AT_ONCE_EACH + 1)
    assert sorted(runner.begun) == sorted([*many[:AT_ONCE_EACH], other])
    runner.release.set()
    wait_until(lambda: not any(thread.is_alive() for thread in runner._running.values()))
    runner._look()
    wait_until(lambda: set(many) <= set(runner.begun))


def test_a_batch_that_is_cancelled_or_expired_does_not_wait_for_the_tenants_others(runner, wait_until):
    for _ in range(AT_ONCE_EACH):
        runner.add("one")
    waiting, cancelled = runner.add("one"), runner.add("one")
    expired = runner.add("one", expires_in_s=-1)
    runner.store.cancel(cancelled, "one")
    assert runner.store.read(cancelled, "one").status == "cancelling"
    runner._look()
    wait_until(lambda: {cancelled, expired} <= set(runner.begun))
    assert waiting not in runner.begun


def test_a_batch_that_was_never_written_whole_is_not_run(runner):
    name = runner.add("one")
    (runner.store.folder(name) / "batch.json").unlink()
    runner._look()
    assert (runner.begun, runner.store.open()) == ([], [])


def test_a_batch_that_names_a_model_does_not_begin_while_no_worker_lives(runner):
    def begin(name: str, *models: str) -> str:
        stored = runner.store.stored(name)
        with Journal.open(runner.store.folder(name) / "journal", name.encode()) as journal:
            stops = threading.Event()
            work = BatchWork(runner._settings, runner.store, runner._files, stored, journal, stops, runner._admit)
            work._begin(SimpleNamespace(workers=list), Survey(1, frozenset(), frozenset(models)))
        return runner.store.read(name, "one").status

    name = runner.add("one")
    with pytest.raises(NoWorker):
        begin(name, "some/model")
    assert runner.store.read(name, "one").status == "validating"
    runner.store.cancel(name, "one")
    assert begin(name, "some/model") == "cancelling"  # that needs no worker
    # A hosted model's name stands for the default, which is waited for.
    assert begin(runner.add("one"), "rerank-v3.5") == "in_progress"


def test_lines_that_were_answered_before_others_wait_are_counted(runner, monkeypatch):
    name = runner.add("one")
    stored = runner.store.stored(name)
    with Journal.open(runner.store.folder(name) / "journal", name.encode()) as journal:
        work = BatchWork(
            runner._settings, runner.store, runner._files, stored, journal, threading.Event(), runner._admit
        )

        def answer(number):
            journal.append(number, "output", b"{}")
            work._advance(1)
            return runner.store.read(name, "one").request_counts.completed

        assert [answer(number) for number in (1, 2, 3)] == [1, 1, 1]  # once a second
        monkeypatch.setattr(batch_runner, "COUNT_EVERY_S", 0)
        work._supervise()
        assert runner.store.read(name, "one").request_counts.completed == 3
        work._finish()
    done = runner.store.read(name, "one")
    assert (done.status, done.request_counts.completed) == ("completed", 3)
    assert runner._files.read(done.output_file_id, "one").expires_at is None


def test_an_unexpected_error_does_not_end_the_looking_for_batches(runner, monkeypatch):
    monkeypatch.setattr(batch_runner, "TRY_AGAIN_S", 0)
    monkeypatch.setattr(batch_runner, "LOOK_EVERY_S", 0)
    looks, looked = [], threading.Event()

    def look():
        looks.append(1)
        if len(looks) < 3:
            raise ValueError("a bug")
        looked.set()

    monkeypatch.setattr(runner, "_look", look)

    async def run():
        running = asyncio.create_task(runner.run())
        assert await asyncio.to_thread(looked.wait, 10)
        running.cancel()
        await asyncio.wait({running})

    asyncio.run(run())
