"""The message broker: the Celery app, and doorbells that name jobs. A message may be lost or arrive twice."""

from typing import Any

from ..settings import Settings
from .celery_app import (
    AHEAD,
    BULK,
    IN_LINE,
    INTERACTIVE,
    TASK,
    forget_celerys_environment,
    make_app,
    queue,
    reach,
    round_trip,
)
from .doorbells import DoorbellSender, MessageCounts

__all__ = [
    "AHEAD",
    "BULK",
    "INTERACTIVE",
    "IN_LINE",
    "TASK",
    "DoorbellSender",
    "MessageCounts",
    "forget_celerys_environment",
    "make_app",
    "queue",
    "reach",
    "round_trip",
]


def __getattr__(name: str) -> Any:
    # For `celery -A rerankq.broker flower`: built when asked for, so that importing this module needs no settings.
    if name == "app":
        forget_celerys_environment()
        return make_app(Settings())
    raise AttributeError(name)
