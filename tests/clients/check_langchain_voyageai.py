"""LangChain's Voyage compressor against the gateway."""

from checking import DOCUMENTS, KEY, QUERY, URL, check, check_keys, ranked_texts
from langchain_core.documents import Document
from langchain_voyageai import VoyageAIRerank


@check("langchain-voyageai VoyageAIRerank", "compress_documents")
def compress():
    ranker = VoyageAIRerank(model="rerank-2.5", api_key=KEY, base_url=f"{URL}/v1", top_k=3)
    found = ranker.compress_documents([Document(page_content=text) for text in DOCUMENTS], QUERY)
    ranked_texts([one.page_content for one in found], top_n=3)


def with_key(url, key):
    ranker = VoyageAIRerank(model="rerank-2.5", api_key=key, base_url=f"{url}/v1")
    return ranker.compress_documents([Document(page_content=text) for text in DOCUMENTS], QUERY)


check_keys("langchain-voyageai VoyageAIRerank", "AuthenticationError", with_key)
