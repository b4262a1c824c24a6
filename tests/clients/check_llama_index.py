"""LlamaIndex's postprocessors against the gateway."""

from checking import DOCUMENTS, KEY, ORDER, QUERY, SCORES, URL, check, check_keys
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.siliconflow_rerank import SiliconFlowRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from llama_index.postprocessor.xinference_rerank import XinferenceRerank

MADE = {
    "tei": lambda url, key: TextEmbeddingInference(base_url=url, top_n=3, auth_token=f"Bearer {key}"),
    "tei below /tei": lambda url, key: TextEmbeddingInference(base_url=f"{url}/tei", top_n=3, auth_token=key),
    "cohere": lambda url, key: CohereRerank(base_url=url, api_key=key, model="rerank-v3.5", top_n=3, max_retries=0),
    "jinaai": lambda url, key: JinaRerank(base_url=f"{url}/v1", api_key=key, top_n=3),
    "siliconflow": lambda url, key: SiliconFlowRerank(
        base_url=f"{url}/v1/rerank", api_key=key, model="default", top_n=3
    ),
}
# What each raises where its key is refused: the one of TEI looks at no status, and counts what it got.
REFUSED = {"cohere": "UnauthorizedError", "tei": "AssertionError", "tei below /tei": "AssertionError"}


def nodes():
    return [NodeWithScore(node=TextNode(text=text, id_=str(at)), score=0.5) for at, text in enumerate(DOCUMENTS)]


def agrees(postprocessor):
    found = postprocessor.postprocess_nodes(nodes(), query_str=QUERY)
    assert [int(one.node.node_id) for one in found] == ORDER[:3], found
    for one in found:
        assert abs(one.score - SCORES[int(one.node.node_id)]) < 1e-4


@check("llama-index xinference", "postprocess_nodes")
def xinference():
    # It sends no key.
    agrees(XinferenceRerank(base_url=URL, model="default", top_n=3))


for name, make in MADE.items():

    @check(f"llama-index {name}", "postprocess_nodes")
    def postprocess(make=make):
        agrees(make(URL, KEY))

    def with_key(url, key, make=make):
        return make(url, key).postprocess_nodes(nodes(), query_str=QUERY)

    check_keys(f"llama-index {name}", REFUSED.get(name, "RuntimeError"), with_key)
