"""Scores on another server: hash, read known scores, ask for the others in as few requests as its limits allow."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Hashable, Iterable, Mapping, Sequence
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
from .in_flight import Awaited, Claim, PairsInFlight
from .logits import LEAST_PROBABILITY, logits_of
from .retrying import Refused
from .sending import Call, RequestSender, Unanswered
from .splitting import split

#: Part of every score's fingerprint: whoever changes how a text is cut or a score becomes a logit changes it.
RULE = "rerankq remote 2"
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

    Equal pairs of jobs in flight are asked for once, where the jobs are of one tenant and priority: nobody waits for
    a call that comes after his own.
    """

    def __init__(self, card: RemoteCard, sender: RequestSender, cache: ScoreCache, *, name: str) -> None:
        self._card = card
        self._sender = sender
        self._cache = cache
        self._name = name
        self._dialect = DIALECTS[card.dialect]
        self._host = urlsplit(card.url).netloc
        self._in_flight = PairsInFlight()
        self.fingerprint = fingerprint_of(card)
        self.max_length = card.max_length
        self.takes_instruction = card.takes_instruction

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
        same = _groups(job.hashes, unknown)
        # With those that another text of the job speaks for.
        work.add_known(len(texts) - len(same))
        logits, truncated, cost = known.logits.astype(np.float64), known.truncated.copy(), _Cost()
        truncated[unknown] = job.truncated[unknown]

        def gain(names: Iterable[bytes], computed: Iterable[float]) -> None:
            for name, logit in zip(names, computed, strict=True):
                logits[same[name]] = logit

        left = list(same)
        while left:
            claim = self._in_flight.claim(map(job.pair, left)) if options.cache == "use" else Claim({}, {})
            others = {name: claim.others[job.pair(name)] for name in left if job.pair(name) in claim.others}
            own = [same[name][0] for name in left if name not in others]
            try:
                with closing(self._replies(job, own, work)) as replies:
                    for call, reply in replies:
                        names = [job.hashes[at] for at in call.positions]
                        computed = logits_of(reply.scores, probabilities=self._card.score == "probability")
                        gain(names, computed)
                        # At once: they are paid for, whatever becomes of the other calls and of the job.
                        self._keep(job, claim, names, computed, truncated[call.positions])
                        cost.add(call, reply)
            finally:
                self._in_flight.release(claim)
            found = _awaited(others, work)
            gain(found, found.values())
            # The job that had asked for the others was cancelled or failed, maybe for a reason of its own.
            left = [name for name in others if name not in found]
        return Scored(
            logits,
            known.mask,
            truncated,
            tokens=cost.tokens,
            waiting_s=cost.waited_s,
            inference_s=cost.took_s,
        )

    def _keep(
        self,
        job: _Job,
        claim: Claim,
        names: Sequence[bytes],
        logits: NDArray[np.float32],
        truncated: NDArray[np.bool_],
    ) -> None:
        """Let later jobs have these logits, and those that wait for them."""
        if job.options.cache != "bypass":
            self._cache.write(job.fingerprint, job.query_hash, names, logits, truncated)
        for name, logit in zip(names, logits.tolist(), strict=True):
            if (pair := job.pair(name)) in claim.own:
                self._in_flight.settle(claim, pair, logit)

    def _prepared(self, query: str, texts: Sequence[str], options: ScoreOptions) -> _Job:
        """Cut and name a job's query and texts."""
        card = self._card
        max_length = min(options.max_length or self.max_length, self.max_length)
        shown, query_cut = _cut(query, card.max_query_chars)
        cut = [_cut(text, card.max_text_chars) for text in texts]
        return _Job(
            query=shown,
            texts=[text for text, _ in cut],
            truncated=np.array([query_cut or text_cut for _, text_cut in cut], np.bool_),
            query_hash=text_hash(query),
            hashes=[text_hash(text) for text in texts],
            fingerprint=score_fingerprint(
                self.fingerprint,
                max_length=max_length if self._dialect.reads_max_length else 0,
                query_max_tokens=0,
                long_chunks=options.long_chunks,
                rule=RULE,
                instruction=options.instruction,
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
        request = RerankRequest(
            self._card.model, job.query, texts, raw, job.max_length, instruction=job.options.instruction
        )
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

    def pair(self, name: bytes) -> Hashable:
        """Name the pair of the query and a text, given by its hash; jobs with a pair of one name share its reply."""
        return self.options.priority, self.options.tenant, self.fingerprint, self.query_hash, name


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


class _Waiting:
    """Pairs that other jobs have asked for, as a part of a job's work."""

    def __init__(self, pairs: Iterable[Awaited]) -> None:
        self.done_pairs = 0
        self._ended: SimpleQueue[Awaited | None] = SimpleQueue()
        for pair in pairs:
            pair.add_done_callback(self._ended.put)

    def cancel(self) -> None:
        """Wake the job's thread."""
        self._ended.put(None)

    def next(self) -> Awaited:
        """Wait for the next pair that has ended; raises JobCancelled once the job was cancelled."""
        ended = self._ended.get()
        if ended is None:
            raise JobCancelled("cancelled while running")
        self.done_pairs += not ended.cancelled()
        return ended


def _awaited(pairs: Mapping[bytes, Awaited], work: Work) -> dict[bytes, float]:
    """Wait for pairs that other jobs have asked for; answers the logits of those that they got."""
    if not pairs:
        return {}
    waiting = _Waiting(pairs.values())
    work.follow(waiting)
    with work.waiting():
        for _ in pairs:
            waiting.next()
    return {name: pair.result() for name, pair in pairs.items() if not pair.cancelled()}


def _cut(text: str, most: int | None) -> tuple[str, bool]:
    """Cut a text to so many characters, and say whether something of it is lost.

    >>> _cut("a text", None), _cut(" a text ", 8), _cut("  a text  ", 6), _cut("    a text", 3)
    (('a text', False), (' a text ', False), ('a text', False), ('a t', True))
    """
    if most is None or len(text) <= most:
        return text, False
    # What is left of a text must not be blank: many servers refuse the whole request then.
    text = text.strip()
    return text[:most], len(text) > most


def _groups(hashes: Sequence[bytes], positions: Sequence[int]) -> dict[bytes, list[int]]:
    """Put positions of equal texts together: each is sent once."""
    groups: dict[bytes, list[int]] = {}
    for at in positions:
        groups.setdefault(hashes[at], []).append(at)
    return groups
