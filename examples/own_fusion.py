"""Weights of one's own: half the model, the rest the first stage's two scores.

RERANKQ_BROKER_URL=redis://localhost:6379/0 python examples/own_fusion.py
"""

from rerankq import Chunk, Client, Fusion

fusion = Fusion(
    weights={"model": 0.5, "vector": 0.3, "keyword": 0.2},
    normalise={"model": "sigmoid", "vector": "none", "keyword": "minmax"},
)
chunks = [
    Chunk(id="bread", text="Bread rises in the oven.", vector_score=0.61, keyword_score=4.2),
    Chunk(id="tides", text="The moon pulls at the sea.", vector_score=0.58),
    Chunk(id="sun", text="The sun rises in the east.", vector_score=0.40, keyword_score=3.9),
]

with Client() as client:
    ranking = client.rerank("why do tides rise?", chunks, timeout=60, fusion=fusion)
    for chunk in ranking.chunks:
        print(chunk.rank, chunk.id, round(chunk.score, 3), chunk.scores, "lacks", chunk.missing)
