"""LightRAG's calls of rerank servers against the gateway."""

import asyncio

from checking import DOCUMENTS, KEY, QUERY, URL, check, check_keys, ranked
from lightrag.rerank import ali_rerank, cohere_rerank, jina_rerank

PATHS = [
    (cohere_rerank, "/v2/rerank"),
    (cohere_rerank, "/v1/rerank"),
    (jina_rerank, "/v1/rerank"),
    (ali_rerank, "/api/v1/services/rerank/text-rerank/text-rerank"),
]

for function, path in PATHS:

    def rerank(url, key, function=function, path=path, **named):
        return asyncio.run(function(query=QUERY, documents=DOCUMENTS, api_key=key, base_url=url + path, **named))

    @check(f"lightrag {function.__name__}", f"at {path}")
    def ranks(rerank=rerank):
        for top_n in (None, 2):
            found = rerank(URL, KEY, top_n=top_n)
            ranked([(one["index"], one["relevance_score"]) for one in found], top_n=top_n)

    # It tries three times, and waits in between.
    if path == "/v1/rerank":
        check_keys(f"lightrag {function.__name__}", "Exception", rerank)
