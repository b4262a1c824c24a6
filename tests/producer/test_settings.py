"""Settings: read once, from the environment or a file, with every mistake told at once."""

from pathlib import Path

import pytest

from rerankq import AsyncClient, Client
from rerankq.errors import BrokerUnavailable, SettingsInvalid
from rerankq.settings import Settings, read_by


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
        "RERANKQ_CONF_DIR": "conf",
    }
    Path("conf").mkdir()
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.broker_url, settings.lease_s, settings.models) == ("redis://broker:6379/0", 2.5, ["a/b", "c", "d"])
    assert (settings.max_batch_tokens, settings.dtype, settings.conf_dir) == (4096, "bfloat16", Path("conf"))


def test_a_file_of_settings_is_read_and_the_environment_overrides_it(monkeypatch: pytest.MonkeyPatch):
    Path(".env").write_text("RERANKQ_LEASE_S=3\nRERANKQ_MODEL=stub\nUNRELATED=1\nRERANKQ_UNKNOWN=1\n")
    monkeypatch.setenv("RERANKQ_LEASE_S", "4")
    assert (Settings().lease_s, Settings().model) == (4, "stub")


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RERANKQ_BROKER_URL", "")
    monkeypatch.setenv("RERANKQ_LEASE_S", "")
    assert (Settings().broker_url, Settings().lease_s) == (None, 8)


def test_all_mistakes_are_reported_together(monkeypatch: pytest.MonkeyPatch):
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


def test_a_database_that_is_not_a_number_is_refused():
    with pytest.raises(SettingsInvalid, match="RERANKQ_LEDGER_URL: expected the number of a database"):
        Settings(broker_url="redis://host/0", ledger_url="redis://host/jobs")


def test_every_setting_has_a_description():
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_one_redis_serves_three_roles_in_databases_of_its_own():
    settings = Settings(broker_url="redis://:pw@host:6379/0")
    assert settings.broker == "redis://:pw@host:6379/0"
    assert settings.ledger == "redis://:pw@host:6379/1"
    assert settings.cache == "redis://:pw@host:6379/2"
    apart = Settings(broker_url="redis://a", ledger_url="redis://b:1/7", cache_url="redis://c")
    assert (apart.ledger, apart.cache) == ("redis://b:1/7", "redis://c")


def test_a_broker_other_than_redis_requires_a_ledger_url():
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


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("max_batch_tokens", "-1"),
        ("max_batch_tokens", "0"),
        ("max_batch_tokens", "1e9"),
        ("max_batch_tokens", "99999999999"),
        ("device", "gpu"),
        ("device", "cuda:"),
        ("device", "cuda:x"),
        ("device", "cpu:0"),
        ("device", "cuda:\u0663"),
        ("device", f"cuda:{10**20}"),
        ("conf_dir", "/nowhere"),
        ("models", '["a", "b"]'),
        *((name, value) for name in ("lease_s", "drain_s") for value in ("nan", "inf", "-inf", "-1", "1e9")),
        ("lease_s", "0"),
        *((name, "0") for name in ("concurrency", "max_attempts", "doorbell_window", "max_chunks", "max_job_bytes")),
        *(
            (name, "9" * 30)
            for name in (
                "cache_ttl_s",
                "result_ttl_s",
                "max_chunks",
                "max_job_bytes",
                "max_queued_pairs",
                "doorbell_window",
            )
        ),
        ("max_attempts", "9" * 5_000),
        ("deployment", "x" * 101),
        ("deployment", "two words"),
        ("dtype", "int4"),
        ("runtime", "onnx"),
    ],
)
def test_every_setting_has_limits_that_its_error_names(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(f"RERANKQ_{name.upper()}", wrong)
    with pytest.raises(SettingsInvalid) as caught:
        Settings()
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"RERANKQ_{name.upper()}: ")
    assert len(line) < 300


def test_the_error_for_a_wrong_device_or_budget_names_valid_values(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RERANKQ_DEVICE", "gpu")
    monkeypatch.setenv("RERANKQ_MAX_BATCH_TOKENS", "-1")
    with pytest.raises(SettingsInvalid) as caught:
        Settings()
    device, budget = sorted(str(caught.value).splitlines())
    assert device == "RERANKQ_DEVICE: expected auto, cpu, cuda or cuda:N (N = 0, 1, …)"
    assert budget.startswith("RERANKQ_MAX_BATCH_TOKENS: Input should be greater than or equal to 1, or Input should be")
    for right in ("auto", "cpu", "cuda", "cuda:0", "cuda:12"):
        assert Settings(device=right, max_batch_tokens=1).device == right


@pytest.mark.parametrize("written", ["{}\n", "{}\r\n", " {} ", "\t{}"])
def test_whitespace_around_a_variable_is_removed(written: str, monkeypatch: pytest.MonkeyPatch):
    said = {"BROKER_URL": "redis://host/0", "MODEL": "stub", "DEVICE": "cpu", "LEASE_S": "3", "DEPLOYMENT": "blue"}
    for name, value in said.items():
        monkeypatch.setenv(f"RERANKQ_{name}", written.format(value))
    settings = Settings()
    assert (settings.broker_url, settings.model, settings.device) == ("redis://host/0", "stub", "cpu")
    assert (settings.lease_s, settings.deployment) == (3, "blue")


@pytest.mark.parametrize("mark", ["'", '"'])
def test_quotation_marks_around_a_value_are_refused(mark: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RERANKQ_MODEL", f"{mark}stub{mark}")
    monkeypatch.setenv("RERANKQ_BROKER_URL", f"{mark}redis://:secret@host/0{mark}")
    with pytest.raises(SettingsInvalid) as caught:
        Settings()
    said = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in said] == ["RERANKQ_BROKER_URL", "RERANKQ_MODEL"]
    assert all("is in quotation marks" in line for line in said)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"])
def test_a_missing_file_in_a_url_is_refused_naming_its_option(option: str):
    url = f"rediss://:secret@host/0?{option}=here.pem"
    with pytest.raises(
        SettingsInvalid, match=f"^RERANKQ_BROKER_URL: option {option} names a file that does not exist here$"
    ):
        Settings(broker_url=url)
    Path("here.pem").touch()
    assert Settings(broker_url=url).broker_url == url


LATIN_1 = "# Schlüssel\nRERANKQ_LEASE_S=3\n".encode("latin-1")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (LATIN_1, ".env, line 1: is not UTF-8; expected NAME=value lines in UTF-8"),
        (b"RERANKQ_LEASE_S=3\nRERANKQ_MODEL=a\0b\n", ".env, line 2: holds a NUL byte"),
        ("RERANKQ_LEASE_S=3".encode("utf-16"), ".env, line 1: "),
        (b"A=1\nRERANKQ_MODEL\n", ".env, line 2: expected NAME=value"),
        (b"A=1\nRERANKQ_BROKER_URL='redis://:secret@host\n", ".env, line 2: expected NAME=value"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line_and_the_reason(
    raw: bytes, said: str, monkeypatch: pytest.MonkeyPatch
):
    Path(".env").write_bytes(raw)
    monkeypatch.setenv("RERANKQ_CONCURRENCY", "0")
    with pytest.raises(SettingsInvalid) as caught:
        Settings()
    first, *others = str(caught.value).splitlines()
    assert first.startswith(said)
    assert [line.partition(":")[0] for line in others] == ["RERANKQ_CONCURRENCY"], "with the other mistakes"
    assert "secret" not in str(caught.value)


def test_a_folder_instead_of_a_file_is_refused_unless_it_is_a_virtual_environment():
    Path(".env").mkdir()
    with pytest.raises(SettingsInvalid, match=r"\.env: is a folder; expected a file"):
        Settings()
    Path(".env/pyvenv.cfg").touch()
    assert Settings().lease_s == 8
    Path("loop").symlink_to("loop")
    with pytest.raises(SettingsInvalid, match=r"loop: cannot be read: "):
        Settings(_env_file="loop")


def test_a_file_may_have_a_byte_order_mark_and_windows_line_ends():
    Path(".env").write_bytes(b"\xef\xbb\xbfRERANKQ_LEASE_S=3\r\nRERANKQ_MODEL=stub\r\n")
    assert (Settings().lease_s, Settings().model) == (3, "stub")


def test_a_variable_that_is_almost_a_setting_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("rerankq.settings._warned", set())
    monkeypatch.setenv("RERANKQ_LEASE", "3")
    monkeypatch.setenv("RERANKQ_PORT", "8080")
    Path(".env").write_text("rerankq_brocker_url=redis://:secret@host\nRERANKQ_QWXZ=1\nOTHER=1\n")
    for _ in range(3):
        Settings()
    assert [record.getMessage() for record in caplog.records] == [
        "RERANKQ_LEASE is not a setting and has no effect; did you mean RERANKQ_LEASE_S?",
        "RERANKQ_BROCKER_URL is not a setting and has no effect; did you mean RERANKQ_BROKER_URL?",
        "RERANKQ_QWXZ is not a setting and has no effect",
    ]


def test_every_setting_says_who_reads_it():
    assert {read_by(name) for name in Settings.model_fields} == {"both", "producer", "worker", "gateway"}
    assert (read_by("device"), read_by("max_chunks"), read_by("broker_url")) == ("worker", "producer", "both")


LIMITS = {
    "concurrency": (1, 1024),
    "lease_s": (0.05, 3600),
    "drain_s": (0, 3600),
    "max_attempts": (1, 1000),
    "doorbell_window": (1, 1_000_000),
    "cache_ttl_s": (1, 315_360_000),
    "result_ttl_s": (1, 315_360_000),
    "max_chunks": (1, 1_000_000),
    "max_job_bytes": (1, 536_870_912),
    "max_queued_pairs": (1, 10**12),
    "max_batch_tokens": (1, 10_000_000),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_of_a_number_are_inclusive(name: str):
    least, most = LIMITS[name]
    for right in (least, most):
        assert getattr(Settings(**{name: right}), name) == right
    for wrong in (least - (1 if isinstance(least, int) else 0.01), most + 1):
        with pytest.raises(SettingsInvalid, match=f"^RERANKQ_{name.upper()}: "):
            Settings(**{name: wrong})


def test_printed_settings_show_no_password():
    urls = {f"{role}_url": f"redis://:secret@{role}/0" for role in ("broker", "ledger", "cache")}
    assert "secret" not in f"{Settings(**urls)} {Settings(**urls)!r}"


def test_quotation_marks_around_an_empty_value_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RERANKQ_DEFAULT_MODEL", '""')
    with pytest.raises(SettingsInvalid, match="RERANKQ_DEFAULT_MODEL: is in quotation marks"):
        Settings()
