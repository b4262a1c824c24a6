"""LlamaIndex's postprocessors against the gateway."""

from checking import DOCUMENTS, KEY, ORDER, QUERY, SCORES, URL, check
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.siliconflow_rerank import SiliconFlowRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from llama_index.postprocessor.xinference_rerank import XinferenceRerank

MADE = {
    "tei": lambda: TextEmbeddingInference(base_url=URL, top_n=3),
    "tei below /tei": lambda: TextEmbeddingInference(base_url=f"{URL}/tei", top_n=3, auth_token=f"Bearer {KEY}"),
    "cohere": lambda: CohereRerank(base_url=URL, api_key=KEY, model="rerank-v3.5", top_n=3),
    "jinaai": lambda: JinaRerank(base_url=f"{URL}/v1", api_key=KEY, top_n=3),
    "xinference": lambda: XinferenceRerank(base_url=URL, model="default", top_n=3),
    "siliconflow": lambda: SiliconFlowRerank(base_url=f"{URL}/v1/rerank", api_key=KEY, model="default", top_n=3),
}

for name, make in MADE.items():

    @check(f"llama-index {name}", "postprocess_nodes")
    def postprocess(make=make):
        nodes = [NodeWithScore(node=TextNode(text=text, id_=str(at)), score=0.5) for at, text in enumerate(DOCUMENTS)]
        found = make().postprocess_nodes(nodes, query_str=QUERY)
        assert [int(one.node.node_id) for one in found] == ORDER[:3], found
        for one in found:
            assert abs(one.score - SCORES[int(one.node.node_id)]) < 1e-4
