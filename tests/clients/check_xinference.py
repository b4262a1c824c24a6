"""Xinference's client against the gateway."""

from checking import DOCUMENTS, ORDER, QUERY, UNSERVED, URL, check, check_keys, raises, ranked
from xinference_client import RESTfulClient


@check("xinference-client", "list_models, get_model, rerank")
def rerank():
    client = RESTfulClient(URL)
    name = next(name for name, model in client.list_models().items() if "rerank" in name)
    model = client.get_model(name)
    found = model.rerank(DOCUMENTS, QUERY, return_documents=True, return_len=True)
    ranked([(one["index"], one["relevance_score"]) for one in found["results"]])
    assert [one["document"]["text"] for one in found["results"]] == [DOCUMENTS[at] for at in ORDER]
    found = model.rerank(DOCUMENTS, QUERY, top_n=2)
    ranked([(one["index"], one["relevance_score"]) for one in found["results"]], top_n=2)


@check("xinference-client", "an unserved model is an error with its detail")
def unknown():
    return raises("RuntimeError", RESTfulClient(URL).get_model, UNSERVED)


def with_key(url, key):
    client = RESTfulClient(url, api_key=key)
    return client.get_model(next(name for name in client.list_models() if "rerank" in name)).rerank(DOCUMENTS, QUERY)


check_keys("xinference-client", "RuntimeError", with_key, wrong=["wrong", None])
