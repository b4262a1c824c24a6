"""LangChain's Cohere compressor against the gateway."""

import cohere
from checking import DOCUMENTS, KEY, QUERY, URL, check, check_keys, ranked, ranked_texts
from langchain_cohere import CohereRerank
from langchain_core.documents import Document


@check("langchain-cohere CohereRerank", "compress_documents, rerank")
def compress():
    compressor = CohereRerank(client=cohere.ClientV2(KEY, base_url=URL), model="rerank-v3.5", top_n=3)
    found = compressor.compress_documents([Document(text) for text in DOCUMENTS], QUERY)
    ranked_texts([document.page_content for document in found], top_n=3)
    ranked_whole = compressor.rerank(DOCUMENTS, QUERY, top_n=len(DOCUMENTS))
    ranked([(one["index"], one["relevance_score"]) for one in ranked_whole])


@check("langchain-cohere CohereRerank", "by base_url")
def by_base_url():
    compressor = CohereRerank(base_url=URL, cohere_api_key=KEY, model="rerank-v3.5", top_n=2)
    found = compressor.compress_documents([Document(text) for text in DOCUMENTS], QUERY)
    ranked_texts([document.page_content for document in found], top_n=2)


def with_key(url, key):
    compressor = CohereRerank(client=cohere.ClientV2(key, base_url=url), model="rerank-v3.5")
    return compressor.compress_documents([Document(text) for text in DOCUMENTS], QUERY)


check_keys("langchain-cohere CohereRerank", "UnauthorizedError", with_key)
