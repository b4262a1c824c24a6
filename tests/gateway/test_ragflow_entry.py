"""The entry that RAGFlow's users paste: in the form that it reads, with the names and lengths of the catalogue."""

import json
from pathlib import Path

import pytest

from rerankq import catalogue
from rerankq.gateway.hosted_models import model_for
from rerankq.ledger.registry import WorkerInfo

ENTRY = json.loads((Path(__file__).resolve().parents[2] / "conf/ragflow/llm_factories.json").read_text())
FACTORY = ENTRY["factory_llm_infos"][0]


def test_the_entry_has_the_keys_that_ragflow_reads():
    assert set(FACTORY) == {"name", "logo", "tags", "status", "llm"}
    # RAGFlow has a class for it, and for no name of ours.
    assert FACTORY["name"] == "Xinference"
    assert "TEXT RE-RANK" in FACTORY["tags"]
    for model in FACTORY["llm"]:
        assert set(model) == {"llm_name", "tags", "max_tokens", "model_type"}
        assert model["model_type"] == "rerank"
        # Both separate a model from its provider there.
        assert "@" not in model["llm_name"]
        assert "___" not in model["llm_name"]


@pytest.mark.parametrize("full", catalogue.models())
def test_every_model_of_the_catalogue_is_in_the_entry_and_its_name_means_it(full):
    card = catalogue.models()[full]
    worker = WorkerInfo("w", full, tuple(card.aliases), "", ("rerankq.interactive",), 0.0, 0.0)
    meant = [model for model in FACTORY["llm"] if catalogue.canonical(model_for(model["llm_name"], [worker])) == full]
    assert [model["max_tokens"] for model in meant] == [card.max_length]
