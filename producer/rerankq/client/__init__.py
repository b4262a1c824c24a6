"""The client: submit jobs, wait for rankings. One implementation, for asyncio; ``Client`` runs it in a thread."""

from .asynchronous import AsyncClient, outcome
from .blocking import Client
from .submission import Job, Submission, prepare, refuse_too_large

__all__ = [
    "AsyncClient",
    "Client",
    "Job",
    "Submission",
    "outcome",
    "prepare",
    "refuse_too_large",
]
