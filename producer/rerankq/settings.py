"""Settings, read once at the edge: environment variables with the prefix ``RERANKQ_``, or a ``.env`` file.

Inner code takes plain arguments and never looks at the environment.
"""

from __future__ import annotations

import difflib
import io
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from dotenv.parser import parse_stream
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from . import urls
from .errors import BrokerUnavailable, SettingsInvalid

logger = logging.getLogger("rerankq")

HOW_TO_SET_A_URL = (
    "RERANKQ_BROKER_URL is not set. Point it at a Redis, e.g. RERANKQ_BROKER_URL=redis://localhost:6379/0; "
    "`rerankq up` starts one for you and prints its URL."
)

PREFIX = "RERANKQ_"
ENV_FILE = ".env"
# Options of a URL that name a file or a folder.
FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")

HOUR_S, YEAR_S = 3_600, 31_536_000

Reader = Literal["worker", "producer", "both", "gateway"]


def _setting(default: Any, read_by: Reader, description: str, *, unit: str = "", **limits: Any) -> Any:
    """Declare a setting, its unit, and which program reads it: set for another one, it changes nothing.

    ``docs/settings.md`` is made from this.
    """
    return Field(default, description=description, json_schema_extra={"read_by": read_by, "unit": unit}, **limits)


def read_by(name: str) -> Reader:
    """Name the program that reads a setting."""
    extra: Any = Settings.model_fields[name].json_schema_extra
    reader: Reader = extra["read_by"]
    return reader


class Settings(BaseSettings):
    """Everything that a deployment can set; each field is the environment variable ``RERANKQ_<FIELD>``.

    Raises:
        SettingsInvalid: naming every variable that is wrong, and what was expected.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=ENV_FILE,
        # Notepad and other editors begin a file with a byte order mark.
        env_file_encoding="utf-8-sig",
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
    )

    # URLs hold passwords, so that a printed Settings does not show them.
    broker_url: str | None = _setting(
        None,
        "both",
        "Where doorbells (Celery messages that name a job) go: redis://, rediss://, unix://, sentinel:// or amqp://.",
        repr=False,
    )
    ledger_url: str | None = _setting(
        None,
        "both",
        "Where jobs and rankings are kept. Default: the database after the broker's.",
        repr=False,
        validate_default=True,
    )
    cache_url: str | None = _setting(
        None, "worker", "Where scores are kept. Default: the second database after the broker's.", repr=False
    )
    deployment: str = _setting(
        "",
        "both",
        "Name of the deployment in pub/sub channels. Default: the ledger's database number.",
        pattern=r"^[A-Za-z0-9._-]*$",
        max_length=100,
    )
    model: str = _setting(
        "BAAI/bge-reranker-base",
        "both",
        "The model: a name in `models.toml` (`remote:NAME` is on another server), a name on the Hugging Face hub, a "
        "folder, `bundled`, or `stub`.",
    )
    default_model: str = _setting(
        "",
        "both",
        "Model for jobs that name none; set it on workers that serve another model. Default: `RERANKQ_MODEL`.",
    )
    models: Annotated[list[str], NoDecode] = _setting(
        [],
        "both",
        "Models, separated by commas, whose jobs are accepted although no worker for them is running at the moment.",
    )
    device: str = _setting("auto", "worker", "What the model runs on: `auto`, `cpu`, `cuda` or `cuda:N`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = _setting(
        "auto", "worker", "Precision of the model. `auto` = bfloat16 if it is faster on this device, else float32."
    )
    runtime: Literal["auto", "torch", "openvino"] = _setting(
        "auto", "worker", "Library that runs the model. `auto` = OpenVINO on a CPU if it is installed, else torch."
    )
    max_batch_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | Literal["auto"] = _setting(
        "auto",
        "worker",
        "Limit of a batch, padding included. `auto` = measured when the worker starts.",
        unit="tokens",
    )
    concurrency: int = _setting(
        32, "worker", "How many jobs a worker processes at the same time.", unit="jobs", ge=1, le=1024
    )
    lease_s: float = _setting(
        8,
        "both",
        "If a worker is silent this long, its jobs go to another.",
        unit="seconds",
        ge=0.05,
        le=HOUR_S,
        allow_inf_nan=False,
    )
    drain_s: float = _setting(
        8,
        "worker",
        "How long a worker that is told to stop may take to finish its jobs; it hands back the rest.",
        unit="seconds",
        ge=0,
        le=HOUR_S,
        allow_inf_nan=False,
    )
    max_attempts: int = _setting(
        3,
        "both",
        "How often a job may crash its worker while running alone before it is marked dead.",
        unit="deaths",
        ge=1,
        le=1_000,
    )
    doorbell_window: int = _setting(
        256,
        "both",
        "How many doorbells may be out at a time, per queue and tenant; the rest of a backlog waits in the ledger.",
        unit="doorbells",
        ge=1,
        le=1_000_000,
    )
    cache_ttl_s: int = _setting(
        604_800,
        "worker",
        "How long the scores of a query are kept after the last of them was computed.",
        unit="seconds",
        ge=1,
        le=10 * YEAR_S,
    )
    result_ttl_s: int = _setting(
        3_600, "both", "How long a ranking is kept after its job ended.", unit="seconds", ge=1, le=10 * YEAR_S
    )
    max_chunks: int = _setting(
        10_000, "producer", "Largest number of chunks in a job.", unit="chunks", ge=1, le=1_000_000
    )
    # A string in Redis has at most 512 MiB.
    max_job_bytes: int = _setting(
        16_777_216, "both", "Largest size of a job as JSON.", unit="bytes", ge=1, le=512 << 20
    )
    max_queued_pairs: int = _setting(
        10_000_000,
        "both",
        "How many pairs may wait, over all queues; a submission beyond that is refused with QueueFull.",
        unit="pairs",
        ge=1,
        le=10**12,
    )
    host: str = _setting("127.0.0.1", "gateway", "Address that the gateway listens on.", min_length=1)
    port: int = _setting(8080, "gateway", "Port that the gateway listens on.", ge=1, le=65_535)
    request_timeout_s: float = _setting(
        300,
        "gateway",
        "How long the gateway waits for a ranking if the caller names no time limit.",
        unit="seconds",
        gt=0,
        le=HOUR_S,
        allow_inf_nan=False,
    )
    webhook_secret: str = _setting(
        "",
        "gateway",
        "Signs webhooks whose caller gives no secret. Without it, each caller must give one.",
        repr=False,
        pattern=r"^$|^[\x21-\x7e]{8,}$",
        max_length=256,
    )
    webhook_networks: Annotated[list[IPv4Network | IPv6Network], NoDecode] = _setting(
        [],
        "gateway",
        "Networks that webhooks may lead to although they are not public, separated by commas, e.g. `10.1.0.0/16`.",
    )
    webhook_give_up_s: float = _setting(
        86_400,
        "gateway",
        "How long after a job's end its webhook is tried again if the receiver fails.",
        unit="seconds",
        ge=0,
        le=YEAR_S,
        allow_inf_nan=False,
    )
    api_keys: str = _setting(
        "",
        "gateway",
        "Who may call the gateway: a TOML file of keys, or `NAME:HASH` separated by commas (`rerankq key NAME` makes "
        "one). Without any, it listens on the loopback only, and whoever reaches it may call.",
        repr=False,
    )
    open_access: bool = _setting(
        False, "gateway", "Whether the gateway may listen on another address than the loopback without API keys."
    )
    allowed_hosts: Annotated[list[str], NoDecode] = _setting(
        [],
        "gateway",
        "Host names, separated by commas, under which the gateway is reached, beside addresses, names without a dot "
        "and names that end in `.internal`; `*.` before a name allows its subdomains. Default: all with API keys, else "
        "`localhost`.",
    )
    cors_origins: Annotated[list[str], NoDecode] = _setting(
        [],
        "gateway",
        "Origins, separated by commas, whose pages may call the gateway from a browser (`https://app.example.com`).",
    )
    open_metrics: bool = _setting(
        False, "gateway", "Whether `/metrics` can be read without a key where there are API keys."
    )
    files_dir: Path | None = _setting(
        None,
        "gateway",
        "Folder of uploaded files and batches, shared by all gateways of a deployment. Default: `rerankq/files` in the "
        "user's folder of data (`~/.local/share`).",
    )
    file_ttl_s: int = _setting(
        30 * 86_400,
        "gateway",
        "How long files are kept that name no time of their own, and batches after their end.",
        unit="seconds",
        ge=HOUR_S,
        le=10 * YEAR_S,
    )
    max_file_bytes: int = _setting(
        536_870_912, "gateway", "Largest size of an uploaded file.", unit="bytes", ge=1, le=1 << 40
    )
    max_batch_lines: int = _setting(
        1_000_000, "gateway", "Largest number of lines of a batch.", unit="lines", ge=1, le=100_000_000
    )
    conf_dir: Path | None = _setting(
        None, "both", "Folder whose models.toml and fusion.toml are read instead of the ones in the package."
    )

    def __init__(self, **given: Any) -> None:
        path = given.get("_env_file", ENV_FILE)
        faults, named = _read_ahead(path if isinstance(path, str | os.PathLike) else None)
        _warn_of(_unknown([*os.environ, *named]))
        if not faults:
            super().__init__(**given)
            return
        try:
            super().__init__(**{**given, "_env_file": None})
        except SettingsInvalid as error:
            faults += str(error).splitlines()
        raise SettingsInvalid("\n".join(faults))

    @field_validator("*", mode="before")
    @classmethod
    def _stripped(cls, value: object) -> object:
        # A secret read from a file ends with a line break; only the reader of ``.env`` removes quotation marks.
        if not isinstance(value, str):
            return value
        bare = value.strip()
        if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'":
            msg = "is in quotation marks, which would be part of the value: write it without them"
            raise ValueError(msg)
        return bare

    @field_validator("models", "webhook_networks", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("["):
            msg = "expected names separated by commas, without brackets"
            raise ValueError(msg)
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("broker_url", "ledger_url", "cache_url")
    @classmethod
    def _known_scheme(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        address = urls.read(value, urls.REDIS | urls.AMQP if info.field_name == "broker_url" else urls.REDIS)
        for option in FILES:
            if not Path(address.options.get(option, ".")).exists():
                msg = f"option {option} names a file that does not exist here"
                raise ValueError(msg)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if not re.fullmatch(r"https?://[^/\s*?#@]+", origin):
                msg = "expected origins like https://app.example.com, without a path and without *"
                raise ValueError(msg)
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, value: list[str]) -> list[str]:
        for name in value:
            if not re.fullmatch(r"(\*\.)?[A-Za-z0-9._-]+", name):
                msg = "expected host names like rerank.example.com or *.example.com, without a port"
                raise ValueError(msg)
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
            msg = "expected auto, cpu, cuda or cuda:N (N = 0, 1, …)"
            raise ValueError(msg)
        return value

    @field_validator("conf_dir")
    @classmethod
    def _a_folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            msg = "is not a folder"
            raise ValueError(msg)
        return value

    @field_validator("ledger_url")
    @classmethod
    def _a_ledger_somewhere(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and _cannot_keep_jobs(info.data.get("broker_url")):
            msg = "is not set, and jobs cannot be kept in a broker that is not a Redis"
            raise ValueError(msg)
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _report_all_mistakes(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise SettingsInvalid("\n".join(_mistakes(error))) from None

    @property
    def broker(self) -> str:
        """The broker's URL, or a BrokerUnavailable that says how to set one."""
        if not self.broker_url:
            raise BrokerUnavailable(HOW_TO_SET_A_URL)
        return self.broker_url

    @property
    def ledger(self) -> str:
        """The ledger's URL."""
        return self.ledger_url or _beside(self.broker, 1)

    @property
    def cache(self) -> str:
        """The score cache's URL; beside the ledger where the broker is not a Redis."""
        if self.cache_url:
            return self.cache_url
        return _beside(self.ledger, 1) if _cannot_keep_jobs(self.broker) else _beside(self.broker, 2)

    @property
    def files(self) -> Path:
        """The folder of files and batches."""
        if self.files_dir is not None:
            return self.files_dir
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "rerankq" / "files"

    @property
    def channel(self) -> str:
        """The prefix of pub/sub channels: pub/sub ignores database numbers, so it carries the deployment's name."""
        return f"rerankq:{self.deployment or urls.database_of(self.ledger)}"


def secret(name: str, path: str | os.PathLike[str] = ENV_FILE) -> str:
    """Read the variable that a catalogue entry names for a key: from the environment, else from the file of settings.

    Empty if it is in neither.
    """
    if given := os.environ.get(name):
        return given
    bindings = parse_stream(io.StringIO(_bytes_of(Path(path).expanduser()).decode("utf-8-sig")))
    return next((one.value or "" for one in bindings if one.key == name), "")


def _cannot_keep_jobs(url: str | None) -> bool:
    """Whether a broker cannot be the ledger too."""
    return url is not None and urls.parts_of(url).scheme in urls.AMQP


def _beside(url: str, further: int) -> str:
    """Point a URL at a database some numbers further on, so that deployments with brokers of their own share none.

    >>> _beside("redis://host/0", 1), _beside("redis://host/5", 2)
    ('redis://host/1', 'redis://host/7')
    """
    return urls.with_database(url, urls.database_of(url) + further)


def _mistakes(error: ValidationError) -> Iterator[str]:
    # Without what was given: URLs hold passwords.
    found: dict[str, list[str]] = {}
    for mistake in error.errors(include_url=False, include_input=False, include_context=False):
        field = ".".join(str(part) for part in mistake["loc"][:1]).upper()
        said = mistake["msg"].removeprefix("Value error, ")
        found.setdefault(f"{PREFIX}{field}: " if field else "", []).append(said)
    # A field of several types has a mistake for each.
    for name, said_of_it in found.items():
        yield name + ", or ".join(said_of_it)


def _read_ahead(path: str | os.PathLike[str] | None) -> tuple[list[str], list[str]]:
    """Read a file of settings before the library does; answer its mistakes, and the names that it sets."""
    if path is None:
        return [], []
    file = Path(path).expanduser()
    try:
        raw = _bytes_of(file)
    except IsADirectoryError:
        return [f"{file}: is a folder; expected a file of NAME=value lines"], []
    except OSError as error:
        return [f"{file}: cannot be read: {error.strerror}"], []
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        fault = "holds a NUL byte" if b"\0" in line else "" if _is_utf8(line) else "is not UTF-8"
        if fault:
            return [f"{file}, line {number}: {fault}; expected NAME=value lines in UTF-8"], []
    bindings = list(parse_stream(io.StringIO(raw.decode("utf-8-sig"))))
    torn = [
        one.original.line
        for one in bindings
        if (one.error or one.value is None) and PREFIX in one.original.string.upper()
    ]
    return [f"{file}, line {line}: expected NAME=value" for line in torn], [one.key for one in bindings if one.key]


def _bytes_of(file: Path) -> bytes:
    """Read a file whole; empty if there is none, or if it can be read only once (a pipe)."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return b""
    # A folder of this name may be a virtual environment.
    if stat.S_ISDIR(mode) and (file / "pyvenv.cfg").exists():
        return b""
    return file.read_bytes() if stat.S_ISDIR(mode) or stat.S_ISREG(mode) else b""


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unknown(names: Iterable[str]) -> Iterator[str]:
    """Warn of each variable with our prefix that is no setting, with the one that may be meant.

    >>> list(_unknown(["RERANKQ_LEASE", "RERANKQ_LEASE_S", "RERANKQ_PORT", "HOME"]))
    ['RERANKQ_LEASE is not a setting and has no effect; did you mean RERANKQ_LEASE_S?']
    """
    known = [name.upper() for name in Settings.model_fields]
    for name in dict.fromkeys(name.upper() for name in names):
        ours = name.removeprefix(PREFIX)
        if ours != name and ours not in known:
            near = difflib.get_close_matches(ours, known, 1)
            yield f"{name} is not a setting and has no effect" + (f"; did you mean {PREFIX}{near[0]}?" if near else "")


_warned: set[str] = set()


def _warn_of(mistakes: Iterable[str]) -> None:
    """Log each once in a process, however often settings are read."""
    for said in mistakes:
        if said not in _warned:
            _warned.add(said)
            logger.warning("%s", said)
