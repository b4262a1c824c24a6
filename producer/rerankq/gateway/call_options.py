"""What a caller asks beside the dialect: the headers X-Rerankq-…, and a fusion profile behind a model's name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, get_args

from ..contract import Fusion, Priority
from ..errors import JobRejected
from .rerank_call import CallOptions

PREFIX = "X-Rerankq-"
# RAGFlow names a model and its provider with this between them.
PROVIDER_SEPARATOR = "___"
# Seconds; a day.
MAX_TIMEOUT_S = 86_400.0

Value = TypeVar("Value")


def _one_of(*allowed: str) -> Callable[[str], Any]:
    def read(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"expected {' or '.join(allowed)}")
        return text.lower()

    return read


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise ValueError(f"expected seconds, above 0 and at most {MAX_TIMEOUT_S:g}")
    return seconds


def _fusion(text: str) -> Fusion | str:
    return Fusion.model_validate_json(text) if text.startswith("{") else text


def _priority(text: str) -> Priority:
    # Numbers as Cohere and vLLM take them: 0 is the most urgent.
    if re.fullmatch(r"[+-]?[0-9]{1,9}", text):
        return "interactive" if int(text) <= 0 else "bulk"
    if text.lower() not in get_args(Priority):
        raise ValueError("expected interactive or bulk, or a whole number: 0 is interactive, above is bulk")
    priority: Priority = _one_of(*get_args(Priority))(text)
    return priority


def _tenant(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,128}", text):
        raise ValueError("expected letters and digits of ASCII, dots, underscores, @ and hyphens; at most 128")
    return text


def _truth(text: str) -> bool:
    return bool(_one_of("true", "false", "1", "0")(text) in {"true", "1"})


_HEADERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "fusion": ("Fusion", _fusion),
    "priority": ("Priority", _priority),
    "tenant": ("Tenant", _tenant),
    "cache": ("Cache", _one_of("use", "refresh", "bypass")),
    "timeout_s": ("Timeout", _seconds),
    "on_timeout": ("On-Timeout", _one_of("error", "first-stage")),
    "explain": ("Explain", _truth),
}


def options_of(headers: Mapping[str, str]) -> CallOptions:
    """Read the headers of a call.

    Raises:
        JobRejected: naming the header that is wrong, and what was expected.

    >>> options_of({"X-Rerankq-Timeout": "2.5", "X-Rerankq-Priority": "bulk"}).timeout_s
    2.5
    """
    found: dict[str, Any] = {}
    for name, (suffix, read) in _HEADERS.items():
        text = (headers.get(PREFIX + suffix) or "").strip()
        if text:
            try:
                found[name] = read(text)
            except ValueError as error:
                raise JobRejected(str(error), field=PREFIX + suffix) from None
    return CallOptions(**found)


def split_model(model: str | None, profiles: Collection[str]) -> tuple[str | None, str | None]:
    """Split a model's name from the fusion profile behind it. Blanks round a name are none of it.

    >>> split_model("bge-reranker-base+rrf", {"rrf"}), split_model("a+b", {"rrf"}), split_model("+rrf", {"rrf"})
    (('bge-reranker-base', 'rrf'), ('a+b', None), (None, 'rrf'))
    """
    model = (model or "").strip()
    if not model:
        return None, None
    name, plus, profile = model.partition(PROVIDER_SEPARATOR)[0].rpartition("+")
    return (name or None, profile) if plus and profile in profiles else (model, None)
