"""Haystack's rankers against the gateway."""

from checking import DOCUMENTS, KEY, ORDER, QUERY, SCORES, UNSERVED, URL, check, raises
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from haystack_integrations.components.rankers.jina import JinaRanker

TOKEN = Secret.from_token(KEY)
MADE = {
    "HuggingFaceTEIRanker": lambda: HuggingFaceTEIRanker(url=URL, top_k=3, token=TOKEN),
    "JinaRanker": lambda: JinaRanker(api_key=TOKEN, base_url=f"{URL}/v1/rerank", top_k=3),
    "CohereRanker": lambda: CohereRanker(api_key=TOKEN, api_base_url=URL, top_k=3),
}

for name, make in MADE.items():

    @check(f"haystack {name}", "run")
    def run(make=make):
        ranker = make()
        if hasattr(ranker, "warm_up"):
            ranker.warm_up()
        documents = [Document(content=text, meta={"at": at}) for at, text in enumerate(DOCUMENTS)]
        found = ranker.run(query=QUERY, documents=documents)["documents"]
        assert [one.meta["at"] for one in found] == ORDER[:3], found
        for one in found:
            assert abs(one.score - SCORES[one.meta["at"]]) < 1e-4


@check("haystack JinaRanker", "an unserved model is an error with the message")
def unknown():
    ranker = JinaRanker(api_key=TOKEN, base_url=f"{URL}/v1/rerank", model=UNSERVED)
    if hasattr(ranker, "warm_up"):
        ranker.warm_up()
    return raises(Exception, ranker.run, query=QUERY, documents=[Document(content="a")])
