"""Haystack's rankers against the gateway."""

from functools import partial

from checking import DOCUMENTS, KEY, ORDER, QUERY, SCORES, UNSERVED, URL, check, check_keys, raises
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from haystack_integrations.components.rankers.jina import JinaRanker

MADE = {
    "HuggingFaceTEIRanker": lambda url, key: HuggingFaceTEIRanker(url=url, top_k=3, token=key, max_retries=0),
    "JinaRanker": lambda url, key: JinaRanker(api_key=key, base_url=f"{url}/v1/rerank", top_k=3),
    "CohereRanker": lambda url, key: CohereRanker(api_key=key, api_base_url=url, top_k=3),
}
# What each raises where its key is refused.
REFUSED = {"HuggingFaceTEIRanker": "RuntimeError", "JinaRanker": "RuntimeError", "CohereRanker": "UnauthorizedError"}


def found_by(make, url, key):
    ranker = make(url, Secret.from_token(key))
    if hasattr(ranker, "warm_up"):
        ranker.warm_up()
    documents = [Document(content=text, meta={"at": at}) for at, text in enumerate(DOCUMENTS)]
    return ranker.run(query=QUERY, documents=documents)["documents"]


for name, make in MADE.items():

    @check(f"haystack {name}", "run")
    def run(make=make):
        found = found_by(make, URL, KEY)
        assert [one.meta["at"] for one in found] == ORDER[:3], found
        for one in found:
            assert abs(one.score - SCORES[one.meta["at"]]) < 1e-4

    check_keys(f"haystack {name}", REFUSED[name], partial(found_by, make))


@check("haystack JinaRanker", "an unserved model is an error with the message")
def unknown():
    ranker = JinaRanker(api_key=Secret.from_token(KEY), base_url=f"{URL}/v1/rerank", model=UNSERVED)
    if hasattr(ranker, "warm_up"):
        ranker.warm_up()
    return raises(Exception, ranker.run, query=QUERY, documents=[Document(content="a")])
