"""What can go wrong, as types.

RerankqError
├── SettingsInvalid      settings are wrong; names all their environment variables
├── BrokerUnavailable    Redis cannot be reached; retry later
│   └── ClientClosed     the client was closed; make a new one
├── ClientUnusable       the client cannot work where it is used
├── JobRejected          the job is not well formed; do not retry
│   └── JobTooLarge      the job is over a limit; send less
├── QueueFull            the backlog is at its limit; retry after ``retry_after_s``
├── RateLimited          the caller asks more than it may; retry after ``retry_after_s``
├── NotAllowed           the caller may not do this
├── ModelUnknown         no worker serves this model
├── NoWorker             no worker serves this model at the moment; retry later
├── GatewayStopping      the gateway ended while the caller waited; retry
├── JobFailed            the worker tried and could not
├── JobExpired           not started before its deadline
├── JobCancelled         somebody cancelled it
├── JobDead              it crashed its worker again and again, and was set aside
├── JobTimedOut          no answer yet; the job may still finish
└── JobUnknown           no such job, or forgotten since
"""

from __future__ import annotations

from collections.abc import Sequence


class RerankqError(Exception):
    """Base of every error that this package raises on purpose.

    ``http_status`` is what the gateway answers with; ``retryable`` says whether the same call can succeed later.
    ``accepted`` holds the ids of the jobs that were already accepted when a bulk submission stopped midway.
    """

    http_status = 500
    retryable = False

    def __init__(self, message: str, *, accepted: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.accepted = list(accepted)


class SettingsInvalid(RerankqError):
    """Raised when settings are wrong; one line of the message for each, with its environment variable."""


class BrokerUnavailable(RerankqError):
    """Raised when Redis (or the message broker) cannot be reached or refuses to write."""

    http_status = 503
    retryable = True


class ClientClosed(BrokerUnavailable):
    """Raised when a client is closed: by each method called afterwards, and by those that wait at the time."""

    retryable = False


class ClientUnusable(RerankqError):
    """Raised when a client cannot work where it is used, or its thread has ended; says why."""


class JobRejected(RerankqError, ValueError):
    """Raised when a job, or a part of it, is not well formed; ``field`` names the field."""

    http_status = 422

    def __init__(self, message: str, *, field: str = "", accepted: Sequence[str] = ()) -> None:
        super().__init__(f"{field}: {message}" if field else message, accepted=accepted)
        self.field = field


class JobTooLarge(JobRejected):
    """Raised when a job has more chunks or bytes than the deployment allows."""

    http_status = 413


class QueueFull(RerankqError):
    """Raised when the backlog is at its limit; ``retry_after_s`` estimates when there is room again."""

    http_status = 429
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 5.0, accepted: Sequence[str] = ()) -> None:
        super().__init__(message, accepted=accepted)
        self.retry_after_s = retry_after_s


class RateLimited(RerankqError):
    """Raised when a caller of the gateway asks more than it may; ``retry_after_s`` says when it may ask again."""

    http_status = 429
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 60.0, accepted: Sequence[str] = ()) -> None:
        super().__init__(message, accepted=accepted)
        self.retry_after_s = retry_after_s


class NotAllowed(RerankqError):
    """Raised when a caller of the gateway may not do what it asks."""

    http_status = 403


class ModelUnknown(RerankqError):
    """Raised when no live worker has registered the model and the deployment does not list it."""

    http_status = 404
    retryable = True


class NoWorker(RerankqError):
    """Raised when somebody waits for an answer, and no worker serves the model at the moment."""

    http_status = 503
    retryable = True


class GatewayStopping(RerankqError):
    """Raised when the gateway ends while somebody waits there; the same call can be sent again."""

    http_status = 503
    retryable = True


class JobFailed(RerankqError):
    """Raised when the worker tried to rank the job and could not; the message says why."""


class JobExpired(RerankqError):
    """Raised when the job was not started before its deadline."""

    http_status = 504


class JobCancelled(RerankqError):
    """Raised when the job was cancelled, by anybody who submitted the same content."""

    http_status = 409


class JobDead(RerankqError):
    """Raised when the job crashed its worker while it ran alone, as often as is allowed."""


class JobTimedOut(RerankqError):
    """Raised when there is no answer within the caller's timeout; the job may still finish.

    From the gateway ``job_id`` names the job, and ``retry_after_s`` says when to try again.
    """

    http_status = 504
    retryable = True

    def __init__(
        self, message: str, *, job_id: str = "", retry_after_s: float | None = None, accepted: Sequence[str] = ()
    ) -> None:
        super().__init__(message, accepted=accepted)
        self.job_id = job_id
        self.retry_after_s = retry_after_s


class JobUnknown(RerankqError):
    """Raised when there is no such job: never submitted, forgotten, or past its time to live."""

    http_status = 404
