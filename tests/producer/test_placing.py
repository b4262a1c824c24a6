"""Where a job belongs, as pure decisions over what the registry says."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq.errors import ModelUnknown
from rerankq.ledger import WorkerInfo
from rerankq.placing import Place, find_place, queue_name, suffix_of

LIVE_S = 24


def worker(model: str, fingerprint: str = "f", *, suffix: str = "", age_s: float = 1, aliases: tuple[str, ...] = ()):
    queues = (f"rerankq.interactive{suffix}", f"rerankq.bulk{suffix}")
    return WorkerInfo(f"{model}@{age_s}", model, aliases, fingerprint, queues, age_s, 0.0, {})


def place(model: str | None, *workers: WorkerInfo, listed: tuple[str, ...] = ()) -> Place:
    return find_place(model, workers, listed=listed, default="the default", live_s=LIVE_S)


def test_a_job_without_a_model_goes_to_the_default_queues_and_knows_the_weights_that_answer_there():
    assert place(None, worker("m", "w"), worker("other", suffix=".other")) == Place("m", "w", "")


def test_without_any_worker_a_job_waits_for_the_default_model():
    assert place(None) == Place("the default", "", "")
    assert place(None, worker("other", suffix=".other")) == Place("the default", "", "")


def test_a_worker_that_is_gone_for_the_moment_still_tells_which_weights_will_answer():
    assert place(None, worker("m", "w", age_s=1_000)) == Place("m", "w", "")
    assert place(None, worker("m", "old", age_s=1_000), worker("m", "new")) == Place("m", "new", "")


def test_a_named_model_is_found_by_its_name_or_an_alias_while_its_worker_lives():
    serving = worker("full/name", "w", suffix=".full-name", aliases=("short",))
    for name in ("full/name", "short"):
        assert place(name, serving) == Place("full/name", "w", ".full-name")
    with pytest.raises(ModelUnknown, match=r"'full/name'; served here: none"):
        place("full/name", serving._replace(age_s=LIVE_S + 1))


def test_a_listed_model_is_accepted_before_its_worker_comes_and_with_its_weights_where_known():
    assert place("a/b", listed=("a/b",)) == Place("a/b", "", ".a-b")
    assert place("a/b", worker("a/b", "w", age_s=1_000), listed=("a/b",)) == Place("a/b", "w", ".a-b")
    assert place("the default", listed=("the default",)).suffix == ""


def test_an_unknown_model_is_told_what_there_is():
    with pytest.raises(ModelUnknown, match=r"'x'; served here: a, b, c"):
        place("x", worker("b"), worker("a"), worker("gone", age_s=99), listed=("c",))


def test_the_choice_does_not_depend_on_the_order_of_the_registry():
    fleet = [worker("m", "b"), worker("m", "a"), worker("m", "c", age_s=99)]
    assert {place(None, *order) for order in itertools.permutations(fleet)} == {Place("m", "a", "")}
    assert {place("m", *order) for order in itertools.permutations(fleet)} == {Place("m", "a", "")}


def test_names_that_differ_only_in_what_no_queue_can_say_have_queues_of_their_own():
    names = ["/srv/模型", "/srv/别的", "模型", "x" * 81, "x" * 80 + "y", "é", "e"]
    assert len({suffix_of(name, "") for name in names}) == len(names) - 1, "a folder is named by its last part"


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_name_of_a_model_gives_a_queue_that_any_broker_takes(name: str):
    assert re.fullmatch(r"rerankq\.bulk\.[A-Za-z0-9_-]{0,80}", queue_name("bulk", suffix_of(name, "")))


def test_a_folder_is_named_by_its_last_part():
    assert suffix_of("/srv/models/mine/", "x") == suffix_of("./mine", "x") == suffix_of("~/mine", "x") == ".mine"
    assert suffix_of("the default", "the default") == ""
