"""Mixedbread's SDK against the gateway."""

from checking import DOCUMENTS, KEY, ORDER, QUERY, UNSERVED, URL, check, check_keys, raises, ranked
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
