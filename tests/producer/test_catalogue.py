"""The catalogues: a folder of one's own replaces what it has, and what is not well formed is named."""

from pathlib import Path

import pytest

from rerankq import catalogue
from rerankq.contract import Fusion
from rerankq.errors import JobRejected, SettingsInvalid

FUSION = '[profile.mine]\ndescription = "x"\nweights = { model = 2 }\n'
MODELS = """
[models."org/mine"]
max_length = 512
languages = ["en"]
size_mb = 1
licence = "MIT"
choose_when = "x"
aliases = ["short"]
"""


@pytest.mark.parametrize("own", [("fusion.toml",), ("models.toml",), ("fusion.toml", "models.toml"), ()])
def test_configured_folder_replaces_the_catalogues_that_it_has(tmp_path: Path, own: tuple[str, ...]):
    for name in own:
        (tmp_path / name).write_text({"fusion.toml": FUSION, "models.toml": MODELS}[name])
    shipped = catalogue.profiles(), catalogue.models()
    assert catalogue.profiles(tmp_path) == (
        {"mine": Fusion(weights={"model": 2})} if "fusion.toml" in own else shipped[0]
    )
    assert (
        set(catalogue.models(tmp_path)) == {"org/mine"}
        if "models.toml" in own
        else catalogue.models(tmp_path) == shipped[1]
    )


def test_model_alias_and_trailing_slashes_give_the_full_name(tmp_path: Path):
    (tmp_path / "models.toml").write_text(MODELS)
    for name in ("short", "org/mine", "org/mine/", "short//"):
        assert catalogue.canonical(name, tmp_path) == "org/mine"
    assert catalogue.canonical("/srv/other/", tmp_path) == "/srv/other"
    assert catalogue.canonical("/", tmp_path) == "/"
    assert catalogue.canonical("short") == "short", "the shipped catalogue has no such alias"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "fusion.toml",
            "[profile.a]\nweights = { model = 1 }\n[profile.b]\nweights = { model = -1 }\n",
            "profile b: weights",
        ),
        ("fusion.toml", "[profile", r"expected TOML with a table \[profile\]"),
        ("fusion.toml", "[profiles.a]\n", r"expected TOML with a table \[profile\]"),
        ("models.toml", '[models.a]\nmax_length = "long"\n', "max_length"),
        ("models.toml", "", r"expected TOML with a table \[models\]"),
    ],
)
def test_malformed_catalogue_is_named(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    read = catalogue.profiles if name == "fusion.toml" else catalogue.models
    with pytest.raises(SettingsInvalid) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    with pytest.raises(SettingsInvalid, match=message):
        read(tmp_path)


def test_unknown_profile_is_refused_with_the_known_ones(tmp_path: Path):
    (tmp_path / "fusion.toml").write_text(FUSION + "[profile.another]\nweights = { model = 1 }\n")
    with pytest.raises(JobRejected, match="no profile 'default'; there are another, mine"):
        catalogue.resolve("default", tmp_path)
    given = Fusion(weights={"model": 3})
    assert catalogue.resolve(given, tmp_path) is given


def test_unknown_profile_is_refused_naming_field_and_profiles(tmp_path: Path):
    (tmp_path / "fusion.toml").write_text(FUSION + FUSION.replace("mine", "also"))
    with pytest.raises(JobRejected, match="no profile 'none'; there are also, mine") as refused:
        catalogue.resolve("none", tmp_path)
    assert refused.value.field == "fusion"


def test_only_slashes_are_cut_from_the_end_of_a_model_name():
    assert catalogue.canonical("org/modelX") == "org/modelX"


def test_missing_catalogue_is_named_with_the_folders_searched(tmp_path: Path):
    with pytest.raises(SettingsInvalid, match=r"^none\.toml: not found in \S+/conf, \S+/conf$"):
        catalogue.find("none.toml")
    with pytest.raises(SettingsInvalid, match=rf"^none\.toml: not found in {tmp_path}, \S+/conf, \S+/conf$"):
        catalogue.find("none.toml", tmp_path)
