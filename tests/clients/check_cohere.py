"""Cohere's own SDK, both of its clients, against the gateway."""

import asyncio

import cohere
from checking import DOCUMENTS, KEY, ORDER, QUERY, UNSERVED, URL, check, check_keys, raises, ranked

NAME = f"cohere {cohere.__version__}" if hasattr(cohere, "__version__") else "cohere"
V2 = cohere.ClientV2(KEY, base_url=URL)
V1 = cohere.Client(KEY, base_url=URL)


def pairs(response):
    return [(one.index, one.relevance_score) for one in response.results]


@check(NAME, "ClientV2.rerank")
def v2():
    response = V2.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS)
    ranked(pairs(response))
    assert response.id
    assert response.meta.billed_units.search_units == 1


@check(NAME, "ClientV2.rerank top_n, max_tokens_per_doc")
def v2_options():
    response = V2.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=2, max_tokens_per_doc=400)
    ranked(pairs(response), top_n=2)


@check(NAME, "AsyncClientV2.rerank, 20 at once")
def v2_async():
    async def many():
        client = cohere.AsyncClientV2(KEY, base_url=URL)
        calls = [client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS) for _ in range(20)]
        return await asyncio.gather(*calls)

    for response in asyncio.run(many()):
        ranked(pairs(response))


@check(NAME, "Client.rerank v1, documents returned")
def v1():
    response = V1.rerank(model="rerank-english-v3.0", query=QUERY, documents=DOCUMENTS, return_documents=True)
    ranked(pairs(response))
    assert [one.document.text for one in response.results] == [DOCUMENTS[at] for at in ORDER]


@check(NAME, "Client.rerank v1, documents not returned")
def v1_without():
    response = V1.rerank(
        model="rerank-english-v3.0", query=QUERY, documents=DOCUMENTS, return_documents=False, max_chunks_per_doc=10
    )
    ranked(pairs(response))
    assert all(one.document is None for one in response.results)


@check(NAME, "Client.rerank v1, structured documents and rank_fields")
def v1_structured():
    documents = [{"text": text, "source": str(at)} for at, text in enumerate(DOCUMENTS)]
    response = V1.rerank(query=QUERY, documents=documents, rank_fields=["text"], return_documents=True)
    ranked(pairs(response))


@check(NAME, "base URL with /v1, or below /cohere")
def other_bases():
    for base in (f"{URL}/v1", f"{URL}/", f"{URL}/cohere"):
        ranked(pairs(cohere.ClientV2(KEY, base_url=base).rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS)))
        ranked(pairs(cohere.Client(KEY, base_url=base).rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS)))


@check(NAME, "an unserved model is a NotFoundError with its message")
def unknown_model():
    said = raises("NotFoundError", V2.rerank, model=UNSERVED, query=QUERY, documents=DOCUMENTS)
    assert UNSERVED in said, said
    return said


@check(NAME, "a blank query is an UnprocessableEntityError")
def blank():
    return raises("UnprocessableEntityError", V2.rerank, model="rerank-v3.5", query=" ", documents=DOCUMENTS)


for name, make in {"ClientV2": cohere.ClientV2, "Client": cohere.Client}.items():

    def with_key(url, key, make=make):
        return make(key, base_url=url).rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS)

    check_keys(f"{NAME} {name}", "UnauthorizedError", with_key)
