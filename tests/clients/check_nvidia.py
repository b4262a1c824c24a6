"""What speaks to NVIDIA's ranking: LangChain's compressor, Haystack's ranker, LlamaIndex's postprocessor."""

from checking import DOCUMENTS, KEY, ORDER, QUERY, URL, check, check_keys, ranked_texts
from haystack import Document as HaystackDocument
from haystack.utils import Secret
from haystack_integrations.components.rankers.nvidia import NvidiaRanker
from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIARerank
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.nvidia_rerank import NVIDIARerank as LlamaIndexNVIDIARerank

for base in ("/v1", "/nvidia/v1"):

    @check("langchain NVIDIARerank", f"compress_documents at {base}")
    def compress(base=base):
        ranker = NVIDIARerank(
            base_url=URL + base, api_key=KEY, model="nvidia/llama-3.2-nv-rerankqa-1b-v2", top_n=3, truncate="END"
        )
        found = ranker.compress_documents([Document(text) for text in DOCUMENTS], QUERY)
        ranked_texts([one.page_content for one in found], top_n=3)
        # Logits.
        assert found[0].metadata["relevance_score"] > found[-1].metadata["relevance_score"]


@check("haystack NvidiaRanker", "run")
def run():
    ranker = NvidiaRanker(api_url=f"{URL}/v1", api_key=Secret.from_token(KEY), top_k=3)
    ranker.warm_up()
    found = ranker.run(query=QUERY, documents=[HaystackDocument(content=text) for text in DOCUMENTS])["documents"]
    ranked_texts([one.content for one in found], top_n=3)


@check("llama-index nvidia", "postprocess_nodes")
def postprocess():
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(at)), score=0.5) for at, text in enumerate(DOCUMENTS)]
    ranker = LlamaIndexNVIDIARerank(base_url=f"{URL}/v1", api_key=KEY, top_n=3)
    assert [int(one.node.node_id) for one in ranker.postprocess_nodes(nodes, query_str=QUERY)] == ORDER[:3]


def langchain_with_key(url, key):
    ranker = NVIDIARerank(base_url=f"{url}/v1", api_key=key, model="nvidia/llama-3.2-nv-rerankqa-1b-v2")
    return ranker.compress_documents([Document(text) for text in DOCUMENTS], QUERY)


def haystack_with_key(url, key):
    ranker = NvidiaRanker(api_url=f"{url}/v1", api_key=Secret.from_token(key))
    ranker.warm_up()
    return ranker.run(query=QUERY, documents=[HaystackDocument(content=text) for text in DOCUMENTS])


def llama_index_with_key(url, key):
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in DOCUMENTS]
    return LlamaIndexNVIDIARerank(base_url=f"{url}/v1", api_key=key).postprocess_nodes(nodes, query_str=QUERY)


check_keys("langchain NVIDIARerank", "Exception", langchain_with_key)
check_keys("haystack NvidiaRanker", "ValueError", haystack_with_key)
check_keys("llama-index nvidia", "HTTPError", llama_index_with_key)
