"""Voyage's SDK against the gateway."""

import voyageai
from checking import DOCUMENTS, KEY, ORDER, QUERY, UNSERVED, URL, check, raises, ranked, ranked_texts
from langchain_core.documents import Document
from langchain_voyageai import VoyageAIRerank
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.voyageai_rerank import VoyageAIRerank as LlamaIndexVoyageAIRerank

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


@check("langchain-voyageai VoyageAIRerank", "compress_documents")
def compress():
    ranker = VoyageAIRerank(model="rerank-2.5", api_key=KEY, base_url=f"{URL}/v1", top_k=3)
    found = ranker.compress_documents([Document(page_content=text) for text in DOCUMENTS], QUERY)
    ranked_texts([one.page_content for one in found], top_n=3)


@check("llama-index voyageai", "postprocess_nodes")
def postprocess():
    ranker = LlamaIndexVoyageAIRerank(model="rerank-2.5", api_key=KEY, top_n=3)
    # It takes no base URL.
    ranker._client = voyageai.Client(api_key=KEY, base_url=f"{URL}/v1")
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(at)), score=0.5) for at, text in enumerate(DOCUMENTS)]
    found = ranker.postprocess_nodes(nodes, query_str=QUERY)
    ranked([(one.node.node_id, one.score) for one in found], top_n=3)
