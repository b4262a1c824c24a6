import pytest

from rerankq import BrokerUnavailable
from rerankq.ledger.registry import WorkerInfo
from rerankq.local.worker_watch import WorkerWatch, unserved


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
def test_unserved_models_are_named(models, workers, missing):
    assert unserved(models, workers) == missing


def test_worker_watch_notifies_once_per_change():
    there, printed = [], []
    watch = WorkerWatch(lambda: there, printed.append)
    for _ in range(3):
        watch.check([None], ["one"])
    there.append(worker("a"))
    for _ in range(3):
        watch.check([None], ["one"])
    there.clear()
    watch.check([None], [f"job-{number}" for number in range(5)])
    assert printed == [
        "no worker is running; waiting for job one (start one with: rerankq worker)",
        "a worker is running now",
        "no worker is running; waiting for jobs job-0, job-1, job-2 and 2 more (start one with: rerankq worker)",
    ]


def test_worker_watch_ignores_an_unreachable_ledger():
    def gone():
        raise BrokerUnavailable("gone")

    WorkerWatch(gone, pytest.fail).check([None])


def test_alias_of_the_catalogue_is_served_by_its_model(tmp_path):
    (tmp_path / "models.toml").write_text(
        '[models."org/long"]\nmax_length = 1\nlanguages = []\nsize_mb = 1\nlicence = "x"\nchoose_when = "x"\n'
        'aliases = ["short"]\n'
    )
    assert unserved(["short", "org/long"], [worker("org/long", ".x")], tmp_path) == ()
    assert unserved(["short"], [worker("other", ".x")], tmp_path) == ("short",)
