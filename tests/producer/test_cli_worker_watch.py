import pytest

from rerankq import BrokerUnavailable
from rerankq.cli.worker_watch import WorkerWatch, unserved
from rerankq.ledger import WorkerInfo


def worker(model, suffix="", aliases=(), queues=True):
    names = tuple(f"rerankq.{priority}{suffix}" for priority in ("interactive", "bulk")) if queues else ()
    return WorkerInfo(f"w-{model}", model, aliases, "f", names, 0.5, 1.0, {})


@pytest.mark.parametrize(
    ("models", "workers", "missing"),
    [
        ([], [], ("",)),
        ([None, "m"], [], ("",)),
        ([None], [worker("a", queues=False)], ("",)),
        ([None], [worker("a")], ()),
        ([None], [worker("a", ".a")], ("the default model",)),
        (["b", "b", None], [worker("a")], ("b",)),
        (["short"], [worker("long", ".long", aliases=("short",))], ()),
        ([], [worker("a", ".a")], ()),
    ],
)
def test_what_no_worker_serves_is_named(models, workers, missing):
    assert unserved(models, workers) == missing


def test_a_change_is_told_once():
    there, told = [], []
    watch = WorkerWatch(lambda: there, told.append)
    for _ in range(3):
        watch.look([None], ["one"])
    there.append(worker("a"))
    for _ in range(3):
        watch.look([None], ["one"])
    there.clear()
    watch.look([None], [f"job-{number}" for number in range(5)])
    assert told == [
        "no worker is alive; waiting for job one (rerankq worker starts one)",
        "a worker is there now",
        "no worker is alive; waiting for jobs job-0, job-1, job-2 and 2 more (rerankq worker starts one)",
    ]


def test_a_ledger_that_does_not_answer_is_nothing_to_tell():
    def gone():
        raise BrokerUnavailable("gone")

    WorkerWatch(gone, pytest.fail).look([None])
