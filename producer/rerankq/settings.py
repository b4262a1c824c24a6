"""Settings, read once at the edge: environment variables with the prefix ``RERANKQ_``, or a ``.env`` file.

Inner code takes plain arguments and never looks at the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .errors import BrokerUnavailable, SettingsInvalid

HOW_TO_SET_A_URL = (
    "RERANKQ_BROKER_URL is not set. Point it at a Redis, e.g. RERANKQ_BROKER_URL=redis://localhost:6379/0; "
    "`rerankq up` starts one for you and prints its URL."
)


UNREADABLE = "cannot be read; in a password write / as %2F, ? as %3F, # as %23, @ as %40, [ as %5B"

REDIS = frozenset({"redis", "rediss", "unix", "sentinel"})
AMQP = frozenset({"amqp", "amqps"})


class Settings(BaseSettings):
    """Everything that a deployment can set; each field is the environment variable ``RERANKQ_<FIELD>``.

    Raises:
        SettingsInvalid: naming every variable that is wrong, and what was expected.
    """

    model_config = SettingsConfigDict(
        env_prefix="RERANKQ_", env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True
    )

    # URLs hold passwords, so that a printed Settings does not show them.
    broker_url: str | None = Field(
        None, repr=False, description="Doorbells: redis://, rediss://, unix://, sentinel:// or amqp://."
    )
    ledger_url: str | None = Field(
        None, repr=False, validate_default=True, description="Jobs and rankings; default: database 1 of a Redis broker."
    )
    cache_url: str | None = Field(None, repr=False, description="Scores; default: database 2 of a Redis broker.")
    deployment: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]*$", description="Name in pub/sub channels; default: the ledger's database number."
    )
    model: str = Field(
        "BAAI/bge-reranker-base", description="A catalogue name, a hub name, a folder, `bundled`, or `stub`."
    )
    default_model: str = Field(
        "", description="The deployment's default model, on a worker that serves another one; empty = MODEL."
    )
    models: Annotated[list[str], NoDecode] = Field(
        default=[], description="Models that the deployment lists (commas): accepted while no worker for them is alive."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="auto = bfloat16 where the device multiplies it faster, else float32."
    )
    runtime: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="What computes the model; auto = OpenVINO on a CPU where it is installed, else torch."
    )
    max_batch_tokens: int | Literal["auto"] = Field(
        "auto", description="Tokens per forward pass, padding included; auto = found by measuring at start."
    )
    concurrency: int = Field(32, ge=1, le=1024, description="Jobs in flight per worker.")
    lease_s: float = Field(8, gt=0, description="Seconds without a sign of life after which a job is handed on.")
    drain_s: float = Field(8, ge=0, description="Seconds to finish jobs in when told to stop; the rest is handed back.")
    max_attempts: int = Field(3, ge=1, description="Deaths of a worker, alone with a job, that set the job aside.")
    ring_window: int = Field(256, ge=1, description="Doorbells out at a time, per queue and tenant.")
    cache_ttl_s: int = Field(604_800, ge=1, description="Seconds that a score is remembered.")
    result_ttl_s: int = Field(3_600, ge=1, description="Seconds that a ranking is kept.")
    max_chunks: int = Field(10_000, ge=1, description="Chunks in a job.")
    max_job_bytes: int = Field(16_777_216, ge=1, description="Bytes of a job as JSON.")
    max_queued_pairs: int = Field(10_000_000, ge=1, description="Pairs waiting, over all queues; more is QueueFull.")
    conf_dir: Path | None = Field(
        None, description="Folder whose models.toml and fusion.toml replace the shipped ones."
    )

    @field_validator("models", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("broker_url", "ledger_url", "cache_url")
    @classmethod
    def _known_scheme(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        fault = _fault(value, REDIS | AMQP if info.field_name == "broker_url" else REDIS)
        if fault:
            raise ValueError(fault)
        return value

    @field_validator("ledger_url")
    @classmethod
    def _a_ledger_somewhere(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and urlsplit(info.data.get("broker_url") or "").scheme in AMQP:
            msg = "is not set, and the broker is not a Redis that could serve this role too"
            raise ValueError(msg)
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _say_all_mistakes(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
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
        return self.ledger_url or with_database(self.broker, 1)

    @property
    def cache(self) -> str:
        """The score cache's URL; beside the ledger where the broker is not a Redis."""
        beside = self.ledger if urlsplit(self.broker).scheme in AMQP else self.broker
        return self.cache_url or with_database(beside, 2)

    @property
    def channel(self) -> str:
        """The prefix of pub/sub channels: pub/sub ignores database numbers, so it carries the deployment's name."""
        return f"rerankq:{self.deployment or database_of(self.ledger)}"


def _fault(url: str, schemes: frozenset[str]) -> str:
    """Say what is wrong with a URL, in none of its own words: they may be a password's. Empty where nothing is.

    >>> _fault("redis://:se/cret@host:6379/0", REDIS)
    'cannot be read; in a password write / as %2F, ? as %3F, # as %23, @ as %40, [ as %5B'
    >>> _fault("redis://host:6379/first", REDIS), _fault("redis://:secret@host:6379/0", REDIS)
    ('expected the number of a database after the host, as in redis://localhost:6379/0', '')
    """
    try:
        parts = urlsplit(url)
        hosts = sentinels_of(url) if parts.scheme == "sentinel" else [(parts.hostname or "", parts.port)]
    except ValueError:
        return UNREADABLE
    if parts.scheme not in schemes:
        others = " or amqp://" if schemes >= AMQP else ""
        return f"expected a URL that begins with redis://, rediss://, unix://, sentinel://{others}"
    if parts.scheme != "unix" and "@" in parts.path + parts.query + parts.fragment and "@" not in parts.netloc:
        return UNREADABLE
    if parts.scheme != "unix" and parts.scheme in REDIS and not re.fullmatch(r"/?\d*", parts.path):
        return "expected the number of a database after the host, as in redis://localhost:6379/0"
    if parts.scheme == "sentinel" and not (all(host for host, _ in hosts) and [*parse_qs(parts.query)] == ["master"]):
        return "expected the sentinels and the master's name, as in sentinel://one:26379,two:26379/0?master=NAME"
    return "port 0 is nobody's" if 0 in [port for _, port in hosts] else ""


def sentinels_of(url: str) -> list[tuple[str, int]]:
    """Read the hosts and ports in a URL of Sentinel's; 26379 is the usual port.

    >>> sentinels_of("sentinel://:secret@one:26380,two/0?master=jobs")
    [('one', 26380), ('two', 26379)]
    """
    hosts = urlsplit(url).netloc.rpartition("@")[2].split(",")
    parts = [urlsplit(f"//{host}") for host in hosts]
    return [(part.hostname or "", 26_379 if part.port is None else part.port) for part in parts]


def master_of(url: str) -> str:
    """Read the name by which the sentinels of a URL know its master."""
    return dict(parse_qsl(urlsplit(url).query))["master"]


def _mistakes(error: ValidationError) -> Iterator[str]:
    # Without what was given: URLs hold passwords.
    for mistake in error.errors(include_url=False, include_input=False, include_context=False):
        field = ".".join(str(part) for part in mistake["loc"][:1]).upper()
        said = mistake["msg"].removeprefix("Value error, ")
        yield f"RERANKQ_{field}: {said}" if field else said


def with_database(url: str, database: int) -> str:
    """Point a Redis URL at another database of the same server.

    >>> with_database("redis://:secret@host:6379/0?health_check_interval=5", 2)
    'redis://:secret@host:6379/2?health_check_interval=5'
    >>> with_database("unix:///run/redis.sock?db=0", 1)
    'unix:///run/redis.sock?db=1'
    """
    parts = urlsplit(url)
    query = [(key, value) for key, value in parse_qsl(parts.query) if key != "db"]
    if parts.scheme == "unix":
        # urlunsplit drops the empty host of a socket's URL.
        return f"unix://{parts.netloc}{parts.path}?{urlencode([*query, ('db', str(database))])}"
    return urlunsplit(parts._replace(path=f"/{database}", query=urlencode(query)))


def masked(url: str) -> str:
    """Write a URL so that it can be shown: without its password and without its options.

    >>> masked("rediss://me:secret@host:6379/0?ssl_ca_certs=x"), masked("redis://host"), masked("unix:///run/r.sock?db=1")
    ('rediss://me:***@host:6379/0', 'redis://host', 'unix:///run/r.sock')
    """
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if at:
        user = user.partition(":")[0] + ":***"
    return f"{parts.scheme}://{user}{at}{host}{parts.path}"


def database_of(url: str) -> int:
    """Read the database number in a Redis URL, 0 where there is none.

    >>> database_of("redis://host:6379/3"), database_of("unix:///run/redis.sock?db=2"), database_of("redis://host")
    (3, 2, 0)
    """
    parts = urlsplit(url)
    named = dict(parse_qsl(parts.query)).get("db") or (parts.path.strip("/") if parts.scheme != "unix" else "")
    return int(named) if named.isdigit() else 0
