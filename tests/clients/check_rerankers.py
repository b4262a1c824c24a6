"""The API ranker of the library rerankers against the gateway."""

from checking import DOCUMENTS, KEY, ORDER, QUERY, URL, check, check_keys, ranked
from rerankers.models.api_rankers import APIRanker

PROVIDERS = {
    "cohere": "/v1/rerank",
    "jina": "/v1/rerank",
    "voyage": "/v1/rerank",
    "mixedbread.ai": "/v1/reranking",
    "pinecone": "/pinecone/rerank",
    "text-embeddings-inference": "/rerank",
    "isaacus": "/rerank",
}

for provider, path in PROVIDERS.items():

    @check(f"rerankers {provider}", f"rank at {path}")
    def rank(provider=provider, path=path):
        ranker = APIRanker(model="default", api_key=KEY, api_provider=provider, url=URL + path, verbose=0)
        found = ranker.rank(QUERY, DOCUMENTS)
        ranked([(one.document.doc_id, one.score) for one in found.results])
        assert found.top_k(1)[0].document.text == DOCUMENTS[ORDER[0]]

    def with_key(url, key, provider=provider, path=path):
        ranker = APIRanker(model="default", api_key=key, api_provider=provider, url=url + path, verbose=0)
        return ranker.rank(QUERY, DOCUMENTS)

    # It looks at no status, and misses the results.
    refused = "TypeError" if provider == "text-embeddings-inference" else "KeyError"
    check_keys(f"rerankers {provider}", refused, with_key)
