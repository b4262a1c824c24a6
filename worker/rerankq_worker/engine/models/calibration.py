"""How many tokens a batch should cost: enough to keep the device busy, and no more, so that waits stay short."""

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
#: Seconds that the measurement may take, unless a single batch takes longer.
PATIENCE_S = MappingProxyType({"cpu": 2.0, "cuda": 5.0})
#: A budget whose throughput reaches this share of the best is as good: rounds on a busy machine differ by more.
LEVEL = 0.95
#: Tokens of the pairs that are measured: a typical paragraph with its query.
_PAIR_TOKENS = 256
_QUERY = "how long is a batch?"
_ROUNDS = 5
#: Words of the pair that ``seconds_per_token`` times. Few, since a token may take a second; on a large GPU a token of
#: so small a batch takes longer than one of a full batch.
_SHORT_WORDS = 16


def levelling_point(throughput: Mapping[int, float], *, level: float = LEVEL) -> int:
    """Find the smallest budget whose tokens per second reach *level* of the best.

    >>> levelling_point({512: 700, 1024: 960, 2048: 990, 4096: 1000})
    1024

    Raises ValueError for an empty mapping.
    """
    if not throughput:
        raise ValueError("no budget was measured")
    enough = level * max(throughput.values())
    return min(budget for budget, tokens_per_second in throughput.items() if tokens_per_second >= enough)


def measure(
    engine: Engine,
    budgets: Sequence[int],
    *,
    patience_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Run batches of each budget in turns; returns tokens per second by budget, of each one's fastest batch.

    The fastest, since other programs on the machine slow batches down; if they do so all the time the result is random
    among the budgets, each of which is sensible. Ends after ``patience_s`` seconds, before a batch that would end
    later. Budgets above ``engine.most_tokens`` are not tried, nor any at or above one that runs out of memory.
    """
    throughput: dict[int, float] = {}
    ends = clock() + patience_s
    limit = engine.most_tokens(_batch(engine, budgets[0]))
    for budget, batch in _turns(engine, budgets):
        cost = sum(pair.length for pair in batch)
        if throughput and budget > limit:
            continue
        if throughput and clock() + cost / max(throughput.values()) > ends:
            break
        began = clock()
        try:
            engine.forward(batch)
        except Exception as error:
            if not throughput or not is_out_of_memory(error):
                raise
            limit = budget - 1
            throughput = {fits: tokens for fits, tokens in throughput.items() if fits <= limit}
            engine.release_memory()
        else:
            throughput[budget] = max(throughput.get(budget, 0.0), cost / max(clock() - began, 1e-9))
    return throughput


def seconds_per_token(engine: Engine, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one short pair: an upper bound of the time per token, for use until the first batch was measured."""
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
        # The template alone is longer.
        (pair,) = engine.tokenise(_QUERY, ["word " * length])
    return [pair] * max(1, tokens // pair.length)
