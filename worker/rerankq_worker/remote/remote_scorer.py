"""Scores on another server: hash, read known scores, ask for the others in as few requests as its limits allow."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from queue import SimpleQueue
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from rerankq.catalogue import RemoteCard
from rerankq.errors import JobCancelled, JobFailed

from ..cache import CachedScores, ScoreCache, score_fingerprint
from ..engine import text_hash
from ..scoring import Scored, ScoreOptions
from ..work import Work
from .dialects import DIALECTS, Reply, RerankRequest, body_of
from .logits import LEAST_PROBABILITY, logits_of
from .retrying import Refused
from .sending import Call, RequestSender, Unanswered
from .splitting import split

#: Part of every score's fingerprint: whoever changes how a text is cut or a score becomes a logit changes it.
RULE = "rerankq remote 1"
#: HTTP status of a request with too many texts or bytes.
TOO_LARGE = 413


def fingerprint_of(card: RemoteCard) -> str:
    """Hash what of a catalogue entry changes a score, 128 bits in hexadecimal: not its key, limits and times."""
    named = {
        "rule": RULE,
        "dialect": card.dialect,
        "url": card.url,
        "model": card.model,
        "revision": card.revision,
        "score": card.score,
        "least": LEAST_PROBABILITY if card.score == "probability" else None,
        "max_text_chars": card.max_text_chars,
        "max_query_chars": card.max_query_chars,
        "parameters": card.parameters,
    }
    return blake2b(json.dumps(named, sort_keys=True).encode(), digest_size=16).hexdigest()


class RemoteScorer:
    """A :class:`~rerankq_worker.scoring.Scorer` over a server of the catalogue.

    Blank texts are not sent, as many servers refuse them: they have no score (NaN). ``truncated`` says what was cut
    here, by ``max_text_chars`` and ``max_query_chars``; what the server cuts is not known. A job's ``max_length``
    counts where the dialect can tell the server; ``query_max_tokens`` never does.
    """

    def __init__(self, card: RemoteCard, sender: RequestSender, cache: ScoreCache, *, name: str) -> None:
        self._card = card
        self._sender = sender
        self._cache = cache
        self._name = name
        self._dialect = DIALECTS[card.dialect]
        self._host = urlsplit(card.url).netloc
        self.fingerprint = fingerprint_of(card)
        self.max_length = card.max_length

    def score(self, query: str, texts: Sequence[str], options: ScoreOptions, work: Work) -> Scored:
        """Score each text; see :class:`~rerankq_worker.scoring.Scorer`.

        Raises:
            JobCancelled: if *work* was cancelled.
            JobFailed: if the server refuses a request, or did not answer for as long as the catalogue says.
            EngineClosed: if the worker stops meanwhile.
        """
        job = self._prepared(query, texts, options)
        known = CachedScores.nothing(len(texts))
        if options.cache == "use":
            known = self._cache.read(job.fingerprint, job.query_hash, job.hashes)
        unknown = [at for at, text in enumerate(texts) if text.strip() and not known.mask[at]]
        work.add_known(len(texts) - len(unknown))
        logits, truncated, cost = known.logits.astype(np.float64), known.truncated.copy(), _Cost()
        truncated[unknown] = job.truncated[unknown]
        same = _groups(job.hashes, unknown)
        with closing(self._replies(job, [group[0] for group in same.values()], work)) as replies:
            for call, reply in replies:
                computed = logits_of(reply.scores, probabilities=self._card.score == "probability")
                for at, logit in zip(call.positions, computed, strict=True):
                    logits[same[job.hashes[at]]] = logit
                # At once: they are paid for, whatever becomes of the other calls and of the job.
                if options.cache != "bypass":
                    names = [job.hashes[at] for at in call.positions]
                    self._cache.write(job.fingerprint, job.query_hash, names, computed, truncated[call.positions])
                cost.add(call, reply)
        return Scored(
            logits,
            known.mask,
            truncated,
            tokens=cost.tokens,
            waiting_s=cost.waited_s,
            inference_s=cost.took_s,
        )

    def _prepared(self, query: str, texts: Sequence[str], options: ScoreOptions) -> _Job:
        """Cut and name a job's query and texts."""
        card = self._card
        max_length = min(options.max_length or self.max_length, self.max_length)
        shown = query[: card.max_query_chars]
        cut = [text[: card.max_text_chars] for text in texts]
        return _Job(
            query=shown,
            texts=cut,
            truncated=np.array(
                [len(shown) < len(query) or len(one) < len(text) for one, text in zip(cut, texts, strict=True)],
                np.bool_,
            ),
            query_hash=text_hash(query),
            hashes=[text_hash(text) for text in texts],
            fingerprint=score_fingerprint(
                self.fingerprint,
                max_length=max_length if self._dialect.reads_max_length else 0,
                query_max_tokens=0,
                long_chunks=options.long_chunks,
                rule=RULE,
            ),
            max_length=max_length,
            options=options,
        )

    def _replies(self, job: _Job, positions: Sequence[int], work: Work) -> Generator[tuple[Call, Reply], None, None]:
        """Send calls for the texts at these positions; gives each with its reply as it is answered."""
        ended: SimpleQueue[Call] = SimpleQueue()
        under_way: set[Call] = set()

        def send(parts: Sequence[Sequence[int]]) -> None:
            for part in parts:
                call = self._call(job, part)
                under_way.add(call)
                call.announce_end(ended)
                work.follow(call)
                self._sender.send(call)

        try:
            send(self._split(job, positions))
            while under_way:
                # A job that only waits for the server has no part in a crash of this worker.
                with work.waiting():
                    call = ended.get()
                under_way.remove(call)
                try:
                    reply = call.result.result()
                except CancelledError:
                    raise JobCancelled("cancelled while running") from None
                except Unanswered as error:
                    raise JobFailed(f"{self._name}: {self._host} does not answer: {error}") from None
                except Refused as refused:
                    if refused.status != TOO_LARGE or len(call.positions) == 1:
                        raise JobFailed(f"{self._name}: {self._host} refused a request: {refused}") from None
                    # The catalogue allows more than the server does.
                    middle = len(call.positions) // 2
                    send([call.positions[:middle], call.positions[middle:]])
                else:
                    yield call, reply
        finally:
            for call in under_way:
                call.cancel()

    def _split(self, job: _Job, positions: Sequence[int]) -> list[list[int]]:
        parts = split(
            [len(job.texts[at]) + len(job.query) for at in positions],
            max_documents=self._card.max_documents,
            max_chars=self._card.max_request_chars or math.inf,
        )
        return [[positions[at] for at in part] for part in parts]

    def _call(self, job: _Job, positions: Sequence[int]) -> Call:
        texts = [job.texts[at] for at in positions]
        raw = self._card.score == "logit"
        request = RerankRequest(self._card.model, job.query, texts, raw, job.max_length)
        return Call(
            body_of(self._dialect, request, self._card.parameters),
            list(positions),
            priority=job.options.priority,
            tenant=job.options.tenant,
            job=job,
            sender=self._sender,
        )


@dataclass(frozen=True, eq=False)
class _Job:
    """A job's query and texts as they are sent, and by which names their scores are known."""

    query: str
    texts: list[str]
    truncated: NDArray[np.bool_]
    query_hash: bytes
    hashes: list[bytes]
    fingerprint: str
    max_length: int
    options: ScoreOptions


@dataclass
class _Cost:
    """What a job's calls cost together: tokens, seconds until the first was sent, and from then to the last reply."""

    tokens: int = 0
    waited_s: float = 0.0
    took_s: float = 0.0
    _first: float = math.inf

    def add(self, call: Call, reply: Reply) -> None:
        self.tokens += reply.tokens
        sent_at = call.made_at + call.waited_s
        if sent_at < self._first:
            self._first, self.waited_s = sent_at, call.waited_s
        self.took_s = time.monotonic() - self._first


def _groups(hashes: Sequence[bytes], positions: Sequence[int]) -> dict[bytes, list[int]]:
    """Put positions of equal texts together: each is sent once."""
    groups: dict[bytes, list[int]] = {}
    for at in positions:
        groups.setdefault(hashes[at], []).append(at)
    return groups
