"""Delivers webhooks: takes those that are due from the ledger, posts them, and reports what became of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from pydantic import BaseModel, ValidationError

from ... import __version__
from ...client.asynchronous import outcome
from ...contract import Ranking, State
from ...errors import JobFailed, JobRejected, RerankqError
from ...ledger import AsyncLedger, JobSnapshot, LedgerLimits, calls, connect_async, webhooks
from ...ledger.webhooks import Taken
from ...outage import Outage
from ...settings import Settings
from . import message, posting
from .message import Record
from .posting import DeliveryFailed, Poster
from .targets import TargetRefused, read

logger = logging.getLogger("rerankq.gateway")

# Seconds between looks at what is due, and between looks at a job whose end may not have been noted.
LOOK_EVERY_S, LOOK_AT_JOB_S = 0.5, 60.0
# Seconds for which a delivery is ours: longer than it may take.
LEASE_S = 2 * posting.DELIVERY_S
# Deliveries at once, so that receivers that hang do not hold up others: in all, of those that have failed before, to
# one receiver whose last delivery succeeded, and to any other.
AT_ONCE, AT_ONCE_AGAIN, AT_ONCE_EACH, AT_ONCE_UNPROVEN = 256, 128, 16, 2
# Receivers whose last delivery succeeded that are remembered.
MAX_PROVEN = 10_000
# Seconds after which a delivery is looked at again that found too many others on their way to its receiver: at first,
# and at the latest.
CROWD_WAIT_S, MAX_CROWD_WAIT_S = 1.0, 30.0
# Seconds in which a gateway that stops hands back what it has not delivered.
HAND_BACK_WITHIN_S = 2.0
# Seconds for which the records of deliveries are kept: of those that were given up, and of those that were not.
KEEP_GIVEN_UP_S, KEEP_S = 7 * 86_400, 86_400
MIN_SECRET = 8


class Webhook(BaseModel):
    """What a caller asks for: where to, and the secret that signs it; None = the deployment's."""

    url: str
    secret: str | None = None


class WebhookStatus(BaseModel):
    """What became of a webhook. ``state``: pending, delivered, given_up. Times are seconds since the epoch."""

    url: str
    state: str
    attempts: int
    added_at: float
    next_attempt_at: float | None
    error: str | None


class Webhooks:
    """The webhooks of a deployment, as one gateway sees them. :meth:`run` delivers; every gateway does."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._limits = LedgerLimits.of(settings)
        self._ledger = AsyncLedger(connect_async(settings.ledger))
        self._poster = Poster(settings.webhook_networks)
        self._clock = clock
        self._busy: Counter[str] = Counter()
        self._again = 0
        self._turned_away: Counter[str] = Counter()
        # By receiver, the latest last.
        self._proven: dict[str, None] = {}
        self._delivering: set[asyncio.Task[None]] = set()
        self._outage = Outage()

    async def read(self, given: object) -> Webhook | None:
        """Read and check what a caller gives as ``webhook``: a URL, an object, or nothing.

        Raises:
            JobRejected: naming the field.
        """
        if given is None:
            return None
        if isinstance(given, str):
            given = {"url": given}
        if not isinstance(given, dict) or not isinstance(given.get("url"), str):
            raise JobRejected("expected a URL, or an object with a url", field="webhook")
        secret = given.get("secret")
        if secret is not None and (not isinstance(secret, str) or not MIN_SECRET <= len(secret) <= 256):
            raise JobRejected(f"expected a text of {MIN_SECRET} to 256 characters", field="webhook.secret")
        if secret is None and not self._settings.webhook_secret:
            said = "cannot be signed: give a webhook.secret, or have RERANKQ_WEBHOOK_SECRET set"
            raise JobRejected(said, field="webhook")
        try:
            await posting.check(given["url"], self._settings.webhook_networks)
        except TargetRefused as error:
            raise JobRejected(str(error), field="webhook.url") from None
        return Webhook(url=given["url"], secret=secret)

    async def add(self, job_id: str, webhook: Webhook) -> State:
        """Write down that a URL is to be told of a job's end, which may have come already; answer its state."""
        record = Record(url=webhook.url, secret=webhook.secret, added_at=self._clock())
        call = webhooks.add(
            job_id, message.name_of(webhook.url), record.model_dump_json(), self._limits, look_s=LOOK_AT_JOB_S
        )
        return await self._ledger.ask(call)

    async def of_job(self, job_id: str) -> list[WebhookStatus]:
        """Say what became of a job's webhooks; they are kept for a while after the job."""
        found = []
        for listed in await self._ledger.ask(webhooks.list_of(job_id)):
            with suppress(ValidationError):
                record = Record.model_validate_json(listed.record)
                known = record.model_dump(include={"url", "state", "attempts", "added_at", "error"})
                found.append(WebhookStatus(**known, next_attempt_at=listed.next_at))
        return sorted(found, key=lambda one: (one.added_at, one.url))

    async def run(self) -> None:
        """Deliver until cancelled."""
        try:
            while True:
                full = False
                try:
                    full = await self._take()
                    self._outage.works(time.monotonic())
                except RerankqError as error:
                    if self._outage.fails(time.monotonic()):
                        logger.warning("webhooks wait: %s", error)
                except Exception:
                    logger.exception("webhooks wait")
                await asyncio.sleep(0 if full else LOOK_EVERY_S)
        finally:
            for task in self._delivering:
                task.cancel()
            if self._delivering:
                await asyncio.wait(self._delivering, timeout=HAND_BACK_WITHIN_S)

    async def _take(self) -> bool:
        """Begin what is due and there is room for; answer whether there may be more."""
        while len(self._delivering) >= AT_ONCE:
            await asyncio.wait(self._delivering, return_when=asyncio.FIRST_COMPLETED)
        room = AT_ONCE - len(self._delivering)
        call = webhooks.take(self._limits, lease_s=LEASE_S, look_s=LOOK_AT_JOB_S, limit=room)
        taken = await self._ledger.ask(call)
        for one in taken:
            task = asyncio.create_task(self._deliver(one))
            self._delivering.add(task)
            task.add_done_callback(self._delivering.discard)
        return len(taken) >= room

    async def _deliver(self, taken: Taken) -> None:
        try:
            try:
                record = Record.model_validate_json(taken.record)
            except ValidationError:
                logger.warning("webhook of job %s: its record cannot be read", taken.job_id)
                await self._report(taken, taken.record, wait_s=None, keep_s=KEEP_S)
                return
            receiver, again = _receiver(record.url), int(record.attempts > 0)
            most = AT_ONCE_EACH if receiver in self._proven else AT_ONCE_UNPROVEN
            if self._busy[receiver] >= most or (again and self._again >= AT_ONCE_AGAIN):
                # The longer a receiver takes, the more are turned away, and the less often they are looked at.
                wait_s = min(MAX_CROWD_WAIT_S, CROWD_WAIT_S * (1 + self._turned_away[receiver] / most))
                self._turned_away[receiver] += 1
                await self._report(taken, taken.record, wait_s=wait_s, keep_s=KEEP_S)
                return
            self._busy[receiver] += 1
            self._again += again
            try:
                await self._try(taken, record)
            finally:
                self._again -= again
                self._turned_away.pop(receiver, None)
                self._busy[receiver] -= 1
                if not self._busy[receiver]:
                    del self._busy[receiver]
        except asyncio.CancelledError:
            # The gateway stops: another need not wait for the end of the lease. If it was reported, this has no effect.
            with suppress(RerankqError):
                await self._report(taken, taken.record, wait_s=0, keep_s=KEEP_S)
            raise
        except RerankqError as error:
            # Its lease ends, and it is taken again.
            logger.info("webhook of job %s: %s", taken.job_id, error)
        except Exception:
            logger.exception("webhook of job %s", taken.job_id)

    async def _try(self, taken: Taken, record: Record) -> None:
        now = self._clock()
        ended_at = record.ended_at or now
        body = record.body.encode() if record.body is not None else await self._body(taken.job_id)
        if body is None:  # it is queued again
            await self._report(taken, taken.record, wait_s=LOOK_AT_JOB_S, keep_s=KEEP_S)
            return
        tried = {"attempts": record.attempts + 1, "ended_at": ended_at}
        try:
            await self._poster.post(record.url, self._headers(taken.job_id, record, body), body)
        except DeliveryFailed as failure:
            self._proven.pop(_receiver(record.url), None)
            late = self._clock() - ended_at >= self._settings.webhook_give_up_s
            if failure.final or late:
                logger.warning(
                    "webhook of job %s given up after %s tries: %s", taken.job_id, tried["attempts"], failure
                )
                told = record.model_copy(update={**tried, "state": "given_up", "error": str(failure), "body": None})
                await self._report(taken, told.model_dump_json(), wait_s=None, keep_s=KEEP_GIVEN_UP_S)
                return
            told = record.model_copy(update={**tried, "error": str(failure), "body": body.decode()})
            wait_s = message.wait_after(record.attempts + 1, asked_s=failure.retry_after_s)
            await self._report(taken, told.model_dump_json(), wait_s=wait_s, keep_s=KEEP_S)
        else:
            self._prove(_receiver(record.url))
            told = record.model_copy(update={**tried, "state": "delivered", "error": None, "body": None})
            await self._report(taken, told.model_dump_json(), wait_s=None, keep_s=KEEP_S)

    def _prove(self, receiver: str) -> None:
        self._proven.pop(receiver, None)
        self._proven[receiver] = None
        if len(self._proven) > MAX_PROVEN:
            del self._proven[next(iter(self._proven))]

    def _headers(self, job_id: str, record: Record, body: bytes) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"rerankq/{__version__}",
            "X-Rerankq-Job": job_id,
            message.DELIVERY: message.event_id(body),
            "X-Rerankq-Attempt": str(record.attempts + 1),
        }
        secret = record.secret or self._settings.webhook_secret
        if secret:
            headers[message.SIGNATURE] = message.signature(secret, body, at=int(self._clock()))
        return headers

    async def _body(self, job_id: str) -> bytes | None:
        """Write what is told of a job; None if it has not ended."""
        try:
            snapshot = await self._ledger.ask(calls.snapshot(job_id, self._limits, with_ranking=True))
        except JobFailed as error:  # its ranking cannot be read
            return message.body_of(job_id, "failed", ended_at=None, error=str(error), error_type="JobFailed")
        return _told(snapshot)

    async def _report(self, taken: Taken, record: str, *, wait_s: float | None, keep_s: int) -> None:
        await self._ledger.ask(webhooks.report(taken, record, wait_s=wait_s, keep_s=keep_s))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._poster.aclose()
        await self._ledger.redis.aclose()


def _told(snapshot: JobSnapshot) -> bytes | None:
    status = snapshot.status
    if status.state in {"queued", "running"}:
        return None
    found = outcome(snapshot)
    if isinstance(found, Ranking):
        return message.body_of(status.job_id, status.state, ended_at=status.ended_at, ranking=found)
    return message.body_of(
        status.job_id, status.state, ended_at=status.ended_at, error=str(found), error_type=type(found).__name__
    )


def _receiver(url: str) -> str:
    try:
        return read(url).authority
    except TargetRefused:
        return url
