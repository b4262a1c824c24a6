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


REMOTE = """
[models]
[remote.mine]
dialect = "jina"
url = "https://h.example/v1/rerank"
model = "m"
score = "probability"
max_length = 512
max_documents = 10
aliases = ["short"]
"""


def remote(folder: Path, *changed: tuple[str, str]) -> Path:
    text = REMOTE
    for old, new in changed:
        assert old in text
        text = text.replace(old, new)
    (folder / "models.toml").write_text(text)
    return folder


def test_model_on_another_server_is_found_by_its_full_name_and_by_its_alias(tmp_path: Path):
    remote(tmp_path)
    assert catalogue.canonical("short", tmp_path) == catalogue.canonical("remote:mine", tmp_path) == "remote:mine"
    card = catalogue.remote("remote:mine", tmp_path)
    assert (card.url, card.concurrency, card.timeout_s, card.retry_for_s) == ("https://h.example/v1/rerank", 4, 60, 300)
    with pytest.raises(SettingsInvalid, match=r"no table \[remote\.other\]; there are: remote:mine"):
        catalogue.remote("remote:other", tmp_path)


def test_catalogue_without_other_servers_has_none(tmp_path: Path):
    (tmp_path / "models.toml").write_text(MODELS)
    assert catalogue.remotes(tmp_path) == {}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('dialect = "jina"', 'dialect = "klingon"', "remote.mine.dialect: Input should be"),
        ('dialect = "jina"', "", "remote.mine.dialect: Field required"),
        ('model = "m"', "", "the dialect jina needs the model's name"),
        (
            'model = "m"',
            'model = "m"\ntakes_instruction = true',
            "only dashscope, siliconflow, vllm have a field for one",
        ),
        ('score = "probability"', "", "remote.mine.score: Field required"),
        ('score = "probability"', 'score = "percent"', "remote.mine.score: Input should be"),
        ("max_documents = 10", "max_documents = 0", "remote.mine.max_documents: Input should be greater"),
        ("max_documents = 10", "max_documents = 10\ntimeout_s = nan", "remote.mine.timeout_s"),
        ("max_documents = 10", "max_documents = 10\nrequests_per_minute = 0", "remote.mine.requests_per_minute"),
        ("max_documents = 10", "max_documents = 10\nmax_document = 10", "remote.mine.max_document: Extra inputs"),
        ("max_documents = 10", 'max_documents = 10\napi_key = "sk-1"', "remote.mine.api_key: Extra inputs"),
        ("max_documents = 10", 'max_documents = 10\napi_key_env = "sk-1"', "remote.mine.api_key_env: String should"),
        ("https://h.example/v1/rerank", "ftp://h/x", "remote.mine.url: .*expected http://HOST/PATH"),
        ("https://h.example/v1/rerank", "h.example/v1", "remote.mine.url: .*expected http://HOST/PATH"),
        ("https://h.example/v1/rerank", "https://h example/v1", "remote.mine.url: .*expected http://HOST/PATH"),
        ("https://h.example/v1/rerank", r"https://h.example/v1\n", "remote.mine.url: .*expected http://HOST/PATH"),
        ("https://h.example/v1/rerank", "https:///v1", "remote.mine.url: .*expected http://HOST/PATH"),
        ("https://h.example/v1/rerank", "https://h:port/v1", "remote.mine.url"),
        ("https://h.example/v1/rerank", "https://u:sk-1@h/v1", "remote.mine.url: .*a key belongs into api_key_env"),
        ("https://h.example/v1/rerank", "https://h/v1?key=sk-1", "remote.mine.url: .*a key belongs into api_key_env"),
        ("[remote.mine]", "[remote]\nmine = 3\n[other]", "remote.mine"),
        ("[models]\n[remote.mine]", "remote = 3\n[models]\n[other]", "expected TOML with a table"),
    ],
)
def test_malformed_entry_of_another_server_is_named_with_its_field_and_without_its_value(
    tmp_path: Path, old: str, new: str, said: str
):
    with pytest.raises(SettingsInvalid, match=said) as raised:
        catalogue.remotes(remote(tmp_path, (old, new)))
    assert "sk-1" not in str(raised.value)
    assert "models.toml" in str(raised.value)


def test_all_mistakes_of_an_entry_are_reported_together(tmp_path: Path):
    with pytest.raises(SettingsInvalid) as raised:
        catalogue.remotes(
            remote(tmp_path, ("max_length = 512", "max_length = -1"), ("documents = 10", "documents = -1"))
        )
    assert len(str(raised.value).splitlines()) == 2
