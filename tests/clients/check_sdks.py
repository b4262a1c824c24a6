"""SDKs of further providers against the gateway: Together, Contextual AI, ZeroEntropy, Isaacus, Baseten."""

from baseten_performance_client import PerformanceClient
from checking import DOCUMENTS, KEY, ORDER, QUERY, UNSERVED, URL, check, check_keys, raises, ranked
from contextual import ContextualAI
from isaacus import Isaacus
from together import Together
from zeroentropy import ZeroEntropy


def together(url, key, **named):
    client = Together(base_url=f"{url}/v1", api_key=key, max_retries=0)
    return client.rerank.create(**{"model": "default", "query": QUERY, "documents": DOCUMENTS, **named})


@check("together", "rerank.create")
def together_ranks():
    found = together(URL, KEY, return_documents=True)
    ranked([(one.index, one.relevance_score) for one in found.results])
    assert [one.document.text for one in found.results] == [DOCUMENTS[at] for at in ORDER]
    found = together(URL, KEY, documents=[{"t": text} for text in DOCUMENTS], rank_fields=["t"], top_n=2)
    assert len(found.results) == 2


@check("together", "an unserved model is a NotFoundError")
def together_unknown():
    return raises("NotFoundError", together, URL, KEY, model=UNSERVED)


check_keys("together", "AuthenticationError", together)


def contextual(url, key):
    client = ContextualAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    model = "ctxl-rerank-v2-instruct-multilingual"
    return client.rerank.create(model=model, query=QUERY, documents=DOCUMENTS, instruction="prefer the sea")


@check("contextual-client", "rerank.create")
def contextual_ranks():
    ranked([(one.index, one.relevance_score) for one in contextual(URL, KEY).results])


check_keys("contextual-client", "AuthenticationError", contextual)


def zeroentropy(url, key):
    client = ZeroEntropy(base_url=f"{url}/v1", api_key=key, max_retries=0)
    return client.models.rerank(model="zerank-1", query=QUERY, documents=DOCUMENTS)


@check("zeroentropy", "models.rerank")
def zeroentropy_ranks():
    ranked([(one.index, one.relevance_score) for one in zeroentropy(URL, KEY).results])


check_keys("zeroentropy", "AuthenticationError", zeroentropy)


def isaacus(url, key):
    client = Isaacus(base_url=f"{url}/v1", api_key=key, max_retries=0)
    return client.rerankings.create(model="kanon-universal-classifier", query=QUERY, texts=DOCUMENTS)


@check("isaacus", "rerankings.create")
def isaacus_ranks():
    ranked([(one.index, one.score) for one in isaacus(URL, KEY).results])


check_keys("isaacus", "AuthenticationError", isaacus)


def baseten(url, key):
    client = PerformanceClient(base_url=url, api_key=key)
    return client.rerank(query=QUERY, texts=DOCUMENTS, model="default", return_text=True)


for base in ("", "/tei"):

    @check("baseten-performance-client", f"rerank at {base or '/'}")
    def baseten_ranks(base=base):
        found = baseten(URL + base, KEY).data
        ranked([(one.index, one.score) for one in sorted(found, key=lambda one: -one.score)])
        assert all(one.text == DOCUMENTS[one.index] for one in found)


check_keys("baseten-performance-client", "HTTPError", baseten)
