"""The catalogues in ``conf/``: models and fusion profiles."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from .contract import Fusion
from .errors import JobRejected, SettingsInvalid


class ModelCard(BaseModel):
    """An entry of the model catalogue."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    max_length: int
    languages: list[str]
    size_mb: float
    licence: str
    choose_when: str
    aliases: list[str] = []


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


def canonical(name: str, conf_dir: Path | None = None) -> str:
    """Return the full name of a model or alias in the catalogue; any other name without slashes at its end."""
    name = name.rstrip("/") or name
    for full, card in models(conf_dir).items():
        if name in card.aliases:
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


def _tables(path: Path, section: str) -> dict[str, dict[str, object]]:
    try:
        with path.open("rb") as file:
            return dict(tomllib.load(file)[section])
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise SettingsInvalid(f"{path}: expected TOML with a table [{section}]: {error}") from None
