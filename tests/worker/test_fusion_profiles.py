"""``conf/fusion.toml`` says what the contract's table says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rerankq import Fusion
from rerankq_worker import fusion
from rerankq_worker.fusion import ragflow

ROOT = Path(__file__).parents[2]
PROFILES = tomllib.loads((ROOT / "conf" / "fusion.toml").read_text(encoding="utf-8"))["profile"]

ENGINE = {"keyword": 0.5 * 0.5, "vector": 0.5 * 0.5, "model": 0.5}
# name: method, weights, rules that the table names, boosts, token rule
TABLE = {
    "model": ("weighted", {"model": 1}, {"model": "sigmoid"}, {}, "coverage"),
    "default": (
        "weighted",
        {"model": 0.7, "token": 0.3, "pagerank": 0.1, "tags": 0.1},
        {"model": "sigmoid", "pagerank": "percent", "tags": "cosine"},
        {"title": 2, "keywords": 5, "questions": 6, "content": 1},
        "coverage",
    ),
    "ragflow": (
        "weighted",
        {"token": 0.3, "model": 0.7, "pagerank": 1, "tags": 10},
        {"model": "ragflow", "pagerank": "raw", "tags": "raw"},
        {},
        "ragflow",
    ),
    "ragflow-live": (
        "weighted",
        {"token": 0.7, "model": 0.3, "pagerank": 1, "tags": 10},
        {"model": "ragflow", "pagerank": "raw", "tags": "raw"},
        {},
        "ragflow",
    ),
    "elasticsearch": ("weighted", ENGINE, {"keyword": "minmax"}, {}, "coverage"),
    "opensearch": ("weighted", ENGINE, {"keyword": "minmax"}, {}, "coverage"),
    "oceanbase": ("weighted", ENGINE, {"keyword": "minmax"}, {}, "coverage"),
    "infinity": (
        "weighted",
        {"keyword": 0.5 * 0.05, "vector": 0.5 * 0.95, "model": 0.5},
        {"keyword": "minmax"},
        {},
        "coverage",
    ),
    "rrf": ("rrf", dict.fromkeys(fusion.DEFAULT_RULES, 1), {}, {}, "coverage"),
}


def spec(name):
    return SimpleNamespace(**{key: value for key, value in PROFILES[name].items() if key != "description"})


def test_the_profiles_are_those_of_the_table():
    assert PROFILES.keys() == TABLE.keys()
    assert all(profile["description"].endswith(".") for profile in PROFILES.values())


@pytest.mark.parametrize("name", TABLE)
def test_a_profile_has_the_tables_numbers(name):
    method, weights, rules, boosts, token_rule = TABLE[name]
    profile = PROFILES[name]
    assert (profile["method"], profile["token_rule"], profile["rrf_k"]) == (method, token_rule, 60)
    assert profile["weights"] == pytest.approx(weights)
    assert profile["boosts"] == boosts
    assert rules.items() <= profile["normalise"].items()


def plain(text):
    return " ".join(text.replace("#", " ").split())


def test_contract_and_catalogue_name_the_default_rules_of_the_code():
    rules = ", ".join(f"{signal} {rule}" for signal, rule in fusion.DEFAULT_RULES.items())
    said = f"A signal that is not named follows, whatever the profile: {rules}"
    assert said in plain(Fusion.model_fields["normalise"].description)
    assert said in plain((ROOT / "conf" / "fusion.toml").read_text(encoding="utf-8"))


def test_the_page_on_fusion_names_the_default_rules_of_the_code():
    page = (ROOT / "docs" / "fusion.md").read_text(encoding="utf-8")
    table = page.partition("| rule | formula | default for |")[2].partition("\n\n")[0]
    said = {}
    for line in table.splitlines()[2:]:
        rules, *_, signals = (re.findall(r"`(\w+)`", cell) for cell in line.strip("|").split("|"))
        # One rule for all its signals, or a rule for each group of them.
        groups = (
            line.rstrip("|").rpartition("|")[2].split(";") if len(rules) > 1 else [" ".join(f"`{s}`" for s in signals)]
        )
        said |= {s: rule for rule, group in zip(rules, groups, strict=True) for s in re.findall(r"`(\w+)`", group)}
    assert said == dict(fusion.DEFAULT_RULES)
    assert "A signal that a fusion does not name in `normalise` follows the defaults of this table" in plain(page)


@pytest.mark.parametrize("name", TABLE)
def test_a_rule_that_no_profile_names_is_that_of_the_code(name):
    profile = spec(name)
    unnamed = SimpleNamespace(**{**vars(profile), "normalise": {}})
    profile.normalise = dict(fusion.DEFAULT_RULES)
    signals = {signal: [0.2, 0.9, 0.4] for signal in profile.weights}
    np.testing.assert_array_equal(fusion.fuse(signals, unnamed), fusion.fuse(signals, profile))


@pytest.mark.parametrize("name", TABLE)
def test_a_profile_fuses(name):
    signals = {
        "model": [2.0, -1.0, None],
        "token": [0.5, 0.1, 0.9],
        "vector": [0.7, 0.2, 0.6],
        "keyword": [12.0, 3.0, 8.0],
        "pagerank": [0.0, 5.0, 0.0],
        "tags": [0.0, 1.0, 0.2],
    }
    blend = fusion.blend(signals, spec(name))
    assert np.isfinite(blend.scores).all()
    assert set(blend.normalised) == set(PROFILES[name]["weights"])


@pytest.mark.parametrize(("name", "token", "model"), [("ragflow", 0.3, 0.7), ("ragflow-live", 0.7, 0.3)])
def test_the_ragflow_profiles_give_ragflows_scores(name, token, model):
    query = [("tide", 0.6), ("moon", 0.4)]
    words = [["tide", "moon"], ["moon"], ["bread"]]
    logits, pageranks = [3.0, -2.0, 0.5], [0, 2, 0]
    tags, query_tags = [{"sea": 1}, {"sky": 2, "sea": 1}, {}], {"sea": 2.0}
    chunks = [
        {"content_tokens": held, "pagerank_fea": rank, "tag_feas": tag}
        for held, rank, tag in zip(words, pageranks, tags, strict=True)
    ]
    expected, *_ = ragflow.rerank_by_model(query, chunks, logits, token, model, query_tags)
    signals = {
        "model": logits,
        "token": fusion.token_signal(
            "tide moon",
            query,
            [SimpleNamespace(text="", title="", keywords=[], questions=[], tokens=held) for held in words],
            spec(name),
            fusion.Analyser(),
        ),
        "pagerank": pageranks,
        "tags": fusion.rank_feature_scores(query_tags, tags),
    }
    np.testing.assert_allclose(fusion.fuse(signals, spec(name)), expected, rtol=1e-9)
