"""Settings: read once, from the environment or a file, with every mistake told at once."""

from pathlib import Path

import pytest

from rerankq import AsyncClient, Client
from rerankq.errors import BrokerUnavailable, SettingsInvalid
from rerankq.settings import Settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"RERANKQ_{name.upper()}", raising=False)


def test_each_field_is_an_environment_variable(monkeypatch: pytest.MonkeyPatch):
    said = {
        "RERANKQ_BROKER_URL": "redis://broker:6379/0",
        "RERANKQ_LEASE_S": "2.5",
        "RERANKQ_MODELS": "a/b, c ,,d",
        "RERANKQ_MAX_BATCH_TOKENS": "4096",
        "RERANKQ_DTYPE": "bfloat16",
        "RERANKQ_CONF_DIR": "/srv/conf",
    }
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.broker_url, settings.lease_s, settings.models) == ("redis://broker:6379/0", 2.5, ["a/b", "c", "d"])
    assert (settings.max_batch_tokens, settings.dtype, settings.conf_dir) == (4096, "bfloat16", Path("/srv/conf"))


def test_a_file_works_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch):
    Path(".env").write_text("RERANKQ_LEASE_S=3\nRERANKQ_MODEL=stub\nUNRELATED=1\nRERANKQ_UNKNOWN=1\n")
    monkeypatch.setenv("RERANKQ_LEASE_S", "4")
    assert (Settings().lease_s, Settings().model) == (4, "stub")


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RERANKQ_BROKER_URL", "")
    monkeypatch.setenv("RERANKQ_LEASE_S", "")
    assert (Settings().broker_url, Settings().lease_s) == (None, 8)


def test_all_mistakes_are_told_together(monkeypatch: pytest.MonkeyPatch):
    wrong = {
        "LEASE_S": "soon",
        "CONCURRENCY": "0",
        "BROKER_URL": "http://:secret@x",
        "DTYPE": "int4",
        "MAX_BATCH_TOKENS": "some",
        "LEDGER_URL": "amqp://x",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(f"RERANKQ_{name}", value)
    for read in (Settings, Client, AsyncClient):
        with pytest.raises(SettingsInvalid) as caught:
            read()
        lines = str(caught.value).splitlines()
        assert {line.partition(":")[0] for line in lines} == {f"RERANKQ_{name}" for name in wrong}
        assert "secret" not in str(caught.value), "URLs hold passwords"


def test_a_database_that_is_no_number_is_not_taken_for_the_first():
    with pytest.raises(SettingsInvalid, match="RERANKQ_LEDGER_URL: expected the number of a database"):
        Settings(broker_url="redis://host/0", ledger_url="redis://host/jobs")


def test_every_setting_says_what_it_is():
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_one_redis_serves_three_roles_in_databases_of_its_own():
    settings = Settings(broker_url="redis://:pw@host:6379/0")
    assert settings.broker == "redis://:pw@host:6379/0"
    assert settings.ledger == "redis://:pw@host:6379/1"
    assert settings.cache == "redis://:pw@host:6379/2"
    apart = Settings(broker_url="redis://a", ledger_url="redis://b:1/7", cache_url="redis://c")
    assert (apart.ledger, apart.cache) == ("redis://b:1/7", "redis://c")


def test_a_broker_that_is_no_redis_wants_a_ledger_of_its_own():
    with pytest.raises(SettingsInvalid, match="RERANKQ_LEDGER_URL: is not set") as caught:
        Settings(broker_url="amqp://guest@host//", concurrency=0)
    assert "RERANKQ_CONCURRENCY" in str(caught.value), "with the others"
    settings = Settings(broker_url="amqp://guest@host//", ledger_url="redis://other:6379/5")
    assert (settings.ledger, settings.cache) == ("redis://other:6379/5", "redis://other:6379/6")
    settings = Settings(broker_url="amqp://guest@host//", ledger_url="redis://other", cache_url="redis://scores")
    assert settings.cache == "redis://scores"


def test_deployments_on_one_server_with_brokers_of_their_own_share_no_ledger_and_no_channel():
    deployments = [Settings(broker_url=f"redis://host/{number}") for number in range(14)]
    for role in ("broker", "ledger", "channel"):
        assert len({getattr(settings, role) for settings in deployments}) == 14
    assert (deployments[5].ledger, deployments[5].cache) == ("redis://host/6", "redis://host/7")


def test_without_a_url_every_role_says_how_to_set_one():
    for role in ("broker", "ledger", "cache", "channel"):
        with pytest.raises(BrokerUnavailable, match=r"RERANKQ_BROKER_URL=redis://.*rerankq up"):
            getattr(Settings(), role)


def test_channels_carry_the_deployments_name_because_they_ignore_databases():
    one = Settings(broker_url="redis://host/0")
    other = Settings(broker_url="redis://host/0", ledger_url="redis://host/9")
    assert one.channel == "rerankq:1"
    assert other.channel == "rerankq:9"
    assert Settings(broker_url="redis://host", deployment="blue").channel == "rerankq:blue"
