"""Agno's Cohere reranker against the gateway."""

import cohere
from agno.knowledge.document import Document
from agno.knowledge.reranker.cohere import CohereReranker
from checking import DOCUMENTS, KEY, QUERY, URL, check, ranked_texts


@check("agno CohereReranker", "rerank")
def ranks():
    reranker = CohereReranker(cohere_client=cohere.Client(KEY, base_url=URL), top_n=3)
    found = reranker.rerank(QUERY, [Document(content=text) for text in DOCUMENTS])
    ranked_texts([one.content for one in found], top_n=3)
    assert all(one.reranking_score is not None for one in found)
