"""Who asks for what and when, and what happens to whom: pure functions of a seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from rerankq import RerankJob

POISON = "poison"
FLOODER = "flooder"
TENANTS = ("", "north", "south", FLOODER)
# Shares of the jobs that are special; the rest are plain.
FLOOD, COPIES, DEADLINES, CANCELLED = 0.2, 0.06, 0.06, 0.05
# When the flood and the poison come, as shares of the run.
FLOOD_AT, POISON_AT = 0.4, 0.25

BlowKind = Literal["kill", "hang", "redis", "freeze", "partition", "hole", "clock"]
Fate = Literal["plain", "deadline", "cancel", "poison"]
# What the clock of Redis is set by, in turn: an hour back, ten minutes on. Less than a ranking is kept for.
CLOCK_STEPS_S = (-3_600, 600)
WORDS = [
    "tide",
    "moon",
    "sea",
    "bread",
    "oven",
    "ledger",
    "doorbell",
    "river",
    "stone",
    "glass",
    "paper",
    "ink",
    "wheel",
]


class Shape(NamedTuple):
    """How much of everything; times in seconds."""

    jobs: int
    span_s: float
    lease_s: float
    workers: int = 3
    producers: int = 3
    chunks: int = 16
    kills: int = 20
    hangs: int = 3
    redis_kills: int = 3
    freezes: int = 0
    partitions: int = 1
    holes: int = 0
    clock_steps: int = 0


class Blow(NamedTuple):
    """Something that happens to a worker, to all of them (``worker`` None), or to Redis, and for how long.

    Of a clock that is set, ``length_s`` is by how much.
    """

    at_s: float
    kind: BlowKind
    worker: int | None
    length_s: float


class Order(NamedTuple):
    """A job that a producer submits ``at_s`` seconds into the run, and how it may end."""

    number: int
    at_s: float
    producer: int
    fate: Fate
    job: RerankJob
    cancel_after_s: float | None = None


def seconds_per_token(shape: Shape, busy: float) -> float:
    """What a token must cost so that undisturbed workers would be busy for that share of the run.

    >>> round(seconds_per_token(Shape(jobs=2_000, span_s=270, lease_s=8), busy=0.6), 5)
    0.00048
    """
    # A pair reads six words of its query, 22.5 of its chunk on average, and three marks.
    tokens = shape.jobs * shape.chunks * 31.5
    return busy * shape.span_s * shape.workers / tokens if tokens else 0.0


def blows(seed: int, shape: Shape) -> list[Blow]:
    """Spread the blows over the run, in a shuffled order, with gaps of half to one and a half times the mean.

    >>> [blow.kind for blow in blows(1, Shape(10, 60, 8, kills=2, hangs=1, redis_kills=1))]
    ['partition', 'redis', 'hang', 'kill', 'kill']
    >>> blows(7, Shape(10, 60, 8)) == blows(7, Shape(10, 60, 8))
    True
    """
    chance = random.Random(f"blows {seed}")
    kinds: list[BlowKind] = [
        *["kill"] * shape.kills,
        *["hang"] * shape.hangs,
        *["redis"] * shape.redis_kills,
        *["freeze"] * shape.freezes,
        *["partition"] * shape.partitions,
        *["hole"] * shape.holes,
        *["clock"] * shape.clock_steps,
    ]
    chance.shuffle(kinds)
    gaps = [chance.uniform(0.5, 1.5) for _ in range(len(kinds) + 1)]
    scale = shape.span_s / sum(gaps)
    at_s, answer, turns = 0.0, [], Counter[BlowKind]()
    for kind, gap in zip(kinds, gaps, strict=False):
        at_s += gap * scale
        turn, turns[kind] = turns[kind], turns[kind] + 1
        worker: int | None = chance.randrange(shape.workers)
        # Of what befalls the network the first befalls all workers, the second one of them, and so on in turn.
        if kind in {"redis", "freeze", "clock"} or (kind in {"partition", "hole"} and turn % 2 == 0):
            worker = None
        answer.append(Blow(at_s, kind, worker, _length(kind, turn, shape.lease_s, chance)))
    return answer


def _length(kind: BlowKind, turn: int, lease_s: float, chance: random.Random) -> float:
    match kind:
        case "kill":  # until a supervisor starts it again
            return 1.0
        case "redis":
            return chance.uniform(0.5, 3.0)
        case "freeze":  # shorter than a lease, and longer
            return lease_s * chance.uniform(0.5, 1.8)
        case "clock":
            return CLOCK_STEPS_S[turn % len(CLOCK_STEPS_S)]
        case _:  # longer than a lease, so that its jobs go to others
            return lease_s * chance.uniform(1.2, 1.8)


def orders(seed: int, shape: Shape) -> list[Order]:
    """Make the jobs: half interactive, half bulk, of several tenants, with copies, deadlines and cancellations.

    >>> made = orders(3, Shape(200, 60, 8))
    >>> len(made), sum(order.fate == "poison" for order in made), len({order.job.query for order in made}) < 200
    (200, 1, True)
    >>> sorted({order.fate for order in made})
    ['cancel', 'deadline', 'plain', 'poison']
    """
    chance = random.Random(f"orders {seed}")
    made = list(_plain(chance, shape, count=shape.jobs - 1 - round(shape.jobs * (FLOOD + COPIES))))
    made += _flood(chance, shape, first=len(made), count=round(shape.jobs * FLOOD))
    made += _copies(chance, shape, made, count=round(shape.jobs * COPIES))
    poison = RerankJob(query="what kills?", chunks=[POISON, "harmless"], fusion="model", priority="bulk")
    made.append(Order(len(made), shape.span_s * POISON_AT, 0, "poison", poison))
    return sorted(made, key=lambda order: order.at_s)


def _plain(chance: random.Random, shape: Shape, count: int) -> Iterator[Order]:
    at_s = 0.0
    for number in range(count):
        # Bunches: producers send some jobs one by one and others many at a time.
        if chance.random() < 0.5:
            at_s = chance.uniform(0, shape.span_s)
        fate: Fate = "plain"
        deadline_s = cancel_after_s = None
        if (drawn := chance.random()) < DEADLINES:
            fate, deadline_s = "deadline", chance.uniform(0.05, 2 * shape.lease_s)
        elif drawn < DEADLINES + CANCELLED:
            fate, cancel_after_s = "cancel", chance.uniform(0, 2.0)
        tenant = TENANTS[number % (len(TENANTS) - 1)]
        job = _job(chance, shape, number, tenant=tenant, bulk=chance.random() < 0.5, deadline_s=deadline_s)
        yield Order(number, at_s, chance.randrange(shape.producers), fate, job, cancel_after_s)


def _flood(chance: random.Random, shape: Shape, first: int, count: int) -> list[Order]:
    producer, at_s = chance.randrange(shape.producers), shape.span_s * FLOOD_AT
    return [
        Order(number, at_s, producer, "plain", _job(chance, shape, number, tenant=FLOODER, bulk=True))
        for number in range(first, first + count)
    ]


def _copies(chance: random.Random, shape: Shape, made: Sequence[Order], count: int) -> list[Order]:
    """The same content again, from another producer: the same job, which is ranked once."""
    answer = []
    while len(answer) < count:
        of = chance.choice(made)
        if of.fate == "plain":
            number = len(made) + len(answer)
            at_s = chance.uniform(0, shape.span_s)
            answer.append(Order(number, at_s, (of.producer + 1) % shape.producers, "plain", of.job))
    return answer


def _job(
    chance: random.Random, shape: Shape, number: int, *, tenant: str, bulk: bool, deadline_s: float | None = None
) -> RerankJob:
    chunks = [
        " ".join([f"{number}.{at}", *chance.choices(WORDS, k=chance.randint(3, 40))])
        for at in range(chance.randint(2, 2 * shape.chunks - 2))
    ]
    return RerankJob(
        id=f"named-{number}" if number % 10 == 0 else None,
        query=" ".join(["query", str(number), *chance.choices(WORDS, k=4)]),
        chunks=chunks,
        fusion="default" if number % 4 == 0 else "model",
        priority="bulk" if bulk else "interactive",
        tenant=tenant,
        deadline_s=deadline_s,
    )
