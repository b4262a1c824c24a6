"""Which failures of a request are tried again, and when. Pure."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

#: Seconds of the first pause, and of the longest unless the server asks for more; each is twice the one before.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
#: Seconds for which a server's word is taken, at most, that it wants no request before: it may be nonsense.
LONGEST_ASKED_S = 3_600.0
#: A reply that makes no sense may have been cut on its way; a server that always answers so is not asked for ever.
MALFORMED_TRIES = 3
# Beside all from 500 on: request timeout, failed dependency (an engine of Text Embeddings Inference), too early, too
# many requests.
_RETRIED = frozenset({408, 424, 425, 429})
# Statuses of a request whose key is missing, wrong, expired or not allowed to do this.
_KEY_REFUSED = frozenset({401, 403})
# Characters of a server's message that are quoted.
_QUOTED = 300


class Transient(Exception):
    """Raised when a request failed and may succeed later; the server may have said after how many seconds.

    ``kind`` is free of the server's own words, which may repeat a text that was sent.
    """

    def __init__(
        self,
        kind: str,
        message: str = "",
        *,
        status: int = 0,
        retry_after_s: float | None = None,
        malformed: bool = False,
    ) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind
        self.status = status
        self.retry_after_s = retry_after_s
        self.malformed = malformed


class Refused(Exception):
    """Raised when the server refuses a request, with its status and its message.

    ``trouble`` says, without the server's own words, why it will refuse others as well; empty if it may not.
    """

    def __init__(self, status: int, message: str, *, trouble: str = "") -> None:
        super().__init__(f"HTTP {status}: {message}" if message else f"HTTP {status}")
        self.status = status
        self.trouble = trouble


def failure_of(
    status: int, content: bytes, retry_after: str | None, *, secret: str = "", api_key_env: str = ""
) -> Transient | Refused:
    """Say what a status other than success means. *secret* is nowhere in it, even if the server repeats it.

    *api_key_env* names the variable that the secret is taken from, if one is sent.
    """
    # Before it is shortened: of a key that is cut, the rest would stay.
    said = message_in(content.replace(secret.encode(), b"***") if secret else content)
    said = said.replace(secret, "***") if secret else said
    if 300 <= status < 400:
        return Refused(status, "redirects are not followed; put the address that it leads to into the catalogue")
    if status >= 500 or status in _RETRIED:
        after_s = retry_after_s(retry_after, now=datetime.now(UTC))
        return Transient(f"HTTP {status}", said, status=status, retry_after_s=after_s)
    if status in _KEY_REFUSED:
        key = f"the API key of {api_key_env} was sent" if api_key_env else "no API key was sent: set api_key_env"
        return Refused(status, f"{said} ({key})" if said else key, trouble=f"HTTP {status}, {key}")
    return Refused(status, said)


def pause_s(failures: int, retry_after_s: float | None, *, jitter: float) -> float:
    """Seconds before the next try after so many *failures*; *jitter* is random, from 0 to 1.

    Never less than the server asks for; else half the pause to all of it, so that callers do not return together.

    >>> [pause_s(failures, None, jitter=1) for failures in (1, 2, 3, 40)], pause_s(1, 7.0, jitter=0)
    ([0.5, 1.0, 2.0, 30.0], 7.0)
    """
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 30))
    return max(longest * (1 + jitter) / 2, retry_after_s or 0.0)


def retry_after_s(header: str | None, *, now: datetime) -> float | None:
    """Read a Retry-After header: seconds, or a date; None where it is neither.

    >>> retry_after_s("1.5", now=datetime.now(UTC)), retry_after_s("soon", now=datetime.now(UTC))
    (1.5, None)
    >>> retry_after_s("Wed, 21 Oct 2026 07:28:00 GMT", now=datetime(2026, 10, 21, 7, 27, tzinfo=UTC))
    60.0
    """
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return None
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds()
    # A comparison with NaN is false.
    return seconds if 0 <= seconds < float("inf") else 0.0 if seconds < 0 else None


def message_in(content: bytes) -> str:
    """Find the words of an error in the forms that servers give it, in one line of limited length.

    >>> message_in(b'{"error": {"message": "too  many"}}'), message_in(b"<h1>Bad gateway</h1>")
    ('too many', '<h1>Bad gateway</h1>')
    >>> message_in(b'{"detail": [{"loc": ["body", "query"], "msg": "is missing", "input": "a text"}]}')
    'body.query: is missing'
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = content.decode("utf-8", "replace")
    said = " ".join(_words(found).split())
    return said if len(said) <= _QUOTED else said[:_QUOTED] + "…"


def _words(found: Any) -> str:
    if isinstance(found, str):
        return found
    if isinstance(found, list):
        return "; ".join(filter(None, map(_words, found)))
    if not isinstance(found, dict):
        return ""
    if isinstance(found.get("msg"), str):
        # Of FastAPI; its "input" is what was sent: texts.
        place = ".".join(map(str, found["loc"])) if isinstance(found.get("loc"), list) else ""
        return f"{place}: {found['msg']}" if place else found["msg"]
    return next(filter(None, (_words(found.get(name)) for name in ("message", "detail", "error"))), "")
