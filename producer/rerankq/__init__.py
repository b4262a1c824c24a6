"""rerankq: asynchronous batch reranking. Producers submit jobs; workers rank their chunks; producers await rankings.

.. code-block:: python

    from rerankq import Client

    with Client() as client:
        ranking = client.rerank("why tides?", ["Bread rises in the oven.", "The moon pulls at the sea."])
        print(ranking.chunks[0].index)

A name is imported from its module when it is first used: the command line begins before the libraries are loaded.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .client.asynchronous import AsyncClient
    from .client.blocking import Client
    from .contract import Chunk, Fusion, JobStatus, RankedChunk, Ranking, RerankJob
    from .errors import (
        BrokerUnavailable,
        ClientClosed,
        ClientUnusable,
        GatewayStopping,
        JobCancelled,
        JobDead,
        JobExpired,
        JobFailed,
        JobRejected,
        JobTimedOut,
        JobTooLarge,
        JobUnknown,
        ModelUnknown,
        NotAllowed,
        NoWorker,
        QueueFull,
        RateLimited,
        RerankqError,
        SettingsInvalid,
    )
    from .settings import Settings

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "BrokerUnavailable",
    "Chunk",
    "Client",
    "ClientClosed",
    "ClientUnusable",
    "Fusion",
    "GatewayStopping",
    "JobCancelled",
    "JobDead",
    "JobExpired",
    "JobFailed",
    "JobRejected",
    "JobStatus",
    "JobTimedOut",
    "JobTooLarge",
    "JobUnknown",
    "ModelUnknown",
    "NoWorker",
    "NotAllowed",
    "QueueFull",
    "RankedChunk",
    "Ranking",
    "RateLimited",
    "RerankJob",
    "RerankqError",
    "Settings",
    "SettingsInvalid",
    "__version__",
]

# The modules of names that are not errors.
_HOMES = {
    "AsyncClient": "client.asynchronous",
    "Client": "client.blocking",
    "Settings": "settings",
    **dict.fromkeys(("Chunk", "Fusion", "JobStatus", "RankedChunk", "Ranking", "RerankJob"), "contract"),
}

# Modules that may be named after nothing but ``import rerankq``.
_MODULES = {"catalogue", "client", "contract", "errors", "settings"}


def __getattr__(name: str) -> object:
    from importlib import import_module  # noqa: PLC0415

    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
