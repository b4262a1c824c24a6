"""Every connection to Redis, for every role, is opened here."""

from .opening import BROKER_ANSWER_S, BROKER_HEALTH_S, CONNECT_S, NoSuchDatabase, cache, ledger, ledger_async, listening

__all__ = [
    "BROKER_ANSWER_S",
    "BROKER_HEALTH_S",
    "CONNECT_S",
    "NoSuchDatabase",
    "cache",
    "ledger",
    "ledger_async",
    "listening",
]
