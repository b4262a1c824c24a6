"""LlamaIndex's Voyage postprocessor against the gateway."""

import voyageai
from checking import DOCUMENTS, KEY, QUERY, URL, check, check_keys, ranked
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.voyageai_rerank import VoyageAIRerank


@check("llama-index voyageai", "postprocess_nodes")
def postprocess():
    ranker = VoyageAIRerank(model="rerank-2.5", api_key=KEY, top_n=3)
    # It takes no base URL.
    ranker._client = voyageai.Client(api_key=KEY, base_url=f"{URL}/v1")
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(at)), score=0.5) for at, text in enumerate(DOCUMENTS)]
    found = ranker.postprocess_nodes(nodes, query_str=QUERY)
    ranked([(one.node.node_id, one.score) for one in found], top_n=3)


def with_key(url, key):
    ranker = VoyageAIRerank(model="rerank-2.5", api_key=key)
    ranker._client = voyageai.Client(api_key=key, base_url=f"{url}/v1", max_retries=0)
    return ranker.postprocess_nodes([NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS], query_str=QUERY)


check_keys("llama-index voyageai", "AuthenticationError", with_key)
