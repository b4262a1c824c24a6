"""rerankq: asynchronous batch reranking. Producers submit jobs; workers rank their chunks; producers await rankings.

.. code-block:: python

    from rerankq import Client

    with Client() as client:
        ranking = client.rerank("why tides?", ["Bread rises in the oven.", "The moon pulls at the sea."])
        print(ranking.chunks[0].index)
"""

from .client.asynchronous import AsyncClient
from .client.blocking import Client
from .contract import Chunk, Fusion, JobStatus, RankedChunk, Ranking, RerankJob
from .errors import (
    BrokerUnavailable,
    ClientClosed,
    ClientUnusable,
    JobCancelled,
    JobDead,
    JobExpired,
    JobFailed,
    JobRejected,
    JobTimedOut,
    JobTooLarge,
    JobUnknown,
    ModelUnknown,
    QueueFull,
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
    "QueueFull",
    "RankedChunk",
    "Ranking",
    "RerankJob",
    "RerankqError",
    "Settings",
    "SettingsInvalid",
    "__version__",
]
