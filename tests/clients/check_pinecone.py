"""Pinecone's SDK against the gateway."""

from checking import DOCUMENTS, KEY, ORDER, QUERY, URL, check, check_keys, ranked
from pinecone import Pinecone

MODEL = "pinecone-rerank-v0"


def rerank(url, key):
    documents = [{"id": str(at), "text": text} for at, text in enumerate(DOCUMENTS)]
    return Pinecone(api_key=key, host=url).inference.rerank(model=MODEL, query=QUERY, documents=documents)


for base in ("", "/pinecone"):

    @check("pinecone", f"inference.rerank at {base or '/'}")
    def ranks(base=base):
        found = rerank(URL + base, KEY)
        ranked([(one.index, one.score) for one in found.data])
        assert [one.document["id"] for one in found.data] == [str(at) for at in ORDER]


check_keys("pinecone", "UnauthorizedError", rerank)
