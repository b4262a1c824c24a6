"""Mixedbread's SDK, and LlamaIndex's postprocessor over it, against the gateway."""

from checking import DOCUMENTS, KEY, ORDER, QUERY, UNSERVED, URL, check, check_keys, raises, ranked
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.mixedbreadai_rerank import MixedbreadAIRerank
from mixedbread import Mixedbread

for base in ("", "/mixedbread"):
    CLIENT = Mixedbread(api_key=KEY, base_url=URL + base, max_retries=0)

    @check("mixedbread", f"rerank at {base or '/'}")
    def rerank(client=CLIENT):
        found = client.rerank(query=QUERY, input=DOCUMENTS, return_input=True)
        ranked([(one.index, one.score) for one in found.data])
        assert [one.input for one in found.data] == [DOCUMENTS[at] for at in ORDER]
        found = client.rerank(query=QUERY, input=[{"t": text} for text in DOCUMENTS], rank_fields=["t"], top_k=2)
        assert len(found.data) == 2


@check("mixedbread", "an unserved model is a NotFoundError")
def unknown():
    return raises("NotFoundError", CLIENT.rerank, query=QUERY, input=DOCUMENTS, model=UNSERVED)


def with_key(url, key):
    return Mixedbread(api_key=key, base_url=url, max_retries=0).rerank(query=QUERY, input=DOCUMENTS)


check_keys("mixedbread", "AuthenticationError", with_key)


@check("llama-index mixedbread", "postprocess_nodes")
def postprocess():
    postprocessor = MixedbreadAIRerank(api_key=KEY, top_n=3)
    # It takes no base URL.
    postprocessor._client = CLIENT
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(at))) for at, text in enumerate(DOCUMENTS)]
    found = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    ranked([(one.node.node_id, one.score) for one in found], top_n=3)
