"""Was every accepted job answered, and rightly? Pure functions of journals, undisturbed rankings and what was done."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gear.checks import TIE

from .schedule import Order

Event = Mapping[str, Any]
# Redis syncs once a second, and puts a write off by up to two while a sync is slow: what it accepted so shortly before
# its death may be lost. Half a second more, because a journal notes what happened a little later.
FSYNC_WINDOW_S = 2.5


class Undisturbed(NamedTuple):
    """What a job's ranking is when nothing else runs: by position in the job, and best first."""

    logits: Sequence[float | None]
    scores: Sequence[float]
    best_first: Sequence[int]


def in_fsync_window(at: float, redis_deaths: Iterable[float], window_s: float = FSYNC_WINDOW_S) -> bool:
    """Whether Redis may have lost, by a death of its own, what it accepted at that moment.

    >>> in_fsync_window(10.0, [11.0]), in_fsync_window(10.0, [9.0, 13.0])
    (True, False)
    """
    return any(0 <= death - at <= window_s for death in redis_deaths)


def differs(told: Event, alone: Undisturbed, *, tie: float = TIE) -> str | None:
    """Say how a ranking differs from the undisturbed one; None where it does not, up to ties and rounding.

    >>> alone = Undisturbed([1.0, 2.0], [0.73, 0.88], [1, 0])
    >>> differs({"order_of_chunks": [1, 0], "logits": [2.0, 1.0], "scores": [0.88, 0.73]}, alone)
    >>> differs({"order_of_chunks": [0, 1], "logits": [1.0, 2.0], "scores": [0.73, 0.88]}, alone)
    'ranked in another order'
    >>> differs({"order_of_chunks": [1], "logits": [2.0], "scores": [0.88]}, alone)
    'other chunks'
    >>> differs({"order_of_chunks": [1, 0], "logits": [2.0, 1.1], "scores": [0.88, 0.73]}, alone)
    'chunk 0: logit 1.1 and not 1.0'
    """
    order = told["order_of_chunks"]
    if sorted(order) != list(range(len(alone.scores))):
        return "other chunks"
    for name, given, expected in (("logit", told["logits"], alone.logits), ("score", told["scores"], alone.scores)):
        for at, value in zip(order, given, strict=True):
            if (value is None) != (expected[at] is None) or (value is not None and abs(value - expected[at]) > tie):
                return f"chunk {at}: {name} {value} and not {expected[at]}"
    least = float("inf")
    for at in order:
        if alone.scores[at] > least + tie:
            return "ranked in another order"
        least = min(least, alone.scores[at])
    return None


def faults(
    order: Order, events: Sequence[Event], alone: Undisturbed | None, redis_deaths: Sequence[float]
) -> list[str]:
    """Say what is wrong with how an order went; nothing, if all is as promised."""
    by_kind = defaultdict(list)
    for event in events:
        by_kind[event["event"]].append(event)
    if not by_kind["accepted"]:
        return ["never accepted"]
    if len(by_kind["ended"]) != 1:
        return [f"accepted, and answered {len(by_kind['ended'])} times"]
    answer = []
    for lost in by_kind["unknown"]:
        accepted_at = max(event["at"] for event in by_kind["accepted"] if event["at"] <= lost["at"])
        if not in_fsync_window(accepted_at, redis_deaths):
            since = min((accepted_at - death for death in redis_deaths if death <= accepted_at), default=None)
            after = "" if since is None else f"; accepted {since:.1f} s after the last one"
            answer.append(f"accepted, then unknown, with no death of Redis to blame{after}")
    ending = by_kind["ended"][0]
    allowed = {
        "plain": {"ranking"},
        "deadline": {"ranking", "JobExpired"},
        "cancel": {"ranking", "JobCancelled"},
        "poison": {"JobDead"},
    }[order.fate]
    if ending["kind"] not in allowed:
        answer.append(f"ended as {ending['kind']}: {ending.get('said')}")
    if ending["kind"] == "ranking" and alone is not None and (fault := differs(ending, alone)):
        answer.append(fault)
    for cancelled in by_kind["cancelled"]:
        was_ranked = cancelled["state"] == "cancelled" and ending["kind"] == "ranking"
        if was_ranked and not in_fsync_window(cancelled["at"], redis_deaths):
            answer.append("told to be cancelled, and ranked")
    return answer


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Give count, median and greatest.

    >>> spread([3.0, 1.0, 2.0])
    {'count': 3, 'median': 2.0, 'greatest': 3.0}
    """
    if not values:
        return None
    return {"count": len(values), "median": round(statistics.median(values), 2), "greatest": round(max(values), 2)}


def summary(orders: Sequence[Order], events: Iterable[Event], redis_deaths: Sequence[float]) -> dict[str, Any]:
    """Count how the orders went."""
    events = list(events)
    endings = Counter(event["kind"] for event in events if event["event"] == "ended")
    accepted = {event["order"] for event in events if event["event"] == "accepted"}
    answered = {event["order"] for event in events if event["event"] == "ended"}
    unknown = [event["order"] for event in events if event["event"] == "unknown"]
    rankings = [event for event in events if event["event"] == "ended" and event["kind"] == "ranking"]
    return {
        "orders": len(orders),
        "different_jobs": len({event["id"] for event in events if event["event"] == "accepted"}),
        "accepted": len(accepted),
        "answered": len(answered),
        "endings": dict(endings.most_common()),
        "lost_by_redis_within_its_fsync_window_and_submitted_again": len(unknown),
        "refusals_tried_again": sum(event["event"] == "refused" for event in events),
        "cancellations_heard": sum(event["event"] == "cancelled" for event in events),
        "share_of_pairs_from_the_cache": round(
            sum(one["cached_pairs"] for one in rankings) / max(1, sum(one["pairs"] for one in rankings)), 3
        ),
        "deaths_of_redis": len(redis_deaths),
    }
