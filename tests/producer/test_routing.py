"""Where a job belongs, as pure decisions over what the registry says."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankq.client.routing import Route, former_queues, queue_name, resolve_route, suffix_of
from rerankq.errors import ModelUnknown
from rerankq.ledger.registry import WorkerInfo

LIVE_S = 24


def worker(model: str, fingerprint: str = "f", *, suffix: str = "", age_s: float = 1, aliases: tuple[str, ...] = ()):
    queues = (f"rerankq.interactive{suffix}", f"rerankq.bulk{suffix}")
    return WorkerInfo(f"{model}@{age_s}", model, aliases, fingerprint, queues, age_s, 0.0, {})


def place(model: str | None, *workers: WorkerInfo, listed: tuple[str, ...] = ()) -> Route:
    return resolve_route(model, workers, listed=listed, default="the default", live_s=LIVE_S)


def test_a_job_without_a_model_goes_to_the_default_queues_and_knows_the_weights_that_answer_there():
    assert place(None, worker("m", "w"), worker("other", suffix=".other")) == Route("m", ("w",), "")


def test_a_route_takes_an_instruction_if_a_living_worker_does():
    takes, other = (worker("m", "w", age_s=age_s) for age_s in (2, 1))
    takes = takes._replace(takes_instruction=True)
    for model in (None, "m"):
        assert place(model, takes, other).takes_instruction
        assert not place(model, other, takes._replace(age_s=1_000)).takes_instruction


def test_without_any_worker_a_job_waits_for_the_default_model():
    assert place(None) == Route("the default", (), "")
    assert place(None, worker("other", suffix=".other")) == Route("the default", (), "")


def test_a_worker_that_is_gone_still_names_the_default_model_but_not_its_weights():
    assert place(None, worker("m", "w", age_s=1_000)) == Route("m", (), "")
    assert place(None, worker("m", "old", age_s=1_000), worker("m", "new")) == Route("m", ("new",), "")


def test_a_worker_that_takes_no_jobs_any_more_names_neither_the_default_model_nor_its_weights():
    stopping = worker("former", "old")._replace(queues=())
    assert place(None, stopping) == Route("the default", (), "")
    assert place(None, stopping, worker("m", "new")) == Route("m", ("new",), "")


def test_an_alias_of_a_worker_that_is_gone_is_unknown():
    gone = worker("full/name", aliases=("short",), age_s=LIVE_S + 1)
    with pytest.raises(ModelUnknown, match=r"'short'; served here: none"):
        place("short", gone)


def test_the_model_of_a_living_worker_goes_before_that_of_one_that_is_gone():
    assert place(None, worker("former", "a", age_s=1_000), worker("new", "z")) == Route("new", ("z",), "")


def test_a_route_holds_all_weights_in_use_while_a_fleet_is_renewed():
    fleet = [worker("m", "new"), worker("m", "old"), worker("m", "old"), worker("n", "other", suffix=".n")]
    assert place(None, *fleet).weights == place("m", *fleet).weights == ("new", "old")
    assert place("n", *fleet).weights == ("other",)


def test_a_named_model_is_found_by_its_name_or_an_alias_while_its_worker_lives():
    serving = worker("full/name", "w", suffix=".full-name", aliases=("short",))
    for name in ("full/name", "short"):
        assert place(name, serving) == Route("full/name", ("w",), ".full-name")
    with pytest.raises(ModelUnknown, match=r"'full/name'; served here: none"):
        place("full/name", serving._replace(age_s=LIVE_S + 1))


def test_the_short_name_of_two_folders_is_refused_unless_their_weights_are_the_same():
    one = worker("/a/model", "w", suffix=".a", aliases=("model",))
    other = worker("/b/model", "x", suffix=".b", aliases=("model",))
    with pytest.raises(ModelUnknown, match="'model' may be any of /a/model, /b/model"):
        place("model", one, other)
    assert place("model", one, other._replace(fingerprint="w")) == Route("/a/model", ("w",), ".a")
    assert place("/b/model", one, other) == Route("/b/model", ("x",), ".b")
    named_so = worker("model", "y", suffix=".model")
    assert place("model", one, other, named_so) == Route("model", ("y",), ".model"), "a full name goes before aliases"


def test_a_listed_model_is_accepted_before_its_worker_comes():
    assert place("a/b", listed=("a/b",)) == Route("a/b", (), suffix_of("a/b", "the default"))
    assert place("a/b", worker("a/b", "w", age_s=1_000), listed=("a/b",)).weights == ()
    assert place("the default", listed=("the default",)).suffix == ""


def test_the_error_for_an_unknown_model_names_those_served():
    with pytest.raises(ModelUnknown, match=r"'x'; served here: a, b, c"):
        place("x", worker("b"), worker("a"), worker("gone", age_s=99), listed=("c",))


def test_a_route_does_not_depend_on_the_order_of_the_registry():
    fleet = [worker("m", "b"), worker("m", "a"), worker("m", "c", age_s=99)]
    assert {place(None, *order) for order in itertools.permutations(fleet)} == {Route("m", ("a", "b"), "")}
    assert {place("m", *order) for order in itertools.permutations(fleet)} == {Route("m", ("a", "b"), "")}


ALIKE = [
    *("org/m.v1", "org/m-v1", "org/M-v1", "org m-v1", "org/m-v1 ", "org-m-v1"),
    *("/a/model", "/b/model", "./model", "../model", "~/model", "model", "/model"),
    *("/srv/模型", "/srv/别的", "模型", "caf\u00e9", "cafe\u0301", "cafe", "\ud800", "\udcff"),
    *("x" * 80, "x" * 81, "x" * 80 + "y", "x" * 10_000),
]


def test_names_that_differ_only_in_replaced_characters_have_different_queues():
    assert len({suffix_of(name, "another") for name in ALIKE}) == len(ALIKE)
    assert "" not in {suffix_of(name, "another") for name in ALIKE}


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), min_size=2, max_size=5, unique=True))
def test_no_two_models_share_a_queue(names: list[str]):
    assert len({suffix_of(name, "\0") for name in names}) == len(names)


@settings(deadline=None)
@given(st.text(min_size=1))
def test_every_model_name_gives_a_valid_queue_name(name: str):
    assert re.fullmatch(r"rerankq\.bulk\.[A-Za-z0-9_-]{17,57}", queue_name("bulk", suffix_of(name, "")))


def test_the_default_keeps_the_plain_names_and_a_folder_shows_its_last_part():
    assert suffix_of("the default", "the default") == ""
    assert all(suffix_of(one, "x").startswith(".mine-") for one in ("/srv/models/mine", "./mine", "~/mine"))


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1), st.booleans())
def test_jobs_in_a_models_former_queues_come_to_those_that_it_has_now(name: str, is_default: bool):
    default = name if is_default else name + "x"
    own = {queue_name(one, suffix_of(name, default)) for one in ("interactive", "bulk")}
    found = former_queues(name, default)
    assert set(found.values()) == own
    assert own.isdisjoint(found)
    assert {"rerankq.interactive", "rerankq.bulk"}.isdisjoint(found), "what the plain ones hold may be anybody's"
    if is_default:
        assert queue_name("bulk", suffix_of(name, "another")) in found


# As version 0.1 wrote them: jobs may still wait there.
@pytest.mark.parametrize(
    ("name", "queue"),
    [
        ("org/m.v1", "rerankq.bulk.org-m-v1"),
        ("-a-", "rerankq.bulk.a"),
        ("Xa-X", "rerankq.bulk.Xa-X"),
        ("x" * 80, f"rerankq.bulk.{'x' * 80}"),
        ("x" * 81, f"rerankq.bulk.{'x' * 70}-8b91359a"),
        ("/srv/模型/", "rerankq.bulk.57dda2fc"),
        ("org/ééé", "rerankq.bulk.org-afce300d"),
    ],
)
def test_queues_of_the_first_version_are_found_by_the_names_that_it_gave_them(name: str, queue: str):
    assert former_queues(name, "the default")[queue] == queue_name("bulk", suffix_of(name, "the default"))


def test_a_worker_lives_up_to_the_limit_itself():
    assert place("m", worker("m", "w", age_s=LIVE_S)) == Route("m", ("w",), "")
