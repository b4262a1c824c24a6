"""The worker's program: settings, the Celery app's configuration, the task, control commands and signals.

Run as ``celery -A rerankq_worker.tasks worker``, or ``rerankq worker``. Importing it reads the settings. The worker
itself hangs on the app, as ``app.process.worker``.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from typing import Any

from celery import signals
from celery.concurrency import get_implementation
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import CPendingDeprecationWarning, Ignore, SecurityWarning
from celery.worker.control import control_command, inspect_command

from rerankq import errors
from rerankq.broker.celery_app import TASK, forget_celerys_environment, make_app
from rerankq.errors import RerankqError
from rerankq.settings import Settings

from .celery_consumer import BulkConsumer, EngineInfo, SafeConsumer, worker_queue
from .engine import EngineError
from .shutdown import ShutdownWatchdog
from .worker import DoorbellIgnored, Worker, WorkerProcess, queues_of

logger = logging.getLogger("rerankq")

# It advises on late acknowledgements, of which there are none here, and would do so at every loss of the broker.
warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
# It warns of root, for messages might bring code: none does, JSON alone is read. Containers often run as root.
warnings.filterwarnings("ignore", category=SecurityWarning)

forget_celerys_environment()
try:
    settings = Settings()
    app = make_app(settings)
except RerankqError as error:
    # This module is a program: its reader is a person at a terminal.
    sys.exit(f"the worker cannot start: {error}")
app.conf.update(
    task_queues=[worker_queue(name, settings.broker) for name in queues_of(settings)],
    worker_pool="threads",
    worker_concurrency=settings.concurrency,
    worker_consumer=f"{SafeConsumer.__module__}:{SafeConsumer.__name__}",
    # Doorbells are acknowledged when they are received; none waits in a worker that has no slot for it.
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
)
app.steps["worker"].add(EngineInfo)
app.steps["consumer"].add(BulkConsumer)
app.process = WorkerProcess()


# An error that we raise says how a job ended; that is no fault of the worker, and no traceback in its log.
@app.task(name=TASK, throws=(RerankqError, EngineError))  # type: ignore[untyped-decorator]  # Celery ships no types
def rerank(job_id: str) -> str:
    """Rank the job that the doorbell names."""
    worker: Worker | None = app.process.worker
    if worker is None:
        msg = "the worker has not started"
        raise RuntimeError(msg)
    try:
        return worker.rerank(job_id)
    except DoorbellIgnored as ignored:
        raise Ignore(str(ignored)) from ignored


@control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def revoke(state: Any, task_id: str | list[str], **_: Any) -> dict[str, str]:
    """Cancel jobs in the ledger, whether they wait, run, or have no doorbell yet.

    In place of Celery's own command, which knows only messages, cannot stop a thread, and remembers a revoked id for
    hours: the same content submitted again would not be ranked.
    """
    job_ids = [task_id] if isinstance(task_id, str) else list(task_id)
    if app.process.worker is not None:
        # Not here: this is the consumer's thread, and the ledger may be slow to answer.
        cancel = app.process.worker.cancel
        threading.Thread(target=cancel, args=(job_ids,), name="rerankq-revoked", daemon=True).start()
    for job_id in job_ids:
        state.consumer.event_dispatcher.send("task-revoked", uuid=job_id, terminated=False, signum=None, expired=False)
    return {"ok": f"cancelled: {', '.join(job_ids)}"}


@inspect_command()  # type: ignore[untyped-decorator]
def active_queues(state: Any) -> list[dict[str, Any]]:
    """List the queues that this worker consumes; Celery's own command knows only those of its own channel."""
    return [dict(queue.as_dict(recurse=True)) for queue in state.consumer.queues()]


def chosen(settings: Settings, program: Any) -> Settings:
    """Take over the concurrency that Celery's own command line asks for.

    Raises:
        SettingsInvalid: if it asks for another pool: one engine serves all jobs from threads beside it.
    """
    pool = get_implementation(program.pool_cls)
    if pool is not ThreadPool:
        asked = pool.__module__.rpartition(".")[-1]
        raise errors.SettingsInvalid(f"--pool: expected threads, and not {asked}; leave it out")
    if isinstance(program.concurrency, int) and program.concurrency != settings.concurrency:
        return settings.model_copy(update={"concurrency": program.concurrency})
    return settings


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _load(sender: Any, **_: Any) -> None:
    # Before the pool and the consumer: the model is warm before the first job is taken.
    if threading.current_thread() is threading.main_thread():
        # Elsewhere, in a program that runs a worker in a thread, signals are that program's.
        app.process.watchdog = ShutdownWatchdog(settings.drain_s, begin=app.process.stop_worker)
        app.process.watchdog.install()
    try:
        worker = app.process.worker = Worker(chosen(settings, sender))
        worker.start()
    except Exception as error:
        logger.critical(
            "the worker cannot start: %s", error, exc_info=not isinstance(error, RerankqError | EngineError)
        )
        # Celery swallows exceptions of signals, and would take jobs without an engine.
        sys.exit(1)


@signals.task_received.connect  # type: ignore[untyped-decorator]
def _received(sender: Any, request: Any, **_: Any) -> None:
    # This runs on the consumer's own thread, before it reads the next message: bulk never exceeds its share.
    if app.process.worker is not None:
        app.process.worker.take_slot(request.id, request.delivery_info.get("routing_key"))
        sender.update_bulk()


@signals.task_revoked.connect  # type: ignore[untyped-decorator]
def _revoked(request: Any, **_: Any) -> None:
    # By Celery's own means (a header, an id remembered from before): it never ran, and nobody else gives its slot back.
    if app.process.worker is not None:
        app.process.worker.give_slot_back(request.id)
        app.process.worker.cancel([request.id])


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _stopping(**_: Any) -> None:
    app.process.begin_to_stop()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _stop(sender: Any, **_: Any) -> None:
    # Celery has let all running jobs finish by now.
    worker: Worker | None = app.process.worker
    if worker is not None:
        worker.stop()
        if worker.life.exit_status:
            sender.exitcode = worker.life.exit_status
    if app.process.watchdog is not None:
        app.process.watchdog.finish()
