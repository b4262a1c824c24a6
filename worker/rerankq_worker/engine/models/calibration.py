"""How many tokens a batch should cost: enough to keep the device busy, and no more, so that nobody waits long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from types import MappingProxyType

from ..errors import is_out_of_memory
from ..protocol import Engine, TokenisedPair

#: Tokens per batch that are tried, by kind of device, ascending.
BUDGETS = MappingProxyType(
    {
        "cpu": (512, 1024, 2048, 4096),
        "cuda": (4096, 8192, 16_384, 32_768, 65_536, 131_072),
    }
)
#: Seconds that trying may take, unless a single batch takes longer.
PATIENCE_S = MappingProxyType({"cpu": 2.0, "cuda": 5.0})
#: A budget within this share of the best pace is as good: rounds on a busy machine differ by more.
LEVEL = 0.95
#: Tokens of the pairs that are tried: a usual paragraph with its query.
_PAIR_TOKENS = 256
_QUERY = "how long is a batch?"
_ROUNDS = 5
#: Few, since a token may take a second; and alone on a large GPU they take longer for each than a batch does.
_SHORT_WORDS = 16


def levelling_point(pace: Mapping[int, float], *, level: float = LEVEL) -> int:
    """Find the smallest budget whose tokens per second reach *level* of the best.

    >>> levelling_point({512: 700, 1024: 960, 2048: 990, 4096: 1000})
    1024

    Raises ValueError for no budgets.
    """
    if not pace:
        raise ValueError("no budget was measured")
    enough = level * max(pace.values())
    return min(budget for budget, tokens_per_second in pace.items() if tokens_per_second >= enough)


def measure(
    engine: Engine,
    budgets: Sequence[int],
    *,
    patience_s: float,
    most_tokens: Callable[[Sequence[TokenisedPair]], float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Run batches of each budget in turns; answers tokens per second by budget, of each one's fastest batch.

    What others do on the machine slows a batch down, hence the fastest; where they have it all the time the answer is
    chance, among budgets that are tried because each of them is sensible. Ends after ``patience_s`` seconds,
    before a batch that would last beyond. ``most_tokens(batch)`` tells how many tokens fit into memory, judged by one
    small batch; budgets beyond are not tried, nor any at or above one that runs out of memory.
    """
    pace: dict[int, float] = {}
    ends = clock() + patience_s
    limit = most_tokens(_batch(engine, budgets[0])) if most_tokens else float("inf")
    for budget, batch in _turns(engine, budgets):
        cost = sum(pair.length for pair in batch)
        if pace and budget > limit:
            continue
        if pace and clock() + cost / max(pace.values()) > ends:
            break
        began = clock()
        try:
            engine.forward(batch)
        except Exception as error:
            if not pace or not is_out_of_memory(error):
                raise
            limit = budget - 1
            pace = {fits: tokens for fits, tokens in pace.items() if fits <= limit}
            engine.release_memory()
        else:
            pace[budget] = max(pace.get(budget, 0.0), cost / max(clock() - began, 1e-9))
    return pace


def seconds_per_token(engine: Engine, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one short pair: what a token takes at most, before any batch has taught better."""
    (pair,) = engine.tokenise(_QUERY, ["word " * _SHORT_WORDS])
    began = clock()
    engine.forward([pair])
    return (clock() - began) / pair.length


def _turns(engine: Engine, budgets: Sequence[int]) -> Iterator[tuple[int, list[TokenisedPair]]]:
    for _, budget in product(range(_ROUNDS), budgets):
        yield budget, _batch(engine, budget)


def _batch(engine: Engine, tokens: int) -> list[TokenisedPair]:
    length = min(_PAIR_TOKENS, engine.max_length)
    try:
        (pair,) = engine.tokenise(_QUERY, ["word " * length], max_length=length)
    except ValueError:
        # A long template leaves no room in so few tokens.
        (pair,) = engine.tokenise(_QUERY, ["word " * length])
    return [pair] * max(1, tokens // pair.length)
