"""Voyage's SDK against the gateway."""

import voyageai
from checking import DOCUMENTS, KEY, ORDER, QUERY, UNSERVED, URL, check, check_keys, raises, ranked

for base in ("/v1", "/voyage", "/voyage/v1"):

    @check("voyageai", f"rerank at {base}")
    def rerank(base=base):
        client = voyageai.Client(api_key=KEY, base_url=URL + base, max_retries=0)
        for top_k in (None, 2):
            found = client.rerank(QUERY, DOCUMENTS, model="rerank-2.5", top_k=top_k)
            ranked([(one.index, one.relevance_score) for one in found.results], top_n=top_k)
            assert [one.document for one in found.results] == [DOCUMENTS[at] for at in ORDER[:top_k]]
            assert found.total_tokens > 0


@check("voyageai", "an unserved model is an error with the message")
def unknown():
    client = voyageai.Client(api_key=KEY, base_url=f"{URL}/v1", max_retries=0)
    return raises("VoyageError", client.rerank, QUERY, DOCUMENTS, model=UNSERVED)


def with_key(url, key):
    return voyageai.Client(api_key=key, base_url=f"{url}/v1", max_retries=0).rerank(
        QUERY, DOCUMENTS, model="rerank-2.5"
    )


check_keys("voyageai", "AuthenticationError", with_key)
