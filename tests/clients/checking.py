"""What the checks share. Runs in the environments of the clients: it imports none of ours, and nothing that they lack.

``run.py`` sets ``GATEWAY_URL``, and ``GATEWAY_SCORES``: the score of each document, as the gateway gave them to a plain
request. Each check prints a line of JSON.
"""

import json
import os
import sys
import traceback

URL = os.environ["GATEWAY_URL"]
SCORES = json.loads(os.environ["GATEWAY_SCORES"])
# A second gateway, which refuses callers without this key.
LOCKED_URL, KEY = os.environ["GATEWAY_LOCKED_URL"], os.environ["GATEWAY_KEY"]
UNSERVED = "BAAI/bge-reranker-v2-m3"

QUERY = "why do tides rise and fall?"
DOCUMENTS = [
    "Bread rises because yeast makes gas.",
    "Tides rise and fall because the moon's gravity pulls the sea.",
    "The stock market fell on Monday.",
    "The harbour's depth at low water is two metres, and six when the sea is high.",
]
ORDER = sorted(range(len(DOCUMENTS)), key=lambda at: -SCORES[at])


def check(client, what):
    """Run a function at once; print whether it went through, and what it said if not."""

    def run(function):
        try:
            said = function()
            line = {"client": client, "what": what, "ok": True, "said": (said or "")[-100:]}
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            line = {"client": client, "what": what, "ok": False, "said": f"{type(error).__name__}: {error}"[:300]}
        print("CHECK", json.dumps(line), flush=True)
        return function

    return run


def check_keys(client, expected, call, *, wrong=("wrong",)):
    """Check that a call with the right key is let in, and that others fail by the client's own error; what it says.

    Args:
        client: its name.
        expected: the error's type, or the name of it or of a type that it is made of.
        call: takes the gateway's URL and a key.
        wrong: the keys to be refused; None: none at all, of clients that can do without.
    """

    @check(client, f"a wrong key is {expected}, the right one is let in")
    def keys():
        assert call(LOCKED_URL, KEY) is not None
        said = [raises(expected, call, LOCKED_URL, key) for key in wrong]
        return said[0]


def ranked(results, *, top_n=None):
    """Assert that (index, score) pairs are the ranking that the gateway gave."""
    found = [(int(index), float(score)) for index, score in results]
    expected = ORDER[:top_n]
    assert [index for index, _ in found] == expected, f"order {found}, expected {expected}"
    for index, score in found:
        assert abs(score - SCORES[index]) < 1e-4, f"score {score} of document {index}, expected {SCORES[index]}"


def ranked_texts(texts, *, top_n=None):
    """Assert that texts come in the ranking's order."""
    assert list(texts) == [DOCUMENTS[at] for at in ORDER[:top_n]], texts


def raises(expected, call, *args, **named):
    """Assert that a call fails with an error of a type, or of a type with that name; answer its text."""
    try:
        call(*args, **named)
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        wanted = expected if isinstance(expected, str) else expected.__name__
        if wanted not in names:
            raise
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"no error; expected {expected}")
