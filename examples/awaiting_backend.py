"""A backend that awaits rankings, many at a time, and keeps the first stage's order if one takes too long.

RERANKQ_BROKER_URL=redis://localhost:6379/0 python examples/awaiting_backend.py
"""

import asyncio

from rerankq import AsyncClient, Chunk, RerankqError


async def best(client: AsyncClient, query: str, chunks: list[Chunk], *, limit: int = 3) -> list[str]:
    """Name the best chunks for a query."""
    try:
        # Not started within 5 seconds: it expires, and no worker computes what nobody waits for.
        ranking = await client.rerank(query, chunks, timeout=10, top_k=limit, deadline_s=5)
    except RerankqError as error:
        print(f"first-stage order for {query!r}: {error}")
        return [chunk.id for chunk in chunks[:limit]]
    return [chunk.id for chunk in ranking.chunks]


async def main() -> None:
    chunks = [
        Chunk(id="bread", text="Bread rises in the oven."),
        Chunk(id="tides", text="The moon pulls at the sea."),
        Chunk(id="sun", text="The sun rises in the east."),
    ]
    queries = ["why do tides rise?", "how is bread baked?", "where is the east?"]
    async with AsyncClient() as client:
        answers = await asyncio.gather(*(best(client, query, chunks) for query in queries))
        for query, names in zip(queries, answers, strict=True):
            print(query, *names)


if __name__ == "__main__":
    asyncio.run(main())
