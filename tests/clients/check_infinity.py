"""Infinity's client, and the compressors of langchain-community, against the gateway."""

import langchain_community.document_compressors.jina_rerank as jina
from checking import DOCUMENTS, KEY, ORDER, QUERY, UNSERVED, URL, check, check_keys, ranked, ranked_texts
from infinity_client import Client
from infinity_client.api.default import models
from infinity_client.api.default import rerank as rerank_api
from infinity_client.models import RerankInput
from langchain_community.document_compressors.infinity_rerank import InfinityRerank
from langchain_core.documents import Document

CHUNKS = [Document(text) for text in DOCUMENTS]

for base in ("", "/infinity", "/v1"):

    @check("infinity_client", f"rerank at {base or '/'}")
    def rerank(base=base):
        body = RerankInput(query=QUERY, documents=DOCUMENTS, model="default", return_documents=True)
        response = rerank_api.sync(client=Client(base_url=URL + base), body=body)
        ranked([(one.index, one.relevance_score) for one in response.results])
        assert [one.document for one in response.results] == [DOCUMENTS[at] for at in ORDER]
        assert response.usage.total_tokens > 0


@check("infinity_client", "raw scores, top_n")
def raw():
    body = RerankInput(query=QUERY, documents=DOCUMENTS, model="default", raw_scores=True, top_n=2)
    response = rerank_api.sync(client=Client(base_url=URL), body=body)
    assert [one.index for one in response.results] == ORDER[:2]
    assert response.results[-1].relevance_score < 0 or response.results[0].relevance_score > 1


@check("infinity_client", "models")
def listed():
    found = models.sync(client=Client(base_url=f"{URL}/infinity"))
    assert any("rerank" in model.id for model in found.data)


@check("infinity_client", "an unserved model: 404")
def unknown():
    body = RerankInput(query=QUERY, documents=DOCUMENTS, model=UNSERVED)
    response = rerank_api.sync_detailed(client=Client(base_url=URL), body=body)
    assert response.status_code == 404, response


@check("langchain-community InfinityRerank", "compress_documents")
def infinity_rerank():
    compressor = InfinityRerank(client=Client(base_url=URL), model="default", top_n=3)
    ranked_texts([one.page_content for one in compressor.compress_documents(CHUNKS, QUERY)], top_n=3)


@check("langchain-community JinaRerank", "compress_documents")
def jina_rerank():
    jina.JINA_API_URL = f"{URL}/v1/rerank"
    compressor = jina.JinaRerank(jina_api_key=KEY, top_n=3)
    ranked_texts([one.page_content for one in compressor.compress_documents(CHUNKS, QUERY)], top_n=3)


def with_key(url, key):
    body = RerankInput(query=QUERY, documents=DOCUMENTS, model="default")
    return rerank_api.sync(client=client_with_key(url, key), body=body)


def client_with_key(url, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return Client(base_url=url, headers=headers, raise_on_unexpected_status=True)


check_keys("infinity_client", "UnexpectedStatus", with_key, wrong=["wrong", None])


def compressed_with_key(url, key):
    return InfinityRerank(client=client_with_key(url, key), model="default").compress_documents(CHUNKS, QUERY)


check_keys("langchain-community InfinityRerank", "UnexpectedStatus", compressed_with_key, wrong=["wrong", None])


def jina_with_key(url, key):
    jina.JINA_API_URL = f"{url}/v1/rerank"
    return jina.JinaRerank(jina_api_key=key).compress_documents(CHUNKS, QUERY)


check_keys("langchain-community JinaRerank", "RuntimeError", jina_with_key)
