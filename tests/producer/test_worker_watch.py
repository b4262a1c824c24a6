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


def test_a_short_name_of_the_catalogue_is_served_by_the_model_that_it_stands_for(tmp_path):
    (tmp_path / "models.toml").write_text(
        '[models."org/long"]\nmax_length = 1\nlanguages = []\nsize_mb = 1\nlicence = "x"\nchoose_when = "x"\n'
        'aliases = ["short"]\n'
    )
    assert unserved(["short", "org/long"], [worker("org/long", ".x")], tmp_path) == ()
    assert unserved(["short"], [worker("other", ".x")], tmp_path) == ("short",)
