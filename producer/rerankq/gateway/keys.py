"""API keys: who may call, as whom, how urgently and how much. Only hashes of keys are stored."""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..contract import Priority
from ..errors import SettingsInvalid

logger = logging.getLogger("rerankq.gateway")

SETTING = "RERANKQ_API_KEYS"
PREFIX = "rerankq-"
# A tenant that stands for all: the caller names one, and sees the jobs of all.
EVERY_TENANT = "*"


def hash_of(key: str) -> str:
    """Hash a key as it is stored. Keys are random, 256 bits: a slow hash would protect nothing more.

    >>> hash_of("rerankq-example")[:19]
    'sha256:3754adf9e725'
    """
    return f"sha256:{sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}"


def new_key() -> str:
    """Make a key."""
    return PREFIX + secrets.token_urlsafe(32)


def _hash(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"(sha256:)?[0-9a-fA-F]{64}", value):
        # The value is not quoted: it may be a key itself.
        msg = "expected the SHA-256 of a key, 64 hexadecimal digits: `rerankq key NAME` makes a key and its hash"
        raise ValueError(msg)
    return f"sha256:{value.removeprefix('sha256:').lower()}"


class KeyLimits(BaseModel):
    """How much a key may, and the name under which that is counted. A limit that is None is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")
    requests_per_minute: int | None = Field(None, ge=1, le=10**9)
    pairs_per_minute: int | None = Field(None, ge=1, le=10**12)
    tokens_per_minute: int | None = Field(None, ge=1, le=10**12)
    concurrent: int | None = Field(None, ge=1, le=10**6, description="Calls that wait for a ranking at a time.")


class ApiKey(KeyLimits):
    """A key's entry."""

    hash: Annotated[str, BeforeValidator(_hash)] = Field(repr=False)
    tenant: str | None = Field(None, min_length=1, max_length=200, description="Default: the key's name. `*`: any.")
    priority: Priority = Field("interactive", description="The most urgent priority that its calls may have.")
    operator: bool = Field(False, description="May see the whole deployment, its metrics and dead jobs.")

    @property
    def limits(self) -> KeyLimits:
        """How much it may, without its hash."""
        return KeyLimits(**self.model_dump(include=set(KeyLimits.model_fields)))

    @property
    def own_tenant(self) -> str | None:
        """The tenant that all its jobs have; None: whatever they name."""
        return None if self.tenant == EVERY_TENANT else self.tenant or self.name


def entry_of(key: ApiKey) -> str:
    """Write a key's entry for the file of keys.

    >>> print(entry_of(ApiKey(name="search", hash="0" * 64, requests_per_minute=60)))
    [[keys]]
    name = "search"
    hash = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
    requests_per_minute = 60
    """
    fields = {"name": key.name, "hash": key.hash, **key.model_dump(exclude_defaults=True, exclude_none=True)}
    # JSON's strings, numbers and truth values are TOML's, too.
    return "\n".join(["[[keys]]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())])


def parse_keys(setting: str) -> tuple[ApiKey, ...]:
    """Read the setting: a TOML file with an entry ``[[keys]]`` for each, or ``NAME:HASH`` separated by commas.

    Raises:
        SettingsInvalid: naming the entry and field that is wrong, and what was expected.
    """
    if not setting:
        return ()
    file = file_of(setting)
    entries = _in_line(setting) if file is None else _in_file(file)
    return _checked(entries, where=SETTING if file is None else f"{SETTING}: {file}")


def file_of(setting: str) -> Path | None:
    """Say which file a setting names; None if it holds the keys itself."""
    return Path(setting).expanduser() if setting.endswith(".toml") or "/" in setting else None


def _in_line(setting: str) -> list[dict[str, Any]]:
    parts = [part.strip().partition(":") for part in setting.split(",") if part.strip()]
    return [{"name": name.strip(), "hash": hashed.strip()} for name, _, hashed in parts]


def _in_file(file: Path) -> list[dict[str, Any]]:
    try:
        read = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsInvalid(f"{SETTING}: {file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsInvalid(f"{SETTING}: {file}: {error}") from None
    entries = read.pop("keys", None)
    if read or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SettingsInvalid(f"{SETTING}: {file}: expected entries [[keys]] and nothing else")
    return entries


def _checked(entries: Sequence[dict[str, Any]], *, where: str) -> tuple[ApiKey, ...]:
    if not entries:
        raise SettingsInvalid(f"{where}: holds no keys; without the setting the gateway is open, on the loopback only")
    keys, faults = [], []
    for at, entry in enumerate(entries, 1):
        try:
            keys.append(ApiKey(**entry))
        except ValidationError as error:
            # Without what was given: it may be a key itself.
            for fault in error.errors(include_url=False, include_input=False, include_context=False):
                said = fault["msg"].removeprefix("Value error, ")
                faults.append(f"{where}: key {at}: {'.'.join(map(str, fault['loc']))}: {said}")
        except TypeError:
            faults.append(f"{where}: key {at}: expected fields with names")
    for field in ("name", "hash"):
        faults += [f"{where}: two keys have the {field} {one!r}" for one in _repeated(getattr(k, field) for k in keys)]
    if faults:
        raise SettingsInvalid("\n".join(faults))
    return tuple(keys)


def _repeated(values: Iterable[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


def _holds_none(file: Path) -> bool:
    """Whether a file of keys is well formed, and has none."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")) in ({}, {"keys": []})
    except (OSError, ValueError):
        return False


class KnownKeys:
    """The keys that are valid now. A file of them is read again when it changes; while it is wrong, the last ones hold.

    It is true if keys are asked for: also once the last one was taken out of the file, and nobody has one.

    Raises (made): SettingsInvalid, if the setting is wrong.
    """

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._file = file_of(setting) if setting else None
        self._mark = self._emptied = self._mark_now()
        self._keys = parse_keys(setting)

    def __bool__(self) -> bool:
        return bool(self._setting)

    @property
    def tenants(self) -> set[str]:
        """The tenants that keys belong to."""
        return {key.own_tenant for key in self._keys if key.own_tenant}

    def find(self, presented: str) -> ApiKey | None:
        """Find the key that was presented, in a time that does not depend on how much of it is right."""
        hashed, found = hash_of(presented), None
        for key in self._keys:
            if hmac.compare_digest(key.hash, hashed):
                found = key
        return found

    def named(self, name: str) -> ApiKey | None:
        """Find a key by its name."""
        return next((key for key in self._keys if key.name == name), None)

    def refresh(self) -> None:
        """Read the file again if it has changed.

        One without any key in it may be about to be written: what it held is void if it is the same at the next look.
        """
        mark = self._mark_now()
        if mark == self._mark:
            return
        if self._file is not None and _holds_none(self._file):
            if mark != self._emptied:
                self._emptied = mark
                return
            self._mark, self._keys = mark, ()
            logger.warning("%s: %s holds no API keys any more: nobody is let in", SETTING, self._file)
            return
        self._mark = mark
        try:
            self._keys = parse_keys(self._setting)
        except SettingsInvalid as error:
            logger.warning("the API keys stay as they were: %s", error)
        else:
            logger.warning("read %d API keys again", len(self._keys))

    def _mark_now(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
