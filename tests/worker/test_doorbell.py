"""Doorbells: what the client sends is let in, and nothing else, whatever it is."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankq_worker.doorbell import LARGEST, LONGEST_ID, LONGEST_SHOWN, NoDoorbell, headers_of, sized

HEADERS = {"task": "rerankq.rerank", "id": "a", "lang": "py", "eta": None, "expires": None}
REST = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=8), parts, max_size=4),
)


def test_the_messages_of_the_client_are_doorbells():
    kept = headers_of(HEADERS, [["an-id"], {}, REST])
    assert kept == {
        "task": "rerankq.rerank", "id": "a", "root_id": "a", "lang": "py", "argsrepr": "an-id", "kwargsrepr": "{}",
    }  # fmt: skip
    assert (
        headers_of(HEADERS | {"argsrepr": '"why tides?" 2 chunks'}, [["x"], {}, REST])["argsrepr"]
        == '"why tides?" 2 chunks'
    )


@pytest.mark.parametrize("job_id", ["a" * LONGEST_ID, "a b", "月"])
def test_ids_of_128_characters_are_accepted(job_id: str):
    assert headers_of(HEADERS | {"id": job_id}, [[job_id], {}, REST])["id"] == job_id
    assert LONGEST_ID == 128, "as the contract says"


@pytest.mark.parametrize("shown", ["x" * LONGEST_SHOWN, "x" * (LONGEST_SHOWN + 1), "x" * 60_000])
def test_the_label_of_a_doorbell_is_cut_to_512_characters(shown: str):
    assert headers_of(HEADERS | {"argsrepr": shown}, [["a"], {}, REST])["argsrepr"] == "x" * LONGEST_SHOWN


@pytest.mark.parametrize("name", ["eta", "expires", "timelimit", "retries", "stamps", "group", "shadow"])
def test_headers_that_celery_would_obey_are_left_out(name: str):
    assert name not in headers_of(HEADERS | {name: "soon"}, [["an-id"], {}, REST])


@pytest.mark.parametrize(
    ("headers", "payload"),
    [
        (HEADERS | {"task": "os.system"}, [["a"], {}, REST]),
        (HEADERS | {"id": ["a"]}, [["a"], {}, REST]),
        (HEADERS, [[3], {}, REST]),
        (HEADERS, [["a", "b"], {}, REST]),
        (HEADERS, [["a" * 129], {}, REST]),
        (HEADERS, [["a\nb"], {}, REST]),
        (HEADERS, [["a"], {"more": 1}, REST]),
        (HEADERS, [["a"], [], REST]),
        (HEADERS, [["a"], None, REST]),
        (HEADERS, [["a"], {}, REST, REST]),
        (HEADERS, [["a"], {}, REST | {"chain": [{"task": "rerankq.rerank"}]}]),
    ],
)
def test_near_miss_messages_are_rejected(headers: object, payload: object):
    with pytest.raises(NoDoorbell):
        headers_of(headers, payload)


@settings(deadline=None)
@given(
    headers=anything | st.builds(lambda more: HEADERS | more, st.dictionaries(st.text(), anything)), payload=anything
)
def test_any_message_is_a_doorbell_or_is_rejected_as_none(headers: object, payload: object):
    with suppress(NoDoorbell):  # and nothing else is raised
        headers_of(headers, payload)
        assert isinstance(payload[0][0], str), "it is one after all"


def test_messages_over_64_kib_are_rejected_by_their_size():
    sized(b"x" * LARGEST)
    with pytest.raises(NoDoorbell, match=f"larger than {LARGEST} bytes"):
        sized(b"x" * (LARGEST + 1))
