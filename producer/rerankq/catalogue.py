"""The catalogues in ``conf/``: models, models on other servers, and fusion profiles."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from .contract import Fusion
from .errors import JobRejected, SettingsInvalid

#: What the name of a model on another server begins with; the rest names its table ``[remote.NAME]``.
REMOTE = "remote:"


class ModelCard(BaseModel):
    """An entry of the model catalogue."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    max_length: int
    languages: list[str]
    size_mb: float
    licence: str
    choose_when: str
    aliases: list[str] = []


DialectName = Literal[
    "cohere",
    "dashscope",
    "infinity",
    "jina",
    "localai",
    "siliconflow",
    "tei",
    "vllm",
    "voyage",
    "xinference",
]


#: Dialects whose requests have a field for an instruction.
INSTRUCTED: tuple[DialectName, ...] = ("dashscope", "siliconflow", "vllm")


def _bare_url(url: str) -> str:
    parts = urlsplit(url)
    # Reading the port raises ValueError where it is no number.
    written = url.isprintable() and " " not in url
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0 or not written:
        msg = "expected http://HOST/PATH or https://HOST/PATH, the full address that requests are posted to"
        raise ValueError(msg)
    if parts.username or parts.password or parts.query or parts.fragment:
        msg = "expected an address without user, password, query and fragment; a key belongs into api_key_env"
        raise ValueError(msg)
    return url


class RemoteCard(BaseModel):
    """An entry of the model catalogue whose scores another server gives.

    What of it changes a score is part of the fingerprint by which scores are cached; see ``conf/models.toml`` for what
    each field means.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, hide_input_in_errors=True
    )

    dialect: DialectName
    url: Annotated[str, AfterValidator(_bare_url)]
    model: str = ""
    revision: str = ""
    api_key_env: str = Field("", pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")
    score: Literal["logit", "probability"]
    max_length: int = Field(ge=1)
    max_documents: int = Field(ge=1)
    max_text_chars: int | None = Field(None, ge=1)
    max_query_chars: int | None = Field(None, ge=1)
    max_request_chars: int | None = Field(None, ge=1)
    concurrency: int = Field(4, ge=1, le=1024)
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    timeout_s: float = Field(60, gt=0, le=600)
    retry_for_s: float = Field(300, ge=0, le=86_400)
    parameters: dict[str, JsonValue] = {}
    takes_instruction: bool = False
    choose_when: str = ""
    aliases: list[str] = []

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        if not self.model and self.dialect != "tei":
            msg = f"model: the dialect {self.dialect} needs the model's name on that server"
            raise ValueError(msg)
        if self.takes_instruction and self.dialect not in INSTRUCTED:
            msg = f"takes_instruction: only {', '.join(INSTRUCTED)} have a field for one, not {self.dialect}"
            raise ValueError(msg)
        return self


def find(name: str, conf_dir: Path | None = None) -> Path:
    """Find a catalogue file: in *conf_dir*, else in the package, else (a checkout) in the repository's ``conf/``."""
    here = Path(__file__).parent
    # A configured folder may have one catalogue and not the other.
    folders = [*([conf_dir] if conf_dir else []), here / "conf", here.parents[1] / "conf"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise SettingsInvalid(f"{name}: not found in {', '.join(map(str, folders))}")


@lru_cache(maxsize=8)
def profiles(conf_dir: Path | None = None) -> dict[str, Fusion]:
    """Read the fusion profiles, by name.

    Raises:
        SettingsInvalid: naming the file and the malformed profile.
    """
    path = find("fusion.toml", conf_dir)
    found = {}
    for name, table in _tables(path, "profile").items():
        try:
            found[name] = Fusion.model_validate({key: value for key, value in table.items() if key != "description"})
        except JobRejected as error:
            raise SettingsInvalid(f"{path}: profile {name}: {error}") from None
    return found


@lru_cache(maxsize=8)
def descriptions(conf_dir: Path | None = None) -> dict[str, str]:
    """Read what each fusion profile is for, by its name; profiles without a description are left out."""
    tables = _tables(find("fusion.toml", conf_dir), "profile")
    return {name: str(table["description"]) for name, table in tables.items() if "description" in table}


@lru_cache(maxsize=8)
def models(conf_dir: Path | None = None) -> dict[str, ModelCard]:
    """Read the model catalogue, by name.

    Raises:
        SettingsInvalid: naming the file and the malformed model.
    """
    path = find("models.toml", conf_dir)
    try:
        return {name: ModelCard.model_validate(table) for name, table in _tables(path, "models").items()}
    except ValidationError as error:
        raise SettingsInvalid(f"{path}: {error}") from None


@lru_cache(maxsize=8)
def remotes(conf_dir: Path | None = None) -> dict[str, RemoteCard]:
    """Read the models on other servers, by their full names, ``remote:NAME``.

    Raises:
        SettingsInvalid: naming the file and each malformed field.
    """
    path = find("models.toml", conf_dir)
    found = {}
    for name, table in _tables(path, "remote", required=False).items():
        try:
            found[REMOTE + name] = RemoteCard.model_validate(table)
        except ValidationError as error:
            # Without what was given: a key may stand in the wrong place.
            mistakes = [
                f"{path}: remote.{name}.{'.'.join(map(str, one['loc'])) or 'dialect'}: {one['msg']}"
                for one in error.errors(include_url=False, include_input=False, include_context=False)
            ]
            raise SettingsInvalid("\n".join(mistakes)) from None
    return found


def remote(name: str, conf_dir: Path | None = None) -> RemoteCard:
    """Return the entry of a model on another server, by its full name.

    Raises:
        SettingsInvalid: if there is none, naming those that there are.
    """
    known = remotes(conf_dir)
    if name not in known:
        path, listed = find("models.toml", conf_dir), ", ".join(sorted(known)) or "none"
        raise SettingsInvalid(f"{path} has no table [remote.{name.removeprefix(REMOTE)}]; there are: {listed}")
    return known[name]


def canonical(name: str, conf_dir: Path | None = None) -> str:
    """Return the full name of a model or alias in the catalogue; any other name without slashes at its end."""
    name = name.rstrip("/") or name
    aliases = {full: card.aliases for full, card in models(conf_dir).items()}
    aliases |= {full: card.aliases for full, card in remotes(conf_dir).items()}
    for full, others in aliases.items():
        if name in others:
            return full
    return name


def resolve(fusion: Fusion | str, conf_dir: Path | None = None) -> Fusion:
    """Return the fusion that a profile's name stands for.

    Raises:
        JobRejected: if there is no such profile.
    """
    if isinstance(fusion, Fusion):
        return fusion
    known = profiles(conf_dir)
    if fusion not in known:
        raise JobRejected(f"no profile {fusion!r}; there are {', '.join(sorted(known))}", field="fusion")
    return known[fusion]


def _tables(path: Path, section: str, *, required: bool = True) -> dict[str, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            read = tomllib.load(file)
        return dict(read[section] if required else read.get(section, {}))
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsInvalid(f"{path}: expected TOML with a table [{section}]: {error}") from None
