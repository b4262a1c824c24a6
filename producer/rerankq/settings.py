"""Settings, read once at the edge: environment variables with the prefix ``RERANKQ_``, or a ``.env`` file.

Inner code takes plain arguments and never looks at the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from . import urls
from .errors import BrokerUnavailable, SettingsInvalid

HOW_TO_SET_A_URL = (
    "RERANKQ_BROKER_URL is not set. Point it at a Redis, e.g. RERANKQ_BROKER_URL=redis://localhost:6379/0; "
    "`rerankq up` starts one for you and prints its URL."
)


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
        None, repr=False, validate_default=True, description="Jobs and rankings; default: the broker's database plus 1."
    )
    cache_url: str | None = Field(None, repr=False, description="Scores; default: the broker's database plus 2.")
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
        urls.read(value, urls.REDIS | urls.AMQP if info.field_name == "broker_url" else urls.REDIS)
        return value

    @field_validator("ledger_url")
    @classmethod
    def _a_ledger_somewhere(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and _carries_bells_alone(info.data.get("broker_url")):
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
        return self.ledger_url or _beside(self.broker, 1)

    @property
    def cache(self) -> str:
        """The score cache's URL; beside the ledger where the broker is not a Redis."""
        if self.cache_url:
            return self.cache_url
        return _beside(self.ledger, 1) if _carries_bells_alone(self.broker) else _beside(self.broker, 2)

    @property
    def channel(self) -> str:
        """The prefix of pub/sub channels: pub/sub ignores database numbers, so it carries the deployment's name."""
        return f"rerankq:{self.deployment or urls.database_of(self.ledger)}"


def _carries_bells_alone(url: str | None) -> bool:
    """Whether a broker cannot be a ledger too."""
    return url is not None and urls.parts_of(url).scheme in urls.AMQP


def _beside(url: str, further: int) -> str:
    """Point a URL at a database some numbers further on, so that deployments with brokers of their own share none.

    >>> _beside("redis://host/0", 1), _beside("redis://host/5", 2)
    ('redis://host/1', 'redis://host/7')
    """
    return urls.with_database(url, urls.database_of(url) + further)


def _mistakes(error: ValidationError) -> Iterator[str]:
    # Without what was given: URLs hold passwords.
    for mistake in error.errors(include_url=False, include_input=False, include_context=False):
        field = ".".join(str(part) for part in mistake["loc"][:1]).upper()
        said = mistake["msg"].removeprefix("Value error, ")
        yield f"RERANKQ_{field}: {said}" if field else said
