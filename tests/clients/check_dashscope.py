"""DashScope's SDK, and LangChain's compressor over it, against the gateway."""

import dashscope
from checking import DOCUMENTS, KEY, LOCKED_URL, ORDER, QUERY, UNSERVED, URL, check, ranked, ranked_texts
from langchain_community.document_compressors.dashscope_rerank import DashScopeRerank
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.dashscope_rerank import DashScopeRerank as LlamaIndexDashScopeRerank

for base in ("/api/v1", "/dashscope/api/v1"):

    @check("dashscope TextReRank", f"call at {base}")
    def call(base=base):
        dashscope.base_http_api_url = URL + base
        found = dashscope.TextReRank.call(
            api_key=KEY, model="gte-rerank-v2", query=QUERY, documents=DOCUMENTS, return_documents=True
        )
        assert found.status_code == 200, found
        ranked([(one.index, one.relevance_score) for one in found.output.results])
        assert [one["document"]["text"] for one in found.output.results] == [DOCUMENTS[at] for at in ORDER]
        assert found.usage.total_tokens > 0
        assert found.request_id


@check("dashscope TextReRank", "an unserved model: 404 with its message")
def unknown():
    dashscope.base_http_api_url = f"{URL}/api/v1"
    found = dashscope.TextReRank.call(api_key=KEY, model=UNSERVED, query=QUERY, documents=DOCUMENTS)
    assert found.status_code == 404, found
    assert UNSERVED in found.message, found
    return found.message


@check("langchain-community DashScopeRerank", "compress_documents")
def compress():
    dashscope.base_http_api_url = f"{URL}/api/v1"
    compressor = DashScopeRerank(dashscope_api_key=KEY, model="gte-rerank-v2", top_n=3)
    found = compressor.compress_documents([Document(text) for text in DOCUMENTS], QUERY)
    ranked_texts([one.page_content for one in found], top_n=3)


@check("llama-index dashscope", "postprocess_nodes")
def postprocess():
    dashscope.base_http_api_url = f"{URL}/api/v1"
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(at)), score=0.5) for at, text in enumerate(DOCUMENTS)]
    found = LlamaIndexDashScopeRerank(top_n=3, api_key=KEY).postprocess_nodes(nodes, query_str=QUERY)
    ranked([(one.node.node_id, one.score) for one in found], top_n=3)


@check("dashscope TextReRank", "a wrong key: 401 with its message")
def wrong_key():
    dashscope.base_http_api_url = f"{LOCKED_URL}/api/v1"
    named = {"model": "gte-rerank-v2", "query": QUERY, "documents": DOCUMENTS}
    assert dashscope.TextReRank.call(api_key=KEY, **named).status_code == 200
    found = dashscope.TextReRank.call(api_key="wrong", **named)
    assert found.status_code == 401, found
    assert "key" in found.message, found
    return f"{found.code}: {found.message}"
