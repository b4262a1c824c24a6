import resource

import pytest

from rerankq.rescoring.inputs import InputFault
from rerankq.rescoring.journal import Answer, Journal, has_answers
from rerankq.rescoring.output import WriteFailed

HEADER = {"journal": "rerankq rescore 2", "depth": 100}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.part"


def answer(query, weights="w"):
    rows = [("d1", 0.25, -1.5), ("d2", 0.1, None)]
    return Answer(query, rows, "model", weights, pairs=2, cached_pairs=1, missing=("vector",))


def fill(path, *queries):
    with Journal.open(path, HEADER) as journal:
        for query in queries:
            journal.append(answer(query))


def test_answers_are_read_back_as_they_were_written(path):
    with Journal.open(path, HEADER) as journal:
        journal.append(answer("q1"))
        journal.append(answer("ä\n\u2028 q2"))
        assert journal.answer("q1") == answer("q1")
        assert journal.answer("ä\n\u2028 q2") == answer("ä\n\u2028 q2")
        journal.append(answer("q3"))
    with Journal.open(path, HEADER) as journal:
        assert journal.queries == {"q1", "ä\n\u2028 q2", "q3"}
        assert journal.answer("q3") == answer("q3")


def test_journal_without_answers_is_removed(path):
    fill(path)
    assert not path.exists()
    fill(path, "q1")
    fill(path)
    assert path.exists(), "an earlier start's answers are in it"


def test_journal_cut_at_any_byte_resumes_with_the_complete_answers(path):
    fill(path, "q1", "q2")
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with Journal.open(path, HEADER) as journal:
            assert len(journal.queries) == sum(end <= cut for end in ends[1:])
            for query in sorted({"q1", "q2"} - journal.queries):
                journal.append(answer(query))
        assert path.read_bytes() == whole


def test_changed_options_are_refused_and_named(path):
    fill(path, "q1")
    with pytest.raises(InputFault, match=r"started with another depth \(100 before, 50 now\); add --restart"):
        Journal.open(path, {**HEADER, "depth": 50})


def test_changed_options_are_accepted_by_a_journal_without_answers(path):
    fill(path)
    with Journal.open(path, {**HEADER, "depth": 50}) as journal:
        journal.append(answer("q1"))
    with Journal.open(path, {**HEADER, "depth": 50}) as journal:
        assert journal.queries == {"q1"}


def test_restart_discards_earlier_answers(path):
    fill(path, "q1")
    with Journal.open(path, {**HEADER, "depth": 50}, restart=True) as journal:
        assert journal.queries == set()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("content", [b"something else\n", b"{}\n{}\n", b"\xff\n", b"no end of a line"])
def test_file_that_is_no_journal_is_left_unchanged(path, content, restart):
    path.write_bytes(content)
    with pytest.raises(InputFault, match="not the journal of a re-scoring"):
        Journal.open(path, HEADER, restart=restart)
    assert path.read_bytes() == content


def test_journal_of_another_version_is_refused_and_restarted_on_request(path):
    path.write_text('{"journal": "rerankq rescore 1", "depth": 100}\n{"query": "q1"}\n')
    with pytest.raises(InputFault, match=r"started with another journal \(rerankq rescore 1 before"):
        Journal.open(path, HEADER)
    with Journal.open(path, HEADER, restart=True) as journal:
        assert journal.queries == set()


def test_has_answers_leaves_the_file_unchanged(path):
    assert not has_answers(path, HEADER)
    with Journal.open(path, HEADER) as journal:
        assert not has_answers(path, HEADER), "nothing is done yet"
        journal.append(answer("q1"))
        assert has_answers(path, HEADER)
        assert journal.model == ("model", "w")
    assert not has_answers(path, {**HEADER, "depth": 50})


def test_answer_without_space_is_refused_and_earlier_ones_are_kept(path):
    with Journal.open(path, HEADER) as journal:
        journal.append(answer("q1"))
        size = path.stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        try:
            with pytest.raises(WriteFailed, match=r"out.part: cannot be written"):
                journal.append(answer("q2"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.stat().st_size == size
        assert journal.queries == {"q1"}
        journal.append(answer("q2"))
    with Journal.open(path, HEADER) as journal:
        assert journal.queries == {"q1", "q2"}


def test_journal_that_cannot_be_started_for_want_of_space_is_an_input_fault(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(InputFault, match=r"out.part: cannot be written: File too large"):
            Journal.open(path, HEADER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_two_processes_cannot_write_one_output(path):
    with Journal.open(path, HEADER), pytest.raises(InputFault, match="another process"):
        Journal.open(path, HEADER)


def test_answers_of_other_weights_are_refused(path):
    fill(path, "q1")
    with Journal.open(path, HEADER) as journal, pytest.raises(InputFault, match="weights have changed"):
        journal.append(answer("q2", weights="other"))
    with Journal.open(path, HEADER) as journal:
        assert journal.queries == {"q1"}


def test_unwritable_path_is_reported(tmp_path):
    with pytest.raises(InputFault, match="cannot be written"):
        Journal.open(tmp_path / "nowhere" / "out.part", HEADER)
