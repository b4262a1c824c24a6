"""The model catalogue and the bundled model are what they say."""

import tomllib
from pathlib import Path
from typing import get_args

import pytest

from rerankq import catalogue

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = tomllib.loads((REPOSITORY / "conf" / "models.toml").read_text(encoding="utf-8"))["models"]
FIELDS = {"max_length", "languages", "parameters", "size_mb", "licence", "choose_when", "aliases"}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_says_what_one_needs_to_choose_it(name):
    card = MODELS[name]
    assert set(card) - {"aliases"} == FIELDS - {"aliases"}
    assert card["max_length"] in {512, 8192}
    assert card["languages"]
    assert all(language == "multilingual" or len(language) == 2 for language in card["languages"])
    assert card["licence"] in {"MIT", "Apache-2.0"}
    assert card["choose_when"].endswith(".")
    # Between two and four bytes a parameter: half or full precision on disk.
    assert 1.9 <= card["size_mb"] / card["parameters"] <= 4.1


def test_the_models_the_project_promises_are_there():
    assert set(MODELS) == {
        "BAAI/bge-reranker-base",
        "BAAI/bge-reranker-large",
        "BAAI/bge-reranker-v2-m3",
        "cross-encoder/ms-marco-MiniLM-L6-v2",
        "cross-encoder/ms-marco-MiniLM-L12-v2",
        "Alibaba-NLP/gte-reranker-modernbert-base",
        "bundled",
    }


def test_every_model_on_another_server_is_well_formed_and_sends_its_key_encrypted():
    cards = catalogue.remotes()
    assert {card.dialect for card in cards.values()} == set(get_args(catalogue.DialectName))
    for name, card in cards.items():
        assert name == f"remote:{card.dialect}"
        assert not card.api_key_env or card.url.startswith("https://"), name


def test_no_name_or_alias_means_two_models():
    cards = [*MODELS.items(), *((name, card.model_dump()) for name, card in catalogue.remotes().items())]
    names = [name for full, card in cards for name in (full, *card.get("aliases", []))]
    assert len(names) == len(set(names))


def test_the_bundled_model_carries_its_attributions():
    readme = (REPOSITORY / "models" / "minilm-l6-rerank" / "README.md").read_text(encoding="utf-8")
    for credit in ("all-MiniLM-L6-v2", "SelQA", "Emory", "Wikipedia", "CC BY-SA", "SciFact", "CC BY 4.0", "ODC-By"):
        assert credit in readme


def test_the_bundled_model_holds_no_executable_weights():
    folder = REPOSITORY / "models" / "minilm-l6-rerank"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".safetensors"}
